"""What operators that reshape, cut and pick do with channels (`edgekit.compress.prune_axes`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgekit.compress.layers_onnx import number
from edgekit.compress.prune_axes import Axes, Axis, Remover, Trace

__all__ = ["expand", "flatten", "gather", "reshape", "shape_of", "slice_", "split"]


def reshape(trace: Trace, node: Any) -> None:
    """Axes that are merged or split: one of them may shrink, the others stay. Which one is a
    choice (heads or the elements of each head, say), offered to whoever walks again."""
    made = _reshaped(trace, node)
    trace.known[node.output[0]] = made
    if all(axis is None for axis in made):
        return
    written = trace.weights.get(node.input[1])
    before, after = trace.shapes[node.input[0]], trace.shapes[node.output[0]]
    place = trace.place
    if written is None:
        alike = len(list(_prefix(before, after)))
        loose = [at for at in range(alike, len(after)) if made[at] is None]
        if len(loose) > 1 and not trace.free_batch_only:
            for axis in made:
                trace.pin(axis, f"Reshape ({node.name}) to a computed shape")
            return
        wanted = [0 if at < alike and made[at] is None else size for at, size in enumerate(after)]
        if len(loose) == 1:
            wanted[loose[0]] = -1
    else:
        wanted = [int(one) for one in written.reshape(-1)]

    def fix(remover: Remover) -> None:
        sizes = [
            size if axis is None or size <= 0 else remover.count(axis)
            for size, axis in zip(wanted, made, strict=True)
        ]
        remover.constant(place, 1, sizes)

    trace.fixes.append(fix)


def flatten(trace: Trace, node: Any) -> None:
    """A Reshape whose target follows from its input."""
    trace.known[node.output[0]] = _reshaped(trace, node)


def _prefix(before: tuple[int, ...], after: tuple[int, ...]) -> Any:
    for one, other in zip(before, after, strict=False):
        if one != other:
            return
        yield one


def _reshaped(trace: Trace, node: Any) -> Axes:
    axes = trace.axes(node.input[0])
    before, after = trace.shapes[node.input[0]], trace.shapes[node.output[0]]
    made: Axes = [None] * len(after)
    why = f"{node.op_type} ({node.name}) merges it with other axes"
    for sources, targets in _blocks(before, after):
        flat = _merged(trace, axes, before, sources, why)
        if flat is None:
            continue
        if len(targets) == 1:
            made[targets[0]] = flat
            continue
        sizes = tuple(after[at] for at in targets)
        trace.offered[sizes] = len(sizes)
        chosen = trace.choices.get(sizes, 0)
        grid = np.moveaxis(flat.reshape(sizes), chosen, 0).reshape(sizes[chosen], -1)
        trace.tie(grid)
        made[targets[chosen]] = grid[:, 0].copy()
    return made


def _merged(
    trace: Trace, axes: Axes, shape: tuple[int, ...], sources: list[int], why: str
) -> Axis:  # fmt: skip
    """The atoms of axes laid out as one."""
    if len(sources) == 1:
        return axes[sources[0]]
    able = [at for at in sources if axes[at] is not None]
    if not able:
        return None
    for at in able[1:]:
        trace.pin(axes[at], why)
    sizes = [shape[at] for at in sources]
    grid = np.zeros(sizes, np.int64)
    place = sources.index(able[0])
    atoms = axes[able[0]]
    if atoms is None:
        return None
    grid += atoms.reshape([-1 if at == place else 1 for at in range(len(sizes))])
    return grid.reshape(-1)


def _blocks(
    before: tuple[int, ...], after: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:  # fmt: skip
    """The fewest axes that hold the same numbers on both sides; without those of length 1."""
    left = [at for at, size in enumerate(before) if size != 1]
    right = [at for at, size in enumerate(after) if size != 1]
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        sources, targets = [left[i]], [right[j]]
        i, j = i + 1, j + 1
        one, other = before[sources[0]], after[targets[0]]
        while one != other:
            if one < other:
                sources.append(left[i])
                one *= before[left[i]]
                i += 1
            else:
                targets.append(right[j])
                other *= after[right[j]]
                j += 1
        found.append((sources, targets))
    return found


def split(trace: Trace, node: Any) -> None:
    """Each output has its part of the axis; the parts' sizes are written anew."""
    axes = trace.axes(node.input[0])
    along = int(number(node, "axis", 0)) % len(axes)
    sizes = [trace.shapes[name][along] for name in node.output]
    atoms = axes[along]
    ends = np.cumsum(sizes)[:-1]
    parts: list[Axis] = [None] * len(sizes)
    if atoms is not None:
        parts = list(np.split(atoms, ends))
    for name, part in zip(node.output, parts, strict=True):
        own = list(axes)
        own[along] = part if part is not None and len(part) > 1 else None
        if part is not None and len(part) == 1:
            trace.pin(part, f"Split ({node.name}) into single channels")
        trace.known[name] = own
    if atoms is not None:
        place = trace.place

        def fix(remover: Remover) -> None:
            remover.attribute(place, "num_outputs", None)
            remover.constant(place, 1, [remover.count(p) for p in parts if p is not None])

        trace.fixes.append(fix)


