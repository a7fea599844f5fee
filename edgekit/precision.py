"""What a graph really computes in, which is not always what it was asked to."""

from __future__ import annotations

from dataclasses import replace

from edgekit.device import Quantization
from edgekit.graph import Graph, Operator
from edgekit.graph.memory import VIEWS
from edgekit.graph.model import elements

__all__ = [
    "STEPS_BETWEEN", "activation_types", "broken_promise", "computed_types", "in_8_bits",
    "quantized_already", "stored_type",
]  # fmt: skip

_DEQUANTIZE, _QUANTIZE, _FAKE = "DequantizeLinear", "QuantizeLinear", "FakeQuantize"
#: operators that only change how numbers are stored
STEPS_BETWEEN = frozenset(
    {_DEQUANTIZE, _QUANTIZE, _FAKE, "DynamicQuantizeLinear", "Cast", "Convert", "QUANTIZE",
     "DEQUANTIZE"}
)  # fmt: skip
#: types of values that have a scale
_SMALL = ("int4", "uint4", "int8", "uint8", "int16", "uint16")
#: operators that only choose or move values, so work on quantized ones as they are
_PASSED_THROUGH = VIEWS | {"MaxPool", "Transpose", "Concat", "Slice", "Split", "Relu", "Pad"}


#: operators for which it does not matter what type their input has
_TYPELESS = VIEWS | {"Shape", "Size"}


def computed_types(graph: Graph) -> dict[str, str | None]:
    """The type each tensor is computed in: between ONNX's DequantizeLinear and QuantizeLinear, and
    behind OpenVINO's FakeQuantize, a graph says float32 and engines compute in 8 bits. TFLite's
    DEQUANTIZE is a step that runs: what follows is float."""
    types: dict[str, str | None] = {n: t.dtype for n, t in graph.tensors.items()}
    if graph.format == "tflite":
        return types
    readers: dict[str, list[Operator]] = {}
    for operator in graph.operators:
        for name in operator.inputs:
            readers.setdefault(name, []).append(operator)
    for operator in graph.operators:
        made = _made_in(operator, graph, types)
        for name in filter(None, operator.outputs):
            if "float" in (types[name] or ""):
                types[name] = made or _read_as(readers.get(name, []), graph) or types[name]
    return types


def activation_types(graph: Graph) -> frozenset[str]:
    """The types in which the operators that multiply take their activations; float32 if none."""
    types = computed_types(graph)
    found = {
        types[name]
        for operator in graph.operators
        if operator.macs != 0
        for name in operator.inputs[:1]
        if name and not graph.tensors[name].constant
    }
    return frozenset(str(one) for one in found if one) or frozenset(["float32"])


def stored_type(graph: Graph, name: str) -> str | None:
    """The type in which a constant is in the file: that of the biggest stored tensor which it is
    computed from."""
    makers = {made: one for one in graph.operators for made in one.outputs}
    seen: set[str] = set()
    leaves, todo = [], [name]
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        if here in makers:
            todo += [one for one in makers[here].inputs if one]
        else:
            size = elements(graph.tensors[here].shape)
            leaves.append((size or 0, graph.tensors[here].dtype))
    return max(leaves, key=lambda one: one[0])[1] if leaves else None


def quantized_already(graph: Graph) -> str | None:
    """What shows that a model was quantized before, in words; None if nothing does."""
    steps = [
        one.type for one in graph.operators
        if one.canonical in (_QUANTIZE, _DEQUANTIZE) or one.type == _FAKE
        or one.type.rpartition(":")[2] in _INTEGER_OPERATORS
    ]  # fmt: skip
    weights = [
        name for name, one in graph.tensors.items()
        if one.quantized and one.dtype in _SMALL and one.constant
    ]  # fmt: skip
    if graph.format == "onnx":  # unpacked by Cast and Mul, which engines fold
        weights += [
            one.inputs[0] for one in graph.operators
            if one.type == "Cast" and graph.tensors[one.inputs[0]].constant
            and graph.tensors[one.inputs[0]].dtype in _SMALL
            and len(graph.tensors[one.inputs[0]].shape or ()) > 1
        ]  # fmt: skip
    if graph.format == "tflite":
        steps = []
    if graph.format == "openvino" and not steps:
        weights = [
            name for one in graph.operators if one.macs != 0
            for name in one.inputs[1:]
            if name and graph.tensors[name].constant and stored_type(graph, name) in _SMALL
        ]  # fmt: skip
    if weights:
        return f"{len(weights)} of its weights are stored as integers with a scale ({weights[0]})"
    return f"it has {len(steps)} {steps[0]} operators" if steps else None


