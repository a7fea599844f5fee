"""SavedModel to quantized TFLite, by TensorFlow's converter: it quantizes on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.scheme import Scheme
from edgekit.errors import ModelError, require
from edgekit.graph import read_graph
from edgekit.precision import quantized_already

__all__ = ["quantize_savedmodel"]

_EXTRA = "tensorflow"


def quantize_savedmodel(
    source: list[str], target: str, scheme: dict[str, Any], calibration: dict[str, Any] | None
) -> dict[str, Any]:
    """Write the TFLite model, its inputs and outputs float and called as the plain conversion calls
    them. Runs in a child process.

    Ranges are least and greatest value seen. Operators without integer kernels stay float. The
    converter leaves matrices of fewer than 1,024 weights float where activations are.

    Returns facts: `signature` and `notes` of the conversion.

    Raises:
        ModelError: an operator is not among TFLite's, or nothing was quantized.
    """
    converters = require("edgekit_converters.savedmodel", extra=_EXTRA)
    wanted = Scheme.from_json(scheme)
    static = wanted.kind in ("int8-static", "int16x8")
    samples = CalibrationSamples(calibration) if static else None

    def configure(tf: Any, converter: Any) -> None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if wanted.kind == "fp16":
            converter.target_spec.supported_types = [tf.float16]
        if wanted.kind == "int16x8":
            sets = tf.lite.OpsSet
            converter.target_spec.supported_ops = [
                sets.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
                sets.TFLITE_BUILTINS,
            ]
        if samples is not None:
            converter.representative_dataset = lambda: _fed(samples)
        converter._experimental_disable_per_channel = not wanted.per_channel

    made, frozen = converters.tflite_of(source[0], {}, Path(target).parent, configure)
    Path(target).write_bytes(made)
    graph = read_graph(Path(target))
    half = wanted.kind == "fp16" and any(t.dtype == "float16" for t in graph.tensors.values())
    if not half and not quantized_already(graph):
        raise ModelError("nothing was quantized: no operator the scheme covers")
    facts: dict[str, Any] = frozen.facts()
    return facts


def _fed(samples: CalibrationSamples) -> Iterator[tuple[str, dict[str, Any]]]:
    """The samples as the converter wants them: for which signature, then arrays by input."""
    for sample in samples:
        yield "serving_default", dict(sample)
