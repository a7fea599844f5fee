"""OpenVINO IR by NNCF: static from calibration, or int8 weights with dynamic activations."""

from __future__ import annotations

from typing import Any

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.scheme import Scheme
from edgekit.errors import ModelError, one_line, require

__all__ = ["quantize_openvino"]

_COMPUTE = {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"}
_STRUCTURE = {"Parameter", "Constant", "Result", "Convert"}


def quantize_openvino(
    source: list[str], target: str, scheme: dict[str, Any], data: dict[str, str], indices: str
) -> None:
    """Write the quantized IR. Runs in a child process.

    `int8-dynamic` stores weights in int8; the CPU plug-in then quantizes activations at run time
    where it has kernels for that, and computes in float elsewhere.

    Raises:
        ModelError: NNCF refuses the model.
    """
    ov = require("openvino", extra="openvino")
    nncf = require("nncf", extra="openvino")
    wanted = Scheme(**scheme)
    model = ov.Core().read_model(source[0])
    try:
        if wanted.kind == "int8-dynamic":
            done = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            done = _static(ov, nncf, model, wanted, CalibrationSamples(source[0], data, indices))
    except Exception as error:
        raise ModelError(f"NNCF cannot quantize the model: {one_line(error)}") from error
    kinds = {op.get_type_name() for op in done.get_ops()}
    weights = any(
        op.get_type_name() == "Constant" and op.get_element_type() in (ov.Type.i8, ov.Type.u8)
        for op in done.get_ops()
    )
    if not weights and "FakeQuantize" not in kinds:
        raise ModelError("nothing was quantized: no operator the scheme covers")
    ov.save_model(done, target, compress_to_fp16=False)


def _static(ov: Any, nncf: Any, model: Any, scheme: Scheme, samples: Any) -> Any:
    quantization = nncf.quantization.advanced_parameters
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=quantization.OverflowFix.ENABLE
        if scheme.reduce_range
        else quantization.OverflowFix.DISABLE,
        weights_quantization_params=quantization.QuantizationParameters(
            per_channel=scheme.per_channel
        ),
        activations_quantization_params=quantization.QuantizationParameters(
            mode=nncf.common.quantization.structs.QuantizationScheme.SYMMETRIC
            if scheme.symmetric
            else None
        ),
    )
    ignored = None
    if scheme.operators != "all":
        kinds = {op.get_type_name() for op in model.get_ops()} - _COMPUTE - _STRUCTURE
        ignored = nncf.IgnoredScope(types=sorted(kinds), validate=False)
    return nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        ignored_scope=ignored,
        advanced_parameters=advanced,
    )
