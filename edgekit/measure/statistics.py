"""Statistics that assume nothing about how latencies are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

__all__ = ["median_interval", "paired_ratio", "ratio_interval"]


def median_interval(
    values: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Median and its interval from order statistics: `(median, low, high)`.

    The interval of ranks k and n+1-k covers the true median with probability
    1 - 2 * sum_{i<k} C(n, i) / 2^n, whatever the distribution (Hahn and Meeker, Statistical
    Intervals, 5.2). The narrowest that reaches `confidence` is taken. Five values reach 93.75 %
    at most: fewer than six give the whole real line.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    middle = float(np.median(ordered)) if n else float("nan")
    below, rank = 0.0, 0
    for k in range(1, n // 2 + 1):
        below += comb(n, k - 1) / 2.0**n
        if 1 - 2 * below < confidence:
            break
        rank = k
    if rank == 0:
        return middle, float("-inf"), float("inf")
    return middle, float(ordered[rank - 1]), float(ordered[n - rank])


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratio of two contenders round by round: what disturbs a round disturbs both."""
    count = min(len(numerator), len(denominator))
    return [numerator[i] / denominator[i] for i in range(count)]


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float]
) -> tuple[float, float, float]:
    """Median of the paired ratios with its 95 % interval."""
    return median_interval(paired_ratio(numerator, denominator))
