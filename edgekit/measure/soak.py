"""A sustained run: latency over time, and when the device begins to slow down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import EdgeKitError
from edgekit.measure.conditions import Moment, moment
from edgekit.measure.series import onset, warm_up

__all__ = ["Soak", "soak"]

_MOST_POINTS = 2000


@dataclass
class Soak:
    """Windows of about a second: when each ended (seconds from the beginning), the median, the
    slowest tenth and how many runs, the processor's frequency and temperature then."""

    asked_s: float
    at_s: list[float] = field(default_factory=list)
    p50_ns: list[int] = field(default_factory=list)
    p90_ns: list[int] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    frequency_khz: list[int | None] = field(default_factory=list)
    temperature_mc: list[int | None] = field(default_factory=list)
    error: EdgeKitError | KeyboardInterrupt | None = None

    @property
    def failure(self) -> str | None:
        """Why it ended early."""
        return None if self.error is None else str(self.error) or "stopped"

    def to_json(self) -> dict[str, Any]:
        """With the first and the last minute's medians (a tenth of the time, if it is under ten
        minutes), their ratio, and `onset_s`: when it became slower for good, None if it did not.
        """
        document: dict[str, Any] = {
            **{key: value for key, value in vars(self).items() if key != "error"},
            "failure": self.failure, "onset_s": self.onset_s(),
        }  # fmt: skip
        if self.at_s:
            span = min(60.0, max(self.at_s[-1] / 10, 1.0))
            first = [ns for at, ns in zip(self.at_s, self.p50_ns, strict=True) if at <= span]
            last = [
                ns for at, ns in zip(self.at_s, self.p50_ns, strict=True)
                if at > self.at_s[-1] - span
            ]  # fmt: skip
            begin, end = float(np.median(first or last)), float(np.median(last))
            document |= {
                "window_s": span, "first_ns": int(begin), "last_ns": int(end),
                "slowdown": round(end / begin, 4) if begin else None,
            }  # fmt: skip
        return document

    def onset_s(self) -> float | None:
        """When it became slower by 5 % or more and stayed so, seconds from the beginning."""
        cut = warm_up(self.p50_ns)
        found = onset(self.p50_ns[cut:])
        if found is None:
            return None
        index = cut + found
        return self.at_s[index - 1] if index else 0.0


def soak(
    take: Callable[[float], list[int]],
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    look: Callable[[], Moment] = moment,
    progress: Callable[[int, int], None] | None = None,
) -> Soak:
    """Call `take(window_s)`, which returns the nanoseconds of runs, until the time is over.

    What fails ends it, and so does Ctrl-C; what was measured until then is kept, and `failure` says
    so.
    """
    found = Soak(seconds)
    window = max(1.0, seconds / _MOST_POINTS)
    start = clock()
    while (passed := clock() - start) < seconds:
        try:
            samples = [ns for ns in take(min(window, seconds - passed)) if ns > 0]
            now = look() if samples else None
        except (EdgeKitError, KeyboardInterrupt) as error:
            found.error = error
            break
        if now is not None:
            found.at_s.append(round(clock() - start, 3))
            found.p50_ns.append(int(np.median(samples)))
            found.p90_ns.append(int(np.quantile(samples, 0.9)))
            found.runs.append(len(samples))
            found.frequency_khz.append(now.frequency_khz)
            found.temperature_mc.append(now.temperature_mc)
        if progress is not None:
            progress(int(clock() - start), int(seconds))
    return found
