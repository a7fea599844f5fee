"""TFLite by litert-quantizer: works on any float model, a recipe per operator."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.ranges import RangeFinder
from edgekit.compress.scheme import Scheme
from edgekit.errors import EdgeKitError, ModelError, UsageError, one_line, require
from edgekit.graph import Graph, read_graph
from edgekit.precision import quantized_already
from edgekit_runtime.loading import load

__all__ = ["quantize_tflite"]

_EXTRA = "tflite-convert"
_COMPUTE = ("CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED", "BATCH_MATMUL", "DEPTHWISE_CONV_2D")
#: operators whose kernels read 4-bit weights in blocks
_IN_BLOCKS = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")

#: the float tensors of one run by name
_Values = Mapping[str, NDArray[Any]]


def quantize_tflite(
    source: list[str], target: str, scheme: dict[str, Any], calibration: dict[str, Any] | None
) -> dict[str, Any]:
    """Write the quantized model; inputs and outputs stay float. Runs in a child process.

    int8-weights and int4-weights put a DEQUANTIZE before the operator, which then computes in
    float. int4-weights takes blocks where the operator has them and its rows divide into them, a
    scale per channel for convolutions and other rows, 8 bits elsewhere. A DEQUANTIZE of blocks
    gives wrong numbers (LiteRT 2.3), so that operators with blocks take the weights as they are,
    and quantize their activations at run time; XNNPACK does that right, LiteRT's own kernels do
    not. `learned-rounding` is GPTQ, for FULLY_CONNECTED.

    Returns facts: `stored`, the number of weights by type, and `notes`.

    Raises:
        ModelError: the quantizer refuses the model, it is quantized already, or nothing was
            quantized.
        UsageError: no operator makes a tensor of `scheme.keep`.
    """
    require("ai_edge_litert", extra=_EXTRA)
    quantizer = require("litert_quantizer.quantizer", extra=_EXTRA)
    wanted = Scheme.from_json(scheme)
    graph = read_graph(Path(source[0]))
    found = quantized_already(graph)
    if found:
        raise ModelError(f"the model is quantized already: {found}; quantize the float model")
    try:
        tool = quantizer.Quantizer(source[0])
        _add_recipe(tool, wanted, source[0], graph)
        ranges = None
        if tool.need_calibration:
            samples = CalibrationSamples(calibration)
            if "learned-rounding" in wanted.recovery:
                ranges = _hessians(source[0], samples)
            else:
                ranges = _ranges(source[0], wanted, samples)
        _share_zero_points()
        quantized = tool.quantize(ranges, enable_progress_report=False)
    except EdgeKitError:
        raise
    except Exception as error:
        raise ModelError(
            f"litert-quantizer cannot quantize the model: {one_line(error)}"
        ) from error
    quantized.export_model(target, overwrite=True)
    made = read_graph(Path(target))
    if not any(t.quantized or t.dtype == "float16" for t in made.tensors.values()):
        raise ModelError("nothing was quantized: no operator the scheme covers")
    return _facts(wanted, source[0], made)


def _facts(scheme: Scheme, model: str, made: Graph) -> dict[str, Any]:
    stored = Counter(
        str(one.dtype)
        for one in made.tensors.values()
        if one.constant and one.quantized and len([d for d in one.shape or () if d != 1]) > 1
    )
    notes = []
    if scheme.kind == "int4-weights" and stored["int8"]:
        notes.append(f"{stored['int8']} of {stored.total()} weights are in 8 bits: "
                     "their operators have no 4-bit kernels")  # fmt: skip
    products = [one for one in _matrices(model) if one[1] == "FULLY_CONNECTED"]
    blocks = sum(_divides(scheme, kind, shape) for _, kind, shape in products)
    if scheme.kind == "int4-weights" and blocks:
        notes.append(f"{blocks} matrix products have weights in blocks: their activations are "
                     "quantized at run time, right in XNNPACK only")  # fmt: skip
    return {"stored": dict(stored), "notes": notes}


def _share_zero_points() -> None:
    """Write equal lists of zero points once: a channel has two, of the weights and of the bias, 8
    bytes each and all 0. VWW MobileNet: 364 kB -> 323 kB. Changes the serializer in this process,
    which is a child that does nothing else."""
    schema = require("ai_edge_litert.schema_py_generated", extra=_EXTRA)
    pack = schema.QuantizationParametersT.Pack
    if pack.__name__ == "packed":  # shared already
        return

    sharing: list[_SharingBuilder] = []  # of the builder in use

    def packed(self: Any, builder: Any) -> Any:
        if not sharing or sharing[0].builder is not builder:
            sharing[:] = [_SharingBuilder(builder)]
        if self.zeroPoint is not None:
            self.zeroPoint = np.asarray(self.zeroPoint, np.int64)
        return pack(self, sharing[0])

    schema.QuantizationParametersT.Pack = packed


class _SharingBuilder:
    """A flatbuffers.Builder that gives the place of a vector written before if one is equal."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self._places: dict[tuple[str, bytes], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    def CreateNumpyVector(self, array: NDArray[Any]) -> Any:  # noqa: N802  (flatbuffers' name)
        key = (array.dtype.str, array.tobytes())
        if key not in self._places:
            self._places[key] = self.builder.CreateNumpyVector(array)
        return self._places[key]


