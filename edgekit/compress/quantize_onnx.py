"""ONNX by onnxruntime.quantization: QDQ with ranges from `RangeFinder`, dynamic, weights only."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.compact import compact_onnx
from edgekit.compress.float_onnx import stay_float
from edgekit.compress.prepare_onnx import (
    MATRIX_OPERATORS,
    Prepared,
    float_session,
    prepare_onnx,
    save_onnx,
)
from edgekit.compress.ranges import RangeFinder
from edgekit.compress.scheme import Scheme
from edgekit.compress.weights_onnx import store_fp16, store_int4, store_int8, stored_weights
from edgekit.errors import EdgeKitError, ModelError, one_line, require

__all__ = ["quantize_onnx"]

#: 16-bit and 4-bit integers are standard from here on
_SMALL_TYPES_OPSET = 21


def quantize_onnx(
    source: list[str], target: str, scheme: dict[str, Any], calibration: dict[str, Any] | None
) -> dict[str, Any]:
    """Write the quantized model; inputs and outputs stay float. Runs in a child process.

    int8-static, int16x8: QuantizeLinear and DequantizeLinear around operators, which ONNX Runtime
    fuses with them (of int16x8 it computes in float). int8-dynamic: MatMul, Gemm, Conv, LSTM and
    embeddings. int8-weights: in front of each weight a DequantizeLinear. int4-weights: MatMul and
    Gemm become MatMulNBits, embeddings GatherBlockQuantized, what else has weights is in 8 bits.
    fp16: a Cast to float32 in front of each weight.

    Returns facts: `stored`, the number of weights by type, and `notes`.

    Raises:
        ModelError: the quantizer refuses the model, it is quantized already, or nothing was
            quantized.
        UsageError: no operator makes a tensor of `scheme.keep`.
    """
    onnx = require("onnx", extra="onnx")
    tools = require("onnxruntime.quantization", extra="onnx")
    wanted = Scheme.from_json(scheme)
    small = wanted.kind in ("int16x8", "int4-weights")
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder, _Quiet():
        prepared = prepare_onnx(
            source[0], folder, wanted.keep, _SMALL_TYPES_OPSET if small else None
        )
        try:
            if wanted.kind in ("int8-static", "int16x8"):
                ranges = _ranges(prepared.proto, folder, wanted, CalibrationSamples(calibration))
                _static(tools, prepared, ranges, target, wanted)
            elif wanted.kind == "int8-dynamic":
                _dynamic(tools, prepared, target, wanted)
            else:
                _WEIGHTS[wanted.kind](prepared, wanted)
                save_onnx(prepared.proto, target)
        except (OSError, EdgeKitError):
            raise
        except Exception as error:
            raise ModelError(f"onnxruntime cannot quantize the model: {one_line(error)}") from error
    made = onnx.load(target)
    stored = stored_weights(made)
    if not stored and not _rounds(made):
        raise ModelError(
            "nothing was quantized: no operator the scheme covers has constant weights"
        )
    stay_float(made, set(prepared.kept))
    compact_onnx(made, prepared.names)
    save_onnx(made, target)
    return _facts(wanted, stored, prepared.notes)


_WEIGHTS = {"fp16": store_fp16, "int8-weights": store_int8, "int4-weights": store_int4}


def _facts(scheme: Scheme, stored: Counter[str], notes: list[str]) -> dict[str, Any]:
    notes = list(notes)
    if scheme.kind == "int4-weights" and stored["int8"]:
        notes.append(f"{stored['int8']} of {stored.total()} weights are in 8 bits: "
                     "their operators have no 4-bit kernels")  # fmt: skip
    return {"stored": dict(stored), "notes": notes}


def _rounds(model: Any) -> bool:
    """Whether anything is computed in integers, stored weights or not."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


