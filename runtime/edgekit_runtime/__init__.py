"""Runs EdgeKit bundles: standard library, numpy and one engine, nothing else.

>>> from edgekit_runtime import load
>>> session = load("model.edgekit")            # doctest: +SKIP
>>> session.run({"x": x})                      # doctest: +SKIP
{'y': array(...)}
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    BundleError,
    ClosedError,
    EdgeKitError,
    EngineCrashed,
    EngineError,
    EngineMissingError,
    EngineTooOldError,
    GuardError,
    InputError,
    LimitError,
    LowMemoryError,
    ModelError,
    QueueFullError,
    UsageError,
    WrongDeviceError,
)
from .loading import load, open_installed
from .manifest import Manifest, TensorSpec
from .session import Bound, Session
from .source import FallbackWarning

if TYPE_CHECKING:
    from .guard import GuardWarning
    from .stream import Stream

__version__ = "0.1.0"

__all__ = [
    "Bound",
    "BundleError",
    "ClosedError",
    "EdgeKitError",
    "EngineCrashed",
    "EngineError",
    "EngineMissingError",
    "EngineTooOldError",
    "FallbackWarning",
    "GuardError",
    "GuardWarning",
    "InputError",
    "LimitError",
    "LowMemoryError",
    "Manifest",
    "ModelError",
    "QueueFullError",
    "Session",
    "Stream",
    "TensorSpec",
    "UsageError",
    "WrongDeviceError",
    "load",
    "open_installed",
]


def __getattr__(name: str) -> type:
    """What few programs name is imported when they do."""
    if name == "Stream":
        from .stream import Stream

        return Stream
    if name == "GuardWarning":
        from .guard import GuardWarning

        return GuardWarning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
