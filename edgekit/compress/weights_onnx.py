"""ONNX models whose weights are stored in fewer bits and computed with in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.prepare_onnx import MATRIX_OPERATORS, Prepared
from edgekit.compress.scheme import Scheme
from edgekit.errors import require

__all__ = ["store_fp16", "store_int4", "store_int8", "stored_weights"]

#: smaller tensors stay as they are: a scale and an operator more would outweigh them
_FEWEST = 256
_FP16_MAX = 65504.0
#: the least that has all its bits
_FP16_LEAST = 2.0**-14
_INTEGERS = ("INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16")


# --- fp16 -----------------------------------------------------------------------------------------


def store_fp16(prepared: Prepared, scheme: Scheme) -> None:
    """Put a Cast to float32 in front of each big enough constant, in place.

    ONNX Runtime folds the Casts when it loads the model, so that it costs neither speed nor more
    accuracy than the rounding. `onnxruntime.transformers.float16` makes all of the model compute in
    float16, for which ONNX Runtime has next to no kernels on CPUs: it puts two Casts around every
    operator then, and is slower than with float32.
    """
    onnx = require("onnx", extra="onnx")
    graph = prepared.proto.graph
    kept = _read_by(graph, prepared.kept) | {one.name for one in graph.output}
    casts, unfit = [], []
    for tensor in _floats(onnx, graph):
        if tensor.name in kept:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        greatest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
        if greatest > _FP16_MAX or 0 < greatest < _FP16_LEAST:
            unfit.append(tensor.name)
            continue
        name = tensor.name
        half = _unused(graph, f"{name}_float16")
        with np.errstate(under="ignore"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(onnx.helper.make_node("Cast", [half], [name], name=half, to=1))
    _put_first(graph, casts)
    if unfit:
        prepared.notes.append(
            f"{len(unfit)} weights do not fit into float16 (beyond {_FP16_MAX:.0f}, or nothing of "
            f"{_FP16_LEAST:.0e} or more) and stay float32: {', '.join(unfit[:3])}"
        )


# --- int8 -----------------------------------------------------------------------------------------


def store_int8(prepared: Prepared, scheme: Scheme) -> None:
    """Store weights in 8 bits with a scale per output channel (or one), in place.

    In front of a MatMul DequantizeLinear makes floats of them, which ONNX Runtime fuses with it.
    In front of others it would compute them again at each run (EfficientNet-Lite0: 2.2 times
    slower), so Cast, Sub and Mul do it, which are folded when the model is loaded. Embeddings are
    looked up in 8 bits and dequantized then, with a scale per column.
    """
    onnx = require("onnx", extra="onnx")
    graph = prepared.proto.graph
    todo = {one.name: one for one in _weights(onnx, graph, prepared.kept)
            if scheme.operators == "all" or one.type in MATRIX_OPERATORS}  # fmt: skip
    steps = []
    for tensor in list(_floats(onnx, graph)):
        if tensor.name not in todo:
            continue
        name, found = tensor.name, todo[tensor.name]
        values = onnx.numpy_helper.to_array(tensor)
        axis = values.ndim - 1 if found.looked_up_only else found.axis
        rounded = _Rounded.of(values, axis if scheme.per_channel else None, scheme)
        stored = _unused(graph, f"{name}_int8")
        tensor.CopyFrom(onnx.numpy_helper.from_array(rounded.values, stored))
        if not found.looked_up_only and not found.fused:
            steps += _unpacked(onnx, graph, name, stored, rounded)
            continue
        shape = -1 if scheme.per_channel else ()
        inputs = [stored, _stored(onnx, graph, f"{name}_scale", rounded.scale.reshape(shape))]
        if rounded.zero_point is not None:
            zero = rounded.zero_point.reshape(shape)
            inputs.append(_stored(onnx, graph, f"{name}_zero_point", zero))
        attributes = {"axis": -1 if found.looked_up_only else axis} if scheme.per_channel else {}
        if found.looked_up_only:
            _dequantize_after(onnx, graph, name, inputs, attributes)
        else:
            steps.append(
                onnx.helper.make_node("DequantizeLinear", inputs, [name], name=stored, **attributes)
            )
    _put_first(graph, steps)


def _stored(onnx: Any, graph: Any, name: str, array: NDArray[Any]) -> str:
    name = _unused(graph, name)
    graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return name


def _unpacked(onnx: Any, graph: Any, name: str, stored: str, rounded: _Rounded) -> list[Any]:
    """Operators that compute `name` from what is stored."""
    plain = _unused(graph, f"{name}_float")
    nodes = [onnx.helper.make_node("Cast", [stored], [plain], name=stored, to=1)]
    if rounded.zero_point is not None:
        zero = _stored(
            onnx, graph, f"{name}_zero_point", rounded.zero_point.astype(np.float32)
        )  # fmt: skip
        shifted = _unused(graph, f"{name}_shifted")
        nodes.append(onnx.helper.make_node("Sub", [plain, zero], [shifted], name=shifted))
        plain = shifted
    scale = _stored(onnx, graph, f"{name}_scale", rounded.scale)
    return [*nodes, onnx.helper.make_node("Mul", [plain, scale], [name], name=f"{stored}_scaled")]


def _dequantize_after(
    onnx: Any, graph: Any, table: str, inputs: list[str], attributes: dict[str, int]
) -> None:
    for place in reversed(range(len(graph.node))):
        node = graph.node[place]
        if node.op_type != "Gather" or node.input[0] != table:
            continue
        out = node.output[0]
        node.input[0] = inputs[0]
        node.output[0] = _unused(graph, f"{out}_int8")
        after = onnx.helper.make_node(
            "DequantizeLinear", [node.output[0], *inputs[1:]], [out],
            name=f"{node.name}_dequantize", **attributes,
        )  # fmt: skip
        graph.node.insert(place + 1, after)
    for one in list(graph.value_info):
        if one.name == table:
            graph.value_info.remove(one)


@dataclass(frozen=True)
class _Rounded:
    """`(values - zero_point) * scale`; these two are of the same rank."""

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int8] | None

    @classmethod
    def of(cls, weights: NDArray[Any], axis: int | None, scheme: Scheme) -> _Rounded:
        others = None
        if axis is not None:
            others = tuple(one for one in range(weights.ndim) if one != axis)
        low = np.minimum(weights.min(axis=others, keepdims=True), 0).astype(np.float64)
        high = np.maximum(weights.max(axis=others, keepdims=True), 0).astype(np.float64)
        symmetric = scheme.weights_symmetric
        scale = np.maximum(-low, high) / 127 if symmetric else (high - low) / 255
        # An empty channel; and what float32 rounds to 0 would divide by it.
        scale = np.where(scale < np.finfo(np.float32).tiny, 1.0, scale).astype(np.float32)
        zero = np.zeros_like(scale)
        if not symmetric:
            zero = np.clip(np.round(-128 - low / scale), -128, 127)
        values = np.clip(np.round(weights / scale) + zero, -128, 127).astype(np.int8)
        zero_point = None if symmetric else zero.astype(np.int8)
        return cls(values, scale, zero_point)


# --- int4 -----------------------------------------------------------------------------------------


def store_int4(prepared: Prepared, scheme: Scheme) -> None:
    """Matrices and embeddings in 4 bits with a scale per block, by onnxruntime; what else has
    weights (convolutions, recurrent cells) in 8 bits. In place."""
    onnx = require("onnx", extra="onnx")
    nbits = require("onnxruntime.quantization.matmul_nbits_quantizer", extra="onnx")
    model = prepared.proto
    _split_gemms(onnx, model.graph, set(prepared.kept))
    weights = {one.name: one for one in _weights(onnx, model.graph, prepared.kept)}
    fit = {name for name, one in weights.items() if one.in_blocks}
    include = {
        node.name
        for node in model.graph.node
        for place in _WEIGHT_PLACES.get(node.op_type, ())
        if node.op_type in ("MatMul", "Gather") and node.input[place] in fit
    }
    tool = nbits.MatMulNBitsQuantizer(
        model,
        bits=4,
        block_size=scheme.block,
        is_symmetric=scheme.weights_symmetric,
        nodes_to_exclude=[n.name for n in model.graph.node if n.name not in include],
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    tool.process()
    model.CopyFrom(tool.model.model)
    store_int8(prepared, scheme)


def _split_gemms(onnx: Any, graph: Any, kept: set[str]) -> None:
    """Gemm with stored weights becomes MatMul and Add, for which there are 4-bit kernels."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for place in reversed(range(len(graph.node))):
        node = graph.node[place]
        if node.op_type != "Gemm" or node.name in kept or node.input[1] not in stored:
            continue
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        tensor = stored[node.input[1]]
        if options.get("transA") or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        matrix = onnx.numpy_helper.to_array(tensor) * np.float32(options.get("alpha", 1.0))
        name = _unused(graph, f"{tensor.name}_{place}")
        matrix = np.ascontiguousarray(matrix.T if options.get("transB") else matrix)
        graph.initializer.append(onnx.numpy_helper.from_array(matrix, name))
        out = node.output[0]
        has_bias = len(node.input) > 2 and bool(node.input[2])
        product = _unused(graph, f"{out}_product") if has_bias else out
        new = [onnx.helper.make_node("MatMul", [node.input[0], name], [product], name=node.name)]
        if has_bias:
            bias = node.input[2]
            if options.get("beta", 1.0) != 1.0:
                factor = _unused(graph, f"{out}_beta")
                beta = np.float32(options["beta"])
                graph.initializer.append(onnx.numpy_helper.from_array(beta, factor))
                scaled = _unused(graph, f"{out}_bias")
                new.insert(0, onnx.helper.make_node("Mul", [bias, factor], [scaled], name=scaled))
                bias = scaled
            new.append(
                onnx.helper.make_node("Add", [product, bias], [out], name=f"{node.name}_bias")
            )
        graph.node.remove(node)
        for one in reversed(new):
            graph.node.insert(place, one)
    _drop_unread(graph)


