"""The first tensor at which two models differ, found by bisection over the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.taps import Tap

__all__ = [
    "Divergence", "Search", "error_between", "matched", "runs_at_most", "search", "search_by_value",
]  # fmt: skip

#: tensors of fewer elements have their values by chance, too
_LEAST_TELLING = 8

#: `values_of(names)`: these tensors of the reference, with their counterparts in the candidate
Search = Callable[[Sequence[str]], Mapping[str, tuple[NDArray[Any], NDArray[Any]]]]


@dataclass(frozen=True)
class Divergence:
    """Where two models part: the tensor, the node that computes it in the reference's words, how
    far it is off, the last tensors before it that agree, and how many runs of both it took."""

    tensor: str
    node: str
    candidate_tensor: str
    relative_error: float
    agree: tuple[str, ...]
    compared: int
    runs: int


def runs_at_most(tensors: int) -> int:
    """The most runs of both models that `search` needs for so many tensors."""
    return math.ceil(math.log2(max(1, tensors))) + 2


def search(
    taps: Sequence[Tap],
    counterparts: Mapping[str, str],
    output: str,
    values_of: Search,
    tolerance: float,
) -> Divergence | None:
    """The first tensor, in the order of `taps`, that differs although all it is computed from
    agrees; None if no tensor that both have leads to `output`, which is known to differ.

    Each run halves what is left: of the first half of the tensors, all that the second half uses
    are compared at once. If they agree, the fault is in the second half; if one does not, it is
    among what that one is computed from.
    """
    parents = _parents(taps, counterparts)
    if output not in parents:
        return None
    left = _leading_to(output, parents)
    total, runs = len(left), 0
    errors: dict[str, float] = {}
    while len(left) > 1:
        half, rest = left[: len(left) // 2], left[len(left) // 2 :]
        used = set().union(*(parents[later] for later in rest))
        edge = [one for one in half if one in used]
        runs += 1
        for name, (one, other) in values_of(edge).items():
            errors[name] = error_between(one, other)
        bad = next((one for one in edge if not errors[one] <= tolerance), None)
        if bad is None:
            left = rest
        else:
            upstream = set(_leading_to(bad, parents))
            left = [one for one in half if one in upstream]
    found = left[0]
    near = sorted(parents[found])
    unseen = [one for one in (found, *near) if one not in errors]
    if unseen:
        runs += 1
        for name, (one, other) in values_of(unseen).items():
            errors[name] = error_between(one, other)
    node = next(tap.node for tap in taps if tap.name == found)
    agree = tuple(one for one in near if errors[one] <= tolerance)
    return Divergence(found, node, counterparts[found], errors[found], agree, total, runs)


def search_by_value(
    taps: Sequence[Tap],
    output: str,
    reference: Mapping[str, NDArray[Any]],
    candidate: Mapping[str, NDArray[Any]],
    tolerance: float,
) -> Divergence | None:
    """As `search`, for models that name their tensors differently: a tensor of the reference is
    in the candidate if one there has the same values, in whatever order of axes. What is not in it
    was fused away if something computed from it is, and is where they part if nothing is."""
    names = {tap.name: tap.name for tap in taps if tap.name in reference}
    parents = _parents(taps, names)
    if output not in parents:
        return None
    order = _leading_to(output, parents)
    sorted_theirs: dict[int, list[tuple[str, NDArray[Any]]]] = {}
    for name, array in candidate.items():
        values = np.sort(array.astype(np.float64), axis=None)
        sorted_theirs.setdefault(array.size, []).append((name, values))
    agreeing: dict[str, str] = {}
    for one in order:
        array = reference[one]
        if array.size < _LEAST_TELLING or np.ptp(array.astype(np.float64)) == 0:
            continue
        values = np.sort(array.astype(np.float64), axis=None)
        for name, theirs in sorted_theirs.get(array.size, []):
            if error_between(values, theirs) <= tolerance:
                agreeing[one] = name
                break
    sound = set(agreeing)  # and whatever a sound one is computed from
    for one in reversed(order):
        if one in sound:
            sound |= parents[one]
    found = next((one for one in order if one not in sound), output)
    node = next(tap.node for tap in taps if tap.name == found)
    near = tuple(one for one in sorted(parents[found]) if one in sound)
    return Divergence(found, node, "", math.inf, near, len(order), 1)


def error_between(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """The greatest difference over the reference's greatest absolute value; infinite where shapes
    differ or one has NaN or Inf and the other has not. Axes may be in another order (NCHW and
    NHWC): the order that fits best counts."""
    if reference.size != candidate.size:
        return math.inf
    one = reference.astype(np.float64)
    shapes = [candidate] if reference.shape == candidate.shape else _reordered(one, candidate)
    least = math.inf
    for other in shapes:
        both = other.astype(np.float64).reshape(one.shape)
        sound = np.isfinite(one)
        if not np.array_equal(sound, np.isfinite(both)):
            continue
        if not sound.any():
            return 0.0
        scale = float(np.max(np.abs(one[sound]))) or 1.0
        least = min(least, float(np.max(np.abs(one[sound] - both[sound]))) / scale)
    return least


def _reordered(one: NDArray[Any], other: NDArray[Any]) -> list[NDArray[Any]]:
    squeezed, wanted = other.squeeze(), one.squeeze().shape
    orders = permutations(range(squeezed.ndim)) if squeezed.ndim <= 5 else ()
    return [
        squeezed.transpose(order) for order in orders
        if tuple(squeezed.shape[axis] for axis in order) == wanted
    ]  # fmt: skip


def matched(reference: Sequence[Tap], candidate: Sequence[Tap]) -> dict[str, str]:
    """The candidate's name for each tensor that both have: equal, or equal without what converters
    put around names (`:0`, the names merged into one with `;`, the scope of the whole graph)."""
    theirs = {tap.name for tap in candidate if tap.comparable}
    found = {tap.name: tap.name for tap in reference if tap.comparable and tap.name in theirs}
    plain: dict[str, list[str]] = {}
    for name in theirs:
        for one in {_plain(part) for part in name.split(";")}:
            plain.setdefault(one, []).append(name)
    for tap in reference:
        others = plain.get(_plain(tap.name.split(";")[0]), [])
        if tap.comparable and tap.name not in found and len(others) == 1:
            found[tap.name] = others[0]
    return found


def _plain(name: str) -> str:
    name = name.split(":", maxsplit=1)[0]
    for scope in ("StatefulPartitionedCall/", "import/"):
        name = name.removeprefix(scope)
    return name


def _parents(taps: Sequence[Tap], common: Mapping[str, str]) -> dict[str, set[str]]:
    """For each tensor that both have, the nearest of them that it is computed from; in order."""
    nearest: dict[str, set[str]] = {}
    for tap in taps:
        above: set[str] = set()
        for name in tap.inputs:
            above |= {name} if name in common and name in nearest else nearest.get(name, set())
        nearest[tap.name] = above
    return {name: above for name, above in nearest.items() if name in common}


def _leading_to(output: str, parents: Mapping[str, set[str]]) -> list[str]:
    """The tensors that `output` is computed from, and itself last, in the order of `parents`."""
    found, todo = {output}, [output]
    while todo:
        new = parents[todo.pop()] - found
        found |= new
        todo += new
    return [name for name in parents if name in found]
