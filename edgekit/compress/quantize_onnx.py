"""ONNX by onnxruntime.quantization: QDQ, MinMax calibration."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.scheme import Scheme
from edgekit.errors import ModelError, one_line, require

__all__ = ["quantize_onnx"]

_COMPUTE = ["Conv", "MatMul", "Gemm"]
_PER_CHANNEL_OPSET = 13  # DequantizeLinear takes an axis from opset 13 on


def quantize_onnx(
    source: list[str], target: str, scheme: dict[str, Any], data: dict[str, str], indices: str
) -> None:
    """Write the quantized model. Runs in a child process.

    Raises:
        ModelError: the quantizer refuses the model; or nothing in it can be quantized.
    """
    require("onnx", extra="onnx")
    tools = require("onnxruntime.quantization", extra="onnx")
    wanted = Scheme(**scheme)
    settings: dict[str, Any] = {
        "weight_type": tools.QuantType.QInt8,
        "per_channel": wanted.per_channel,
        "reduce_range": wanted.reduce_range,
        "op_types_to_quantize": None if wanted.operators == "all" else _COMPUTE,
    }
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        _prepare(source[0], prepared)
        try:
            if wanted.kind == "int8-dynamic":
                tools.quantize_dynamic(prepared, target, **settings)
            else:
                samples = iter(CalibrationSamples(source[0], data, indices))
                tools.quantize_static(
                    prepared, target, _reader(tools, samples),
                    activation_type=tools.QuantType.QInt8
                    if wanted.activations == "int8"
                    else tools.QuantType.QUInt8,
                    extra_options={"ActivationSymmetric": wanted.symmetric},
                    calibrate_method=tools.CalibrationMethod.MinMax,
                    quant_format=tools.QuantFormat.QDQ,
                    **settings,
                )  # fmt: skip
        except OSError:
            raise
        except Exception as error:
            raise ModelError(f"onnxruntime's quantizer fails: {one_line(error)}") from error
    _require_int8(target)


def _reader(tools: Any, samples: Any) -> Any:
    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def get_next(self) -> Any:
            return next(samples, None)

    return Reader()


def _prepare(source: str, target: str) -> None:
    """Weights in Constant nodes become initializers, old opsets are upgraded.

    As shipped, such models give an invalid QDQ graph (per-channel DequantizeLinear below opset
    13) or are not quantized at all.
    """
    import onnx
    from onnx import numpy_helper, version_converter

    model = onnx.load(source)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _PER_CHANNEL_OPSET:
        try:
            model = version_converter.convert_version(model, _PER_CHANNEL_OPSET)
        except Exception as error:
            raise ModelError(
                f"opset {opset} cannot be upgraded to {_PER_CHANNEL_OPSET}: {one_line(error)}"
            ) from error
    kept = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type != "Constant" or value is None:
            kept.append(node)
            continue
        value.name = node.output[0]
        # Data may be in any of the typed fields; the quantizer wants it raw.
        model.graph.initializer.append(
            numpy_helper.from_array(np.asarray(numpy_helper.to_array(value)), value.name)
        )
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.save(model, target)


def _require_int8(target: str) -> None:
    import onnx

    types = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    if not any(t.data_type in types and t.dims for t in onnx.load(target).graph.initializer):
        raise ModelError(
            "nothing was quantized: no operator the scheme covers has constant weights"
        )
