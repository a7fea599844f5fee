"""The report of measured runs: latency distributions, soaks, operators, comparisons, conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from edgekit.measure.record import checked_schema, record_of, sound
from edgekit.measure.report_chart import Axis, Series, bars, lines
from edgekit.measure.report_page import Markup, element, fact_list, page, section
from edgekit.measure.report_pruning import pruned
from edgekit.measure.report_text import DASH, bytes_text, ms_text
from edgekit_runtime.timing import unpack_ns

__all__ = ["runs_html"]

_MOST_BARS = 20
_KINDS = ("edgekit.bench", "edgekit.measure", "edgekit.compare", "edgekit.trace", "edgekit.prune")


def runs_html(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """One page that works offline, of documents and where they came from.

    Raises:
        InputError: one of them is no result of a measurement, or is damaged.
    """
    kinds = [checked_schema(document, where, kinds=_KINDS) for where, document in runs]
    named = _names(runs)
    body = [_header(runs, named)]
    spread = [
        one for run, name in zip(runs, named, strict=True) for one in _distributions(*run, name)
    ]
    if spread:
        body.append(section("Latency distribution", *_ecdf(spread)))
    for (_, document), kind, name in zip(runs, kinds, named, strict=True):
        if kind == "edgekit.bench":
            body += _bench(document, name)
        elif kind == "edgekit.compare":
            body.append(section(f"Comparison: {name}", *_compared(document)))
        elif kind == "edgekit.trace":
            body.append(section(f"Operators: {name}", *_traced(document)))
        elif kind == "edgekit.prune":
            body += pruned(document, name)
    body += [
        section(f"Conditions: {name}", _conditions(document))
        for (_, document), name in zip(runs, named, strict=True)
        if document.get("conditions")
    ]
    return page(f"EdgeKit report: {', '.join(dict.fromkeys(named))}", body, None)


def _names(runs: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Short, and different."""
    names = []
    for where, document in runs:
        model = PurePath(str(document.get("model") or document.get("new") or where)).name
        engine = document.get("engine")
        name = f"{model}, {engine}" if engine else model
        names.append(name if name not in names else f"{name} ({PurePath(where).name})")
    return names


def _header(runs: Sequence[tuple[str, dict[str, Any]]], names: Sequence[str]) -> Markup:
    cpus = {(document.get("conditions") or {}).get("cpu") for _, document in runs} - {None}
    where = f"Measured on {', '.join(sorted(map(str, cpus)))}." if cpus else ""
    warnings = []
    for (_, document), name in zip(runs, names, strict=True):
        warnings += [f"{name}: {reason}" for reason in document.get("unfit") or []]
        warnings += [
            f"{name}: {one['name']} {one['status']}: {one['failure']}"
            for one in document.get("phases") or [] if one.get("failure")
        ]  # fmt: skip
        warnings += [f"{name}: {note}" for note in document.get("notes") or []]
    aside = Markup()
    if warnings:
        items = element("ul", *(element("li", one) for one in warnings))
        aside = element("aside", element("strong", "Please note"), items, class_="warning")
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    return Markup(
        element(
            "header", element("p", "EdgeKit report of measured runs", class_="eyebrow"),
            element("h1", title), element("p", where, class_="why"),
        ) + aside
    )  # fmt: skip


def _distributions(
    where: str, document: dict[str, Any], name: str
) -> list[tuple[str, list[int], dict[str, Any]]]:
    if document["schema"].startswith("edgekit.compare"):
        sides = [("base", document["base"]), ("new", document["new"])]
        found: list[tuple[str, list[int], dict[str, Any]]] = []
        for key, path in sides:
            if document.get(f"{key}_samples_ns"):
                samples, _ = sound(unpack_ns(document[f"{key}_samples_ns"]))
                found.append((f"{key}: {PurePath(path).name}", samples, {}))
        return found
    if not document.get("samples_ns"):
        return []
    samples = record_of(document, where).warm_ns
    return [(name, samples, document.get("latency_ns") or {})] if samples else []


