"""Writes an ONNX graph so that onnx2tf (1.28) understands it: same numbers, plainer words.

What it takes, each found on a public model: names with `;`, `@` or `:` break TensorFlow's scopes
(basic-pitch, PP-OCR cls); a Slice of every axis, or with axes out of order, is cut along the wrong
one (basic-pitch, silero-vad); an If looks for constants in its branches only and runs both anyway
(silero-vad); outputs of rank 4 come out with the channels last (PP-OCR det).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, require
from edgekit_converters.onnx import simplify

__all__ = ["plain_graph"]

_CHOICE = "the result of If "
_BEYOND = 2**31 - 1  # what exporters write for "to the end", or more


def plain_graph(model: Any, target: Path) -> tuple[list[str], list[str]]:
    """Write the model (`onnx_ir`, changed in place) for onnx2tf; its new input and output names.

    Raises:
        ModelError: it has loops, or an If whose branches give different shapes.
    """
    ir = require("onnx_ir", extra="tflite-convert")
    passes = require("onnx_ir.passes.common", extra="tflite-convert")
    while branching := [node for node in model.graph if _has_graphs(node)]:
        for node in branching:
            _select(model.graph, node)
        passes.NameFixPass()(model)
        simplify(model)  # an inner If often asks for a shape, which is known outside of it only
    _check_branches(model.graph)
    graph = model.graph
    for node in graph:
        if node.op_type == "Slice" and node.domain == "":
            _plain_slice(graph, node)
    for index, value in enumerate(graph.outputs):
        _keep_layout(graph, index, value)
    passes.RemoveUnusedNodesPass()(model)
    _plain_names(model)
    ir.save(model, target)
    return [v.name for v in graph.inputs], [v.name for v in graph.outputs]


def _has_graphs(node: Any) -> bool:
    return any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values())


def _select(graph: Any, node: Any) -> None:
    """Compute both branches of an If and take one's results."""
    ir = require("onnx_ir", extra="tflite-convert")
    if node.op_type != "If":
        raise ModelError(
            f"onnx2tf cannot convert the model: {node.op_type} {node.name!r} is a loop; unroll it "
            "where the model is exported"
        )
    results = []
    for branch in ("then_branch", "else_branch"):
        inner = node.attributes[branch].as_graph()
        results.append(list(inner.outputs))
        nodes = list(inner)
        inner.outputs.clear()
        inner.remove(nodes)
        graph.insert_before(node, nodes)
    for then, other, output in zip(*results, node.outputs, strict=True):
        choice = ir.node("Where", [node.inputs[0], then, other], name=f"{_CHOICE}{node.name}")
        choice.outputs[0].type = output.type
        name, output.name = output.name, f"{output.name}_unused"
        choice.outputs[0].name = name
        graph.insert_before(node, choice)
        output.replace_all_uses_with(choice.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _check_branches(graph: Any) -> None:
    """Both results of an If are computed with the same fixed shape."""
    for node in graph:
        if node.name is not None and node.name.startswith(_CHOICE):
            _, then, other = (value.shape for value in node.inputs)
            if then is None or not then.is_static() or then != other:
                raise ModelError(
                    f"onnx2tf cannot convert the model: the branches of If "
                    f"{node.name.removeprefix(_CHOICE)!r} make shapes {then} and {other} of "
                    f"{node.outputs[0].name!r}; make the input that decides a constant "
                    "(--set NAME=NUMBER)"
                )


def _plain_slice(graph: Any, node: Any) -> None:
    """One Slice for each axis that is cut at all, with starts and ends from 0 on."""
    ir = require("onnx_ir", extra="tflite-convert")
    np = require("numpy", extra="tflite-convert")
    data, *rest = node.inputs
    constants = [None if value is None else value.const_value for value in rest]
    if data.shape is None or not data.shape.is_static() or any(
        value is not None and constant is None
        for value, constant in zip(rest, constants, strict=True)
    ):  # fmt: skip
        return
    shape = data.shape.numpy()
    numbers: list[Any] = [None if one is None else one.numpy().tolist() for one in constants]
    starts, ends, axes, steps = (*numbers, None, None)[:4]
    axes = axes or range(len(starts))
    steps = steps or [1] * len(starts)
    cuts = sorted(
        (axis % len(shape), *slice(start, end if abs(end) < _BEYOND else None, step).indices(
            shape[axis]), step)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    )  # fmt: skip
    if any(step < 1 for *_, step in cuts):
        return
    value = data
    for axis, start, end, step, _ in cuts:
        if (start, end, step) == (0, shape[axis], 1):
            continue
        arguments = []
        for what, number in (("start", start), ("end", end), ("axis", axis), ("step", step)):
            name = f"{node.outputs[0].name}_{what}_{axis}"
            tensor = ir.tensor(np.array([number], "int64"), name=name)
            arguments.append(ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            ))  # fmt: skip
            graph.initializers.add(arguments[-1])
        cut = ir.node("Slice", [value, *arguments])
        value = cut.outputs[0]
        value.name, value.type = f"{node.outputs[0].name}_{axis}", data.type
        shape = (*shape[:axis], len(range(start, end, step)), *shape[axis + 1 :])
        value.shape = ir.Shape(shape)
        graph.insert_before(node, cut)
    if value is data and node.outputs[0].is_graph_output():
        return
    name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    node.outputs[0].name = f"{name}_unused"
    if value is not data:
        value.name = name
    graph.remove(node, safe=True)


def _keep_layout(graph: Any, index: int, value: Any) -> None:
    """End with a Reshape to the very same shape: onnx2tf turns the channels back for it."""
    ir = require("onnx_ir", extra="tflite-convert")
    np = require("numpy", extra="tflite-convert")
    if value.shape is None or len(value.shape) < 3 or not value.shape.is_static():
        return
    name = f"{value.name}_shape"
    tensor = ir.tensor(np.array(value.shape.numpy(), "int64"), name=name)
    shape = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers.add(shape)
    node = ir.node("Reshape", [value, shape])
    output = node.outputs[0]
    output.name, output.type, output.shape = value.name, value.type, value.shape
    value.name = f"{value.name}_before_layout"
    graph.append(node)
    graph.outputs[index] = output


def _plain_names(model: Any) -> None:
    """Names that TensorFlow's scopes allow, near the old ones; each node called as its output."""
    graph = model.graph
    used: set[str] = set()
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    values += [output for node in graph for output in node.outputs]
    for value in dict.fromkeys(values):
        if value.name:  # an output that is left out has none
            plain = re.sub(r"^[^A-Za-z0-9.]|[^A-Za-z0-9_.]", "_", value.name).lstrip("_") or "x"
            name, number = plain, 2
            while name.lower() in used:  # Keras' layers differ by more than case
                name, number = f"{plain}_{number}", number + 1
            used.add(name.lower())
            value.name = name
    for node in graph:
        node.name = next(output.name for output in node.outputs if output.name)
