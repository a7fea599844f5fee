"""What both uses of tf2onnx need: the opsets it writes, and an honest interface afterwards.

tf2onnx goes on where it cannot convert an operator, and leaves it in the graph under TensorFlow's
or TFLite's name; the inputs and outputs come in no promised order, with made-up dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require

__all__ = ["checked_opset", "finish"]

#: tf2onnx 1.17 writes 18 at most (its `constants.OPSET_TO_IR_VERSION`)
_OPSET = 18

Shape = tuple[int | str, ...]


def checked_opset(wanted: int | None, oldest: int) -> int:
    """The opset to write.

    Raises:
        UsageError: tf2onnx does not write the one that is wanted.
    """
    if wanted is not None and not oldest <= wanted <= _OPSET:
        raise UsageError(
            f"tf2onnx writes opsets {oldest} to {_OPSET} here, not {wanted}; leave --opset out"
        )
    return wanted or _OPSET


def finish(
    model: Any,
    target: str,
    inputs: Mapping[str, Shape | None],
    outputs: Mapping[str, Shape | None],
    unused: Mapping[str, str],
) -> None:
    """Save the model with exactly these inputs and outputs, in this order, free dimensions named.

    `unused` are inputs without influence, and their dtype: tf2onnx may drop them.

    Raises:
        ModelError: an operator was not converted, or an input or output is lost or made up.
    """
    onnx = require("onnx", extra="onnx")
    _refuse_unmapped(onnx, model)
    graph = model.graph
    weights = {one.name for one in graph.initializer}
    found = {value.name: value for value in graph.input if value.name not in weights}
    made = {value.name: value for value in graph.output}
    for name, dtype in unused.items():
        if name not in found:
            kind = onnx.helper.np_dtype_to_tensor_dtype(_dtype(dtype))
            found[name] = onnx.helper.make_tensor_value_info(name, kind, inputs[name])
    strays = (set(found) ^ set(inputs)) | (set(made) ^ set(outputs))
    if strays:
        raise ModelError(f"tf2onnx lost or made up {min(strays)!r}, an input or output")
    for values, by_name, wanted in ((graph.input, found, inputs), (graph.output, made, outputs)):
        del values[:]
        values.extend(by_name[name] for name in wanted)
        for value, shape in zip(values, wanted.values(), strict=True):
            _name_dimensions(value.type.tensor_type.shape.dim, shape)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"tf2onnx made an invalid ONNX model: {one_line(error)}") from None
    onnx.save(model, target)


def _dtype(name: str) -> Any:
    import numpy as np

    return np.dtype(name)


def _name_dimensions(dims: Sequence[Any], shape: Shape | None) -> None:
    if shape is None or len(dims) != len(shape):
        return
    for dim, size in zip(dims, shape, strict=True):
        if not dim.HasField("dim_value"):
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = size


def _refuse_unmapped(onnx: Any, model: Any) -> None:
    opsets = {one.domain: one.version for one in model.opset_import}
    for node in _nodes(model.graph):
        if not onnx.defs.has(node.op_type, opsets.get(node.domain, 1), node.domain):
            raise ModelError(
                f"tf2onnx has no counterpart for {node.op_type.removeprefix('TFL_')} ({node.name}) "
                f"in opset {opsets.get('', 0)}; replace it in the model, or end the model before it"
            )


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
            for one in attribute.graphs:
                yield from _nodes(one)
