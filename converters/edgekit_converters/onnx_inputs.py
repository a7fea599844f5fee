"""What users say about the inputs of an ONNX model: names, shapes, dtypes, layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.errors import UsageError, require

__all__ = ["apply_inputs", "apply_layout", "apply_values", "forget_false_names"]

_TO_NHWC = [0, 2, 3, 1]
_TO_NCHW = [0, 3, 1, 2]
Dim = int | str | None


def forget_false_names(model: Any) -> None:
    """Make dimensions of "-1" and "?", which Paddle's exporter writes for any number, unnamed."""
    ir = require("onnx_ir", extra="onnx")
    for value in _values(model):
        if value.shape is not None:
            dims = [
                None if dim == "?" or (isinstance(dim, int) and dim < 0) else dim
                for dim in _dims(value.shape)
            ]
            if dims != _dims(value.shape):
                value.shape = ir.Shape(dims)


def apply_inputs(model: Any, wanted: Mapping[str, Mapping[str, Any]]) -> bool:
    """Set shapes of inputs (`{name: {"shape": [...], "dtype": ...}}`), in place.

    A symbol means the same number everywhere, so what one becomes it becomes in every tensor.
    Returns whether anything changed.

    Raises:
        UsageError: there is no such input, or the model contradicts.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    symbols: dict[str, Dim] = {}
    changed = False
    for name, spec in wanted.items():
        if name not in inputs:
            raise UsageError(f"no input {name!r}; inputs: {', '.join(map(repr, inputs))}")
        _check_dtype(name, inputs[name], spec.get("dtype"))
        if spec.get("shape") is not None:
            changed |= _set_shape(name, inputs[name], list(spec["shape"]), symbols)
    if changed:
        _rename_symbols(model, symbols)
    return changed


def apply_values(model: Any, values: Mapping[str, float]) -> None:
    """Make inputs that are always the same constants of the model, in place; a free dimension of
    theirs becomes 1.

    Raises:
        UsageError: there is no such input, or it cannot hold the value.
    """
    ir = require("onnx_ir", extra="onnx")
    inputs = {value.name: value for value in model.graph.inputs}
    for name, number in values.items():
        if name not in inputs:
            raise UsageError(f"--set: no input {name!r}; inputs: {', '.join(map(repr, inputs))}")
        value = inputs[name]
        dims = [dim if isinstance(dim, int) else 1 for dim in _dims(value.shape or ir.Shape([]))]
        dtype = value.dtype.numpy()
        if value.dtype.name == "STRING" or np.array(number).astype(dtype) != number:
            raise UsageError(f"--set {name}={number:g}: the input is {dtype}")
        value.const_value = ir.tensor(np.full(dims, number, dtype), name=name)
        value.shape = ir.Shape(dims)
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)


def _check_dtype(name: str, value: Any, wanted: str | None) -> None:
    has = "string" if value.dtype.name == "STRING" else str(value.dtype.numpy())
    if wanted is not None and wanted != has:
        raise UsageError(f"input {name!r} is {has}, not {wanted}; feed {has}")


def _dims(shape: Any) -> list[Dim]:
    return [dim if isinstance(dim, int) else dim.value for dim in shape]


def _set_shape(name: str, value: Any, wanted: list[int | str], symbols: dict[str, Dim]) -> bool:
    ir = require("onnx_ir", extra="onnx")
    if value.shape is None:
        value.shape = ir.Shape(wanted)
        return True
    has = _dims(value.shape)
    if len(has) != len(wanted):
        raise UsageError(f"input {name!r} has {len(has)} dimensions {_text(has)}, not {wanted}")
    for old, new in zip(has, wanted, strict=True):
        if (isinstance(old, int) and old != new) or symbols.get(str(old), new) != new:
            raise UsageError(f"input {name!r} is {_text(has)}, cannot be {_text(wanted)}")
        if isinstance(old, str):
            symbols[old] = new
    value.shape = ir.Shape(wanted)
    return has != wanted


def _text(shape: Sequence[Dim]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in shape)


def _rename_symbols(model: Any, symbols: Mapping[str, Dim]) -> None:
    ir = require("onnx_ir", extra="onnx")
    for value in _values(model):
        if value.shape is not None:
            dims = [symbols.get(d, d) if isinstance(d, str) else d for d in _dims(value.shape)]
            value.shape = ir.Shape(dims)


def _values(model: Any) -> Iterator[Any]:
    """Everything computed and fed, in all graphs."""
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def apply_layout(model: Any, layout: str) -> dict[str, list[int]]:
    """Make rank-4 inputs take `layout` ("nchw" or "nhwc"), by a Transpose behind each.

    An input is taken to be NCHW, as ONNX's operators are, unless all that is done to it first is a
    Transpose from NHWC. Returns, for the inputs that changed, the permutation that turns an array
    for the original input into one for the new.

    Raises:
        UsageError: no input has four dimensions, or `layout` is none.
    """
    if layout not in ("nchw", "nhwc"):
        raise UsageError(f"no layout {layout!r}; known: nchw, nhwc")
    images = [v for v in model.graph.inputs if v.shape is not None and len(v.shape) == 4]
    if not images:
        shapes = ", ".join(
            f"{v.name!r} {_text(_dims(v.shape)) if v.shape is not None else 'of unknown rank'}"
            for v in model.graph.inputs
        )
        raise UsageError(f"--layout {layout} is about inputs of four dimensions; here: {shapes}")
    changed = {}
    for value in images:
        if ("nhwc" if _from_nhwc(value) else "nchw") != layout:
            changed[value.name] = _TO_NHWC if layout == "nhwc" else _TO_NCHW
            _transpose(model.graph, value, changed[value.name])
    return changed


def _from_nhwc(value: Any) -> bool:
    return bool(value.consumers()) and all(
        node.op_type == "Transpose"
        and node.domain == ""
        and "perm" in node.attributes
        and list(node.attributes["perm"].as_ints()) == _TO_NCHW
        for node in value.consumers()
    )


def _transpose(graph: Any, value: Any, permutation: list[int]) -> None:
    """Permute the input's dimensions; what used it uses the Transpose back."""
    ir = require("onnx_ir", extra="onnx")
    if value.is_graph_output():
        raise UsageError(f"input {value.name!r} is an output too; its layout cannot be changed")
    original = _dims(value.shape)
    users = list(value.uses())
    value.shape = ir.Shape([original[axis] for axis in permutation])
    results = [user.outputs[0] for user, _ in users]
    if permutation == _TO_NCHW and not any(result.is_graph_output() for result in results):
        for result in results:  # a Transpose from NHWC each: no longer needed
            result.replace_all_uses_with(value)
        return
    back = [permutation.index(axis) for axis in range(len(permutation))]
    node = ir.node("Transpose", [value], {"perm": back}, name=f"{value.name}_layout")
    output = node.outputs[0]
    output.name, output.type = f"{value.name}_original_layout", value.type
    output.shape = ir.Shape(original)
    for user, index in users:
        user.replace_input_with(index, output)
    graph.insert_before(next(iter(graph)), node)
