"""Folds the transposition before a flattened matrix product into the weights of the product.

PyTorch flattens NCHW tensors, TFLite computes in NHWC: what comes out of onnx2tf turns the channels
back at run time, each time, before the first fully connected layer.
"""

from __future__ import annotations

from typing import Any

from edgekit.errors import require

__all__ = ["fold_flatten"]

_FLOAT32 = 0  # TensorType


def fold_flatten(model: Any) -> int:
    """Fold, in place, every TRANSPOSE that only a RESHAPE to (samples, values) takes, and that only
    a FULLY_CONNECTED with constant float32 weights of its own; returns how many went.

    `model` is a `ModelT` of LiteRT's schema.
    """
    operators = require(
        "ai_edge_litert.schema_py_generated", extra="tflite-convert"
    ).BuiltinOperator
    graph = model.subgraphs[0]
    made = {tensor: one for one in graph.operators for tensor in one.outputs}
    uses: dict[int, int] = dict.fromkeys(graph.outputs, 1)
    for one in graph.operators:
        for tensor in one.inputs:
            uses[tensor] = uses.get(tensor, 0) + 1

    def before(operator: Any, code: int) -> Any | None:
        """What makes its first input, if that is of this kind and nothing else takes it."""
        one = made.get(operator.inputs[0])
        if one is None or model.operatorCodes[one.opcodeIndex].builtinCode != code:
            return None
        return one if uses[operator.inputs[0]] == 1 else None

    folded = 0
    for product in list(graph.operators):
        if model.operatorCodes[product.opcodeIndex].builtinCode != operators.FULLY_CONNECTED:
            continue
        reshape = before(product, operators.RESHAPE)
        transpose = before(reshape, operators.TRANSPOSE) if reshape else None
        if (
            reshape
            and transpose
            and uses[product.inputs[1]] == 1
            and _fold(model, product, reshape, transpose)
        ):
            reshape.inputs = [transpose.inputs[0], *reshape.inputs[1:]]
            graph.operators.remove(transpose)
            folded += 1
    return folded


def _fold(model: Any, product: Any, reshape: Any, transpose: Any) -> bool:
    """Reorder the weights; False where rows are not those of one sample, or weights not known."""
    np = require("numpy", extra="tflite-convert")
    tensors = model.subgraphs[0].tensors
    weights, source = tensors[product.inputs[1]], tensors[transpose.inputs[0]]
    data = model.buffers[weights.buffer].data
    axes = model.buffers[tensors[transpose.inputs[1]].buffer].data
    if weights.type != _FLOAT32 or data is None or axes is None or source.shape is None:
        return False
    order = np.frombuffer(bytes(axes), np.int32)
    samples, rest = source.shape[0], source.shape[1:]
    rows = list(tensors[reshape.outputs[0]].shape) == [samples, np.prod(rest)]
    shared = sum(one.buffer == weights.buffer for one in tensors) > 1
    if order[0] != 0 or not rows or shared:
        return False
    taken = np.arange(np.prod(rest)).reshape(rest).transpose(order[1:] - 1).reshape(-1)
    was = np.frombuffer(bytes(data), np.float32).reshape(weights.shape)
    now = np.empty_like(was)
    now[:, taken] = was
    model.buffers[weights.buffer].data = np.frombuffer(now.tobytes(), np.uint8)
    return True
