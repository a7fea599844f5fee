"""What each ONNX operator does with the channels of its inputs (`edgekit.compress.prune_axes`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgekit.compress.layers_onnx import number
from edgekit.compress.prune_axes import Axes, Axis, Product, Remover, Trace
from edgekit.compress.prune_reshape import expand, flatten, gather, reshape, shape_of, slice_, split

__all__ = ["RULES", "walk"]

Rule = Callable[[Trace, Any], None]


def walk(trace: Trace) -> None:
    """Go through the whole graph. Inputs and outputs of the model stay as they are."""
    graph = trace.model.graph
    for one in graph.input:
        if one.name not in trace.weights:
            trace.known[one.name] = [None] * len(trace.shapes[one.name])
    for place, node in enumerate(graph.node):
        trace.place = place
        plain = node.domain in ("", "ai.onnx") and all(n in trace.shapes for n in node.input if n)
        rule = RULES.get(node.op_type) if plain else None
        (rule or _unknown)(trace, node)
    for one in graph.output:
        trace.pin_all(one.name, "an output of the model")


def _unknown(trace: Trace, node: Any) -> None:
    """Everything it reads stays, inside its subgraphs, too."""
    for name, readers in trace.readers.items():
        if any(one is node for one in readers):
            trace.pin_all(name, f"{node.op_type} ({node.name}): no rule for it")
    for name in node.output:
        if name in trace.shapes:
            trace.known[name] = [None] * len(trace.shapes[name])


# --- elementwise ----------------------------------------------------------------------------------


def _elementwise(trace: Trace, node: Any) -> None:
    """Axes that meet are one; those of length 1 are broadcast."""
    shape = trace.shapes[node.output[0]]
    made: Axes = []
    for place, size in enumerate(shape):
        found: list[Axis] = []
        for name in filter(None, node.input):
            at = place - len(shape) + len(trace.shapes[name])
            if at >= 0 and size > 1 and trace.shapes[name][at] == size:
                found.append(trace.axes(name)[at])
        axis = found[0] if found else None
        for other in found[1:]:
            axis = trace.same(axis, other, f"{node.op_type} ({node.name}) with what cannot shrink")
        made.append(axis)
    trace.known[node.output[0]] = made


def _first(trace: Trace, node: Any) -> None:
    """Outputs are as the first input; the others are numbers."""
    for name in filter(None, node.output):
        trace.known[name] = list(trace.axes(node.input[0]))


def _batchnorm(trace: Trace, node: Any) -> None:
    axes = list(trace.axes(node.input[0]))
    for name in node.input[1:]:
        axes[1] = trace.same(axes[1], trace.axes(name)[0], f"{node.op_type} ({node.name})")
    trace.known[node.output[0]] = axes


def _groupnorm(trace: Trace, node: Any) -> None:
    """Whole groups, whose statistics are their own."""
    axes = list(trace.axes(node.input[0]))
    groups = int(number(node, "num_groups", 1))
    if axes[1] is not None:
        trace.tie(axes[1].reshape(groups, -1))
        each = trace.axes(node.input[1])[0]
        per_channel = each is not None and len(each) == len(axes[1])
        for name in node.input[1:3]:
            own = axes[1] if per_channel else axes[1].reshape(groups, -1)[:, 0]
            trace.same(own, trace.axes(name)[0], f"GroupNormalization ({node.name})")
        place, leaders = trace.place, axes[1].reshape(groups, -1)[:, 0]
        trace.fixes.append(lambda r: r.attribute(place, "num_groups", r.count(leaders)))
    trace.known[node.output[0]] = axes


# --- over an axis ---------------------------------------------------------------------------------


def _over_axis(trace: Trace, node: Any) -> None:
    """Softmax and the like: what is mixed stays."""
    axes = list(trace.axes(node.input[0]))
    at = int(number(node, "axis", -1))
    trace.pin(axes[at], f"{node.op_type} ({node.name}) is over the channels")
    axes[at] = None
    trace.known[node.output[0]] = axes


def _layernorm(trace: Trace, node: Any) -> None:
    axes = list(trace.axes(node.input[0]))
    start = int(number(node, "axis", -1)) % len(axes)
    for at in range(start, len(axes)):
        trace.pin(axes[at], f"{node.op_type} ({node.name}) is over the channels")
        axes[at] = None
    for name in filter(None, node.input[1:]):
        trace.pin_all(name, f"{node.op_type} ({node.name}) is over the channels")
    for name in filter(None, node.output):
        trace.known[name] = axes[: len(trace.shapes[name])]


def _neighbours(trace: Trace, node: Any) -> None:
    """LRN mixes neighbouring channels."""
    axes = list(trace.axes(node.input[0]))
    trace.pin(axes[1], f"{node.op_type} ({node.name}) mixes neighbouring channels")
    axes[1] = None
    trace.known[node.output[0]] = axes


def _axes_of(trace: Trace, node: Any, place: int = 1) -> list[int] | None:
    """The attribute or input `axes`; None: there is none, or it is not known."""
    for one in node.attribute:
        if one.name == "axes":
            return list(one.ints)
    if len(node.input) > place and node.input[place]:
        values = trace.values.get(node.input[place])
        return None if values is None else [int(v) for v in values.reshape(-1)]
    return None


def _reduce(trace: Trace, node: Any) -> None:
    axes = list(trace.axes(node.input[0]))
    found = _axes_of(trace, node)
    if found is None and number(node, "noop_with_empty_axes", 0):
        trace.known[node.output[0]] = axes
        return
    over = {at % len(axes) for at in (range(len(axes)) if found is None else found)}
    for at in over:
        trace.pin(axes[at], f"{node.op_type} ({node.name}) is over the channels")
    if number(node, "keepdims", 1):
        made = [None if at in over else axis for at, axis in enumerate(axes)]
    else:
        made = [axis for at, axis in enumerate(axes) if at not in over]
    trace.known[node.output[0]] = made


def _argument(trace: Trace, node: Any) -> None:
    axes = list(trace.axes(node.input[0]))
    at = int(number(node, "axis", 0)) % len(axes)
    trace.pin(axes[at], f"{node.op_type} ({node.name}) is over the channels")
    keep = number(node, "keepdims", 1)
    axes[at : at + 1] = [None] if keep else []
    trace.known[node.output[0]] = axes


# --- windows --------------------------------------------------------------------------------------


def _pool(trace: Trace, node: Any) -> None:
    axes = trace.axes(node.input[0])
    for axis in axes[2:]:
        trace.pin(axis, f"{node.op_type} ({node.name}) is over it")
    for name in filter(None, node.output):
        trace.known[name] = [*axes[:2], *[None] * (len(trace.shapes[name]) - 2)]


def _resize(trace: Trace, node: Any) -> None:
    """Axes that keep their length pass; `sizes` are then to be written anew."""
    axes, shape = trace.axes(node.input[0]), trace.shapes[node.input[0]]
    out = trace.shapes[node.output[0]]
    made = [axis if n == m else None for axis, n, m in zip(axes, shape, out, strict=True)]
    for axis, n, m in zip(axes, shape, out, strict=True):
        if n != m:
            trace.pin(axis, f"{node.op_type} ({node.name}) is over it")
    sized = len(node.input) > 3 and node.input[3]
    if (sized and trace.values.get(node.input[3]) is None) or any(
        one.name == "axes" for one in node.attribute
    ):
        for axis in axes:
            trace.pin(axis, f"{node.op_type} ({node.name}) has computed sizes")
        made = [None] * len(out)
    elif sized:
        place = trace.place

        def fix(remover: Remover) -> None:
            sizes = [m if a is None else remover.count(a) for a, m in zip(made, out, strict=True)]
            remover.constant(place, 3, sizes)

        if any(axis is not None for axis in made):
            if node.input[3] not in trace.weights and not trace.free_batch_only:
                for axis in axes:
                    trace.pin(axis, f"{node.op_type} ({node.name}) has computed sizes")
            trace.fixes.append(fix)
    trace.known[node.output[0]] = made


def _pad(trace: Trace, node: Any) -> None:
    axes, out = list(trace.axes(node.input[0])), trace.shapes[node.output[0]]
    for at, (n, m) in enumerate(zip(trace.shapes[node.input[0]], out, strict=True)):
        if n != m:
            trace.pin(axes[at], f"Pad ({node.name}) adds channels")
            axes[at] = None
    trace.known[node.output[0]] = axes


def _conv(trace: Trace, node: Any) -> None:
    turned = node.op_type == "ConvTranspose"
    x, w = trace.axes(node.input[0]), list(trace.axes(node.input[1]))
    shape, weight = trace.shapes[node.input[0]], trace.shapes[node.input[1]]
    why = f"{node.op_type} ({node.name})"
    for axis in (*w[2:], *x[2:]):
        trace.pin(axis, f"{why} is over it")
    groups = int(number(node, "group", 1))
    out = _conv_grouped(trace, x[1], w, (shape[1], groups), turned=turned, why=why)
    rows = trace.shapes[node.output[0]][1]
    if len(node.input) > 2 and node.input[2] and rows > 1:
        out = trace.same(out, trace.axes(node.input[2])[0], f"{why}: its bias")
    made = trace.shapes[node.output[0]]
    trace.known[node.output[0]] = [x[0], out, *[None] * (len(made) - 2)]
    places = math.prod(shape[2:]) if turned else math.prod(made[2:])
    depthwise = groups > 1 and groups == shape[1]
    factor, axes = made[0] * places * math.prod(weight[2:]), []
    for size, axis in zip(weight[:2], w[:2], strict=True):
        if axis is None:
            factor *= size
        else:
            axes.append(axis)
    stored = node.input[1] in trace.weights
    trace.products.append(
        Product(
            trace.place,
            node.input[1] if stored else "",
            factor,
            tuple(axes),
            out,
            None if depthwise else x[1],
            1 if turned else 0,
            0 if turned else 1,
            node.input[2] if len(node.input) > 2 else "",
        )
    )


def _conv_grouped(
    trace: Trace, x: Axis, w: Axes, sizes: tuple[int, int], *, turned: bool, why: str
) -> Axis:  # fmt: skip
    """The atoms of the output channels. `w`: those of the weight, (out, in per group) or turned
    round (in, out per group)."""
    channels, groups = sizes
    if groups == 1:
        if channels > 1:
            trace.same(x, w[0 if turned else 1], f"{why} of what cannot shrink")
        return w[1 if turned else 0]
    if groups == channels:
        return _conv_depthwise(trace, x, w, channels, turned=turned, why=why)
    # The n-th channel of every group goes with the n-th of the others.
    columns = w[0 if turned else 1]
    if turned:
        trace.same(x, columns, f"{why} of what cannot shrink")
        if columns is not None:
            trace.tie(columns.reshape(groups, -1).T)
        return None if w[1] is None else np.tile(w[1], groups)
    if columns is not None:
        trace.same(x, np.tile(columns, groups), f"{why} of what cannot shrink")
    else:
        trace.pin(x, f"{why} of groups of one channel")
    if w[0] is not None:
        trace.tie(w[0].reshape(groups, -1).T)
    return w[0]


def _conv_depthwise(
    trace: Trace, x: Axis, w: Axes, channels: int, *, turned: bool, why: str
) -> Axis:  # fmt: skip
    """Each channel with the outputs made of it; how many there are is an attribute."""
    place = trace.place
    if turned:
        if w[1] is not None:
            trace.pin(w[1], f"{why}: several outputs per channel")
        axis = trace.same(x, w[0], f"{why} of what cannot shrink")
        each = trace.shapes[trace.model.graph.node[place].output[0]][1] // channels
        out = None if axis is None else np.repeat(axis, each)
    elif w[0] is None:
        return None
    else:
        tied = w[0].reshape(channels, -1)
        trace.tie(tied)
        axis = trace.same(x, tied[:, 0].copy(), f"{why} of what cannot shrink")
        out = None if axis is None else w[0]
    if axis is not None:
        trace.fixes.append(lambda r: r.attribute(place, "group", r.count(axis)))
    return out


# --- matrices -------------------------------------------------------------------------------------


def _gemm(trace: Trace, node: Any) -> None:
    a, b = trace.axes(node.input[0]), trace.axes(node.input[1])
    ta, tb = bool(number(node, "transA", 0)), bool(number(node, "transB", 0))
    rows, inner = (a[1], a[0]) if ta else (a[0], a[1])
    own, out = (b[1], b[0]) if tb else (b[0], b[1])
    why = f"Gemm ({node.name})"
    columns = trace.same(inner, own, f"{why} of what cannot shrink")
    made: Axes = [rows, out]
    if len(node.input) > 2 and node.input[2]:
        shape, c = trace.shapes[node.output[0]], trace.axes(node.input[2])
        for back in range(1, len(c) + 1):
            if shape[-back] > 1 and trace.shapes[node.input[2]][-back] == shape[-back]:
                made[-back] = trace.same(made[-back], c[-back], f"{why}: its bias")
    trace.known[node.output[0]] = made
    m, n = trace.shapes[node.output[0]]
    k = trace.shapes[node.input[1]][1 if tb else 0]
    if node.input[1] in trace.weights and ta:
        trace.pin(out, f"{why} of a turned matrix")
    _product(trace, node, [(m, made[0]), (n, made[1]), (k, columns)], (made[1], columns),
             (0, 1) if tb else (1, 0))  # fmt: skip


def _matmul(trace: Trace, node: Any) -> None:
    (xs, ws), shape = (trace.shapes[n] for n in node.input[:2]), trace.shapes[node.output[0]]
    x, w = trace.axes(node.input[0]), trace.axes(node.input[1])
    why = f"MatMul ({node.name})"
    if len(xs) < 2 or len(ws) < 2:
        for axis in (*x, *w):
            trace.pin(axis, f"{why} of a vector")
        trace.known[node.output[0]] = [None] * len(shape)
        return
    inner = trace.same(x[-1], w[-2], f"{why} of what cannot shrink") if ws[-2] > 1 else None
    made: Axes = []
    for back in range(len(shape), 2, -1):
        found = [
            axes[-back] for axes, sizes in ((x, xs), (w, ws))
            if len(sizes) >= back and sizes[-back] == shape[-back] and shape[-back] > 1
        ]  # fmt: skip
        axis = found[0] if found else None
        for other in found[1:]:
            axis = trace.same(axis, other, f"{why} of what cannot shrink")
        made.append(axis)
    made += [x[-2], w[-1]]
    trace.known[node.output[0]] = made
    lengths = [*zip(shape, made, strict=True), (ws[-2], inner)]
    stored = len(ws) == 2 and node.input[1] in trace.weights
    if not stored:
        inner_rows: Axis = None
        _product(trace, node, lengths, (inner_rows, None), (-1, -1))
    else:
        _product(trace, node, lengths, (made[-1], inner), (1, 0))


def _product(
    trace: Trace, node: Any, lengths: list[tuple[int, Axis]], weight_axes: tuple[Axis, Axis],
    places: tuple[int, int],
) -> None:  # fmt: skip
    factor = math.prod(size for size, axis in lengths if axis is None)
    axes = tuple(axis for _, axis in lengths if axis is not None)
    stored = node.input[1] in trace.weights and places[0] >= 0
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    trace.products.append(
        Product(
            trace.place, node.input[1] if stored else "", factor, axes, *weight_axes, *places, bias
        )
    )


# --- moves ----------------------------------------------------------------------------------------


def _transpose(trace: Trace, node: Any) -> None:
    axes = trace.axes(node.input[0])
    order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    trace.known[node.output[0]] = [axes[at] for at in order or range(len(axes) - 1, -1, -1)]


def _concat(trace: Trace, node: Any) -> None:
    shape = trace.shapes[node.output[0]]
    along = int(number(node, "axis", 0)) % len(shape)
    made: Axes = []
    why = f"Concat ({node.name}) with what cannot shrink"
    for at, size in enumerate(shape):
        parts = [trace.axes(name)[at] for name in node.input]
        lengths = [trace.shapes[name][at] for name in node.input]
        if at == along and any(part is not None for part in parts):
            # What cannot shrink becomes pinned atoms beside those that can.
            arrays = []
            for part, length in zip(parts, lengths, strict=True):
                own = part
                if own is None:
                    own = trace.fresh(length)
                    trace.pin(own, why)
                arrays.append(own)
            made.append(np.concatenate(arrays))
            continue
        axis = parts[0]
        if size > 1 and at != along:
            for other in parts[1:]:
                axis = trace.same(axis, other, why)
        made.append(axis if at != along else None)
    trace.known[node.output[0]] = made


def _squeeze(trace: Trace, node: Any) -> None:
    axes, shape = trace.axes(node.input[0]), trace.shapes[node.input[0]]
    found = _axes_of(trace, node)
    if found is None:
        found = [at for at, size in enumerate(shape) if size == 1]
    over = {at % len(shape) for at in found}
    trace.known[node.output[0]] = [axis for at, axis in enumerate(axes) if at not in over]


def _unsqueeze(trace: Trace, node: Any) -> None:
    rank = len(trace.shapes[node.output[0]])
    added = {at % rank for at in _axes_of(trace, node) or []}
    left = iter(trace.axes(node.input[0]))
    trace.known[node.output[0]] = [None if at in added else next(left) for at in range(rank)]


def _depth_to_space(trace: Trace, node: Any) -> None:
    axes, size = trace.axes(node.input[0]), int(number(node, "blocksize", 1)) ** 2
    mode = next((a.s for a in node.attribute if a.name == "mode"), b"DCR")
    out = None
    if axes[1] is not None:
        grid = axes[1].reshape(size, -1).T if mode == b"DCR" else axes[1].reshape(-1, size)
        trace.tie(grid)
        out = grid[:, 0].copy() if len(grid) > 1 else None
        if out is None:
            trace.pin(axes[1], f"DepthToSpace ({node.name}) into one channel")
    trace.known[node.output[0]] = [axes[0], out, None, None]


def _space_to_depth(trace: Trace, node: Any) -> None:
    axes, size = trace.axes(node.input[0]), int(number(node, "blocksize", 1)) ** 2
    out = None if axes[1] is None else np.tile(axes[1], size)
    trace.known[node.output[0]] = [axes[0], out, None, None]


_UNARY = (
    "Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Celu",
    "Softplus", "Softsign", "Mish", "Gelu", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Neg",
    "Abs", "Clip", "Identity", "Dropout", "Cast", "Floor", "Ceil", "Round", "Sin", "Cos", "Not",
    "ThresholdedRelu", "Sign", "Swish",
)  # fmt: skip
_BINARY = (
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Where", "PRelu", "Equal",
    "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And", "Or", "Xor",
)  # fmt: skip
_REDUCE = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip
_POOL = (
    "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _first),
    **dict.fromkeys(_BINARY, _elementwise),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(_POOL, _pool),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "CumSum"), _over_axis),
    **dict.fromkeys(("ArgMax", "ArgMin"), _argument),
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batchnorm,
    "InstanceNormalization": _batchnorm,
    "GroupNormalization": _groupnorm,
    "LayerNormalization": _layernorm,
    "RMSNormalization": _layernorm,
    "LRN": _neighbours,
    "Transpose": _transpose,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "Expand": expand,
    "Shape": shape_of,
    "Pad": _pad,
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
