"""Folds what scales and shifts channels into the operator before it: BatchNormalization, and the
multiplication and addition by constants that some exporters write for it.

onnxscript's rules for it (0.7.2) also fold nodes in training mode, which take their statistics from
the batch, turn float16 weights to float32, and know scalars only; hence our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgekit.errors import require

__all__ = ["fold_affine"]

_EPSILON = 1e-5  # ONNX's default


def fold_affine(model: Any) -> int:
    """Fold, in place, what can be; returns how many operators went.

    Inference-mode BatchNormalization with constant statistics, and Mul and Add with a constant per
    channel, behind a Conv, ConvTranspose or Gemm with constant weights, whose output nothing else
    uses, in the outermost graph.
    """
    return sum(_fold(model.graph, node) for node in list(model.graph))


def _fold(graph: Any, node: Any) -> bool:
    before = _foldable(node)
    if before is None:
        return False
    ir = require("onnx_ir", extra="onnx")
    np = require("numpy", extra="onnx")
    weight = before.inputs[1].const_value.numpy()
    affine = _affine(node, before, weight)
    if affine is None:
        return False
    factor, shift = affine
    bias: Any = 0.0
    if len(before.inputs) > 2 and before.inputs[2] is not None:
        bias = before.inputs[2].const_value.numpy().astype("float64")
        bias = bias * _number(before, "beta", 1.0)
    new_weight = (weight * _along_outputs(before, weight, factor)).astype(weight.dtype)
    new_bias = (bias * factor + shift).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return False  # too big for float16: the separate operators still work
    names = _free_names(graph)
    values = []
    for array, what in ((new_weight, "weight"), (new_bias, "bias")):
        name = next(
            n for n in _candidates(f"{before.outputs[0].name}_folded_{what}") if n not in names
        )
        values.append(ir.Value(
            name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name),
        ))  # fmt: skip
        graph.initializers.add(values[-1])
    before.resize_inputs(3)
    before.replace_input_with(1, values[0])
    before.replace_input_with(2, values[1])
    before.attributes.pop("beta", None)  # of Gemm: it is in the bias now
    inner, outer = before.outputs[0], node.outputs[0]
    inner.name, outer.name = outer.name, None
    inner.shape = inner.shape or outer.shape
    outer.replace_all_uses_with(inner, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


def _foldable(node: Any) -> Any:
    """The operator the node can be folded into, or None."""
    if node.op_type not in ("BatchNormalization", "Mul", "Add") or node.domain:
        return None
    if _number(node, "training_mode", 0):
        return None
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None  # running statistics are asked for
    data = _data(node)
    before = data.producer() if data is not None else None
    if (
        before is None
        or before.domain
        or before.op_type not in ("Conv", "ConvTranspose", "Gemm")
        or before.graph is not node.graph
        or len(before.outputs[0].uses()) != 1
        or before.outputs[0].is_graph_output()
    ):
        return None
    constants = [*before.inputs[1:], *(one for one in node.inputs if one is not data)]
    if any(value is not None and not _is_constant(value) for value in constants):
        return None
    kind = before.inputs[1].const_value.dtype.name
    return before if kind in ("FLOAT", "FLOAT16", "DOUBLE") else None


def _data(node: Any) -> Any:
    """The input that is scaled and shifted: the first, or the one that is no constant."""
    if node.op_type == "BatchNormalization" or node.inputs[0] is None:
        return node.inputs[0]
    return node.inputs[1] if _is_constant(node.inputs[0]) else node.inputs[0]


def _is_constant(value: Any) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def _affine(node: Any, before: Any, weight: Any) -> tuple[Any, Any] | None:
    """What the node does to each output channel of `before`, as `(factor, shift)` in float64; None
    where it does not treat whole channels."""
    np = require("numpy", extra="onnx")
    if node.op_type == "BatchNormalization":
        gamma, beta, mean, var = (v.const_value.numpy().astype("float64") for v in node.inputs[1:])
        epsilon = _number(node, "epsilon", _EPSILON)
        factor = gamma / np.sqrt(var + epsilon)
        return factor, beta - mean * factor
    data = _data(node)
    constant = next(one for one in node.inputs if one is not data).const_value.numpy()
    if constant.ndim > weight.ndim:
        return None
    shape = (*[1] * (weight.ndim - constant.ndim), *constant.shape)
    channels = _channels(before, weight)
    if shape[1] not in (1, channels) or constant.size != shape[1]:
        return None
    values = np.broadcast_to(constant.reshape(-1).astype("float64"), (channels,))
    zero, one = np.zeros(channels), np.ones(channels)
    return (values, zero) if node.op_type == "Mul" else (one, values)


def _channels(before: Any, weight: Any) -> int:
    if before.op_type == "Conv":
        return int(weight.shape[0])
    if before.op_type == "Gemm":
        return int(weight.shape[0 if _number(before, "transB", 0) else 1])
    return int(weight.shape[1] * _number(before, "group", 1))


def _along_outputs(before: Any, weight: Any, factor: Any) -> Any:
    """`factor`, one per output channel, shaped to be multiplied with `weight`."""
    if before.op_type == "Conv":
        return factor.reshape(-1, *[1] * (weight.ndim - 1))
    if before.op_type == "Gemm":
        return factor.reshape(-1, 1) if _number(before, "transB", 0) else factor.reshape(1, -1)
    # ConvTranspose: (inputs, outputs / groups, ...), the groups one after the other in `inputs`
    np = require("numpy", extra="onnx")
    groups = int(_number(before, "group", 1))
    rows = np.repeat(factor.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


def _number(node: Any, name: str, default: float) -> float:
    return float(node.attributes[name].value) if name in node.attributes else default


def _candidates(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{i}" for i in range(2, 1 << 30))


def _free_names(graph: Any) -> set[str]:
    values = {*graph.inputs, *graph.initializers.values()}
    return {v.name for v in values} | {v.name for n in graph.all_nodes() for v in n.outputs}
