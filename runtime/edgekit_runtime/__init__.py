"""Runs EdgeKit bundles: standard library, numpy and one engine, nothing else.

>>> from edgekit_runtime import load
>>> session = load("model.edgekit")            # doctest: +SKIP
>>> session.run({"x": x})                      # doctest: +SKIP
{'y': array(...)}
"""

from __future__ import annotations

from .errors import (
    BundleError,
    EdgeKitError,
    EngineError,
    EngineMissingError,
    InputError,
    LimitError,
    ModelError,
    UsageError,
)
from .manifest import Manifest, TensorSpec
from .session import Bound, Session, load

__version__ = "0.1.0"

__all__ = [
    "Bound",
    "BundleError",
    "EdgeKitError",
    "EngineError",
    "EngineMissingError",
    "InputError",
    "LimitError",
    "Manifest",
    "ModelError",
    "Session",
    "TensorSpec",
    "UsageError",
    "load",
]
