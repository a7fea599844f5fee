"""Which classes go for a given share of the MACs, or of the latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.prune_axes import Classes, Product
from edgekit.compress.prune_latency import Table, interpolate
from edgekit.compress.prune_score import Group

__all__ = ["Cost", "choose", "choose_evenly", "latency_costs", "macs_costs", "share_saved"]

#: classes of a group that go in one step
_STEPS = 96
#: the least share of a group that stays
_LEAST = 0.05


#: what MACs count for beside measured time, so that steps of the same time can be told apart
_MACS_COUNT = 0.01


@dataclass(frozen=True)
class Cost:
    """What is to be saved of a product: `of` the lengths of `axes`."""

    axes: tuple[NDArray[np.int64], ...]
    of: Callable[[Sequence[int]], float]


def macs_costs(classes: Classes) -> list[Cost]:
    """MACs."""
    return [Cost(one.axes, _macs(one)) for one in classes.trace.products]


def latency_costs(classes: Classes, tables: Sequence[Table | None]) -> list[Cost]:
    """Nanoseconds by the tables of `edgekit.compress.prune_latency`; products without one take as
    long for a MAC as the others do."""
    products = classes.trace.products
    macs = [_macs(one)([len(axis) for axis in one.axes]) for one in products]
    known = [(n, t["ns"][-1][-1]) for n, t in zip(macs, tables, strict=True) if t]
    rate = sum(ns for _, ns in known) / max(1.0, sum(n for n, _ in known)) or 1.0
    return [
        Cost(one.axes, _scaled(_macs(one), rate)) if table is None else _timed(one, table, rate)
        for one, table in zip(products, tables, strict=True)
    ]


def _macs(one: Product) -> Callable[[Sequence[int]], float]:
    return lambda counts: one.factor * math.prod(counts)


def _scaled(of: Callable[[Sequence[int]], float], rate: float) -> Callable[[Sequence[int]], float]:
    return lambda counts: rate * of(counts)


def _timed(one: Product, table: Table, rate: float) -> Cost:
    """Its rows and columns shrink, if they are known at all; whatever else it is over does not."""
    pairs = ((one.rows, "rows"), (one.columns, "columns"))
    ends = [(axis, int(table[name][-1])) for axis, name in pairs]
    axes = tuple(axis for axis, _ in ends if axis is not None)
    most = one.factor * math.prod(len(axis) for axis in one.axes) * rate

    def of(counts: Sequence[int]) -> float:
        left = iter(counts)
        sizes = [full if axis is None else next(left) for axis, full in ends]
        share: float = math.prod(size / full for size, (_, full) in zip(sizes, ends, strict=True))
        return interpolate(table, *sizes) + _MACS_COUNT * most * share

    return Cost(axes, of)


class _Account:
    """Costs while classes go."""

    def __init__(self, classes: Classes, costs: Sequence[Cost] | None) -> None:
        self.costs = costs or macs_costs(classes)
        self.counts = [[len(axis) for axis in one.axes] for one in self.costs]
        self.total = sum(one.of(n) for one, n in zip(self.costs, self.counts, strict=True))
        self.places: dict[int, list[tuple[int, int, int]]] = {}
        for number, one in enumerate(self.costs):
            for place, axis in enumerate(one.axes):
                for label, count in zip(
                    *np.unique(classes.axis(axis), return_counts=True), strict=True
                ):
                    self.places.setdefault(int(label), []).append((number, place, int(count)))

    def saved(self, labels: Iterable[int]) -> float:
        """What goes with these."""
        fewer: dict[int, list[int]] = {}
        for label in labels:
            for number, place, count in self.places.get(label, ()):
                counts = fewer.setdefault(number, list(self.counts[number]))
                counts[place] -= count
        return sum(
            self.costs[number].of(self.counts[number]) - self.costs[number].of(counts)
            for number, counts in fewer.items()
        )

    def drop(self, labels: Sequence[int]) -> None:
        for label in labels:
            for number, place, count in self.places.get(label, ()):
                self.counts[number][place] -= count


def share_saved(
    classes: Classes, gone: NDArray[np.bool_], costs: Sequence[Cost] | None = None
) -> float:  # fmt: skip
    """The share of all costs (MACs by default) that goes with these classes (bool by class)."""
    account = _Account(classes, costs)
    return account.saved(np.flatnonzero(gone).tolist()) / max(account.total, 1e-30)


def _least(size: int, multiple: int) -> int:
    """How many of a group stay at least."""
    few = max(1, int(np.ceil(_LEAST * size)))
    return min(size, -(-few // multiple) * multiple if size > multiple else few)


def choose(
    classes: Classes, groups: Sequence[Group], amount: float, multiple: int = 1,
    costs: Sequence[Cost] | None = None,
) -> NDArray[np.bool_]:  # fmt: skip
    """Bool by class: those that go for a share `amount` of the costs (MACs by default), where least
    is lost for what is saved. What is left of a group is a multiple of `multiple` where it is
    greater than that."""
    account = _Account(classes, costs)
    gone, saved = np.zeros(len(classes.of), bool), 0.0
    taken = [0] * len(groups)
    while saved < amount * account.total:
        best, rate = None, np.inf
        for number, group in enumerate(groups):
            step = _next(group, taken[number], multiple)
            if not step:
                continue
            labels = [int(c) for c in group.order[taken[number] : taken[number] + step]]
            less = account.saved(labels)
            cost = float(group.costs[taken[number] : taken[number] + step].sum())
            if less > 0 and cost / less < rate:
                best, rate = (number, labels, less), cost / less
        if best is None:
            break
        number, labels, less = best
        account.drop(labels)
        gone[labels] = True
        taken[number] += len(labels)
        saved += less
    return gone


def _next(group: Group, taken: int, multiple: int) -> int:
    """How many go next; 0: no more may."""
    size = len(group.order)
    left = size - taken
    step = max(1, size // _STEPS)
    if size > multiple > 1:
        step = max(step // multiple, 1) * multiple
        step = left % multiple or step
    return step if left - step >= _least(size, multiple) else 0


def choose_evenly(
    classes: Classes, groups: Sequence[Group], amount: float, multiple: int = 1,
    costs: Sequence[Cost] | None = None,
) -> NDArray[np.bool_]:  # fmt: skip
    """The same share of every group: the classical way of ranking by norms."""
    account = _Account(classes, costs)
    low, high = 0.0, 1.0
    gone = np.zeros(len(classes.of), bool)
    for _ in range(20):
        share = (low + high) / 2
        found = np.zeros(len(classes.of), bool)
        for group in groups:
            size = len(group.order)
            stay = max(_least(size, multiple), round((1 - share) * size))
            if size > multiple > 1:
                stay = min(size, -(-stay // multiple) * multiple)
            found[group.order[: size - stay]] = True
        if account.saved(np.flatnonzero(found).tolist()) >= amount * account.total:
            high, gone = share, found
        else:
            low = share
    return gone if gone.any() else found
