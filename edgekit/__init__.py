"""Fit a trained model to a device: convert, quantize, measure, choose, bundle.

The same words as on the command line: `edgekit optimize` is `edgekit.optimize.optimize`.
Importing this package imports nothing heavy.
"""

from edgekit_runtime import __version__

__all__ = ["__version__"]
