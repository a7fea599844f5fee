"""Fit a trained model to a device: convert, quantize, measure, choose, bundle.

The same words as on the command line: `edgekit optimize` is `edgekit.optimize.optimize`.
Importing this package imports nothing heavy.
"""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
    from edgekit_runtime import __version__  # imports numpy: not for `edgekit --help`

    return __version__