def _ecdf(found: list[tuple[str, list[int], dict[str, Any]]]) -> tuple[Markup, ...]:
    low = min(min(samples) for _, samples, _ in found)
    high = max(float(np.quantile(samples, 0.99)) for _, samples, _ in found)
    wide = high > 6 * low
    series = []
    for name, samples, _ in found:
        ordered = np.sort(samples)
        shares = np.arange(1, len(ordered) + 1) / len(ordered)
        kept = ordered <= max(high, ordered[0])
        at = np.log10(ordered[kept] / 1e6) if wide else ordered[kept] / 1e6
        series.append(Series(name, list(zip(at.tolist(), shares[kept].tolist(), strict=True))))
    names = ("p50", "p90", "p99", "p99.9")
    rows = []
    for name, samples, latency in found:
        known = latency or {"p50": int(np.median(samples))}
        text = ", ".join(f"{key} {ms_text(known[key])}" for key in names if known.get(key))
        ends = (known.get("intervals") or {}).get("p50")
        span = f"; the median between {ms_text(ends[0])} and {ms_text(ends[1])}" if ends else ""
        worth = known.get("effective_samples")
        also = f", worth {worth} independent ones" if worth else ""
        rows.append((name, f"{text} ms{span}; {len(samples)} samples{also}"))
    words = "latency (ms); the slowest hundredth is not drawn"
    shown = lines(
        series,
        _log_axis(words, low / 1e6, high / 1e6) if wide
        else Axis.over(words, low / 1e6, high / 1e6),
        Axis("share of runs that took at most so long", 0, 1,
             [(0, "0"), (0.5, "0.5"), (0.9, "0.9"), (1, "1")]),
        says="latency distributions; the numbers are below",
    )  # fmt: skip
    return shown, fact_list(rows, style="facts wide")