class _Quiet:
    """The tool logs a warning per tensor, and advice about a pre-processing that was done."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)


# --- static ---------------------------------------------------------------------------------------


def _ranges(
    model: Any, folder: str, scheme: Scheme, samples: CalibrationSamples
) -> dict[str, tuple[float, float]]:
    """The tool's own calibration keeps the outputs of all samples in memory, or averages."""
    inside = _Inside(model, _types(scheme), folder)

    def passes() -> Iterator[Mapping[str, NDArray[Any]]]:
        return (inside.run(sample) for sample in samples)

    return RangeFinder(scheme.ranges).find(passes, symmetric=scheme.symmetric)


def _types(scheme: Scheme) -> list[str] | None:
    return None if scheme.operators == "all" else list(MATRIX_OPERATORS)


def _static(
    tools: Any, prepared: Prepared, ranges: dict[str, tuple[float, float]], target: str,
    scheme: Scheme,
) -> None:  # fmt: skip
    calibrate = require("onnxruntime.quantization.calibrate", extra="onnx")
    source, cache = Path(target).with_name("float.onnx"), Path(target).with_name("ranges.json")
    save_onnx(prepared.proto, str(source))
    method = tools.CalibrationMethod.MinMax  # says only where ranges come from
    found = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    calibrate.save_tensors_data(calibrate.TensorsData(method, found), cache)
    activations = {"int8": "QInt8", "int16": "QInt16"}.get(scheme.activations, "QUInt8")
    tools.quantize_static(
        source, target,
        calibration_cache_path=cache,
        calibrate_method=method,
        quant_format=tools.QuantFormat.QDQ,
        op_types_to_quantize=_types(scheme),
        nodes_to_exclude=prepared.kept,
        per_channel=scheme.per_channel,
        reduce_range=scheme.reduce_range,
        activation_type=tools.QuantType[activations],
        weight_type=tools.QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": scheme.symmetric,
            "WeightSymmetric": scheme.weights_symmetric,
        },
    )  # fmt: skip
    source.unlink()
    cache.unlink()


class _Inside:
    """A model with the float activations of operators of these types (None: all) as outputs."""

    def __init__(self, model: Any, types: list[str] | None, folder: str) -> None:
        onnx = require("onnx", extra="onnx")
        tapped = onnx.ModelProto()
        tapped.CopyFrom(model)
        graph = tapped.graph
        nodes = [node for node in graph.node if types is None or node.op_type in types]
        wanted = {name for node in nodes for name in (*node.input, *node.output) if name}
        made = {name for node in graph.node for name in node.output}
        there = {one.name for one in graph.output}
        # Without a type: the session finds it, and not only where shape inference did.
        graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in sorted((wanted & made) - there)
        )
        path = str(Path(folder) / "tapped.onnx")
        save_onnx(tapped, path)
        self._session = float_session(path)
        self._names = [
            one.name
            for one in self._session.get_outputs()
            if one.name in wanted and one.type == "tensor(float)"
        ]
        self._inputs = [
            one.name
            for one in self._session.get_inputs()
            if one.name in wanted and one.type == "tensor(float)"
        ]

    def run(self, sample: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The tensors by name, inputs among them."""
        arrays = self._session.run(self._names, dict(sample)) if self._names else []
        return {name: sample[name] for name in self._inputs} | dict(
            zip(self._names, arrays, strict=True)
        )


# --- dynamic --------------------------------------------------------------------------------------


def _dynamic(tools: Any, prepared: Prepared, target: str, scheme: Scheme) -> None:
    source = Path(target).with_name("float.onnx")
    save_onnx(prepared.proto, str(source))
    # The tool makes a MatMul of each Gemm first, and calls it so.
    kept = [*prepared.kept, *(f"{name}_MatMul" for name in prepared.kept)]
    tools.quantize_dynamic(
        source, target,
        weight_type=tools.QuantType.QInt8,
        per_channel=scheme.per_channel,
        reduce_range=scheme.reduce_range,
        op_types_to_quantize=_types(scheme),
        nodes_to_exclude=kept,
        extra_options={"WeightSymmetric": scheme.weights_symmetric},
    )  # fmt: skip
    source.unlink()
