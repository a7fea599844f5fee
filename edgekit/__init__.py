"""Fit a trained model to a device: convert, quantize, measure, choose, bundle.

The same words as on the command line: `edgekit optimize` is `edgekit.optimize.optimize`.
Importing this package imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekit.exporting import export as export
    from edgekit_runtime import __version__ as __version__

__all__ = ["__version__", "export"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from edgekit_runtime import __version__  # imports numpy: not for `edgekit --help`

        return __version__
    if name == "export":
        from edgekit.exporting import export

        return export
    raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
