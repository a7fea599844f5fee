"""TFLite by litert-quantizer: works on any float model, recipes per operator."""

from __future__ import annotations

from typing import Any

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.scheme import Scheme
from edgekit.errors import ModelError, one_line, require

__all__ = ["quantize_tflite"]

_COMPUTE = ("CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED", "BATCH_MATMUL", "DEPTHWISE_CONV_2D")


def quantize_tflite(
    source: list[str], target: str, scheme: dict[str, Any], data: dict[str, str], indices: str
) -> None:
    """Write the quantized model; inputs and outputs stay float. Runs in a child process.

    Raises:
        ModelError: the quantizer refuses the model.
    """
    require("ai_edge_litert", extra="tflite-convert")
    quantizer = require("litert_quantizer.quantizer", extra="tflite-convert")
    wanted = Scheme(**scheme)
    try:
        tool = quantizer.Quantizer(source[0])
        _add_recipe(tool, wanted)
        results = None
        if tool.need_calibration:
            samples = CalibrationSamples(source[0], data, indices)
            results = _calibrate(tool, source[0], samples)
        quantized = tool.quantize(results)
    except Exception as error:
        raise ModelError(
            f"litert-quantizer cannot quantize the model: {one_line(error)}"
        ) from error
    quantized.export_model(target)


def _add_recipe(tool: Any, scheme: Scheme) -> None:
    from litert_quantizer import qtyping

    names = qtyping.TFLOperationName
    operators = [names.ALL_SUPPORTED] if scheme.operators == "all" else [names[n] for n in _COMPUTE]
    granularity = (
        qtyping.QuantGranularity.CHANNELWISE
        if scheme.per_channel
        else qtyping.QuantGranularity.TENSORWISE
    )
    for operator in operators:
        if scheme.kind == "int8-dynamic":
            tool.add_dynamic_config(
                regex=".*", operation_name=operator, num_bits=8, granularity=granularity
            )
        else:
            # As the tool's add_static_config, which does not let the activations be symmetric.
            tool.update_quantization_recipe(
                ".*",
                operator,
                qtyping.OpQuantizationConfig(
                    activation_tensor_config=qtyping.TensorQuantizationConfig(
                        num_bits=8, symmetric=scheme.symmetric
                    ),
                    weight_tensor_config=qtyping.TensorQuantizationConfig(
                        num_bits=8, symmetric=True, granularity=granularity
                    ),
                    compute_precision=qtyping.ComputePrecision.INTEGER,
                ),
            )
    # The model keeps the inputs and outputs its users feed and read.
    _keep_float(tool, (names.INPUT, names.OUTPUT))


def _keep_float(tool: Any, operators: tuple[Any, ...]) -> None:
    from litert_quantizer import algorithm_manager

    for operator in operators:
        tool.update_quantization_recipe(
            ".*",
            operator,
            algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE,
        )


def _calibrate(tool: Any, model: str, samples: Any) -> Any:
    """Ranges from the least and the greatest value seen.

    The tool's own `calibrate` keeps a moving average of each sample's range, which clips what
    only some samples reach.
    """
    from litert_quantizer import calibrator, recipe_manager
    from litert_quantizer.utils import qsv_utils

    recipe = recipe_manager.RecipeManager()
    recipe.load_quantization_recipe(tool.get_quantization_recipe())
    watcher = calibrator.Calibrator(model, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    watcher.calibrate({_signature(model): samples}, recipe)
    return watcher.get_model_qsvs()


def _signature(model: str) -> str | None:
    from ai_edge_litert.interpreter import Interpreter

    listed = list(Interpreter(model_path=model).get_signature_list())
    if len(listed) > 1:
        raise ModelError(f"the model has {len(listed)} signatures: {', '.join(listed)}; wanted one")
    return str(listed[0]) if listed else None
