"""Multiply-accumulates of one operator, from shapes.

Counted: convolutions, matrix products, recurrent cells, attention. All else (elementwise,
normalization, pooling, resizing, Fourier transforms) counts 0, as papers and vendors count. The
products with padding are counted, as they are computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgekit.graph.model import Shape

__all__ = ["count_macs"]

Shapes = Sequence[Shape | None]
Attributes = Mapping[str, Any]
_Formula = Callable[["_Call"], int]


class _UnknownError(Exception):
    """A dimension or an attribute that the formula needs is not known."""


class _Call:
    """One operator's shapes; asking for what is not there ends the count."""

    def __init__(self, inputs: Shapes, outputs: Shapes, attributes: Attributes) -> None:
        self._inputs, self._outputs, self.attributes = inputs, outputs, attributes

    def x(self, place: int) -> tuple[int, ...]:
        """The shape of an input."""
        return _fixed(self._inputs, place)

    def y(self, place: int = 0) -> tuple[int, ...]:
        """The shape of an output."""
        return _fixed(self._outputs, place)

    def given(self, place: int) -> bool:
        """Whether an optional input is there."""
        return place < len(self._inputs) and self._inputs[place] != ()

    def number(self, name: str) -> int:
        value = self.attributes.get(name)
        if not isinstance(value, int):
            raise _UnknownError
        return value


def count_macs(
    fmt: str, kind: str, inputs: Shapes, outputs: Shapes, attributes: Attributes, *, custom: bool
) -> int | None:
    """MACs of an operator by its native name; absent inputs have shape ().

    None if a dimension is unknown, or the operator is: a custom one without a formula here.
    """
    formula = _FORMULAS[fmt].get(kind)
    if formula is None:
        return None if custom and kind not in _WITHOUT else 0
    try:
        return formula(_Call(inputs, outputs, attributes))
    except (_UnknownError, ZeroDivisionError):
        return None


def _fixed(shapes: Shapes, place: int) -> tuple[int, ...]:
    shape = shapes[place] if place < len(shapes) else None
    if not shape or any(isinstance(dim, str) for dim in shape):
        raise _UnknownError
    return tuple(int(dim) for dim in shape)


def _convolution(weight: int, axis: int) -> _Formula:
    """`axis` is that of the channels. Every output position meets every weight once: a weight
    tensor holds (output channels, input channels of the group, kernel), in whatever layout."""

    def count(call: _Call) -> int:
        out = call.y()
        return math.prod(out) // out[axis] * math.prod(call.x(weight))

    return count


def _transposed(data: int, weight: int, axis: int) -> _Formula:
    """Every input position meets every weight once."""

    def count(call: _Call) -> int:
        source = call.x(data)
        return math.prod(source) // source[axis] * math.prod(call.x(weight))

    return count


def _product(first: int = 0, transposed: str = "") -> _Formula:
    """Output elements times the length of what is summed over: the last axis of the first
    operand, or the one before where the attribute `transposed` is set."""

    def count(call: _Call) -> int:
        left = call.x(first)
        turned = bool(transposed and call.attributes.get(transposed)) and len(left) > 1
        # a product of two vectors has no output dimension: prod(()) is 1
        out = call._outputs[0] if call._outputs else None
        if out is None or any(isinstance(dim, str) for dim in out):
            raise _UnknownError
        return math.prod(int(dim) for dim in out) * left[-2 if turned else -1]

    return count


def _recurrent(*weights: int, steps: slice = slice(0, 2)) -> _Formula:
    """Each weight is used once for each step of each sequence of the batch; `steps` are those
    axes of the first input."""

    def count(call: _Call) -> int:
        used = sum(math.prod(call.x(w)) for w in weights if call.given(w) and len(call.x(w)) > 1)
        return math.prod(call.x(0)[steps]) * used

    return count


def _svdf(call: _Call) -> int:
    return call.x(0)[0] * (math.prod(call.x(1)) + math.prod(call.x(2)))


