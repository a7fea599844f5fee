"""Second moments of what flows into layers, streamed: normal equations without keeping samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.compress.layers_onnx import Array, Layer, Tap

__all__ = ["Moments", "input_moments", "outputs_at", "up_to"]

#: positions of an image that are looked at in each sample
_POSITIONS = 64
#: the weight of the diagonal, at most
_MOST_DOUBT = 0.9
#: rows that are multiplied together
_HELD = 512


@dataclass
class Moments:
    """Of the inputs x of a layer, per group, and of targets y: float64.

    xx: (groups, terms, terms), the mean of (x - mean) (x - mean)^T, or of x x^T where the layer
    has no bias to take the mean up. yx: (groups, outputs per group, terms), likewise. rows: how
    many x they are of.
    """

    mean: Array
    xx: Array
    target: Array
    yx: Array
    rows: int

    def doubted(self) -> Array:
        """xx with as much added to its diagonal as so few rows call for: seen 200 times, each of
        1,000 inputs follows from the others, and to take that for granted is wrong of new samples.

        The weight of the diagonal is that of oracle approximating shrinkage (Chen, Wiesel, Eldar
        and Hero, IEEE Trans. Signal Processing 58(10), 2010, equation 23) of the correlations.
        """
        return np.stack([one + np.diag(_doubt(one, self.rows)) for one in self.xx])


def _doubt(xx: Array, rows: int) -> Array:
    """What is added to the diagonal."""
    terms, own = len(xx), np.diag(xx)
    known = own > 1e-12 * own.max(initial=0.0)
    if terms < 2 or not known.any():
        return np.zeros(terms)
    scale = np.where(known, own, 1.0) ** -0.5 * known
    spread = float((np.square(xx * scale[:, None] * scale)).sum())
    size = int(known.sum())
    off = (rows + 1 - 2 / size) * (spread - size)
    share = min(_MOST_DOUBT, ((1 - 2 / size) * spread + size**2) / off) if off > 0 else _MOST_DOUBT
    return share / (1 - share) * own


class _Sums:
    def __init__(self, groups: int, terms: int, outputs: int) -> None:
        self.count = 0
        self.x, self.y = np.zeros((groups, terms)), np.zeros((groups, outputs))
        self.xx = np.zeros((groups, terms, terms))
        self.yx = np.zeros((groups, outputs, terms))
        self._held: list[tuple[Array, Array | None]] = []

    def add(self, parts: Array, targets: Array | None) -> None:
        """parts: (groups, positions, terms); targets: (groups, positions, outputs)."""
        self._held.append((parts, targets))
        if sum(one.shape[1] for one, _ in self._held) >= _HELD:
            self._flush()

    def _flush(self) -> None:
        """Products of a few long matrices are much quicker than of many short ones."""
        if not self._held:
            return
        parts = np.concatenate([one for one, _ in self._held], axis=1)
        aims = [aim for _, aim in self._held if aim is not None]
        targets = np.concatenate(aims, axis=1) if aims else None
        self._held = []
        self.count += parts.shape[1]
        self.x += parts.sum(axis=1)
        self.xx += np.matmul(parts.transpose(0, 2, 1), parts)
        if targets is not None:
            self.y += targets.sum(axis=1)
            self.yx += np.matmul(targets.transpose(0, 2, 1), parts)

    def moments(self, *, centred: bool) -> Moments:
        self._flush()
        count = max(1, self.count)
        x, y = self.x / count, self.y / count
        if not centred:
            x, y = np.zeros_like(x), np.zeros_like(y)
        xx = self.xx / count - x[:, :, None] * x[:, None, :]
        yx = self.yx / count - y[:, :, None] * x[:, None, :]
        return Moments(x, xx, y, yx, self.count)


def input_moments(
    model: Any, layers: Sequence[Layer], weights: Mapping[str, Array],
    samples: Iterable[Mapping[str, Array]], targets: Iterable[Mapping[str, Array]] | None = None,
) -> dict[str, Moments]:  # fmt: skip
    """Of each layer, by the name of its weight; `targets` holds for each sample what the layers'
    outputs (of `outputs_at`) should be."""
    sums = {}
    for layer in layers:
        rows = layer.rows(weights)
        groups = layer.group
        sums[layer.weight] = _Sums(groups, rows.shape[1], len(rows) // groups)
    names = [one.node.input[0] for one in layers]
    # onnxruntime refuses a model without nodes, so the whole one where only inputs are read.
    part = up_to(model, names)
    tap = Tap(part if part.graph.node else model, names)
    wanted = iter(targets) if targets is not None else None
    for number, sample in enumerate(samples):
        found = tap.run(sample)
        goal = next(wanted) if wanted is not None else None
        for layer in layers:
            draw = np.random.default_rng(number)
            array = found[layer.node.input[0]]
            parts = np.stack([*layer.patches(array, weights, draw, _POSITIONS)])
            aim = None
            if goal is not None:
                rows = goal[layer.weight]
                aim = rows.reshape(len(rows), layer.group, -1).transpose(1, 0, 2)
            sums[layer.weight].add(parts, aim)
    return {
        one.weight: sums[one.weight].moments(centred=one.can_shift) for one in layers
    }  # fmt: skip


def outputs_at(layer: Layer, array: Array, number: int) -> Array:
    """float64 (positions, outputs): the outputs at the positions that `input_moments` looks at in
    sample `number`."""
    flat = (np.moveaxis(array, 1, -1) if layer.is_conv else array).reshape(
        -1, array.shape[1 if layer.is_conv else -1]
    )
    picked = np.random.default_rng(number).permutation(len(flat))[:_POSITIONS]
    return flat[picked].astype(np.float64)


def up_to(model: Any, names: Sequence[str]) -> Any:
    """The part of the model that these tensors need, without outputs."""
    wanted, kept = set(names), []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
            wanted |= {n for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)
                       for inner in g.node for n in inner.input}  # fmt: skip
    made = type(model)()
    made.ir_version = model.ir_version
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.graph.name = model.graph.name
    made.graph.node.extend(reversed(kept))
    made.graph.input.extend(model.graph.input)
    made.graph.initializer.extend(one for one in model.graph.initializer if one.name in wanted)
    return made
