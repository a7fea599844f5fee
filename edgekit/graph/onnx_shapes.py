"""Shapes of all tensors of an ONNX model, by ONNX's shape inference.

Inference stops where a shape is computed by operators (exported Reshape and Slice arguments). When
the shapes these start from are fixed, that arithmetic has one answer: it is evaluated, put into the
graph in place of the operators, and inference goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit.graph.model import Shape
from edgekit.graph.onnx_contrib import stand_in

__all__ = [
    "array_of",
    "dtype_name",
    "fix_shapes",
    "infer",
    "live_branch",
    "shape_of",
    "subgraphs",
    "symbols_in",
]

#: what is evaluated, and up to how many numbers: arguments of Reshape and the like are few
_ARITHMETIC = frozenset(
    """Abs Add And Cast Ceil Concat ConstantOfShape Div Equal Expand Flatten Floor Gather
        Greater GreaterOrEqual Identity Less LessOrEqual Max Min Mod Mul Neg Not Or Range
        ReduceMax ReduceMin ReduceProd ReduceSum Reshape ScatterND Shape Size Slice Split Sqrt
        Squeeze Sub Tile Transpose Unsqueeze Where""".split()  # noqa: SIM905
)
_MOST_ELEMENTS = 4096
#: each round gets behind one more computed shape; PP-OCR recognition takes 3
_MOST_ROUNDS = 30


def fix_shapes(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """Set the shapes of inputs, in place; a symbol means the same number everywhere.

    What was noted for other tensors is forgotten, so that it is inferred anew. Returns what the
    model declares its outputs to be then, for those that inference says less of.

    Raises:
        UsageError: no such input, wrong rank, another fixed dimension, or one symbol with two
            values.
    """
    if not shapes:
        return {}
    stored = {one.name for one in model.graph.initializer}
    inputs = {one.name: one.type for one in model.graph.input if one.name not in stored}
    symbols: dict[str, int] = {}
    for name, wanted in shapes.items():
        if name not in inputs:
            raise UsageError(f"no input {name!r}; inputs: {', '.join(inputs)}")
        symbols |= _fixed_symbols(name, shape_of(inputs[name]), wanted, symbols)
        dims = inputs[name].tensor_type.shape.dim
        while len(dims) < len(wanted):  # of unknown rank until now
            dims.add()
        for dim, value in zip(dims, wanted, strict=True):
            dim.dim_value = value
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = symbols[dim.dim_param]
    declared = {one.name: shape_of(one.type) for one in model.graph.output}
    for graph in _graphs(model.graph):
        for value in graph.output:
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
        del graph.value_info[:]
    return {name: shape for name, shape in declared.items() if shape is not None}


def _fixed_symbols(
    name: str, has: Shape | None, wanted: Sequence[int], before: Mapping[str, int]
) -> dict[str, int]:
    """What an input's symbols become, `before` given; refuses what contradicts the model."""
    if has is None:
        return {}
    if len(has) != len(wanted):
        raise UsageError(f"input {name!r} has {len(has)} dimensions, not {len(wanted)}")
    symbols = dict(before)
    for dim, value in zip(has, wanted, strict=True):
        if (symbols.get(dim, value) if isinstance(dim, str) else dim) != value:
            raise UsageError(f"input {name!r} is {list(has)}, cannot be {list(wanted)}")
        if isinstance(dim, str) and dim != "?":
            symbols[dim] = value
    return symbols


def infer(model: Any) -> tuple[Any, dict[str, Any]]:
    """A copy of the model that knows its shapes (without big weights), and what operators compute
    that follows from them: `{name in the outermost graph: array}`. `live_branch` tells of an If
    in the copy which branch is the only one that runs.

    Raises:
        ModelError: inference refuses the model.
    """
    onnx = require("onnx", extra="onnx")
    require("onnx.shape_inference", extra="onnx")
    work = type(model)()
    work.CopyFrom(model)
    for graph in _graphs(work.graph):
        for node in graph.node:
            node.ClearField("doc_string")  # see _drop_dead_branch
            stand_in(node)
    _drop_big_constants(work.graph)
    known: dict[str, Any] = {}
    for _ in range(_MOST_ROUNDS):
        try:
            work = onnx.shape_inference.infer_shapes(work, data_prop=True)
        except Exception as error:
            raise ModelError(f"ONNX cannot infer its shapes: {one_line(error)}") from None
        if not _fold(work, work.graph, dict(known), {}, known):
            break
    return work, known


