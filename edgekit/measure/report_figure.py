"""The report's plot, accuracy against latency, as a plotly figure in plain data.

Candidates far over the accuracy budget would squeeze the others into one row of pixels, so they
get a strip of their own below the plot: one row each, in order, with the true value on the axis.
Colours are the names of CSS variables (`var(--kept)`), which `report.js` looks up: the colour
scheme is the reader's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any

from edgekit.measure.report_text import Scale, bytes_text, finite, ms_text, ratio_text, stand_in

__all__ = ["pareto_figure"]

_Document = dict[str, Any]

#: in the order they are drawn; numbers are legible in all of these shapes
_MARKERS = {
    "skipped": "hexagon",
    "failed": "triangle-down",
    "dropped": "square",
    "kept": "circle",
    "chosen": "diamond",
}
#: heights, margins and diameters in CSS pixels; a marker's area follows the size of the file
_MAIN_PX, _GAP_PX, _ROW_PX, _TOP_PX, _BOTTOM_PX = 360, 32, 40, 14, 52
_LARGEST_PX, _LEAST_PX = 40.0, 20.0
#: a candidate that loses more than this many times the budget goes into the strip
_FAR = 2.5
#: latencies further apart than this get a logarithmic axis
_LOG_FROM = 10.0


@dataclass(frozen=True)
class _Point:
    """A candidate in the plot; `number` is its row in the table."""

    number: int
    candidate: _Document
    diameter_px: float

    @property
    def x_ms(self) -> float:
        return float(self.candidate["latency_ns"]["p50"]) / 1e6

    @property
    def metric(self) -> float:
        return float(self.candidate["metric"])

    @property
    def drop(self) -> float:
        return float(self.candidate["metric_drop"])


def pareto_figure(
    document: _Document, scale: Scale, ranked: Sequence[_Document]
) -> _Document | None:
    """`{data, layout}` for plotly; None when no candidate has both a metric and a latency.

    `ranked` are the document's candidates in the order of the table.
    """
    points = _points(ranked)
    reference, max_drop = document["reference"], document["max_drop"]
    if not points or not finite(reference["metric"]) or not reference["latency_ns"]:
        return None
    near, far = _near_and_far(points, reference["metric"], max_drop)
    far.sort(key=lambda p: -p.drop)
    strip_px = len(far) * _ROW_PX
    height_px = _MAIN_PX + (strip_px + _GAP_PX if far else 0)
    floor, strip = 1 - _MAIN_PX / height_px, strip_px / height_px
    x_axis = _x_axis([p.x_ms for p in points])
    y_range = _y_range([0.0, max_drop, *(p.drop for p in near)], reference["metric"], scale)
    layout = {
        "height": height_px + _TOP_PX + _BOTTOM_PX,
        "margin": {"l": 8, "r": 12, "t": _TOP_PX, "b": _BOTTOM_PX},
        "xaxis": {**x_axis, "anchor": "y2" if far else "y"},
        "yaxis": {
            "range": y_range,
            "domain": [floor, 1],
            "title": {"text": _plain(scale.name) + (", %" if scale.share else "")},
        },
        "shapes": _guides(document, scale, y_range[0], strip),
        "annotations": _guide_labels(document, scale, x_axis, floor if far else None),
    }
    if far:
        layout["yaxis2"] = {
            "domain": [0, strip],
            "range": [-0.5, len(far) - 0.5],
            "tickvals": list(range(len(far))),
            "ticktext": [scale.value(p.metric).removesuffix(" %") for p in far],
        }
    hovers = {p.number: _hover(scale, p.candidate) for p in points}
    traces = [
        *_front([p for p in near if p.drop <= max_drop], scale),
        *_traces(near, [p.metric * scale.factor for p in near], "y", hovers),
        *_traces(far, [float(row) for row in range(len(far))], "y2", hovers),
    ]
    return {"data": traces, "layout": layout}


def _plain(text: str) -> str:
    """Text that plotly's own small markup leaves alone."""
    return escape(text, quote=False)


