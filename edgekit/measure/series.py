"""Samples in the order they were taken: where warming up ends, how much they really say.

Latencies are skewed and follow each other: a slow moment lasts for many runs. What is said of them
here counts ranks, and counts only as many samples as independent ones would be needed for the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PERCENTILES",
    "effective_size",
    "latency_summary",
    "least_count",
    "onset",
    "quantile_interval",
    "warm_up",
    "width",
]

#: the percentiles that are shown, by the name they have in documents
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
#: fewer samples than this have no beginning to speak of
_LEAST_FOR_WARM_UP = 20


def least_count(share: float, *, confidence: float = 0.95) -> int:
    """Samples needed before the quantile at `share` (0.5 <= share < 1) has an interval.

    Above the largest of n samples lies the true quantile with probability share**n; the upper end
    of an equal-tailed interval exists once that is at most (1 - confidence) / 2 (Hahn and Meeker,
    Statistical Intervals, 5.3). At 95 %: 6 for the median, 36 for p90, 368 for p99, 3688 for
    p99.9.
    """
    return math.ceil(math.log((1 - confidence) / 2) / math.log(share))


def quantile_interval(
    values: Sequence[float], share: float, *, count: int | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval of the quantile at `share` from order statistics, whatever the distribution.

    The ranks l and h of the binomial(count, share) with at most (1 - confidence) / 2 below l and
    from h on (Hahn and Meeker, 5.2). `count`: how many independent samples these are worth (see
    `effective_size`); their ranks are scaled up to all samples. Infinite where there is no rank.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered) if count is None else min(count, len(ordered))
    if n < 1:
        return -math.inf, math.inf
    below = _binomial_cdf(n, share)
    tail = (1 - confidence) / 2
    low = int(np.searchsorted(below, tail, side="right"))  # largest l with cdf(l - 1) <= tail
    high = int(np.searchsorted(below, 1 - tail, side="left")) + 1  # smallest h: cdf(h - 1) >= ...
    scale = len(ordered) / n
    at_low = ordered[max(math.floor(low * scale), 1) - 1] if low >= 1 else -math.inf
    at_high = ordered[min(math.ceil(high * scale), len(ordered)) - 1] if high <= n else math.inf
    return float(at_low), float(at_high)


def _binomial_cdf(n: int, share: float) -> NDArray[np.float64]:
    """P(B <= k) for k = 0..n, of the binomial(n, share)."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # log k!
    k = np.arange(n + 1)
    choose = logs[n] - logs - logs[::-1]
    mass = np.exp(choose + k * math.log(share) + (n - k) * math.log1p(-share))
    found: NDArray[np.float64] = np.minimum(np.cumsum(mass), 1.0)
    return found


def effective_size(values: Sequence[float], share: float = 0.5) -> int:
    """As many independent samples would say as much of the quantile at `share`: 1..len(values).

    From the autocorrelation of "is at most the quantile" (Vehtari et al., Bayesian Analysis 16,
    2021, 4.1), summed over Geyer's initial positive pairs (Statistical Science 7, 1992). Never
    more than there are: samples that alternate are taken as independent.
    """
    taken = np.asarray(values, np.float64)
    n = len(taken)
    if n < 4:
        return n
    under = (taken <= np.quantile(taken, share, method="inverted_cdf")).astype(np.float64)
    centred = under - under.mean()
    power = float(centred @ centred)
    if power == 0:
        return n
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    rho = np.fft.irfft(spectrum * np.conj(spectrum), size)[:n] / power
    pairs = rho[0 : n - n % 2 : 2] + rho[1 : n - n % 2 : 2]
    negative = np.flatnonzero(pairs <= 0)
    pairs = pairs[: negative[0]] if len(negative) else pairs
    time = max(1.0, 2 * float(np.minimum.accumulate(pairs).sum()) - 1)
    return max(1, int(n / time))


def warm_up(values: Sequence[float]) -> int:
    """How many samples at the beginning belong to warming up, found by change point.

    The logarithms are split where both sides' means differ most; the split is believed when it
    explains more than 3 log n variances (Zhang and Siegmund's modified BIC, Biometrics 63, 2007),
    the variance being that of the second half times its autocorrelation time, with what lies more
    than three interquartile ranges outside pulled in: one interruption is no change. Only a
    beginning of at most a quarter that is slower than every later stretch of its length is warming
    up: others come and go. What is left is looked at again, since warming up has several steps.
    """
    taken = np.log(np.maximum(np.asarray(values, np.float64), 1.0))
    start = 0
    while len(taken) - start >= _LEAST_FOR_WARM_UP:
        split = _slower_beginning(taken[start:])
        if split == 0 or start + split > len(taken) // 4:
            break
        start += split
    return start


