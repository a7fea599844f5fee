"""Numbers as the report writes them: with their unit, and a dash for what is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DASH",
    "Scale",
    "bytes_text",
    "count_text",
    "finite",
    "ms_text",
    "ratio_text",
    "seconds_text",
    "stand_in",
]

DASH, _MINUS = "\u2013", "\u2212"

#: metrics that are shares of 1 and read best in percent; any other is shown as it is
_SHARES = frozenset({"top1", "top5", "accuracy", "precision", "recall", "f1"})


def finite(value: object) -> bool:
    """Whether it is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def ms_text(ns: float | None) -> str:
    """Milliseconds with three significant digits, without the unit: a column shares it."""
    return DASH if ns is None else _three_digits(ns / 1e6)


def bytes_text(count: float | None) -> str:
    """Decimal units: 1 kB is 1000 bytes."""
    if count is None:
        return DASH
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{_three_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float | None) -> str:
    """Seconds, or minutes when there are many."""
    if seconds is None:
        return DASH
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def ratio_text(ratio: Sequence[float] | None) -> tuple[str, str]:
    """`[ratio, low, high]` as "0.66x" and "95 % CI 0.49 to 0.74"; the second may be empty."""
    if ratio is None or not finite(ratio[0]):
        return DASH, ""
    middle, low, high = ratio
    if low == high:  # fewer than six rounds give no interval
        return f"{middle:.2f}x", "too few rounds for an interval"
    return f"{middle:.2f}x", f"95 % CI {low:.2f} to {high:.2f}"


def count_text(number: int, noun: str) -> str:
    """A count with its noun: "1 thread", "2 threads"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _three_digits(value: float) -> str:
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, decimals)}f}"


@dataclass(frozen=True)
class Scale:
    """How a metric is written: a share in percent and its changes in points, others as they are."""

    name: str
    higher_is_better: bool

    @property
    def share(self) -> bool:
        return self.name in _SHARES

    @property
    def factor(self) -> float:
        """From the document's number to the one shown."""
        return 100.0 if self.share else 1.0

    @property
    def drop_name(self) -> str:
        """What getting worse is called: an error rises."""
        return "drop" if self.higher_is_better else "rise"

    def value(self, metric: float | None) -> str:
        if metric is None:
            return DASH
        if not finite(metric):
            return "NaN"
        return f"{metric * 100:.2f} %" if self.share else f"{metric:.5g}".replace("-", _MINUS)

    def drop(self, drop: float | None) -> str:
        """With its unit; positive is worse."""
        if drop is None:
            return DASH
        if not finite(drop):
            return "NaN"
        number = f"{drop * 100:z.2f}" if self.share else f"{drop:z.3g}"
        return number.replace("-", _MINUS) + (" points" if self.share else "")

    def interval(self, interval: Sequence[float] | None) -> str:
        """Of a drop and in its unit: "95 % CI low to high", empty when there is none."""
        if interval is None:
            return ""
        low, high = (self.drop(end).removesuffix(" points") for end in interval)
        return f"95 % CI {low} to {high}"

    def budget(self, reference: float, max_drop: float) -> float:
        """The worst metric that is allowed."""
        return reference - max_drop if self.higher_is_better else reference + max_drop

    def budget_text(self, reference: float, max_drop: float) -> str:
        sign = "\u2265" if self.higher_is_better else "\u2264"
        return f"{self.name} {sign} {self.value(self.budget(reference, max_drop))}"


def stand_in(candidate: Mapping[str, Any]) -> str:
    """What stood in for a candidate's accelerator, so that its times mean nothing; empty if
    nothing did."""
    return str((candidate["placement"] or {}).get("simulated") or "")
