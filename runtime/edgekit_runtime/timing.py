"""Takes latency samples and summarises them. Samples are what is kept; a summary is a view."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, List, Sequence

import numpy as np

__all__ = ["percentile_ns", "sample", "summary"]


def sample(call: Callable[[], Any], count: int) -> List[int]:
    """Call `count` times; nanoseconds of each call (monotonic clock)."""
    clock = time.perf_counter_ns
    taken = []
    for _ in range(count):
        start = clock()
        call()
        taken.append(clock() - start)
    return taken


def percentile_ns(samples: Sequence[int], percent: float) -> int:
    """The smallest sample that at least `percent` % of all samples do not exceed.

    The nearest-rank definition (Hyndman and Fan 1996, definition 1): always a value that was
    really measured. `percent` in 0..100.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.int64))
    rank = max(1, int(np.ceil(percent * len(ordered) / 100)))
    return int(ordered[rank - 1])


def summary(samples: Sequence[int], *, label: str = "measured") -> Dict[str, Any]:
    """`{p50, p90, min, samples, label}` in nanoseconds, and `p99`.

    p90 is None below 36 samples, p99 below 368: fewer give no 95 % interval for them (0.9**36 and
    0.99**368 are 0.025; Hahn and Meeker, Statistical Intervals, 5.3).
    """
    count = len(samples)
    return {
        "p50": percentile_ns(samples, 50),
        "p90": percentile_ns(samples, 90) if count >= 36 else None,
        "p99": percentile_ns(samples, 99) if count >= 368 else None,
        "min": int(min(samples)),
        "samples": count,
        "label": label,
    }