# --- the recipe -----------------------------------------------------------------------------------


def _add_recipe(tool: Any, scheme: Scheme, model: str, graph: Graph) -> None:
    from litert_quantizer import algorithm_manager, qtyping

    names, methods = qtyping.TFLOperationName, algorithm_manager.AlgorithmName
    operators = [names.ALL_SUPPORTED] if scheme.operators == "all" else [names[n] for n in _COMPUTE]
    method = methods.FLOAT_CASTING if scheme.kind == "fp16" else methods.MIN_MAX_UNIFORM_QUANT
    grain = qtyping.QuantGranularity
    fits = grain.CHANNELWISE if scheme.per_channel else grain.TENSORWISE
    if scheme.kind == "fp16":
        fits = grain.TENSORWISE
    for operator in operators:
        tool.update_quantization_recipe(".*", operator, _config(scheme, fits), method)
    if scheme.kind == "int4-weights":
        for scope, kind, shape in _matrices(model):
            in_blocks = _divides(scheme, kind, shape)
            fits = grain[f"BLOCKWISE_{scheme.block}"] if in_blocks else grain.CHANNELWISE
            learned = kind == "FULLY_CONNECTED" and "learned-rounding" in scheme.recovery
            tool.update_quantization_recipe(
                scope, names.ALL_SUPPORTED, _config(scheme, fits, bits=4, hybrid=in_blocks),
                methods.GPTQ if learned else method,
            )  # fmt: skip
    # The model keeps the inputs and outputs its users feed and read.
    for operator in (names.INPUT, names.OUTPUT):
        tool.update_quantization_recipe(".*", operator, algorithm_key=methods.NO_QUANTIZE)
    for scope in _scopes(graph, model, scheme.keep):
        tool.update_quantization_recipe(
            scope, names.ALL_SUPPORTED, algorithm_key=methods.NO_QUANTIZE
        )


def _divides(scheme: Scheme, kind: str, shape: tuple[int, ...]) -> bool:
    return bool(scheme.block) and kind in _IN_BLOCKS and shape[-1] % scheme.block == 0


def _config(scheme: Scheme, granularity: Any, *, bits: int = 8, hybrid: bool = False) -> Any:
    """What is done to one operator; the tool's own methods do not let activations be symmetric.
    `hybrid`: its kernel takes the weights as they are stored."""
    from litert_quantizer import qtyping

    static = scheme.kind in ("int8-static", "int16x8")
    wide = scheme.kind == "int16x8"
    fp16 = scheme.kind == "fp16"
    dynamic = hybrid or scheme.kind == "int8-dynamic"
    kinds, precision = qtyping.TensorDataType, qtyping.ComputePrecision
    return qtyping.OpQuantizationConfig(
        activation_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=16 if wide else 8, symmetric=wide or scheme.symmetric
        )
        if static
        else None,
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=16 if fp16 else bits, symmetric=True, granularity=granularity,
            dtype=kinds.FLOAT if fp16 else kinds.INT,
        ),
        compute_precision=precision.INTEGER if static or dynamic else precision.FLOAT,
        explicit_dequantize=not (static or dynamic),
    )  # fmt: skip


def _scopes(graph: Graph, model: str, keep: Sequence[str]) -> list[str]:
    """Expressions for the operators whose first outputs are called so."""
    places = {one.outputs[0]: one.index for one in graph.operators if one.outputs and not one.scope}
    unknown = sorted(set(keep) - set(places))
    if unknown:
        raise UsageError(f"no operator's first output is {unknown[0]!r}, which is to stay float")
    chosen = {places[name] for name in keep}
    return [one.scope for one in _operators(model) if one.place in chosen]