def _slower_beginning(values: NDArray[np.float64]) -> int:
    n = len(values)
    later = values[n // 2 :]
    low, high = np.quantile(later, [0.25, 0.75])
    reach = 3 * (high - low)
    calm = np.clip(values, low - reach, high + reach)
    late = calm[n // 2 :]
    # rounding makes steps: a series that does not vary at all would see a change in each of them
    variance = max(float(late.var()), 1e-8) * len(late) / effective_size(late.tolist())
    ends = np.arange(1, n // 4 + 1)
    sums = np.cumsum(calm)
    left = sums[ends - 1] / ends
    right = (sums[-1] - sums[ends - 1]) / (n - ends)
    gain = np.where(left > right, ends * (n - ends) / n * (left - right) ** 2 / variance, 0.0)
    split = int(np.argmax(gain)) + 1
    if gain[split - 1] <= 3 * math.log(n):
        return 0
    later_means = (sums[2 * split - 1 :] - sums[split - 1 : n - split]) / split
    return split if left[split - 1] > later_means.max() else 0


def onset(values: Sequence[float], *, least: float = 0.05) -> int | None:
    """Where a series becomes slower for good: the first value of the slow part, None if nowhere.

    The split whose two sides' medians explain most, as for `warm_up`; believed when the later
    median lies over `least` above the earlier one. An engine that warms up first: cut that off.
    """
    taken = np.log(np.maximum(np.asarray(values, np.float64), 1.0))
    n = len(taken)
    if n < _LEAST_FOR_WARM_UP:
        return None
    sums, squares = np.cumsum(taken), np.cumsum(taken**2)
    ends = np.arange(2, n - 1)  # two values on each side at least
    left, right = sums[ends - 1] / ends, (sums[-1] - sums[ends - 1]) / (n - ends)
    inside = (squares[-1] - ends * left**2 - (n - ends) * right**2) / n
    gain = np.where(right > left, ends * (n - ends) / n * (right - left) ** 2, 0.0)
    best = int(np.argmax(gain))
    split = int(ends[best])
    calm = np.concatenate([taken[:split] - left[best], taken[split:] - right[best]])
    variance = max(float(inside[best]), 1e-8) * n / effective_size(calm.tolist())
    grown = float(np.median(taken[split:]) - np.median(taken[:split]))
    if gain[best] <= 3 * math.log(n) * variance or grown < math.log1p(least):
        return None
    return split


def width(values: Sequence[float]) -> float:
    """Half the median's interval as a share of it, from the effective size; infinite for few."""
    count = effective_size(values)
    low, high = quantile_interval(values, 0.5, count=count)
    middle = float(np.median(np.asarray(values, np.float64))) if len(values) else 0.0
    return (high - low) / (2 * middle) if middle > 0 else math.inf


def latency_summary(samples: Sequence[int], *, label: str = "measured") -> dict[str, Any]:
    """`{p50, p90, p99, p99.9, min, samples, effective_samples, intervals, label}` in nanoseconds.

    `intervals` holds `[low, high]` at 95 % of each percentile shown. A percentile whose interval
    does not exist for as many effective samples as there are (`least_count`) is None; the median
    is always given, without an interval if need be. Samples are used as they are: cut warming up
    off first.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = np.sort(np.asarray(samples, np.int64))
    out: dict[str, Any] = {}
    intervals: dict[str, list[int]] = {}
    effective = bulk = effective_size(samples)
    for name, share in PERCENTILES.items():
        # the bulk says how much the series depends on itself, too: never more than that
        effective = min(effective, effective_size(samples, share))
        rank = max(1, math.ceil(round(share * len(ordered), 9)))
        low, high = quantile_interval(samples, share, count=effective)
        known = math.isfinite(low) and math.isfinite(high)
        out[name] = int(ordered[rank - 1]) if known or name == "p50" else None
        if known:
            intervals[name] = [int(low), int(high)]
    return {
        **out,
        "min": int(ordered[0]),
        "samples": len(ordered),
        "effective_samples": bulk,
        "intervals": intervals,
        "label": label,
    }
