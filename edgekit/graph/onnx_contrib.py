"""Shapes of ONNX Runtime's own operators (domain com.microsoft), which ONNX does not infer.

For inference, each is replaced by an ONNX operator whose output has the same shape and type: fused
and quantized forms keep those of the plain one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["stand_in"]


class _Plain(NamedTuple):
    """An ONNX operator, which inputs it gets, and which attributes."""

    kind: str
    inputs: tuple[int, ...]
    attributes: tuple[str, ...] = ()


_WINDOW = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads",
           "strides")  # fmt: skip
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_SAME = _Plain("Identity", (0,))
_PLAIN = {
    "FusedConv": _Plain("Conv", (0, 1), _CONV),
    "FusedGemm": _Plain("Gemm", (0, 1), ("transA", "transB")),
    "QGemm": _Plain("Gemm", (0, 3), ("transA", "transB")),
    "FusedMatMul": _Plain("MatMul", (0, 1)),
    "TransposeMatMul": _Plain("MatMul", (0, 1)),
    "DynamicQuantizeMatMul": _Plain("MatMul", (0, 1)),
    "QLinearAdd": _Plain("Add", (0, 3)),
    "QLinearMul": _Plain("Mul", (0, 3)),
    "QLinearAveragePool": _Plain("AveragePool", (0,), _WINDOW),
    "QLinearGlobalAveragePool": _Plain("GlobalAveragePool", (0,)),
    **dict.fromkeys(
        (
            "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "QLinearLeakyRelu", "QLinearSigmoid",
            "QLinearSoftmax", "RotaryEmbedding", "SkipLayerNormalization",
            "SkipSimplifiedLayerNormalization", "GroupNorm",
        ),
        _SAME,
    ),
}  # fmt: skip
_TRANSPOSED = ("transA", "transB", "transBatchA", "transBatchB")


def stand_in(node: Any) -> None:
    """Replace a com.microsoft node by one that ONNX can infer, in place; others stay."""
    plain = _PLAIN.get(node.op_type)
    if node.domain != "com.microsoft" or plain is None:
        return
    attributes = {one.name: one for one in node.attribute}
    turned = any(attributes[name].i for name in _TRANSPOSED if name in attributes)
    last = attributes.get("channels_last")
    if (plain.kind == "MatMul" and turned) or (last is not None and last.i):
        return
    if len(node.input) <= max(plain.inputs):
        return
    inputs = [node.input[place] for place in plain.inputs]
    kept = [attributes[name] for name in plain.attributes if name in attributes]
    node.domain, node.op_type = "", plain.kind
    del node.input[:], node.attribute[:], node.output[1:]
    node.input.extend(inputs)
    node.attribute.extend(kept)
