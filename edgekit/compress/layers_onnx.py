"""Layers of a prepared ONNX model as matrices, and what flows into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.prepare_onnx import float_session
from edgekit.errors import require

__all__ = [
    "PRODUCTS", "Array", "Layer", "Tap", "find_layers", "number", "readers_of", "store_weights",
]  # fmt: skip

Array = NDArray[Any]

#: operators that are sums of products with weights of their own
PRODUCTS = ("Conv", "Gemm", "MatMul", "ConvTranspose")


@dataclass
class Layer:
    """A Conv, Gemm, MatMul or ConvTranspose with constant weights of its own.

    A ConvTranspose is a convolution, too: with the kernel turned round, over its input with zeros
    between the values (V. Dumoulin and F. Visin, "A guide to convolution arithmetic for deep
    learning", 2016, section 4.6).

    bias: a constant (outputs,) of its own, of a MatMul that of the Add behind it; empty: it has
    none. output: the tensor behind the bias. can_shift: the bias can be changed, or one be added.
    """

    node: Any
    weight: str
    bias: str
    output: str
    can_shift: bool
    group: int = 1
    transposed: bool = False

    @property
    def is_conv(self) -> bool:
        """Channels are on axis 1; else on the last one."""
        return bool(self.node.op_type in ("Conv", "ConvTranspose"))

    @property
    def turned(self) -> bool:
        """Its weights are (in, out, *kernel)."""
        return bool(self.node.op_type == "ConvTranspose")

    def rows(self, weights: Mapping[str, Array]) -> Array:
        """float64 (outputs, terms of each sum)."""
        array = weights[self.weight].astype(np.float64)
        if self.turned:
            array = _turned(array, self.group)
        if self.is_conv:
            return array.reshape(len(array), -1)
        return array if self.transposed else array.T

    def put(self, weights: dict[str, Array], rows: Array) -> None:
        """The other way round."""
        old = weights[self.weight]
        if self.turned:
            inner, outer, *kernel = old.shape
            rows = rows.reshape(self.group * outer, inner // self.group, *kernel)
            rows = _turned(rows, self.group)
        elif not self.is_conv and not self.transposed:
            rows = rows.T
        weights[self.weight] = np.ascontiguousarray(rows.reshape(old.shape).astype(old.dtype))

    def patches(
        self, array: Array, weights: Mapping[str, Array], rng: np.random.Generator, most: int
    ) -> Array:
        """What each sum is over, float32 (groups, positions, terms), of its input `array`; at most
        so many positions, drawn."""
        if not self.is_conv:
            flat = array.reshape(-1, array.shape[-1])
            return flat[rng.permutation(len(flat))[:most]].astype(np.float32, copy=False)[None]
        windows = self._windows(array, weights[self.weight].shape[2:])
        places = windows.shape[: array.ndim - 1]
        count = int(np.prod(places))
        picked = np.unravel_index(rng.permutation(count)[:most], places)
        taken: Array = windows[picked].astype(np.float32, copy=False)
        return np.moveaxis(taken.reshape(len(taken), self.group, -1), 1, 0)

    def _windows(self, array: Array, kernel: Sequence[int]) -> Array:
        """(batch, *places, channels, *kernel)."""
        rank = len(kernel)
        settings = {one.name: list(one.ints) for one in self.node.attribute if one.ints}
        strides = settings.get("strides", [1] * rank)
        dilations = settings.get("dilations", [1] * rank)
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = settings.get("pads", [0] * 2 * rank)
        if self.turned:
            more = settings.get("output_padding", [0] * rank)
            array = _spread(array, strides, spans, pads, more)
            strides, pads = [1] * rank, [0] * 2 * rank
        automatic = next((a.s for a in self.node.attribute if a.name == "auto_pad"), b"NOTSET")
        if automatic.startswith(b"SAME"):
            needed = [
                max(0, (-(-size // stride) - 1) * stride + span - size)
                for size, stride, span in zip(array.shape[2:], strides, spans, strict=True)
            ]
            lower = [(one + (automatic == b"SAME_LOWER")) // 2 for one in needed]
            pads = [*lower, *(n - low for n, low in zip(needed, lower, strict=True))]
        padded = np.pad(array, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
        windows = np.lib.stride_tricks.sliding_window_view(
            padded, spans, axis=tuple(range(2, 2 + rank))
        )
        places = (slice(None), slice(None), *(slice(None, None, s) for s in strides),
                  *(slice(None, None, d) for d in dilations))  # fmt: skip
        return np.moveaxis(windows[places], 1, 1 + rank)


def _turned(array: Array, groups: int) -> Array:
    """(in, out per group, *kernel) as (out, in per group, *kernel) with the kernel turned round,
    and the other way."""
    parts = [one.swapaxes(0, 1) for one in np.split(array, groups)]
    return np.flip(np.concatenate(parts), tuple(range(2, array.ndim)))


def _spread(
    array: Array, strides: Sequence[int], spans: Sequence[int], pads: Sequence[int],
    more: Sequence[int],
) -> Array:  # fmt: skip
    """What a ConvTranspose is a convolution over: zeros between the values and around them."""
    rank = len(strides)
    sizes = [(n - 1) * stride + 1 for n, stride in zip(array.shape[2:], strides, strict=True)]
    made = np.zeros((*array.shape[:2], *sizes), array.dtype)
    places = [slice(None), slice(None), *(slice(None, None, stride) for stride in strides)]
    made[tuple(places)] = array
    around = [(span - 1 - low, span - 1 - high + extra) for span, low, high, extra in
              zip(spans, pads[:rank], pads[rank:], more, strict=True)]  # fmt: skip
    made = np.pad(made, [(0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in around)])
    cut = [slice(max(-a, 0), n - max(-b, 0))
           for (a, b), n in zip(around, made.shape[2:], strict=True)]  # fmt: skip
    found: Array = made[(slice(None), slice(None), *cut)]
    return found


def find_layers(
    model: Any, weights: Mapping[str, Array], kept: Sequence[str] = (),
    kinds: Sequence[str] = ("Conv", "Gemm", "MatMul"),
) -> list[Layer]:  # fmt: skip
    """In the model's order, without those whose node's name or first output is in `kept`."""
    readers = readers_of(model)
    own = {name for name in weights if len(readers.get(name, [])) == 1}
    own -= {one.name for one in model.graph.output}
    found = []
    for node in model.graph.node:
        if node.op_type not in kinds or node.domain in ("com.microsoft",):
            continue
        if node.name in kept or node.output[0] in kept or node.input[1] not in own:
            continue
        array = weights[node.input[1]]
        if array.dtype != np.float32 or (array.ndim != 2 and "Conv" not in node.op_type):
            continue
        if node.op_type == "ConvTranspose" and _sized_by_output(node):
            continue
        if any(number(node, key, value) != value for key, value in _PLAIN.items()):
            continue
        layer = Layer(
            node, node.input[1], "", node.output[0], False,
            int(number(node, "group", 1)), bool(number(node, "transB", 0)),
        )  # fmt: skip
        _find_bias(layer, weights, readers, own)
        found.append(layer)
    return found


def _sized_by_output(node: Any) -> bool:
    return any(
        one.name == "output_shape" or (one.name == "auto_pad" and one.s.startswith(b"SAME"))
        for one in node.attribute
    )


_PLAIN = {"transA": 0, "alpha": 1.0, "beta": 1.0}


def _find_bias(
    layer: Layer, weights: Mapping[str, Array], readers: Mapping[str, list[Any]], own: set[str]
) -> None:
    node = layer.node
    layer.can_shift = node.op_type != "MatMul"
    bias = node.input[2] if len(node.input) > 2 else ""
    if node.op_type == "MatMul":
        behind = readers.get(node.output[0], [])
        if len(behind) != 1 or behind[0].op_type != "Add":
            return
        bias = next((name for name in behind[0].input if name in weights), "")
        layer.output = behind[0].output[0]
    if bias:
        outputs = len(layer.rows(weights))
        layer.can_shift = bias in own and weights[bias].shape == (outputs,)
        layer.bias = bias


def number(node: Any, name: str, default: float) -> float:
    """An attribute's value."""
    found = next((one for one in node.attribute if one.name == name), None)
    if found is None:
        return default
    return float(found.f if found.type == found.FLOAT else found.i)


def readers_of(model: Any) -> dict[str, list[Any]]:
    """Tensor -> the nodes of the outermost graph that read it, inside their subgraphs too."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in _reads(node):
            readers.setdefault(name, []).append(node)
    return readers


def _reads(node: Any) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for one in inner.node:
                yield from _reads(one)
            yield from (out.name for out in inner.output)


def store_weights(model: Any, weights: Mapping[str, Array], before: Mapping[str, Array]) -> None:
    """Put what differs from `before`, by identity, into the model's initializers."""
    onnx = require("onnx", extra="onnx")
    known = set()
    for one in model.graph.initializer:
        known.add(one.name)
        if weights[one.name] is not before.get(one.name):
            one.CopyFrom(onnx.numpy_helper.from_array(weights[one.name], one.name))
    new = [name for name in weights if name not in known]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(weights[n], n) for n in new)


class Tap:
    """A model whose tensors `names` are read, sample by sample, computed in float."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        onnx = require("onnx", extra="onnx")
        tapped = onnx.ModelProto()
        tapped.CopyFrom(model)
        there = {one.name for one in (*tapped.graph.output, *tapped.graph.input)}
        tapped.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in there
        )
        self._session = float_session(tapped.SerializeToString())
        given = {one.name for one in self._session.get_inputs()}
        self._names = [name for name in dict.fromkeys(names) if name not in given]

    def run(self, sample: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors by name, inputs among them."""
        arrays = self._session.run(self._names, dict(sample)) if self._names else []
        return {**sample, **dict(zip(self._names, arrays, strict=True))}