def _matrices(model: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The operators that can have 4-bit weights: expression, kind, the weights' shape."""
    for one in _operators(model):
        if one.weights is not None and one.kind in (*_IN_BLOCKS, "CONV_2D"):
            yield one.scope, one.kind, one.weights


@dataclass(frozen=True)
class _Operator:
    """Of the main graph. scope: the expression that matches it alone. first: its first input.
    weights: the shape of its second, if that is stored."""

    place: int
    kind: str
    scope: str
    first: str
    weights: tuple[int, ...] | None


def _operators(model: str) -> Iterator[_Operator]:
    from litert_quantizer.utils import tfl_flatbuffer_utils as flatbuffers

    found = flatbuffers.read_model(model)
    graph = found.subgraphs[0]
    for place, one in enumerate(graph.operators):
        code = found.operatorCodes[one.opcodeIndex].builtinCode
        kind = flatbuffers.TFL_OP_CODE_TO_NAME.get(code)
        if kind is None or not len(one.inputs) or one.inputs[0] < 0:
            continue
        weights = None
        if len(one.inputs) > 1 and one.inputs[1] >= 0:
            tensor = graph.tensors[one.inputs[1]]
            if found.buffers[tensor.buffer].data is not None:
                weights = tuple(int(size) for size in tensor.shape)
        yield _Operator(
            place, str(kind.value), f"^{re.escape(flatbuffers.get_op_scope(one, graph.tensors))}$",
            flatbuffers.get_tensor_name(graph.tensors[one.inputs[0]]), weights,
        )  # fmt: skip


# --- ranges ---------------------------------------------------------------------------------------


def _ranges(model: str, scheme: Scheme, samples: CalibrationSamples) -> dict[str, dict[str, Any]]:
    """What the tool's own `calibrate` gives, which keeps a moving average of each sample's range,
    clips what only some samples reach, and holds all samples in memory."""
    inside = _Inside(model)
    ranks: dict[str, int] = {}

    def passes() -> Iterator[_Values]:
        for sample in samples:
            values = inside.run(sample)
            ranks.update((name, array.ndim) for name, array in values.items())
            yield values

    symmetric = scheme.symmetric or scheme.kind == "int16x8"
    found = RangeFinder(scheme.ranges).find(passes, symmetric=symmetric)
    return {
        name: {
            "min": np.full((1,) * ranks[name], low, np.float32),
            "max": np.full((1,) * ranks[name], high, np.float32),
        }
        for name, (low, high) in found.items()
    }


def _hessians(model: str, samples: CalibrationSamples) -> dict[str, dict[str, Any]]:
    """What GPTQ wants to know of the inputs of FULLY_CONNECTED: 2/n of the sum of x x^T over all n
    rows, as the tool's calibration computes it (Frantar et al., 2022, eq. 2)."""
    columns = {
        one.first: one.weights[-1]
        for one in _operators(model)
        if one.kind == "FULLY_CONNECTED" and one.weights is not None
    }
    sums = {name: np.zeros((size, size)) for name, size in columns.items()}
    rows = dict.fromkeys(columns, 0)
    inside = _Inside(model)
    for sample in samples:
        for name, array in inside.run(sample).items():
            if name in columns:
                flat = array.reshape(-1, columns[name]).astype(np.float64)
                sums[name] += flat.T @ flat
                rows[name] += len(flat)
    return {
        name: {"hessian": (2 / rows[name] * sums[name]).astype(np.float32),
               "num_samples": np.array(rows[name])}
        for name in columns
        if rows[name]
    }  # fmt: skip


class _Inside:
    """The float model with every tensor readable: LiteRT's own kernels, which keep them."""

    def __init__(self, model: str) -> None:
        tools = require("ai_edge_litert.interpreter", extra=_EXTRA)
        self._interpreter = tools.Interpreter(
            model, num_threads=1, experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=tools.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )  # fmt: skip
        with load(Path(model)) as session:
            names = [spec.name for spec in session.inputs]
        details = self._interpreter.get_input_details()
        self._inputs = dict(zip(names, (one["index"] for one in details), strict=True))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._constants = _constants(model)

    def run(self, sample: _Values) -> dict[str, NDArray[Any]]:
        """All float tensors that are computed, by their names in the file."""
        interpreter = self._interpreter
        shapes = {name: sample[name].shape for name in self._inputs}
        if shapes != self._shapes:
            for name, place in self._inputs.items():
                interpreter.resize_tensor_input(place, shapes[name])
            interpreter.allocate_tensors()
            self._shapes = shapes
        interpreter.reset_all_variables()
        for name, place in self._inputs.items():
            interpreter.set_tensor(place, sample[name])
        interpreter.invoke()
        found: dict[str, NDArray[Any]] = {}
        for number in range(interpreter.num_subgraphs()):
            for one in interpreter.get_tensor_details(number):
                name = one["name"]
                if one["dtype"] is not np.float32 or not name or name in self._constants:
                    continue
                with suppress(ValueError):  # of a body that was not run, or without elements
                    found[name] = np.asarray(interpreter.get_tensor(one["index"], number))
        return found


def _constants(model: str) -> set[str]:
    """The names of all stored tensors."""
    from litert_quantizer.utils import tfl_flatbuffer_utils as flatbuffers

    found = flatbuffers.read_model(model)
    return {
        flatbuffers.get_tensor_name(one)
        for graph in found.subgraphs
        for one in graph.tensors
        if found.buffers[one.buffer].data is not None
    }
