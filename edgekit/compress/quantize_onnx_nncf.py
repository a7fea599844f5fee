"""ONNX by NNCF, for what onnxruntime's quantizer does not have: patterns for transformers and
SmoothQuant."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.compact import compact_onnx
from edgekit.compress.float_onnx import stay_float
from edgekit.compress.prepare_onnx import MATRIX_OPERATORS, prepare_onnx, save_onnx
from edgekit.compress.quantize_openvino import bound_bias_correction, range_estimator
from edgekit.compress.scheme import Scheme
from edgekit.compress.weights_onnx import stored_weights
from edgekit.errors import EdgeKitError, ModelError, one_line, require

__all__ = ["quantize_onnx_nncf"]

#: how much of the outliers SmoothQuant moves into the weights; NNCF's default
_SMOOTH = 0.95


def quantize_onnx_nncf(
    source: list[str], target: str, scheme: dict[str, Any], calibration: dict[str, Any] | None
) -> dict[str, Any]:
    """Write the quantized model. Runs in a child process.

    Ranges are least and greatest value seen (`minmax`), or each sample's outermost quantiles, the
    widest of all samples (`percentile`). Biases are corrected from means (NNCF's fast algorithm),
    with `bias-correction` from the outputs of the model as it is quantized so far.

    Returns facts: `stored`, the number of weights by type, and `notes`.

    Raises:
        ModelError: NNCF refuses the model, it is quantized already, or nothing was quantized.
        UsageError: no operator makes a tensor of `scheme.keep`.
    """
    nncf = require("nncf", extra="openvino")
    wanted = Scheme.from_json(scheme)
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
        prepared = prepare_onnx(source[0], folder, wanted.keep)
    kinds = {node.op_type for node in prepared.proto.graph.node}
    types = [] if wanted.operators == "all" else sorted(kinds - set(MATRIX_OPERATORS))
    ignored = nncf.IgnoredScope(names=prepared.kept, types=types, validate=False)
    try:
        made = _quantize(nncf, prepared.proto, wanted, ignored, CalibrationSamples(calibration))
    except EdgeKitError:
        raise
    except Exception as error:
        raise ModelError(f"NNCF cannot quantize the model: {one_line(error)}") from error
    if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
        raise ModelError("nothing was quantized: no operator the scheme covers")
    stored = dict(stored_weights(made))
    stay_float(made, set(prepared.kept))
    compact_onnx(made, prepared.names)
    save_onnx(made, target)
    return {"stored": stored, "notes": prepared.notes}


def _quantize(
    nncf: Any, model: Any, scheme: Scheme, ignored: Any, samples: CalibrationSamples
) -> Any:
    advanced = nncf.quantization.advanced_parameters
    symmetric = nncf.common.quantization.structs.QuantizationScheme.SYMMETRIC
    fixes = advanced.OverflowFix
    parameters = nncf.AdvancedQuantizationParameters(
        overflow_fix=fixes.ENABLE if scheme.reduce_range else fixes.DISABLE,
        weights_quantization_params=advanced.QuantizationParameters(per_channel=scheme.per_channel),
        activations_quantization_params=advanced.QuantizationParameters(
            mode=symmetric if scheme.symmetric else None
        ),
        activations_range_estimator_params=range_estimator(nncf, scheme.ranges),
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(
            matmul=_SMOOTH if "smooth-quant" in scheme.recovery else -1
        ),
    )
    transformer = scheme.transformer or "smooth-quant" in scheme.recovery
    presets = nncf.QuantizationPreset
    bound_bias_correction()
    return nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        preset=presets.PERFORMANCE if scheme.symmetric else presets.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        fast_bias_correction="bias-correction" not in scheme.recovery,
        ignored_scope=ignored,
        advanced_parameters=parameters,
    )