def _drop_big_constants(graph: Any) -> None:
    """Keep the type of a big weight, not its data: inference does not look at it."""
    from onnx import helper

    for one in _graphs(graph):
        for store in (one.initializer, one.sparse_initializer):
            for index in range(len(store) - 1, -1, -1):
                tensor = store[index] if store is one.initializer else store[index].values
                dims = store[index].dims
                if math.prod(dims) > _MOST_ELEMENTS or store is not one.initializer:
                    info = helper.make_tensor_value_info(tensor.name, tensor.data_type, dims)
                    one.value_info.append(info)
                    del store[index]
        for index in range(len(one.node) - 1, -1, -1):
            node = one.node[index]
            value = node.attribute[0] if node.op_type == "Constant" and node.attribute else None
            if value is not None and math.prod(value.t.dims) > _MOST_ELEMENTS:
                info = helper.make_tensor_value_info(
                    node.output[0], value.t.data_type, value.t.dims
                )
                one.value_info.append(info)
                del one.node[index]


def _fold(
    model: Any,
    graph: Any,
    outer: Mapping[str, Any],
    around: Mapping[str, Shape | None],
    found: dict[str, Any],
) -> bool:
    """Replace what can be computed now by its values, which go to `found`; `outer` is what is
    known in the graphs around, `around` their shapes. False if there was nothing."""
    from onnx import numpy_helper

    known = dict(outer)
    for tensor in graph.initializer:
        with suppress(Exception):
            known[tensor.name] = numpy_helper.to_array(tensor)
    shapes = dict(around)
    shapes.update((one.name, shape_of(one.type)) for one in (*graph.value_info, *graph.input))
    outputs = {one.name for one in graph.output}
    changed = False
    done = []
    for index, node in enumerate(graph.node):
        if node.op_type == "If" and node.input[0] in known:
            changed |= _drop_dead_branch(node, bool(known[node.input[0]]))
        for inner, _ in subgraphs(node):
            changed |= _hand_in(inner, known)
            changed |= _fold(model, inner, known, shapes, {})
        values = _evaluated(model, node, known, shapes)
        if values is None:
            continue
        known.update(values)
        if node.op_type != "Constant" and not outputs & values.keys():
            found.update(values)
            done.append(index)
            graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    for index in reversed(done):
        del graph.node[index]
    return changed or bool(done)


def _drop_dead_branch(node: Any, condition: bool) -> bool:
    """Put the branch that runs in place of the other, so that their shapes agree; the node's
    doc_string, empty in the copy, says which it is. False if that was done before."""
    if node.doc_string:
        return False
    node.doc_string = "then_branch" if condition else "else_branch"
    branches = {one.name: one for one in node.attribute}
    for name, branch in branches.items():
        if name != node.doc_string:
            branch.g.CopyFrom(branches[node.doc_string].g)
    return True


def _hand_in(body: Any, known: Mapping[str, Any]) -> bool:
    """Store in a body what it uses of the graphs around: inference does not look there for
    values. False if that was done before."""
    from onnx import numpy_helper

    used = {name for node in body.node for name in node.input}
    own = {one.name for one in (*body.initializer, *body.input)}
    own.update(name for node in body.node for name in node.output)
    missing = sorted((used & known.keys()) - own)
    body.initializer.extend(numpy_helper.from_array(known[name], name) for name in missing)
    return bool(missing)


def live_branch(node: Any) -> str | None:
    """The attribute with the only branch of an If that runs, in a model from `infer`; None: both
    may."""
    return node.doc_string or None if node.op_type == "If" else None


