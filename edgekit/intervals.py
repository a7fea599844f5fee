"""95 % intervals of one figure: closed forms where samples are counted, the bootstrap elsewhere.

The closed forms do not collapse where nothing went wrong: 50 right answers of 50 are not 100 % for
certain. `benchmarks/eval_coverage.py` checks by simulation how often they hold the truth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "auc", "bootstrap", "effective", "f_score", "wilson"]

Array = NDArray[np.float64]

#: the normal quantile of 97.5 %
Z = NormalDist().inv_cdf(0.975)
_RUNS = 2000
_LEAST_RUNS = 200
#: leaving one out is exact up to here; above, blocks of samples are left out
_JACKKNIFE_BLOCKS = 200
#: below, resampling says little about what was not drawn
_LEAST_SAMPLES = 8


@dataclass(frozen=True)
class Interval:
    """`low` and `high` in the figure's units, and the method's name."""

    low: float
    high: float
    method: str


def wilson(hits: Array | float, count: Array | float) -> tuple[Array, Array]:
    """Of a share, by inverting the score test (Wilson, JASA 22, 1927); 0..1 where nothing was
    counted."""
    n = np.asarray(count, np.float64)
    share = np.divide(hits, n, out=np.full(np.shape(n), 0.5), where=n > 0)
    middle = (share * n + Z * Z / 2) / (n + Z * Z)
    half = Z / (n + Z * Z) * np.sqrt(share * (1 - share) * n + Z * Z / 4)
    low, high = np.maximum(0.0, middle - half), np.minimum(1.0, middle + half)
    return np.where(n > 0, low, 0.0), np.where(n > 0, high, 1.0)


def f_score(right: Array | float, wrong: Array | float) -> tuple[Array, Array]:
    """Of F1 = 2 TP / (2 TP + FP + FN), `wrong` being FP + FN.

    TP / (TP + FP + FN) is a share of what is counted, and F1 grows with it: 2 J / (1 + J) (Hand,
    Christen and Kirielle, Machine Learning 110, 2021), so that its interval is that share's.
    """
    low, high = wilson(right, np.asarray(right) + wrong)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def auc(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """Of the area under a ROC curve: method 5 of Newcombe (Statistics in Medicine 25, 2006), the
    score interval with Hanley and McNeil's variance for exponential scores."""
    least = (positives + negatives) / 2 - 1

    def over(truth: float) -> float:
        more = least * ((1 - truth) / (2 - truth) + truth / (1 + truth))
        spread = truth * (1 - truth) * (1 + more) / (positives * negatives)
        return abs(area - truth) - Z * math.sqrt(max(spread, 0.0))

    return _edge(over, area, 0.0), _edge(over, area, 1.0)


def _edge(over: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `over`, negative inside, becomes positive on the way out; by bisection."""
    if over(outside) <= 0 and inside == outside:
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        if over(middle) > 0:
            outside = middle
        else:
            inside = middle
    return inside


def effective(value: float, middle: float, variance: float) -> Interval | None:
    """Of a figure in 0..1 that is no plain share: Wilson's interval with as many samples as a
    share near `middle` would need to have this variance (Dean and Pagano, Journal of Survey
    Statistics and Methodology 3, 2015). `middle` is the figure kept away from 0 and 1."""
    if not (math.isfinite(value) and math.isfinite(variance) and variance > 0 < middle < 1):
        return None
    count = middle * (1 - middle) / variance
    low, high = wilson(value * count, count)
    return Interval(float(low), float(high), "wilson, effective count")


def bootstrap(
    figure: Callable[[NDArray[np.int64]], float], count: int, *, seed: int = 0,
    budget_s: float = 10.0, runs: int = _RUNS,
) -> Interval | None:  # fmt: skip
    """Of any figure of samples, `figure(sample numbers)`: bias-corrected and accelerated (Efron,
    JASA 82, 1987), seeded; None for fewer than 8 samples, or where the figure is hardly ever
    defined or nothing varies. After `budget_s` it makes do with the runs it has.
    """
    if count < _LEAST_SAMPLES:
        return None
    rng = np.random.default_rng(seed)
    everything = np.arange(count)
    value = figure(everything)
    deadline = time.monotonic() + budget_s
    found = []
    for _ in range(runs):
        one = figure(rng.integers(0, count, count))
        if math.isfinite(one):
            found.append(one)
        if time.monotonic() > deadline:
            break
    drawn = np.asarray(found)
    if len(drawn) < _LEAST_RUNS or not math.isfinite(value) or np.ptp(drawn) == 0.0:
        return None
    below = (np.sum(drawn < value) + np.sum(drawn == value) / 2) / len(drawn)
    bias = NormalDist().inv_cdf(min(max(float(below), 1e-6), 1 - 1e-6))
    speed = _acceleration(figure, everything)
    # The t quantile for few samples: resampling alone makes intervals of means too short.
    reach = Z * (1 + (Z * Z + 1) / (4 * (count - 1))) * math.sqrt(count / (count - 1))
    at = []
    for z in (-reach, reach):
        moved = bias + z
        at.append(NormalDist().cdf(bias + moved / max(1 - speed * moved, 0.1)))
    low, high = np.quantile(drawn, at)
    return Interval(float(low), float(high), "bca")


def _acceleration(
    figure: Callable[[NDArray[np.int64]], float], everything: NDArray[np.int64]
) -> float:
    """The skewness of the figures without one sample (or block of them) each, over 6."""
    blocks = np.array_split(everything, min(len(everything), _JACKKNIFE_BLOCKS))
    left = np.array([figure(np.setdiff1d(everything, one)) for one in blocks])
    left = left[np.isfinite(left)]
    if len(left) < 2:
        return 0.0
    away = left.mean() - left
    total = float(np.sum(away**2)) ** 1.5
    return float(np.sum(away**3)) / (6 * total) if total else 0.0