def _log_axis(label: str, low: float, high: float) -> Axis:
    """Powers of ten, with 2 and 5 between them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    ticks = [(math.log10(one), f"{one:g}") for one in values if low <= one <= high]
    return Axis(label, math.log10(low), math.log10(high), ticks)


def _bench(document: dict[str, Any], name: str) -> list[Markup]:
    facts: list[tuple[str, object]] = []
    for key, label in (("import", "import"), ("load", "load"), ("first_run", "first run")):
        cold = sorted(one[f"{key}_ns"] for one in document.get("cold") or [])
        if cold:
            memory = sorted(
                (one.get("memory_bytes") or {}).get(key, {}).get("rss") or 0
                for one in document["cold"]
            )[len(cold) // 2]
            facts.append(
                (f"cold: {label}", f"{ms_text(cold[len(cold) // 2])} ms ({ms_text(cold[0])} to "
                 f"{ms_text(cold[-1])}), then {bytes_text(memory)} resident")
            )  # fmt: skip
    for row in document.get("threads_sweep") or []:
        value = ms_text((row["latency_ns"] or {}).get("p50"))
        facts.append((f"{row['threads']} threads", row["failure"] or f"p50 {value} ms"))
    for row in document.get("throughput") or []:
        what = f"{row['streams'] or '?'} streams x {row['threads']} threads, batch {row['batch']}"
        rate = f"{row['per_second']:.4g} a second" if row["per_second"] else row["failure"]
        facts.append((what, rate))
    facts.append(("peak memory", bytes_text(document.get("peak_rss_bytes"))))
    facts.append(("processor time a run", f"{ms_text(document.get('cpu_ns_per_run'))} ms"))
    energy = document.get("energy") or {}
    joules = energy.get("joules_per_inference")
    facts.append(
        ("energy a run", f"{1e3 * joules:.3g} mJ above idle" if joules is not None
         else f"{DASH} ({energy.get('reason', 'not measured')})")
    )  # fmt: skip
    found = [section(f"Phases: {name}", fact_list(facts, style="facts wide"))]
    soak = document.get("soak")
    if soak and soak.get("at_s"):
        found.append(section(f"Soak: {name}", *_soak(soak)))
    return found


def _soak(soak: dict[str, Any]) -> tuple[Markup, ...]:
    unit, per = ("minutes", 60) if soak["at_s"][-1] > 180 else ("seconds", 1)
    times = [at / per for at in soak["at_s"]]
    top = max(soak["p90_ns"]) / 1e6
    series = [
        Series("p50", list(zip(times, [ns / 1e6 for ns in soak["p50_ns"]], strict=True))),
        Series("p90", list(zip(times, [ns / 1e6 for ns in soak["p90_ns"]], strict=True))),
    ]
    onset = soak.get("onset_s")
    marks = [(onset / per, f"slower from {onset:.0f} s on")] if onset is not None else []
    said = f"slower from {onset:.0f} s on" if onset is not None else "it did not slow down"
    shown = lines(
        series, Axis.over(unit, 0, times[-1]), Axis.over("latency (ms)", 0, 1.05 * top),
        marks=marks, says=f"latency over time: {said}",
    )  # fmt: skip
    text = (
        f"{said}; first {soak['window_s']:.0f} s {ms_text(soak['first_ns'])} ms, last "
        f"{ms_text(soak['last_ns'])} ms ({soak['slowdown']:.2f}x)"
    )
    if soak.get("failure"):
        text += f"; ended early: {soak['failure']}"
    return shown, element("p", text)


def _compared(document: dict[str, Any]) -> tuple[Markup, ...]:
    facts: list[tuple[str, object]] = [("base", document["base"]), ("new", document["new"])]
    for one in document["figures"]:
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.3f}x"
        ends = one["interval"]
        if ends and ends[0] != ends[1]:
            ratio += f" ({ends[0]:.3f} to {ends[1]:.3f})"
        note = f"; {one['note']}" if one["note"] else ""
        failed = ", a regression" if one["regression"] else ""
        facts.append((one["figure"], f"{one['verdict']}{failed} {ratio}".strip() + note))
    how = "in turn" if document["interleaved"] else "at different times: read with care"
    return fact_list(facts, style="facts wide"), element("p", f"Measured {how}.", class_="small")


def _traced(document: dict[str, Any]) -> tuple[Markup, ...]:
    steps = sorted(document["steps"], key=lambda one: -one["duration_ns"])
    total = max(1, document["sum_ns"])
    rows = []
    for one in steps[:_MOST_BARS]:
        rate = f", {one['gop_per_s']:.3g} GOP/s" if one["gop_per_s"] else ""
        share = 100 * one["duration_ns"] / total
        text = f"{ms_text(one['duration_ns'])} ms, {share:.1f} %{rate}"
        rows.append((f"{one['name']} ({one['type']}, {one['device']})", one["duration_ns"], text))
    covered = document.get("covered")
    words = f"{len(steps)} operators, {ms_text(total)} ms together"
    words += f", {100 * covered:.0f} % of a run without profiler" if covered else ""
    words += f"; the {_MOST_BARS} dearest are shown" if len(steps) > _MOST_BARS else ""
    advice = [element("li", one["text"]) for one in document.get("advice") or []]
    fix = (element("h3", "What to fix"), element("ul", *advice)) if advice else ()
    return element("p", words, class_="small"), bars(rows), *fix, *_roofline(document, steps)


def _roofline(document: dict[str, Any], steps: Sequence[dict[str, Any]]) -> tuple[Markup, ...]:
    """Operators under the roof (Williams et al., 2009): operations a byte against operations a
    second; what is far below both lines has something to win."""
    peak, rate = document.get("roof_gop_per_s"), document.get("roof_bytes_per_s")
    dots = [
        (math.log10(2 * one["macs"] / one["bytes"]), math.log10(one["gop_per_s"]),
         f"{one['name']} ({one['type']}): {one['gop_per_s']:.3g} GOP/s, "
         f"{2 * one['macs'] / one['bytes']:.3g} operations a byte")
        for one in steps
        if one.get("macs") and one.get("bytes") and one["gop_per_s"]
    ]  # fmt: skip
    if not (peak and rate and dots):
        return ()
    ridge = math.log10(1e9 * peak / rate)
    top = math.log10(peak)
    left = min(ridge, *(x for x, _, _ in dots)) - 0.3
    right = max(ridge, *(x for x, _, _ in dots)) + 0.3
    low = min(top - 1, *(y for _, y, _ in dots)) - 0.2
    bent = [(left, top + left - ridge), (ridge, top), (right, top)]
    if bent[0][1] < low:  # the slope enters from below
        bent[0] = (ridge - (top - low), low)
    shown = lines(
        [Series(f"the roof: {peak:.3g} GOP/s, {rate / 1e9:.3g} GB/s, measured", bent)],
        _log_axis("operations per byte read and written", 10**left, 10**right),
        _log_axis("GOP/s", 10**low, 10 ** (top + 0.2)), dots=dots,
        says="the roof, and where the operators are under it",
    )  # fmt: skip
    words = (
        "Each dot is an operator. Bytes are those of its inputs, weights and outputs: what stays "
        "in a cache may lift a dot above the slope."
    )
    return element("h3", "Roofline"), shown, element("p", words, class_="small")


def _conditions(document: dict[str, Any]) -> Markup:
    given = document.get("conditions") or {}
    facts = [
        (key.replace("_", " "), _plain(value)) for key, value in given.items()
        if value not in (None, [], {}) and key not in ("before", "during", "after", "engines")
    ]  # fmt: skip
    for key in ("before", "after"):
        moment = given.get(key)
        if moment:
            text = ", ".join(
                f"{name.replace('_', ' ')} {_plain(value)}" for name, value in moment.items()
                if value not in (None, [], {}) and name != "at"
            )  # fmt: skip
            facts.append((key, text))
    if "engine" in document:
        facts.append(("engine", f"{document['engine']} {document.get('engine_version') or ''}"))
    return fact_list(facts)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