def slice_(trace: Trace, node: Any) -> None:
    """With constant bounds and step 1: the axis is cut at what is left in front of them."""
    axes, shape = list(trace.axes(node.input[0])), trace.shapes[node.input[0]]
    given = [trace.values.get(name) if name else None for name in node.input[1:]]
    given += [None] * (4 - len(given))
    starts, ends, over, steps = given
    why = f"Slice ({node.name})"
    if starts is None or ends is None:
        for axis in axes:
            trace.pin(axis, f"{why} at computed bounds")
        trace.known[node.output[0]] = [None] * len(axes)
        return
    places = [int(a) % len(axes) for a in over] if over is not None else list(range(len(starts)))
    strides = [int(s) for s in steps] if steps is not None else [1] * len(places)
    bounds = [slice(int(a), int(b), s).indices(shape[at])
              for a, b, s, at in zip(starts, ends, strides, places, strict=True)]  # fmt: skip
    cut: dict[int, tuple[Any, int, int]] = {}
    for place, (low, high, stride), at in zip(range(len(places)), bounds, places, strict=True):
        atoms = axes[at]
        if atoms is None or (low, high, stride) == (0, shape[at], 1):
            continue
        if stride != 1 or high - low < 2 or not all(n in trace.weights for n in node.input[1:3]):
            trace.pin(atoms, f"{why} in steps, or of one channel")
            axes[at] = None
            continue
        axes[at] = atoms[low:high]
        cut[place] = (atoms, low, high)
    trace.known[node.output[0]] = axes
    if not cut:
        return
    index = trace.place

    def fix(remover: Remover) -> None:
        first, last = [int(one) for one in starts], [int(one) for one in ends]
        for place, (atoms, low, high) in cut.items():
            first[place] = remover.count(atoms[:low])
            last[place] = first[place] + remover.count(atoms[low:high])
        remover.constant(index, 1, first)
        remover.constant(index, 2, last)

    trace.fixes.append(fix)


def gather(trace: Trace, node: Any) -> None:
    """Embeddings pass the other axes on; constant picks along an axis are numbered anew."""
    axes = trace.axes(node.input[0])
    at = int(number(node, "axis", 0)) % len(axes)
    picked = trace.weights.get(node.input[1])
    rank = len(trace.shapes[node.input[1]])
    atoms = axes[at]
    middle: Axes = [None] * rank
    usable = picked is not None and picked.ndim == 1 and len(picked) > 1
    if atoms is not None and picked is not None and usable:
        indices = picked % len(atoms)
        middle = [atoms[indices]]
        place = trace.place

        def fix(remover: Remover) -> None:
            kept = remover.kept(atoms)
            numbers = np.cumsum(kept) - 1
            remover.constant(place, 1, numbers[indices[kept[indices]]])

        trace.fixes.append(fix)
    else:
        trace.pin(atoms, f"Gather ({node.name}) picks single ones")
    trace.known[node.output[0]] = [*axes[:at], *middle, *axes[at + 1 :]]


def expand(trace: Trace, node: Any) -> None:
    """Axes that keep their length pass; the shape is written anew."""
    axes, shape = trace.axes(node.input[0]), trace.shapes[node.input[0]]
    out = trace.shapes[node.output[0]]
    missing = len(out) - len(shape)
    made: Axes = [*([None] * missing), *axes]
    written = trace.weights.get(node.input[1])
    for at, axis in enumerate(made):
        if axis is not None and written is None:
            trace.pin(axis, f"Expand ({node.name}) to a computed shape")
            made[at] = None
    trace.known[node.output[0]] = made
    if written is None or all(axis is None for axis in made):
        return
    place, ahead = trace.place, len(out) - len(written)
    wanted = [1] * ahead + [int(one) for one in written]

    def fix(remover: Remover) -> None:
        sizes = [
            size if axis is None or size == 1 else remover.count(axis)
            for size, axis in zip(wanted, made, strict=True)
        ]
        remover.constant(place, 1, sizes)

    trace.fixes.append(fix)


def shape_of(trace: Trace, node: Any) -> None:
    """Reading a length that shrinks is not followed: such axes stay."""
    axes = trace.axes(node.input[0])
    read: set[int] = set()
    for reader in trace.readers.get(node.output[0], []):
        found = _read(trace, reader, len(axes)) if reader.op_type in ("Gather", "Slice") else None
        read |= set(range(len(axes))) if found is None else found
    for at in read:
        trace.pin(axes[at], f"Shape ({node.name}) reads its length")
    trace.known[node.output[0]] = [None]


def _read(trace: Trace, reader: Any, rank: int) -> set[int] | None:
    values = [trace.values.get(name) for name in reader.input[1:]]
    if any(value is None for value in values):
        return None
    if reader.op_type == "Gather":
        return {int(one) % rank for one in np.asarray(values[0]).reshape(-1)}
    low, high = (int(np.asarray(one).reshape(-1)[0]) for one in values[:2])
    step = int(np.asarray(values[3]).reshape(-1)[0]) if len(values) > 3 else 1
    return set(range(*slice(low, high, step).indices(rank))) if math.isfinite(high) else None
