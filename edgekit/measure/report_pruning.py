"""The part of a report that shows what pruning cost and saved: by amount, and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgekit.measure.report_chart import Axis, Series, lines
from edgekit.measure.report_page import Markup, element, fact_list, section
from edgekit.measure.report_text import DASH, bytes_text, ratio_text

__all__ = ["pruned"]

_COLUMNS = {"macs": "MACs", "zeros_before": "zeros before"}
#: what identical outputs count as, in a table of dB
_SAME = "the same"


def pruned(document: dict[str, Any], name: str) -> list[Markup]:
    """Sections of a document of `edgekit prune`."""
    found = [section(f"Pruned: {name}", fact_list(_facts(document), style="facts wide"))]
    steps = _steps(document)
    if len(steps) > 1:
        found.append(section("What each amount costs and saves", *_plot(document, steps)))
    found.append(section("Layers", *_layers(document)))
    return found


def _facts(document: dict[str, Any]) -> list[tuple[str, object]]:
    evaluation = document["evaluation"]
    facts: list[tuple[str, object]] = [
        ("method", f"{document['method']}, {100 * document['reached']:.1f} % went"),
        (evaluation["name"], f"{evaluation['reference']:.4f} before, {evaluation['metric']:.4f} "
         f"after, on {evaluation['samples']} samples{_interval(evaluation)}"),
    ]  # fmt: skip
    for key in ("macs", "parameters"):
        if key in document:
            before, after = document[key]
            facts.append((key, f"{before:,} before, {after:,} after ({after / before:.3f}x)"))
    latency = document.get("latency")
    if latency:
        ratio, span = ratio_text(latency["ratio"])
        facts.append(("latency", f"{ratio} ({span}), {latency['engine']}, "
                      f"{latency['threads']} thread"))  # fmt: skip
    facts.append(
        ("size", f"{bytes_text(document['before_bytes'])} before, "
         f"{bytes_text(document['size_bytes'])} after, "
         f"{bytes_text(document['deflated_bytes'])} compressed")
    )  # fmt: skip
    return facts


def _interval(evaluation: dict[str, Any]) -> str:
    ends = evaluation.get("drop_interval")
    return f"; drop {evaluation['drop']:+.4f} ({ends[0]:+.4f} to {ends[1]:+.4f})" if ends else ""


def _steps(document: dict[str, Any]) -> list[dict[str, Any]]:
    """By what went, from the model as it came to the one that was written."""
    evaluation, latency = document["evaluation"], document.get("latency") or {}
    last = {
        "reached": document["reached"], "metric": evaluation["metric"],
        "latency_ratio": latency.get("ratio"),
    }  # fmt: skip
    first = {"reached": 0.0, "metric": evaluation["reference"], "latency_ratio": [1.0, 1.0, 1.0]}
    steps = [one for one in document["steps"] if one["reached"] != document["reached"]]
    return sorted([first, *steps, last], key=lambda one: float(one["reached"]))


def _plot(document: dict[str, Any], steps: Sequence[dict[str, Any]]) -> tuple[Markup, ...]:
    """The metric against the latency, or against what went where zeros save no time."""
    metric = document["evaluation"]["name"]
    timed = all(one.get("latency_ratio") for one in steps)
    at = [one["latency_ratio"][0] if timed else 100 * one["reached"] for one in steps]
    values = [one["metric"] for one in steps]
    texts = [
        f"{100 * one['reached']:.1f} % gone: {metric} {one['metric']:.4f}"
        + (f", {one['latency_ratio'][0]:.2f}x the latency" if timed else "")
        for one in steps
    ]
    low, high = min(values), max(values)
    margin = (high - low or 0.01) / 10
    shown = lines(
        [Series("from the model as it came to the one that was written",
                list(zip(at, values, strict=True)))],
        Axis.over("latency over that of the model as it came" if timed else "% of weights gone",
                  min(at) - 0.02 * (max(at) - min(at)), max(at) + 0.02 * (max(at) - min(at))),
        Axis.over(metric, low - margin, high + margin),
        dots=[(x, y, text) for x, y, text in zip(at, values, texts, strict=True)],
        says=f"{metric} against {'latency' if timed else 'zeros'}; the numbers are below",
    )  # fmt: skip
    return shown, element("ul", *(element("li", one) for one in texts), class_="small")


def _layers(document: dict[str, Any]) -> tuple[Markup, ...]:
    channels = document["method"] == "channels"
    keys = ("channels", "macs", "parameters") if channels else ("weights", "zeros_before", "zeros")
    columns = (*(_COLUMNS.get(key, key) for key in keys), "SQNR")
    head = element("tr", *(element("th", one, scope="col") for one in ("layer", *columns)))
    rows = []
    for one in document["layers"]:
        texts = [*(_before_after(one.get(key)) for key in keys), _noise(one)]
        cells = (
            element("td", element("div", text), data_label=column)
            for column, text in zip(columns, texts, strict=True)
        )
        name = element("th", one["name"], element("span", one["type"], class_="small"), scope="row")
        rows.append(element("tbody", element("tr", name, *cells)))
    words = (
        "SQNR: the power of a layer's output over that of its difference to the model as it came, "
        "of the channels that are left, on calibration samples."
    )
    table = element("table", element("thead", head), *rows)
    return element("p", words, class_="small"), element("div", table, class_="scroll")


def _before_after(pair: Sequence[int] | int | None) -> str:
    if pair is None or isinstance(pair, int):
        return DASH if pair is None else f"{pair:,}"
    return f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} to {pair[1]:,}"


def _noise(layer: dict[str, Any]) -> str:
    if "sqnr_db" not in layer:
        return DASH
    return _SAME if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f} dB"