#: of ONNX: what computes with, or unpacks, integers that stand for floats
_INTEGER_OPERATORS = frozenset(
    {
        "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
        "MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
    }
)  # fmt: skip


def _made_in(operator: Operator, graph: Graph, types: dict[str, str | None]) -> str | None:
    """The 8-bit type that an operator's output stands for by what it is made of."""
    if operator.canonical == _DEQUANTIZE and operator.inputs:
        return graph.tensors[operator.inputs[0]].dtype
    if operator.type == _FAKE:
        return "int8"
    given = {types[name] for name in operator.inputs if name and not graph.tensors[name].constant}
    if operator.canonical in _PASSED_THROUGH and len(given) == 1:
        return next(iter(given))
    return None


def _read_as(readers: list[Operator], graph: Graph) -> str | None:
    """The 8-bit type that everybody who reads a tensor makes of it first."""
    if readers and all(one.canonical == _QUANTIZE for one in readers):
        return graph.tensors[readers[0].outputs[0]].dtype
    return "int8" if readers and all(one.type == _FAKE for one in readers) else None


def broken_promise(graph: Graph, rules: Quantization) -> str | None:
    """What a model does that the rules forbid; None if it keeps to them.

    A quantizer is asked for a scheme and silently leaves out what it cannot do: this is what it
    did.
    """
    types = computed_types(graph)
    if not rules.per_channel:
        several = [n for n, t in graph.tensors.items() if t.constant and t.per_channel]
        if several:
            return f"{len(several)} weights have a scale per channel ({several[0]})"
    if rules.symmetric:
        skewed = [
            n for n, t in graph.tensors.items()
            if t.quantized and not t.constant and t.symmetric is False and t.dtype == "int8"
        ]  # fmt: skip
        if skewed:
            return f"{len(skewed)} activations have a zero point that is not 0 ({skewed[0]})"
    steps = [
        one
        for one in graph.operators
        if one.canonical not in (_QUANTIZE, _DEQUANTIZE, *_TYPELESS)
        and one.type not in (_FAKE, "DynamicQuantizeLinear")
        and not graph.folded(one)
    ]
    return _foreign_weights(graph, rules, steps, types) or _foreign_activations(
        graph, rules, steps, types
    )


def _foreign_weights(
    graph: Graph, rules: Quantization, steps: list[Operator], types: dict[str, str | None]
) -> str | None:
    if rules.weights is None:
        return None
    found = {
        name: types[name]
        for one in steps
        if one.macs != 0
        for name in filter(None, one.inputs[1:])
        if graph.tensors[name].constant and len(graph.tensors[name].shape or ()) > 1
        if types[name] not in rules.weights
    }
    if not found:
        return None
    kinds = ", ".join(sorted({str(one) for one in found.values()}))
    return f"{len(found)} weights are {kinds} ({next(iter(found))})"


def _foreign_activations(
    graph: Graph, rules: Quantization, steps: list[Operator], types: dict[str, str | None]
) -> str | None:
    if rules.activations is None:
        return None
    found: dict[str, set[str]] = {}
    for one in steps:
        for name in filter(None, (*one.inputs, *one.outputs)):
            kind = types[name] or ""
            counted = "float" in kind or kind in ("int8", "uint8", "int16", "uint16")
            if counted and not graph.tensors[name].constant and kind not in rules.activations:
                found.setdefault(kind, set()).add(one.type)
    if not found:
        return None
    kind, operators = next(iter(found.items()))
    return f"operators still compute in {kind}: {', '.join(sorted(operators))}"


def in_8_bits(graph: Graph) -> Graph:
    """The graph as engines run it that compute in 8 bits what lies between QuantizeLinear and
    DequantizeLinear: such tensors take one byte per element, and the two cost nothing."""
    types = computed_types(graph)
    small = {
        name: replace(tensor, dtype=types[name], size_bytes=elements(tensor.shape))
        for name, tensor in graph.tensors.items()
        if "float" in (tensor.dtype or "") and types[name] in ("int8", "uint8")
        if not tensor.constant
    }
    if not small:
        return graph
    steps = tuple(
        replace(one, canonical="Identity")
        if (one.canonical in (_QUANTIZE, _DEQUANTIZE) or one.type == _FAKE)
        and all(types[n] in ("int8", "uint8") for n in (one.inputs[0], one.outputs[0]))
        else one
        for one in graph.operators
    )
    return replace(graph, operators=steps, tensors={**graph.tensors, **small})