# --- which tensors are weights --------------------------------------------------------------------

#: operator -> where its weights are
_WEIGHT_PLACES: dict[str, tuple[int, ...]] = {
    "Conv": (1,), "ConvTranspose": (1,), "MatMul": (1, 0), "Gemm": (1, 0), "Gather": (0,),
    "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class _Weight:
    """A stored tensor: the type of the operator that multiplies it, the axis of its output
    channels, whether only Gathers read it, whether ONNX Runtime fuses its reader with a
    DequantizeLinear, and whether it can be in 4 bits."""

    name: str
    type: str
    axis: int
    looked_up_only: bool
    fused: bool
    in_blocks: bool


def _weights(onnx: Any, graph: Any, kept: list[str]) -> Iterator[_Weight]:
    """Each once, those that a kept operator reads left out."""
    stored = {tensor.name: len(tensor.dims) for tensor in _floats(onnx, graph)}
    left_out = _read_by(graph, kept) | {one.name for one in graph.output}
    inner = {
        name for node in graph.node for name in _reads(node) if name not in set(node.input)
    }  # fmt: skip
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    seen: set[str] = set()
    for node in graph.node:
        for place in _WEIGHT_PLACES.get(node.op_type, ()):
            name = node.input[place]
            if name not in stored or name in left_out | seen or stored[name] < 2:
                continue
            seen.add(name)
            looked_up = name not in inner and all(
                one.op_type == "Gather" and one.input[0] == name and _attribute(one, "axis", 0) == 0
                for one in readers[name]
            )
            fused = stored[name] == 2 and node.op_type == "MatMul" and place == 1
            yield _Weight(
                name, node.op_type, _axis(node, place, stored[name]), looked_up, fused,
                fused or (looked_up and stored[name] == 2),
            )  # fmt: skip


def _axis(node: Any, place: int, rank: int) -> int:
    if node.op_type in ("Conv", "Gather"):
        return 0
    if node.op_type == "MatMul":
        return rank - 1 if place == 1 else rank - 2
    if node.op_type == "Gemm":
        turned = _attribute(node, "transB" if place else "transA", 0) != 0
        return int(turned != bool(place))
    return 1  # ConvTranspose (in, out, ...); LSTM (directions, 4 hidden, in)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _floats(onnx: Any, graph: Any) -> Iterator[Any]:
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= _FEWEST:
            yield tensor


def _reads(node: Any) -> Iterator[str]:
    """What it reads, its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for one in inner.node:
                yield from _reads(one)
            yield from (out.name for out in inner.output)


def _read_by(graph: Any, names: list[str]) -> set[str]:
    chosen = set(names)
    return {name for node in graph.node if node.name in chosen for name in _reads(node)}


def _drop_unread(graph: Any) -> None:
    read = {name for node in graph.node for name in _reads(node)}
    read |= {one.name for one in graph.output}
    for tensor in [one for one in graph.initializer if one.name not in read]:
        graph.initializer.remove(tensor)


def _unused(graph: Any, name: str) -> str:
    taken = {tensor.name for tensor in graph.initializer}
    taken |= {out for node in graph.node for out in node.output} | {i.name for i in graph.input}
    while name in taken:
        name += "_"
    return name


def _put_first(graph: Any, nodes: list[Any]) -> None:
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def stored_weights(model: Any) -> Counter[str]:
    """How many matrices and filters of the outermost graph are stored in which small type."""
    onnx = require("onnx", extra="onnx")
    found: Counter[str] = Counter()
    packed = {node.input[1]: "int4" for node in model.graph.node if node.op_type == "MatMulNBits"}
    beside = {
        name for node in model.graph.node if node.op_type in _PACKED for name in node.input[2:]
    }
    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if tensor.name in packed:
            found[packed[tensor.name]] += 1
        elif tensor.name in beside:
            continue
        elif kind in (*_INTEGERS, "FLOAT16") and len([d for d in tensor.dims if d > 1]) > 1:
            found[kind.lower()] += 1
    return found


_PACKED = ("MatMulNBits", "GatherBlockQuantized")
