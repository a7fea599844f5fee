"""The figures of a comparison, each with a verdict, and whether one of them is a regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgekit.measure.compare import Ratio, verdict

__all__ = [
    "Figure", "latency_figure", "memory_figure", "metric_figures", "parity_figure",
    "placement_figure", "size_figure", "unlike_figure",
]  # fmt: skip

#: devices that are worth more than the processor
_ACCELERATORS = ("GPU", "NPU", "DSP", "TPU")
#: outputs that point another way: quantization that is sound stays above (see docs/how-to)
LEAST_COSINE = 0.99


@dataclass(frozen=True)
class Figure:
    """One line of a comparison: values in the unit of its name, and what follows from them."""

    name: str
    base: float | str | None
    new: float | str | None
    verdict: str
    regression: bool = False
    ratio: Ratio | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in `edgekit.compare/1`."""
        ratio = self.ratio.to_json() if self.ratio else {"ratio": None, "interval": None}
        return {
            "figure": self.name, "base": self.base, "new": self.new, **ratio,
            "verdict": self.verdict, "regression": self.regression, "note": self.note,
        }  # fmt: skip


def latency_figure(base_ns: float, new_ns: float, ratio: Ratio, *, fail_over: float) -> Figure:
    """The p50 of both; a regression if it is surely slower, and by more than `fail_over`."""
    said = verdict(ratio, resolution=max(fail_over, 0.05))
    return Figure(
        "latency_ns", base_ns, new_ns, said, said == "slower" and ratio.value > 1 + fail_over, ratio
    )


def unlike_figure(name: str, stand_ins: str) -> Figure:
    """A figure of what stands in for an accelerator on this machine: no regression, nor none."""
    note = f"on {stand_ins}: it says nothing of a device's"
    return Figure(name, None, None, "not compared", note=note)


def memory_figure(
    base: int | None, new: int | None, ratio: Ratio | None, *, fail_over: float
) -> Figure | None:
    """Peak resident memory. Without an interval, from files, over 2 % counts as a difference."""
    if not base or not new:
        return None
    found = ratio or Ratio(new / base, new / base, new / base)
    said = verdict(
        found, floor=0.02, resolution=max(fail_over, 0.05), words=("less memory", "more memory")
    )
    more = said == "more memory" and found.value > 1 + fail_over
    return Figure("peak_rss_bytes", base, new, said, more, found)


def size_figure(base: int | None, new: int | None, *, fail_over: float) -> Figure | None:
    """The files' sizes: exact, so any difference is one."""
    if not base or not new:
        return None
    said = "same size" if base == new else "larger" if new > base else "smaller"
    ratio = new / base
    return Figure("size_bytes", base, new, said, ratio > 1 + fail_over, Ratio(ratio, ratio, ratio))


def placement_figure(base: dict[str, Any] | None, new: dict[str, Any] | None) -> Figure | None:
    """Where it ran: a regression if less of it runs on an accelerator than before."""
    if not base or not new:
        return None
    shares = [one.get("shares") or {} for one in (base, new)]
    texts = [
        ", ".join(f"{100 * share:.0f} % {where}" for where, share in one.items()) for one in shares
    ]
    quick = [sum(v for k, v in one.items() if k in _ACCELERATORS) for one in shares]
    lost = quick[1] < quick[0] - 0.005
    changes = [
        f"{base[key]}, now {new[key]}"
        for key in ("delegate", "precision")
        if key in base and key in new and base[key] != new[key]
    ]
    same = texts[0] == texts[1] and not changes
    said = "less on the accelerator" if lost else "same" if same else "other"
    return Figure("placement", texts[0], texts[1], said, lost, note="; ".join(changes))


def parity_figure(found: dict[str, Any]) -> Figure:
    """Whether the new one answers as the base does: broken outputs, or a cosine under 0.99."""
    if not found["compared"]:
        return Figure("parity", None, None, "not compared", note=found["why"])
    if found["broken"]:
        return Figure("parity", 1.0, None, "NaN or infinities", regression=True)
    low = found["cosine"] < LEAST_COSINE
    note = f"top-1 agrees in {100 * found['top1']:.1f} %" if found["top1"] is not None else ""
    return Figure("parity", 1.0, found["cosine"], "differs" if low else "agrees", low, note=note)


def metric_figures(
    base: list[dict[str, Any]], new: list[dict[str, Any]], *, max_drop: float
) -> list[Figure]:
    """Metrics of both on the same samples, from `edgekit.eval/1`.

    `drop` (positive: worse) and its paired interval where the new one was judged against the base;
    else a difference is one if the two intervals do not overlap. A regression: surely worse, and
    by more than `max_drop` in the metric's own units.
    """
    others = {one["name"]: one for one in base}
    figures = []
    for one in new:
        other = others.get(one["name"])
        old = one.get("reference", other["value"] if other else None)
        if one["value"] is None or old is None:
            continue
        drop, ends = _drop(one, other)
        said = "not enough data"
        if drop is not None and ends is not None:
            said = "worse" if ends[0] > 0 else "better" if ends[1] < 0 else "no difference"
        note = "" if drop is None else f"drop {drop:+.4g}"
        note += f" ({ends[0]:+.4g} to {ends[1]:+.4g})" if one.get("drop_interval") and ends else ""
        worse = said == "worse" and drop is not None and drop > max_drop
        figures.append(Figure(one["name"], old, one["value"], said, worse, note=note))
    return figures


def _drop(
    one: dict[str, Any], other: dict[str, Any] | None
) -> tuple[float | None, tuple[float, float] | None]:
    """How much worse, and the interval of that, from whatever the evaluation says."""
    drop, paired = one.get("drop"), one.get("drop_interval")
    if drop is not None:
        same = drop == 0 and paired is None
        return drop, (0.0, 0.0) if same else (paired[0], paired[1]) if paired else None
    if other is None or not one["interval"] or not other["interval"]:
        return None, None
    sign = 1 if one.get("higher_is_better", True) else -1
    drop = sign * (other["value"] - one["value"])
    spans = sorted((one["interval"], other["interval"]))
    apart = spans[0][1] < spans[1][0]
    return drop, (drop, drop) if apart else (-abs(drop), abs(drop))
