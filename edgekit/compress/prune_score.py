"""How much is lost with a channel.

`l1`, `l2`: the norm of the weights that make it. `activation`: the share of the variance of the
outputs of the layers that read it. `second-order`: the same after the other channels have made up
for it as well as they can, one after the other (B. Hassibi and D. G. Stork, "Second order
derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992, equation 5, for blocks of
weights, with the layer's own squared error as the loss).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.layers_onnx import Array, Layer
from edgekit.compress.prune_axes import Classes, Product
from edgekit.compress.prune_moments import Moments

__all__ = ["IMPORTANCES", "Group", "Reader", "curves", "groups_of", "norms", "readers_in"]

IMPORTANCES = ("l1", "l2", "activation", "second-order")
#: added to the diagonal, as a share of its mean
_DAMPING = 0.01
#: steps in which a group is taken apart
_STEPS = 96


@dataclass
class Group:
    """Classes that are outputs of the same layers.

    order: the classes, those that go first in front. costs: what is lost with each of them, given
    that those in front are gone, float64. layers: the nodes that make them.
    """

    order: NDArray[np.int64]
    costs: Array
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Reader:
    """A layer that sums over channels: rows (outputs, terms), xx (terms, terms), and the terms'
    classes."""

    rows: Array
    xx: Array
    classes: NDArray[np.int64]


def groups_of(classes: Classes) -> list[Group]:
    """The classes that may go, in the order of the layers that make them."""
    free = np.zeros(len(classes.of) + 1, bool)
    free[classes.free] = True
    made: list[tuple[set[int], set[int]]] = []
    for one in classes.trace.products:
        if not one.weight or one.rows is None:
            continue
        own = {int(c) for c in np.unique(classes.axis(one.rows)) if free[c]}
        if not own:
            continue
        nodes = {one.node}
        for other in [g for g in made if g[0] & own]:
            own |= other[0]
            nodes |= other[1]
            made.remove(other)
        made.append((own, nodes))
    return [
        Group(np.array(sorted(own), np.int64), np.zeros(len(own)), tuple(sorted(nodes)))
        for own, nodes in sorted(made, key=lambda g: min(g[1]))
    ]


def norms(classes: Classes, order: int) -> dict[int, float]:
    """The norm (1 or 2) of the weights that make each class, a layer's mean being 1."""
    found: dict[int, float] = dict.fromkeys((int(c) for c in classes.free), 0.0)
    for one in classes.trace.products:
        if not one.weight or one.rows is None:
            continue
        array = np.moveaxis(classes.trace.weights[one.weight].astype(np.float64), one.out_axis, 0)
        axis = classes.trace.axes(one.weight)[one.out_axis]
        if axis is None:
            continue
        each = np.linalg.norm(array.reshape(len(array), -1), order, axis=1)
        each /= max(float(each.mean()), 1e-30)
        for label, value in zip(classes.axis(axis), each, strict=True):
            if int(label) in found:
                found[int(label)] += float(value)
    return found


def readers_in(
    classes: Classes, layers: Sequence[Layer], weights: Mapping[str, Array],
    moments: Mapping[str, Moments],
) -> list[Reader]:  # fmt: skip
    """The layers with moments, as sums over channels."""
    by_weight: dict[str, Product] = {p.weight: p for p in classes.trace.products if p.weight}
    found = []
    for layer in layers:
        product = by_weight.get(layer.weight)
        known = moments.get(layer.weight)
        if product is None or known is None or product.columns is None:
            continue
        rows, labels = layer.rows(weights), classes.axis(product.columns)
        each = len(rows) // layer.group
        width = len(labels) // layer.group
        for group in range(layer.group):
            own = labels[group * width : (group + 1) * width]
            found.append(
                Reader(
                    rows[group * each : (group + 1) * each],
                    known.xx[group],
                    np.repeat(own, rows.shape[1] // width),
                )
            )
    return found


def curves(groups: list[Group], readers: Sequence[Reader], *, compensated: bool) -> None:
    """Put the classes of each group in the order in which they go, with what each costs: the
    squared error of the layers that read them, as shares of their outputs' variance. A group that
    no reader here reads costs infinitely much, and so stays."""
    for group in groups:
        own = [one for one in readers if np.isin(one.classes, group.order).any()]
        if not own:  # what they are worth is not known
            group.costs = np.full(len(group.order), np.inf)
            continue
        states = [_State(one, compensated=compensated) for one in own]
        left, order, costs = [int(c) for c in group.order], [], []
        size = max(1, len(left) // _STEPS) if compensated else len(left)
        while left:
            lost = sum((state.losses(left) for state in states), np.zeros(len(left)))
            picked = np.argsort(lost, kind="stable")[:size]
            for at in picked:
                order.append(left[at])
                costs.append(float(lost[at]))
            for state in states if compensated else ():
                state.drop([left[at] for at in picked])
            gone = set(picked.tolist())
            left = [one for at, one in enumerate(left) if at not in gone]
        group.order = np.array(order, np.int64)
        group.costs = np.maximum.accumulate(np.array(costs))


class _State:
    """A reader while its channels go."""

    def __init__(self, reader: Reader, *, compensated: bool) -> None:
        self.rows = reader.rows.copy()
        self.compensated = compensated
        damped = reader.xx.copy()
        diagonal = np.diag(damped).copy()
        damped[np.diag_indices_from(damped)] += _DAMPING * diagonal.mean() + 1e-12
        self.matrix = np.linalg.inv(damped) if compensated else damped
        energy = np.einsum("ij,jk,ik->", reader.rows, reader.xx, reader.rows, optimize=True)
        self.total = max(float(energy), 1e-30)
        order = np.argsort(reader.classes, kind="stable")
        labels, starts = np.unique(reader.classes[order], return_index=True)
        parts = np.split(order, starts[1:])
        self.terms = {int(c): part for c, part in zip(labels, parts, strict=True)}

    def losses(self, labels: Sequence[int]) -> Array:
        """What each class costs now, as a share."""
        made = np.zeros(len(labels))
        for at, label in enumerate(labels):
            terms = self.terms.get(label)
            if terms is None:
                continue
            block, part = self.matrix[np.ix_(terms, terms)], self.rows[:, terms]
            weighed = np.linalg.solve(block, part.T) if self.compensated else block @ part.T
            made[at] = float(np.einsum("ij,ji->", part, weighed)) / self.total
        return made

    def drop(self, labels: Sequence[int]) -> None:
        """These go; the others make up for them."""
        found = [self.terms[one] for one in labels if one in self.terms]
        if not found:
            return
        terms = np.concatenate(found)
        half = np.linalg.solve(self.matrix[np.ix_(terms, terms)], self.matrix[terms])
        self.rows -= self.rows[:, terms] @ half
        self.matrix -= self.matrix[:, terms] @ half
        # What is gone must not be met again through rounding.
        self.matrix[terms] = self.matrix[:, terms] = 0.0
        self.matrix[terms, terms] = 1.0
        self.rows[:, terms] = 0.0
