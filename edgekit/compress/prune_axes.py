"""Which channels of an ONNX graph must go together.

Every index of every axis of every weight is an atom. Going through the graph in its order, each
operator says which atom each index of its outputs' axes is, which atoms are one and the same, and
which must stay ("pinned", with the reason). What is connected forms a class: removed from all
tensors at once, a class leaves an ordinary, smaller model. Nothing is known of patterns; what no
rule covers is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.layers_onnx import Array, readers_of

__all__ = ["Axes", "Axis", "Classes", "Fix", "Product", "Remover", "Trace", "classes_of"]

#: the atoms along an axis; None: the axis stays as it is
Axis = NDArray[np.int64] | None
Axes = list[Axis]


@dataclass(frozen=True)
class Product:
    """A sum of products: its MACs are `factor` times the lengths of `axes`, which shrink.

    rows, columns: the atoms of the weight's outputs and inputs; `weight` is "" where both operands
    are computed. out_axis, in_axis: theirs in the weight, -1 where it has none.
    """

    node: int
    weight: str
    factor: int
    axes: tuple[NDArray[np.int64], ...]
    rows: Axis = None
    columns: Axis = None
    out_axis: int = -1
    in_axis: int = -1
    bias: str = ""


@dataclass
class Remover:
    """What a repair of a node may ask and do when classes are removed from `model`."""

    model: Any
    gone: NDArray[np.bool_]

    def kept(self, axis: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which indices stay."""
        return ~self.gone[axis]

    def count(self, axis: NDArray[np.int64]) -> int:
        """How many stay."""
        return int(self.kept(axis).sum())

    def constant(self, node: int, place: int, values: Sequence[int]) -> None:
        """Give the node an input of its own, int64."""
        from onnx import numpy_helper

        target = self.model.graph.node[node]
        name = f"edgekit-{node}-{place}"
        array = np.asarray(values, np.int64)
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        target.input.extend([""] * (place + 1 - len(target.input)))
        target.input[place] = name

    def attribute(self, node: int, name: str, value: int | None) -> None:
        """Set an integer attribute, or take it away."""
        from onnx import helper

        target = self.model.graph.node[node]
        for one in [a for a in target.attribute if a.name == name]:
            target.attribute.remove(one)
        if value is not None:
            target.attribute.append(helper.make_attribute(name, value))


#: makes a node's attributes and shape constants fit
Fix = Callable[[Remover], None]


@dataclass
class Trace:
    """The walk through a prepared model.

    shapes: of every tensor, for one sample. values: of small integer tensors. weights: the
    initializers. choices: which of several axes that a Reshape merges or splits may shrink.
    """

    model: Any
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Array]
    weights: Mapping[str, Array]
    choices: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    known: dict[str, Axes] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    fixes: list[Fix] = field(default_factory=list)
    pins: list[tuple[NDArray[np.int64], str]] = field(default_factory=list)
    offered: dict[tuple[int, ...], int] = field(default_factory=dict)
    place: int = 0
    _same: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    _atoms: int = 0

    def __post_init__(self) -> None:
        self.readers = readers_of(self.model)
        self.free_batch_only = all(
            not d.dim_param for one in self.model.graph.input
            for d in one.type.tensor_type.shape.dim[1:]
        )  # fmt: skip

    @property
    def atoms(self) -> int:
        """How many there are."""
        return self._atoms

    def axes(self, name: str) -> Axes:
        """The atoms of a tensor's axes; a weight gets them when it is first asked for."""
        if name not in self.known:
            shape = self.shapes[name]
            stored = name in self.weights
            self.known[name] = [self.fresh(n) if stored and n > 1 else None for n in shape]
        return self.known[name]

    def fresh(self, count: int) -> NDArray[np.int64]:
        """New atoms."""
        made = np.arange(self._atoms, self._atoms + count, dtype=np.int64)
        self._atoms += count
        return made

    def same(self, first: Axis, second: Axis, why: str) -> Axis:
        """Both axes are one; where one stays as it is, the other does, too."""
        if first is None or second is None:
            self.pin(first if second is None else second, why)
            return None
        self._same.append((first, second))
        return first

    def tie(self, axis: NDArray[np.int64]) -> None:
        """(N, together): the atoms of each row go together."""
        if axis.shape[1] > 1:
            first = np.repeat(axis[:, 0], axis.shape[1] - 1)
            self._same.append((first, axis[:, 1:].reshape(-1)))

    def pin(self, axis: Axis, why: str) -> None:
        """These stay."""
        if axis is not None and axis.size:
            self.pins.append((axis.reshape(-1), why))

    def pin_all(self, name: str, why: str) -> None:
        """Everything of a tensor stays."""
        if name and name in self.shapes:
            for axis in self.axes(name):
                self.pin(axis, why)

    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of atoms that are the same."""
        if not self._same:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        first, second = zip(*self._same, strict=True)
        return np.concatenate(first), np.concatenate(second)


@dataclass(frozen=True)
class Classes:
    """The result: `of[atom]` is its class; `reasons` says of pinned classes why they stay.

    free: the classes that may go: not pinned, and outputs of at least one layer.
    """

    trace: Trace
    of: NDArray[np.int64]
    reasons: Mapping[int, str]
    free: NDArray[np.int64]

    def axis(self, atoms: NDArray[np.int64]) -> NDArray[np.int64]:
        """The classes along an axis."""
        found: NDArray[np.int64] = self.of[atoms]
        return found

    @property
    def prunable(self) -> int:
        """How many weights are in rows that may go."""
        able = np.zeros(len(self.of) + 1, bool)
        able[self.free] = True
        return sum(
            int(able[self.of[one.rows]].sum()) * (self.trace.weights[one.weight].size
            // max(1, len(one.rows))) for one in self.trace.products
            if one.weight and one.rows is not None
        )  # fmt: skip


def classes_of(trace: Trace) -> Classes:
    """Connect what is the same, and find what may go."""
    first, second = trace.edges()
    label = _components(trace.atoms, first, second)
    reasons: dict[int, str] = {}
    for atoms, why in trace.pins:
        for one in np.unique(label[atoms]):
            reasons.setdefault(int(one), why)
    rows = [p.rows for p in trace.products if p.weight and p.rows is not None]
    made = np.unique(label[np.concatenate(rows)]) if rows else np.zeros(0, np.int64)
    free = np.array([one for one in made if int(one) not in reasons], np.int64)
    return Classes(trace, label, reasons, free)


def _components(
    count: int, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The least atom that each is connected with."""
    label = np.arange(count, dtype=np.int64)
    while True:
        one, other = label[first], label[second]
        least = np.minimum(one, other)
        made = label.copy()
        np.minimum.at(made, one, least)
        np.minimum.at(made, other, least)
        made = made[made]
        if np.array_equal(made, label):
            return label
        label = made