def _evaluated(
    model: Any, node: Any, known: Mapping[str, Any], shapes: Mapping[str, Shape | None]
) -> dict[str, Any] | None:
    """Its outputs, if it is shape arithmetic whose arguments are known."""
    import numpy as np

    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Constant" and node.attribute:
        with suppress(Exception):
            return {node.output[0]: array_of(node)}
    elif node.op_type == "Shape" and node.input[0] not in known:
        shape = _fixed(shapes, node.input[0])
        if shape is not None:
            bounds = {one.name: one.i for one in node.attribute}
            part = shape[slice(bounds.get("start", 0), bounds.get("end"))]
            return {node.output[0]: np.array(part, np.int64)}
    elif node.op_type in _ARITHMETIC and node.input:
        given = {name: known[name] for name in node.input if name in known}
        sizes = [array.size for array in given.values()]
        sizes += [math.prod(_fixed(shapes, name) or ()) for name in node.output]
        if given.keys() == set(filter(None, node.input)) and max(sizes) <= _MOST_ELEMENTS:
            with suppress(Exception):  # what is wrong with it, the engine will say
                return _run(model, node, given)
    return None


def _fixed(shapes: Mapping[str, Shape | None], name: str) -> tuple[int, ...] | None:
    """A shape, if known; unknown ones are those of small arguments."""
    shape = shapes.get(name)
    if shape is None or any(isinstance(dim, str) for dim in shape):
        return None
    return tuple(int(dim) for dim in shape)


def _run(model: Any, node: Any, given: Mapping[str, Any]) -> dict[str, Any] | None:
    import numpy as np
    from onnx import TypeProto, ValueInfoProto, helper
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.output if name]
    if node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range"):
        asked = [np.prod(a, dtype=float) for a in given.values() if a.ndim == 1]
        if node.op_type == "Range":
            start, limit, delta = (float(given[name]) for name in node.input)
            asked = [(limit - start) / delta]
        if any(count > _MOST_ELEMENTS for count in asked):
            return None
    inputs = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for k, v in given.items()
    ]
    outputs = [ValueInfoProto(name=name, type=TypeProto()) for name in names]
    graph = helper.make_graph([node], "arithmetic", inputs, outputs)
    one = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    with np.errstate(all="ignore"):
        values = ReferenceEvaluator(one).run(names, dict(given))
    if any(array.size > _MOST_ELEMENTS for array in map(np.asarray, values)):
        return None
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def array_of(node: Any) -> Any:
    """The value of a Constant node."""
    import numpy as np
    from onnx import helper, numpy_helper

    value = helper.get_attribute_value(node.attribute[0])
    name = node.attribute[0].name
    if name == "value":
        return numpy_helper.to_array(value)
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32,
             "value_floats": np.float32}  # fmt: skip
    return np.array(value, kinds.get(name))


def subgraphs(node: Any) -> Iterator[tuple[Any, str]]:
    """The bodies of a control-flow node, with their attributes' names."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g, attribute.name
        for index, graph in enumerate(attribute.graphs):
            yield graph, f"{attribute.name}_{index}"


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for inner, _ in subgraphs(node):
            yield from _graphs(inner)


def shape_of(kind: Any) -> Shape | None:
    """The shape in a TypeProto; free dimensions by their symbol, "?" without one."""
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims: list[int | str] = []
    for dim in kind.tensor_type.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(dim.dim_value)
        else:
            dims.append(dim.dim_param or "?")
    return tuple(dims)


def symbols_in(graph: Any) -> set[str]:
    """The names that a model's author gave to dimensions; inference invents others."""
    infos = (v for g in _graphs(graph) for v in (*g.input, *g.output, *g.value_info))
    shapes = (shape_of(info.type) for info in infos)
    return {dim for shape in shapes for dim in shape or () if isinstance(dim, str)}


def dtype_name(number: int) -> str | None:
    """numpy's name of a TensorProto.DataType; None if undefined."""
    from onnx import TensorProto

    if not number:
        return None
    with suppress(ValueError):
        name = str(TensorProto.DataType.Name(number)).lower()
        return {"float": "float32", "double": "float64"}.get(name, name)
    return None
