"""Charts as SVG that stretches with the page, its words in HTML: legible on a phone, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.measure.report_page import Markup, element

__all__ = ["Axis", "Series", "bars", "lines"]

_COLOURS = 6
_MOST_POINTS = 500


@dataclass(frozen=True)
class Series:
    """A line: its name and points, by x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """What is on an axis: its label, the range shown, its ticks by position and text."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    @classmethod
    def over(cls, label: str, low: float, high: float) -> Axis:
        """From `low` to `high`, with round ticks."""
        span = high - low or abs(high) or 1.0
        raw = span / 4
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= raw)
        first = math.ceil(low / step)
        ticks = []
        while first * step <= low + span * (1 + 1e-9):
            ticks.append((first * step, f"{first * step:.6g}"))
            first += 1
        return cls(label, low, low + span, ticks)

    def place(self, value: float) -> float:
        """0..1 along the axis."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def lines(series: Sequence[Series], x: Axis, y: Axis, *, marks: Sequence[tuple[float, str]] = (),
          dots: Sequence[tuple[float, float, str]] = (), says: str) -> Markup:  # fmt: skip
    """A line chart; `marks` are vertical lines with a text, `dots` points with what is told of them
    under the mouse, `says` is for those who cannot see."""
    shapes = [_rule(0, 1000, 400 * (1 - y.place(at))) for at, _ in y.ticks]
    for number, one in enumerate(series):
        points = _thinned(one.points)
        path = " ".join(
            f"{'M' if i == 0 else 'L'}{1000 * x.place(px):.1f} {400 * (1 - y.place(py)):.1f}"
            for i, (px, py) in enumerate(points)
        )
        shapes.append(element("path", d=path, class_=f"line c{number % _COLOURS}"))
    for at, _ in marks:
        place = f"{1000 * x.place(at):.1f}"
        shapes.append(element("path", d=f"M{place} 0 L{place} 400", class_="mark"))
    svg = element(
        "svg", *shapes, viewBox="0 0 1000 400", preserveAspectRatio="none", role="img",
        aria_label=says,
    )  # fmt: skip
    words = [
        *(_word("ytick", text, bottom=y.place(at)) for at, text in y.ticks),
        *(_word("xtick", text, left=x.place(at)) for at, text in x.ticks),
        *(_word("marktext", text, left=x.place(at)) for at, text in marks),
        *(_dot(x.place(px), y.place(py), text) for px, py, text in dots),
    ]
    named = [
        element("span", element("span", class_=f"swatch c{i % _COLOURS}"), one.name)
        for i, one in enumerate(series)
    ]
    return element(
        "figure",
        element("p", *named, class_="legend"),
        element("p", y.label, class_="small"),
        element("div", svg, *words, class_="chart"),
        element("p", x.label, class_="small xlabel"),
        class_="lines",
    )


def bars(rows: Sequence[tuple[str, float, str]]) -> Markup:
    """Horizontal bars: name, length (the longest fills the width), text at its end."""
    longest = max((length for _, length, _ in rows), default=0.0) or 1.0
    found = []
    for name, length, text in rows:
        fill = element("span", class_="fill", style=f"width:{100 * length / longest:.2f}%")
        found.append(
            element(
                # what does not fit is cut at the beginning; the mark keeps the text left to right
                "div", element("span", f"\u200e{name}", class_="barname"),
                element("span", fill, class_="track"), element("span", text, class_="bartext"),
                class_="bar",
            )
        )  # fmt: skip
    return element("div", *found, class_="bars")


def _rule(left: float, right: float, height: float) -> Markup:
    return element("path", d=f"M{left} {height:.1f} L{right} {height:.1f}", class_="grid")


def _word(kind: str, text: str, **place: float) -> Markup:
    ((side, share),) = place.items()
    return element("span", text, class_=kind, style=f"{side}:{100 * share:.2f}%")


def _dot(left: float, bottom: float, text: str) -> Markup:
    place = f"left:{100 * left:.2f}%;bottom:{100 * bottom:.2f}%"
    return element("span", class_="dot", style=place, title=text)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / _MOST_POINTS))
    kept = list(points[::step])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept
