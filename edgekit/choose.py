"""The decision: which candidates may be chosen, which one is, and why, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgekit.measure.benchmark import Measurement
from edgekit.measure.statistics import median_interval, ratio_interval

__all__ = ["Allowed", "Choice", "Entrant", "exceeds", "over_budget", "rank", "samples_to_tell"]

#: what the difference of two metrics may be off by
_ROUNDING = 1e-9
#: medians further apart than this never count as equal, however wide the interval
_LEVEL = 1.05
#: medians no further apart than this always do
_SAME = 1.01

Aim = Literal["latency", "size"]


@dataclass(frozen=True)
class Entrant:
    """A candidate that built, was evaluated within the accuracy budget and was measured."""

    id: str
    size_bytes: int
    measurement: Measurement


@dataclass(frozen=True)
class Choice:
    """`order` are the ids that may be chosen, best first; `dropped` says why others may not."""

    order: tuple[str, ...]
    dropped: Mapping[str, str]
    why: str


@dataclass(frozen=True)
class Allowed:
    """How much may be lost, in the metric's units: by all samples, and by each slice of them."""

    drop: float
    slice_drop: float | None = None


def exceeds(drop: float, allowed: float) -> bool:
    """Whether a loss is more than allowed, or NaN: 3 of 300 lost are 0.01, whatever the difference
    of two floating-point numbers makes of it."""
    return not drop <= allowed + _ROUNDING


def over_budget(evaluation: Mapping[str, Any], allowed: Allowed) -> str | None:
    """Why a candidate's accuracy rules it out, or None; `evaluation` is what `evaluate` found."""
    broken, samples = evaluation["broken"], evaluation["samples"]
    drop = evaluation.get("drop", 0.0)
    if broken:
        return f"NaN or Inf in the outputs of {broken} of {samples} samples"
    if exceeds(drop, allowed.drop):
        return f"loses {_lost(drop)}, more than the {allowed.drop:g} allowed"
    if allowed.slice_drop is not None:
        slices = [one for one in evaluation.get("slices", ()) if one["drop"] is not None]
        worst = max(slices, key=lambda one: float(one["drop"]), default=None)
        if worst is not None and exceeds(worst["drop"], allowed.slice_drop):
            return (
                f"slice {worst['name']} ({worst['samples']} samples) loses "
                f"{_lost(worst['drop'])}, more than the {allowed.slice_drop:g} allowed for a slice"
            )
    return None


def samples_to_tell(evaluation: Mapping[str, Any], allowed: Allowed) -> int | None:
    """About how many samples it takes until the 95 % interval of the drop lies on one side of what
    is allowed, as its width shrinks with the root of their number; None if it does already."""
    span = evaluation.get("drop_interval")
    if not span or not span[0] <= allowed.drop < span[1]:
        return None
    half = (span[1] - span[0]) / 2
    away = max(abs(allowed.drop - evaluation["drop"]), half / 100)
    samples: float = evaluation["samples"] * (half / away) ** 2
    return math.ceil(samples)


def _lost(drop: float) -> str:
    return f"{drop:.4f}" if drop >= 0.001 else f"{drop:.2g}"


def rank(
    entrants: Sequence[Entrant], reference: Entrant, aim: Aim, *, eligible: bool = True
) -> Choice:
    """Never worse: what is neither faster nor smaller than the reference is dropped. Unless the
    reference is not `eligible`, since the device cannot run it: then there is no other choice.

    "Faster" needs the whole 95 % interval of the ratio below 1. Among contenders that the
    intervals cannot tell from the fastest, the smallest is taken.
    """
    dropped, kept = {}, []
    for one in entrants:
        if one.id == reference.id:
            continue
        ratio, _, high = _ratio(one, reference)
        if eligible and not high < 1.0 and not one.size_bytes < reference.size_bytes:
            dropped[one.id] = (
                f"neither faster ({ratio:.2f}x) nor smaller "
                f"({_kb(one.size_bytes)} against {_kb(reference.size_bytes)}) than fp32"
            )
        else:
            kept.append(one)
    field = [reference, *kept] if eligible else kept
    if not field:
        return Choice((), dropped, "")
    if aim == "size":
        order = sorted(field, key=lambda e: (e.size_bytes, _middle(e)))
        why = f"the smallest within the accuracy budget ({_kb(order[0].size_bytes)})"
        return Choice(tuple(e.id for e in order), dropped, why)
    order = sorted(field, key=_middle)
    fastest = order[0]
    level = [e for e in order if e is fastest or _is_level(e, fastest)]
    winner = min(level, key=lambda e: (e.size_bytes, _middle(e)))
    order.sort(key=lambda e: (e is not winner, e not in level, _middle(e)))
    why = _why(winner, fastest, reference, level)
    if not eligible:
        ratio = _ratio(winner, reference)[0]
        why = f"the best that the device can run; {ratio:.2f}x the latency of the model as it came"
    return Choice(tuple(e.id for e in order), dropped, why)


def _is_level(one: Entrant, fastest: Entrant) -> bool:
    """Whether the noise hides any difference that would matter.

    A wide interval alone is no evidence of that: the median must be close, too, or a noisy
    machine would hand the choice to something that looks 40 % slower. Within 1 % all is level: two
    processes of one model differ by that (decision record 8), if not on an emulator. Without an
    interval (too few rounds) nothing is level.
    """
    ratio, low, _ = _ratio(one, fastest)
    return low > 0 and (ratio <= _SAME or (low <= 1.0 and ratio <= _LEVEL))


def _why(winner: Entrant, fastest: Entrant, reference: Entrant, level: list[Entrant]) -> str:
    if winner is reference:
        return "nothing within the accuracy budget is faster than the model as it came"
    ratio, low, high = _ratio(winner, reference)
    text = f"{ratio:.2f}x the latency of fp32 (95 % interval {low:.2f} to {high:.2f})"
    if winner is not fastest:
        return f"{text}; not told apart from {fastest.id}, and smaller"
    if len(level) > 1:
        return f"{text}; fastest, and the smallest of {len(level)} not told apart"
    return f"{text}; fastest within the accuracy budget"


def _middle(entrant: Entrant) -> float:
    return median_interval(entrant.measurement.medians_ns)[0]


def _ratio(one: Entrant, other: Entrant) -> tuple[float, float, float]:
    return ratio_interval(one.measurement.medians_ns, other.measurement.medians_ns)


def _kb(size_bytes: int) -> str:
    return f"{size_bytes / 1000:.0f} kB"