def _einsum(call: _Call) -> int:
    equation = re.sub(r"\s", "", str(call.attributes.get("equation", "")))
    terms, arrow, out = equation.partition("->")
    operands = terms.split(",")
    if not arrow or "." in equation or len(operands) > 2:
        raise _UnknownError
    sizes: dict[str, int] = {}
    for place, letters in enumerate(operands):
        shape = call.x(place)
        if len(shape) != len(letters):
            raise _UnknownError
        sizes.update(zip(letters, shape, strict=True))
    if len(operands) < 2 or set(sizes) == set(out):
        return 0  # a transpose or a sum; a product without one
    return math.prod(sizes.values())


def _attention(call: _Call) -> int:
    """Query (B, H, L, E) or (B, L, H E), key, value: two matrix products."""
    query, key, value = call.x(0), call.x(1), call.x(2)
    if call.given(4) or call.given(5):  # a cache of unknown use
        raise _UnknownError
    if len(query) == 4:
        return math.prod(query[:3]) * key[2] * (query[3] + value[3])
    heads, groups = call.number("q_num_heads"), call.number("kv_num_heads")
    return query[0] * query[1] * key[1] * (query[2] + value[2] * heads // groups)


def _fused_attention(call: _Call) -> int:
    """com.microsoft: input (B, L, D), weights (D, Q + K + V): projections and two products."""
    batch, length, _ = call.x(0)
    depth, width = call.x(1)
    if call.given(4):
        raise _UnknownError
    return batch * length * (depth * width + 2 * length * call.y()[-1])


def _multi_head(call: _Call) -> int:
    """com.microsoft: query (B, L, D), key (B, S, D), value (B, S, D), nothing packed or cached."""
    query, key, value = call.x(0), call.x(1), call.x(2)
    if len({len(query), len(key), len(value), 3}) > 1 or call.given(6) or call.given(7):
        raise _UnknownError
    return query[0] * query[1] * key[1] * (query[2] + value[2])


def _scaled_dot_product(call: _Call) -> int:
    """OpenVINO: query (..., L, E), key (..., S, E), value (..., S, Ev)."""
    query, key, value = call.x(0), call.x(1), call.x(2)
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _wide(call: _Call) -> int:
    """Weights in a packed form: K is the input's last axis, N the attribute."""
    return math.prod(call.x(0)) * call.number("N")


def _not_known(call: _Call) -> int:
    raise _UnknownError


_RNN = _recurrent(1, 2)
_ONNX: dict[str, _Formula] = {
    "Conv": _convolution(1, 1), "ConvInteger": _convolution(1, 1),
    "QLinearConv": _convolution(3, 1), "DeformConv": _convolution(1, 1),
    "ConvTranspose": _transposed(0, 1, 1),
    "MatMul": _product(), "MatMulInteger": _product(), "QLinearMatMul": _product(),
    "Gemm": _product(transposed="transA"), "LSTM": _RNN, "GRU": _RNN, "RNN": _RNN,
    "Einsum": _einsum, "Attention": _attention,
}  # fmt: skip
_MICROSOFT: dict[str, _Formula] = {
    "FusedConv": _convolution(1, 1), "NhwcFusedConv": _convolution(1, -1),
    "NhwcConv": _convolution(1, -1), "QLinearConv": _not_known,
    "ConvTransposeWithDynamicPads": _transposed(0, 1, 1),
    "FusedMatMul": _product(transposed="transA"),
    "FusedMatMulActivation": _product(), "TransposeMatMul": _product(transposed="transA"),
    "FusedGemm": _product(transposed="transA"), "QGemm": _product(transposed="transA"),
    "DynamicQuantizeMatMul": _product(), "MatMulInteger16": _product(),
    "MatMulIntegerToFloat": _product(), "MatMulNBits": _wide, "MatMulBnb4": _wide,
    "MatMulFpQ4": _not_known, "DynamicQuantizeLSTM": _RNN, "Attention": _fused_attention,
    "QAttention": _not_known, "MultiHeadAttention": _multi_head,
}  # fmt: skip

_TFLITE: dict[str, _Formula] = {
    "CONV_2D": _convolution(1, -1), "DEPTHWISE_CONV_2D": _convolution(1, -1),
    "CONV_3D": _convolution(1, -1), "TRANSPOSE_CONV": _transposed(2, 1, -1),
    "CONV_3D_TRANSPOSE": _transposed(2, 1, -1),
    "Convolution2DTransposeBias": _transposed(0, 1, -1),
    "FULLY_CONNECTED": lambda call: math.prod(call.y()) * call.x(1)[-1],
    "BATCH_MATMUL": _product(transposed="adjX"),
    # weights of the four gates, of input and state, then the projection
    "LSTM": _recurrent(*range(1, 9), 16, steps=slice(0, 1)),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _recurrent(*range(1, 9), 16),
    "BIDIRECTIONAL_SEQUENCE_LSTM": _recurrent(*range(1, 9), 16, *range(18, 26), 33),
    "RNN": _recurrent(1, 2, steps=slice(0, 1)), "UNIDIRECTIONAL_SEQUENCE_RNN": _RNN,
    "BIDIRECTIONAL_SEQUENCE_RNN": _recurrent(1, 2, 5, 6), "SVDF": _svdf,
    "STABLEHLO_CONVOLUTION": _not_known, "STABLEHLO_DOT_GENERAL": _not_known,
    "STABLEHLO_CUSTOM_CALL": _not_known, "DELEGATE": _not_known,
}  # fmt: skip

_OPENVINO: dict[str, _Formula] = {
    "Convolution": _convolution(1, 1), "GroupConvolution": _convolution(1, 1),
    "ConvolutionBackpropData": _transposed(0, 1, 1),
    "GroupConvolutionBackpropData": _transposed(0, 1, 1),
    "BinaryConvolution": _convolution(1, 1), "DeformableConvolution": _convolution(2, 1),
    "MatMul": _product(transposed="transpose_a"), "Einsum": _einsum,
    "LSTMSequence": _recurrent(4, 5), "GRUSequence": _recurrent(3, 4),
    "RNNSequence": _recurrent(3, 4), "LSTMCell": _recurrent(3, 4, steps=slice(0, 1)),
    "GRUCell": _recurrent(2, 3, steps=slice(0, 1)),
    "RNNCell": _recurrent(2, 3, steps=slice(0, 1)),
    "ScaledDotProductAttention": _scaled_dot_product,
}  # fmt: skip

_FORMULAS = {
    "onnx": {**_ONNX, **{f"com.microsoft:{name}": one for name, one in _MICROSOFT.items()}},
    "tflite": _TFLITE,
    "openvino": _OPENVINO,
}

#: custom operators known to do no multiply-accumulates worth counting
_WITHOUT = frozenset(
    {
        f"com.microsoft:{name}"
        for name in """BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu CDist CropAndResize
            DequantizeLinear DynamicTimeWarping EmbedLayerNormalization ExpandDims FastGelu
            GatherBlockQuantized GatherND Gelu GridSample GroupNorm Inverse Irfft NhwcMaxPool
            QLinearAdd QLinearAveragePool QLinearConcat QLinearGlobalAveragePool
            QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax
            QLinearWhere QuantizeLinear QuickGelu Rfft RotaryEmbedding SkipLayerNormalization
            SkipSimplifiedLayerNormalization Tokenizer Trilu Unique""".split()  # noqa: SIM905
    }
    | {
        "MaxPoolingWithArgmax2D", "MaxUnpooling2D", "TFLite_Detection_PostProcess",
        "Landmarks2TransformMatrix", "TransformLandmarks", "TransformTensorBilinear",
    }
)  # fmt: skip
