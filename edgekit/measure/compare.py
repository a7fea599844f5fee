"""Two contenders against each other: what can be said of the ratio, and what cannot.

Two processes of the same model differ by a per cent or two for as long as they live (where their
memory came to lie, which processor they run on), so that no number of samples of one pair tells
more than that. Here both are started anew several times, side by side on the same processors, and
take turns of a few milliseconds; a start gives one ratio, the median of its turns', and the
interval is over starts.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.measure.series import effective_size, quantile_interval
from edgekit.measure.statistics import median_interval
from edgekit.measure.worker import Contender, Worker, processors

__all__ = ["Duel", "Effort", "Ratio", "duel", "ratio_of_series", "verdict"]

#: a difference under 1 % is not called one: processes of the same binary differ by as much
FLOOR = 0.01


@dataclass(frozen=True)
class Ratio:
    """New over base: the estimate and its 95 % interval (infinite ends: not known)."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """`{ratio, interval}`; None for what is not known."""
        known = math.isfinite(self.low) and math.isfinite(self.high)
        interval = [round(self.low, 5), round(self.high, 5)] if known else None
        return {
            "ratio": round(self.value, 5) if math.isfinite(self.value) else None,
            "interval": interval,
        }


def verdict(
    ratio: Ratio, *, resolution: float = 0.05, floor: float = FLOOR,
    words: tuple[str, str] = ("faster", "slower"),
) -> str:  # fmt: skip
    """`faster`, `slower`, `no difference` or `not enough data`.

    A difference: the interval leaves 1 out and the estimate differs by over `floor`. None: the
    whole interval lies within a factor of 1 + `resolution`. Neither: more data is needed.
    """
    if not (math.isfinite(ratio.low) and math.isfinite(ratio.high)):
        return "not enough data"
    if ratio.low > 1 and ratio.value > 1 + floor:
        return words[1]
    if ratio.high < 1 and ratio.value < 1 / (1 + floor):
        return words[0]
    inside = ratio.low >= 1 / (1 + resolution) and ratio.high <= 1 + resolution
    return "no difference" if inside else "not enough data"


@dataclass(frozen=True)
class Effort:
    """How much is measured. Six starts are the fewest for which an interval of the median exists
    at 95 %; more follow until its half-width is `enough`, or a quarter
    of the difference, or `most` starts or `budget_s` are
    spent. A turn of `slice_s` holds at least one run."""

    least: int = 6
    most: int = 15
    turns: int = 40
    slice_s: float = 0.008
    start_s: float = 2.0
    enough: float = 0.01
    budget_s: float = 120.0


@dataclass
class Duel:
    """What was measured: per start one ratio, the samples and peak memory of both sides.

    `stopped` says why it ended: `narrow` (the interval is narrow enough), `starts` or `budget`
    (spent), `cancelled`.
    """

    ratios: list[float] = field(default_factory=list)
    base_ns: list[list[int]] = field(default_factory=list)
    new_ns: list[list[int]] = field(default_factory=list)
    base_rss: list[int] = field(default_factory=list)
    new_rss: list[int] = field(default_factory=list)
    hello: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    failure: str | None = None

    @property
    def latency(self) -> Ratio:
        """New over base."""
        return Ratio(*median_interval(self.ratios)) if self.ratios else _NOTHING

    @property
    def memory(self) -> Ratio:
        """Peak resident memory, new over base."""
        pairs = [n / b for n, b in zip(self.new_rss, self.base_rss, strict=True) if b]
        return Ratio(*median_interval(pairs)) if pairs else _NOTHING


_NOTHING = Ratio(math.nan, -math.inf, math.inf)


def duel(
    base: Contender,
    new: Contender,
    *,
    inputs: Path | None = None,
    effort: Effort = Effort(),
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> Duel:
    """Measure both, interleaved, on the same processors.

    One that dies after a whole start leaves what was measured, with `failure` set.

    Raises:
        EdgeKitError: one of them cannot be loaded, or died before the first start was done.
    """
    found, rng = Duel(), random.Random(seed)  # noqa: S311  (order of measuring, no secret)
    deadline = time.monotonic() + effort.budget_s
    for start in range(effort.most):
        cpus = processors(max(base.threads, new.threads), start)
        try:
            _one_start(found, (base, new), inputs, effort=effort, cpus=cpus, rng=rng)
        except Exception as error:
            if not found.ratios:
                raise
            found.failure, found.stopped = str(error), "failure"
            return found
        if progress is not None:
            progress(start + 1, effort.most)
        if start + 1 < effort.least:
            continue
        ratio = found.latency
        # a large difference need not be known as finely as a small one
        if (ratio.high - ratio.low) / 2 <= max(effort.enough, abs(ratio.value - 1) / 4):
            found.stopped = "narrow"
            return found
        if time.monotonic() > deadline:
            found.stopped = "budget"
            return found
    found.stopped = "starts"
    return found


def _one_start(
    found: Duel, sides: tuple[Contender, Contender], inputs: Path | None, *, effort: Effort,
    cpus: Sequence[int] | None, rng: random.Random,
) -> None:  # fmt: skip
    order = [0, 1]
    rng.shuffle(order)  # who is loaded first gets other memory
    with ExitStack() as stack:
        workers: dict[int, Worker] = {}
        for side in order:
            workers[side] = stack.enter_context(Worker(sides[side], inputs, cpus=cpus))
            workers[side].take(effort.slice_s)
        taken: tuple[list[list[int]], list[list[int]]] = ([], [])
        longest = max(2 * effort.slice_s, sum(w.estimate_ns for w in workers.values()) / 1e9)
        turns = max(5, min(effort.turns, int(effort.start_s / longest)))
        for _ in range(turns):
            rng.shuffle(order)
            for side in order:
                taken[side].append(workers[side].take(effort.slice_s).samples_ns)
        medians = [np.array([np.median(block) for block in blocks]) for blocks in taken]
        found.ratios.append(float(np.median(medians[1] / np.maximum(medians[0], 1))))
        found.base_ns += taken[0]
        found.new_ns += taken[1]
        found.base_rss.append(workers[0].peak_rss_bytes)
        found.new_rss.append(workers[1].peak_rss_bytes)
        found.hello = [workers[0].hello, workers[1].hello]


def ratio_of_series(base: Sequence[int], new: Sequence[int]) -> Ratio:
    """Ratio of the medians of two series taken at different times.

    Each median's interval at 97.5 %, from its effective sample size: both hold together with at
    least 95 % (Bonferroni), so the ratio lies between the ends' ratios. What changed between the
    two times is in the ratio and in no interval.
    """
    if not base or not new:
        return _NOTHING
    ends = []
    for series in (base, new):
        count = effective_size(series)
        ends.append(quantile_interval(series, 0.5, count=count, confidence=0.975))
    (base_low, base_high), (new_low, new_high) = ends
    middle = float(np.median(new)) / max(float(np.median(base)), 1.0)
    if not all(map(math.isfinite, (base_low, base_high, new_low, new_high))):
        return Ratio(middle, -math.inf, math.inf)
    return Ratio(middle, new_low / max(base_high, 1.0), new_high / max(base_low, 1.0))