def _points(ranked: Sequence[_Document]) -> list[_Point]:
    sizes = [c["size_bytes"] or 0 for c in ranked]
    largest = max([*sizes, 1])
    return [
        _Point(number, c, round(max(_LEAST_PX, _LARGEST_PX * math.sqrt(size / largest)), 1))
        for number, (c, size) in enumerate(zip(ranked, sizes, strict=True), start=1)
        if c["latency_ns"] and finite(c["metric"]) and finite(c["metric_drop"]) and not stand_in(c)
    ]


def _near_and_far(
    points: Sequence[_Point], reference: float, max_drop: float
) -> tuple[list[_Point], list[_Point]]:
    """Those that one axis shows well, and those it would be squeezed by."""
    good = [0.0, *(p.drop for p in points if p.drop <= max_drop)]
    least = 0.002 * (abs(reference) or 1.0)  # with a budget of 0 and no gains: two per mille
    reach = max(_FAR * max_drop, -1.5 * min(good), least)
    return [p for p in points if p.drop <= reach], [p for p in points if p.drop > reach]


def _y_range(drops: Sequence[float], reference: float, scale: Scale) -> list[float]:
    """From worst to best: the axis of an error runs downwards, up is always better."""
    pad = 0.12 * (max(drops) - min(drops)) or 0.01 * (abs(reference) or 1.0)
    ends = (max(drops) + pad, min(drops) - 2 * pad)  # room for the names above the best
    return [scale.budget(reference, drop) * scale.factor for drop in ends]


def _x_axis(values: Sequence[float]) -> _Document:
    low, high = min(values), max(values)
    axis: _Document = {"title": {"text": "latency p50, ms"}}
    if high <= _LOG_FROM * low:
        pad = 0.1 * (high - low) or 0.2 * high
        return {**axis, "type": "linear", "range": [low - pad, high + pad]}
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    pad = 0.1 * math.log10(high / low)
    return {
        **axis,
        "type": "log",
        "range": [math.log10(low) - pad, math.log10(high) + pad],
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def _traces(
    points: Sequence[_Point], heights: Sequence[float], axis: str, hovers: dict[int, str]
) -> list[_Document]:
    """One trace per status, small markers above large ones."""
    pairs = sorted(zip(points, heights, strict=True), key=lambda pair: -pair[0].diameter_px)
    traces = []
    for status, symbol in _MARKERS.items():
        mine = [(p, y) for p, y in pairs if p.candidate["status"] == status]
        if not mine:
            continue
        trace = {
            "type": "scatter",
            "mode": "markers+text",
            "yaxis": axis,
            "x": [p.x_ms for p, _ in mine],
            "y": [y for _, y in mine],
            "text": [str(p.number) for p, _ in mine],
            "hovertext": [hovers[p.number] for p, _ in mine],
            "hoverinfo": "text",
            "customdata": [_plain(p.candidate["id"]) for p, _ in mine],
            "cliponaxis": False,
            "marker": {
                "symbol": symbol,
                "size": [p.diameter_px for p, _ in mine],
                "opacity": 1,
                "color": f"var(--{status}-fill)",
                "line": {"color": f"var(--{status})", "width": 1.5},
            },
            "textfont": {"color": f"var(--{status}-ink)", "size": 11},
        }
        traces.append(trace)
    return traces


def _front(points: Sequence[_Point], scale: Scale) -> list[_Document]:
    """The steps of the Pareto front: nothing within the budget is faster and more accurate."""
    front: list[_Point] = []
    for point in sorted(points, key=lambda p: (p.x_ms, p.drop)):
        if not front or point.drop < front[-1].drop:
            front.append(point)
    if len(front) < 2:
        return []
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": [p.x_ms for p in front],
        "y": [p.metric * scale.factor for p in front],
        "line": {"shape": "hv", "color": "var(--muted)", "width": 1.25},
        "hoverinfo": "skip",
    }
    return [trace]


def _guides(document: _Document, scale: Scale, worst: float, strip: float) -> list[_Document]:
    """The budget, what lies beyond it, and the reference's latency."""
    reference = document["reference"]
    budget = scale.budget(reference["metric"], document["max_drop"]) * scale.factor
    x_ms = reference["latency_ns"]["p50"] / 1e6
    across = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
    beyond = {"fillcolor": "var(--beyond)", "line": {"width": 0}}
    line = {"color": "var(--dropped)", "width": 1.5, "dash": "dash"}
    upright = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    shapes = [
        {**across, **beyond, "yref": "y", "y0": worst, "y1": budget},
        {**across, "type": "line", "yref": "y", "y0": budget, "y1": budget, "line": line},
        {"type": "line", "layer": "below", "x0": x_ms, "x1": x_ms, "yref": "paper", "y0": 0,
         "y1": 1, "line": upright},
    ]  # fmt: skip
    return [*shapes, {**across, **beyond, "yref": "paper", "y0": 0, "y1": strip}]


def _guide_labels(
    document: _Document, scale: Scale, x_axis: _Document, floor: float | None
) -> list[_Document]:
    """Words at the guides; `floor` is where the main plot ends, given that there is a strip."""
    reference = document["reference"]
    budget = scale.budget(reference["metric"], document["max_drop"]) * scale.factor
    x = reference["latency_ns"]["p50"] / 1e6
    if x_axis["type"] == "log":
        x = math.log10(x)  # annotations, unlike shapes, take a logarithmic axis' own numbers
    low, high = x_axis["range"]
    left = x - low < 0.6 * (high - low)
    words = scale.budget_text(reference["metric"], document["max_drop"])
    labels: list[_Document] = [
        {"text": f"budget: {_plain(words)}", "xref": "paper", "x": 1, "xanchor": "right",
         "xshift": -4, "yref": "y", "y": budget, "yanchor": "top"},
        {"text": f"{_plain(reference['scheme'])} reference", "x": x, "yref": "paper", "y": 1,
         "yanchor": "top", "xanchor": "left" if left else "right", "xshift": 3 if left else -3},
    ]  # fmt: skip
    if floor is not None:
        words = "far over the budget: in order, not to scale"
        labels.append(
            {"text": words, "xref": "paper", "x": 0, "xanchor": "left", "yref": "paper",
             "y": floor, "yanchor": "top", "yshift": -6}
        )  # fmt: skip
    return [
        {**label, "showarrow": False, "font": {"size": 11, "color": "var(--muted)"}}
        for label in labels
    ]


def _hover(scale: Scale, candidate: _Document) -> str:
    """All facts in short lines, for a narrow window too."""
    latency = candidate["latency_ns"]
    engine = f"{candidate['engine']} {candidate['engine_version'] or ''}".rstrip()
    drop = f"{scale.drop_name} {scale.drop(candidate['metric_drop'])}"
    ratio, interval = ratio_text(candidate["latency_ratio"])
    shares = (candidate["placement"] or {}).get("shares", {})
    lines = (
        f"{engine}, {candidate['scheme']}",
        f"{scale.name} {scale.value(candidate['metric'])}",
        _joined(drop, scale.interval(candidate["metric_drop_interval"])),
        f"p50 {ms_text(latency['p50'])} ms, p90 {ms_text(latency['p90'])}, "
        f"min {ms_text(latency['min'])}; {latency['samples']} samples, {latency['label']}",
        _joined(f"{ratio} the reference's latency", interval),
        f"file {bytes_text(candidate['size_bytes'])}, "
        f"peak RSS {bytes_text(candidate['peak_rss_bytes'])}",
        ", ".join(f"{where} {100 * share:.0f} %" for where, share in shares.items()),
        _joined(candidate["status"], candidate["reason"], ": "),
    )
    title = "<br>".join(_plain(part) for part in wrap(candidate["id"], 40))
    rest = (_plain(part) for line in lines for part in wrap(line, 46)[:4])
    return "<br>".join([f"<b>{title}</b>", *rest])


def _joined(text: str, more: str, by: str = ", ") -> str:
    return f"{text}{by}{more}" if more else text
