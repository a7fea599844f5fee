"""The report: a result document (`edgekit.optimize/1`) as one HTML file that loads nothing else.

Everything is built with `_element`, which escapes text by default: paths, reasons and notes come
from files and tools that are not ours. A content security policy in the page forbids whatever
escaping might miss. The look is in `report.css`; `report.js` does what needs the window: the
plot's colour scheme, and labels where there is room for them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import PurePath
from typing import Any

from edgekit.measure.report_figure import pareto_figure
from edgekit.measure.report_text import (
    DASH,
    Scale,
    bytes_text,
    count_text,
    finite,
    ms_text,
    ratio_text,
    seconds_text,
)

__all__ = ["report_html"]

_Document = dict[str, Any]

#: best first; each status has a shape of its own, the same as in the plot
_SHAPES = {
    "chosen": "M6 0L12 6L6 12L0 6Z",
    "kept": "M6 1A5 5 0 1 1 6 11A5 5 0 1 1 6 1Z",
    "dropped": "M1.5 1.5H10.5V10.5H1.5Z",
    "failed": "M0.5 1.5H11.5L6 11Z",
    "skipped": "M3 1H9L12 6L9 11H3L0 6Z",
}


def report_html(document: dict[str, Any]) -> str:
    """The report of an `edgekit.optimize/1` document as one HTML page that works offline."""
    # A metric of the user's own is a path; its file's name is enough everywhere but in one place.
    scale = Scale(PurePath(document["metric"]).name, higher_is_better=document["higher_is_better"])
    ranked = _best_first(document)
    figure = pareto_figure(document, scale, ranked)
    body = (
        _headline(document, scale),
        _banner(document),
        _section("What was asked", _asked(document, scale)),
        _section("Confirmation on untouched samples", *_confirmation(document, scale)),
        _section("Accuracy against latency", *_plot(document, scale, ranked, figure)),
        _section("All candidates", *_candidates(document, scale, ranked)),
        _losses(document),
        _section("Conditions of the measurement", *_conditions(document)),
        _section("How to reproduce", *_reproduce(document)),
    )
    return _page(f"EdgeKit report: {_file_name(document)}", body, figure)


# --- HTML that cannot be broken out of ----------------------------------------------------------


class _Markup(str):
    """HTML; any other string is text and gets escaped."""

    __slots__ = ()


def _element(tag: str, *children: object, **attributes: str) -> _Markup:
    """`<tag attributes>children</tag>`; `class_` is `class`, `data_label` is `data-label`."""
    named = (
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
    )
    inside = "".join(c if isinstance(c, _Markup) else escape(str(c)) for c in children)
    return _Markup(f"<{tag}{''.join(named)}>{inside}</{tag}>")


def _section(title: str, *children: _Markup) -> _Markup:
    return _element("section", _element("h2", title), *children)


def _facts(facts: Iterable[tuple[str, object]], *, style: str = "facts") -> _Markup:
    pairs = (_element("div", _element("dt", name), _element("dd", value)) for name, value in facts)
    return _element("dl", *pairs, class_=style)


def _symbol(status: str) -> _Markup:
    path = _element("path", d=_SHAPES[status])
    return _element("svg", path, viewBox="0 0 12 12", aria_hidden="true", class_=f"symbol {status}")


def _page(title: str, body: Sequence[_Markup], figure: _Document | None) -> str:
    scripts: list[str] = []
    data = _Markup()
    if figure is not None:
        from plotly.offline import get_plotlyjs

        scripts = [get_plotlyjs(), _resource("report.js")]
        # In a script element nothing is escaped: no `<` may be left that could end it.
        text = json.dumps(figure, allow_nan=False).replace("<", "\\u003c")
        data = _Markup(f'<script type="application/json" id="figure">{text}</script>')
    allowed = " ".join(f"'sha256-{_sha256_base64(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            _element("title", title),
            f"<style>\n{_resource('report.css')}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>",
            data,
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        )
    )


def _sha256_base64(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _resource(name: str) -> str:
    return resources.files("edgekit.measure").joinpath(name).read_text(encoding="utf-8")


# --- the sections -------------------------------------------------------------------------------


def _chosen(document: _Document) -> _Document | None:
    return next((c for c in document["candidates"] if c["id"] == document["chosen"]), None)


def _file_name(document: _Document) -> str:
    return PurePath(document["model"]["path"]).name


def _where(document: _Document) -> str:
    cpu = document["conditions"].get("cpu") or "an unnamed CPU"
    return f"on {cpu}, {count_text(document['threads'], 'thread')}"


def _how(candidate: _Document) -> str:
    """Where a latency comes from: measured, simulated or estimated."""
    return str((candidate["latency_ns"] or {}).get("label", "not known"))


def _headline(document: _Document, scale: Scale) -> _Markup:
    name, why = document["profile"]["name"], document["why"]
    eyebrow = _element("p", f"EdgeKit report: {_file_name(document)} for {name}", class_="eyebrow")
    chosen, reference = _chosen(document), document["reference"]
    if chosen is None:
        said = _element("p", f"{why}.", class_="why")
        return _element("header", eyebrow, _element("h1", "Nothing was chosen"), said)
    same = chosen["id"] == reference["id"]
    return _element(
        "header",
        eyebrow,
        _element("h1", chosen["id"]),
        _element("p", _symbol("chosen"), f"Chosen: {why}." if why else "Chosen.", class_="why"),
        _element("div", *_tiles(chosen, reference, scale, same=same), class_="tiles"),
        _element(
            "p",
            f"Latency {_how(chosen)} {_where(document)}. {scale.name} measured there on the "
            f"{chosen['samples']} samples the choice was made with"
            f"{_confirmed(document['confirmation'], scale)}.",
            class_="small",
        ),
    )


def _confirmed(found: _Document | None, scale: Scale) -> str:
    if found is None:
        return ", and not confirmed on others"
    change = f"{scale.value(found['reference_metric'])} \u2192 {scale.value(found['metric'])}"
    return f"; on {found['samples']} untouched ones {change}"


def _tiles(
    chosen: _Document, reference: _Document, scale: Scale, *, same: bool
) -> tuple[_Markup, ...]:
    base = reference["scheme"]
    p50, p50_before = ((c["latency_ns"] or {}).get("p50") for c in (chosen, reference))
    if same:
        return (
            _tile(f"{ms_text(p50)} ms", "latency p50", "the model as it came"),
            _tile(bytes_text(chosen["size_bytes"]), "model file", "the model as it came"),
            _tile(scale.value(chosen["metric"]), scale.name, "the model as it came"),
        )
    ratio, interval = ratio_text(chosen["latency_ratio"])
    size, size_before = chosen["size_bytes"], reference["size_bytes"]
    smaller = f"{size / size_before:.2f}x" if size and size_before else DASH
    return (
        _tile(
            ratio,
            f"the latency of {base}",
            f"{ms_text(p50_before)} \u2192 {ms_text(p50)} ms p50",
            interval,
        ),
        _tile(
            smaller, f"the size of {base}", f"{bytes_text(size_before)} \u2192 {bytes_text(size)}"
        ),
        _tile(
            scale.value(chosen["metric"]),
            f"{scale.name}; {base} has {scale.value(reference['metric'])}",
            f"{scale.drop_name} {scale.drop(chosen['metric_drop'])}",
            scale.interval(chosen["metric_drop_interval"]),
        ),
    )


def _tile(figure: str, label: str, *details: str) -> _Markup:
    return _element(
        "div",
        _element("span", figure, class_="figure"),
        _element("span", label, class_="label"),
        *(_element("span", detail, class_="small") for detail in details if detail),
    )


def _banner(document: _Document) -> _Markup:
    notes, incomplete = document["notes"], document["incomplete"]
    if not notes and not incomplete:
        return _Markup()
    title = "Incomplete: the run ended before everything was done" if incomplete else "Please note"
    items = _element("ul", *(_element("li", note) for note in notes)) if notes else ""
    return _element("aside", _element("strong", title), items, class_="warning", role="note")


def _asked(document: _Document, scale: Scale) -> _Markup:
    model, data, profile = document["model"], document["data"], document["profile"]
    split = (
        f"{data['samples']} samples: {data['calibration']} to calibrate, {data['selection']} to "
        f"select on, {data['confirmation']} untouched until the choice was made"
    )
    if data["calibration_source"] != data["source"]:
        split = (
            f"{data['samples']} samples: {data['selection']} to select on, {data['confirmation']} "
            f"untouched until the choice was made; {data['calibration']} to calibrate came from "
            f"{data['calibration_source']}"
        )
    budget = scale.budget_text(document["reference"]["metric"], document["max_drop"])
    better = "higher" if scale.higher_is_better else "lower"
    return _facts(
        (
            ("model", f"{model['path']} ({model['format']}, {bytes_text(model['size_bytes'])})"),
            ("inputs", "; ".join(model["inputs"])),
            ("outputs", "; ".join(model["outputs"])),
            ("profile", f"{profile['id']}: {profile['name']}"),
            ("target", document["target"]),
            ("metric", f"{document['metric']} ({better} is better)"),
            (f"largest {scale.drop_name}", f"{scale.drop(document['max_drop'])}: {budget}"),
            ("minimize", document["minimize"]),
            ("threads", document["threads"]),
            ("data", data["source"]),
            *((f"{name} is made by", steps) for name, steps in data.get("steps", {}).items()),
            ("split", split),
        ),
        style="facts wide",
    )


def _confirmation(document: _Document, scale: Scale) -> tuple[_Markup, ...]:
    found = document["confirmation"]
    if document["chosen"] is None and found is None:
        return (_element("p", "Nothing was chosen, so there was nothing to confirm."),)
    if found is None:
        text = (
            "Not confirmed: how accurate the choice is, is known from the selection samples only."
        )
        return (_element("p", text, class_="warning"),)
    tries = found["tries"]
    use = "none of them used before"
    if tries > 1:  # each try looks at the same samples: the more tries, the less they prove
        use = f"used before only to reject {count_text(tries - 1, 'better candidate')}"
    drop, interval = scale.drop(found["drop"]), scale.interval(found["drop_interval"])
    facts = (
        (f"{scale.name}, reference", scale.value(found["reference_metric"])),
        (f"{scale.name}, chosen", scale.value(found["metric"])),
        (scale.drop_name, f"{drop} ({interval})" if interval else drop),
        ("samples", f"{found['samples']}, {use}"),
    )
    style = "warning" if found["reason"] else "verdict"
    return _element("p", _verdict(document, scale, found), class_=style), _facts(
        facts, style="facts wide"
    )


def _verdict(document: _Document, scale: Scale, found: _Document) -> str:
    """What the confirmation means, with what its interval does not rule out."""
    interval, max_drop = found["drop_interval"], document["max_drop"]
    within = f"Within the {scale.drop(max_drop)} allowed"
    if found["reason"]:
        return f"Not within the budget: {found['reason']}."
    if document["chosen"] == document["reference"]["id"]:
        return "The choice is the reference itself: nothing is lost."
    if interval is None:
        return f"{within}; too few samples for an interval."
    if interval[1] > max_drop:
        return (
            f"{within}, but so few samples do not rule out more: the interval reaches "
            f"{scale.drop(interval[1])}."
        )
    return f"{within}, and so is the whole confidence interval."


# --- the plot -----------------------------------------------------------------------------------


def _plot(
    document: _Document, scale: Scale, ranked: Sequence[_Document], figure: _Document | None
) -> tuple[_Markup, ...]:
    if figure is None:
        text = "Nothing to draw: no candidate has both an accuracy and a latency."
        return (_element("p", text),)
    numbers = [int(text) for trace in figure["data"] for text in trace.get("text", ())]
    drawn = {ranked[number - 1]["status"] for number in numbers}
    left_out = len(ranked) - len(numbers)
    legend = [_element("span", _symbol(status), status) for status in _SHAPES if status in drawn]
    if any(trace["mode"] == "lines" for trace in figure["data"]):
        legend.append(_rule("rule", "Pareto front within the budget"))
    legend.append(_rule("rule budget", "accuracy budget"))
    words = (
        "Up and to the left is better. Numbers are the rows of the table below; the area of a "
        f"mark follows the size of the model file. Latency {_how(document['reference'])} "
        f"{_where(document)}."
    )
    if left_out:
        words += f" Not drawn: {count_text(left_out, 'candidate')} without accuracy or latency."
    return (
        _element("p", *legend, class_="legend"),
        _element(
            "div",
            _element("noscript", "The plot needs JavaScript; the table has the same numbers."),
            id="plot", role="img", aria_label=f"{scale.name} against latency; see the table",
            style=f"height:{figure['layout']['height']}px",
        ),
        _element("p", words, class_="small"),
    )  # fmt: skip


def _rule(style: str, text: str) -> _Markup:
    return _element("span", _element("span", class_=style), text)


# --- the table ----------------------------------------------------------------------------------


def _best_first(document: _Document) -> list[_Document]:
    """By status, then within the budget or not, then by what was to be minimized."""

    def aim(candidate: _Document) -> float:
        if document["minimize"] == "size":
            return float(candidate["size_bytes"] or math.inf)
        ratio = candidate["latency_ratio"]
        return float(ratio[0]) if ratio and finite(ratio[0]) else math.inf

    def rank(candidate: _Document) -> tuple[int, bool, float]:
        status, drop = candidate["status"], candidate["metric_drop"]
        place = list(_SHAPES).index(status)
        return place, drop is None or not drop <= document["max_drop"], aim(candidate)

    return sorted(document["candidates"], key=rank)


def _candidates(
    document: _Document, scale: Scale, ranked: Sequence[_Document]
) -> tuple[_Markup, ...]:
    base = document["reference"]["scheme"]
    columns = (
        "", "candidate", "status", scale.name, "latency p50", f"ratio to {base}", "size",
        "peak RSS", "placement",
    )  # fmt: skip
    head = _element("tr", *(_element("th", column, scope="col") for column in columns))
    rows = (
        _row(document, scale, columns, number, candidate)
        for number, candidate in enumerate(ranked, start=1)
    )
    legend = (
        f"Best first. Measured {_where(document)}, candidates in turn; {scale.name} and its "
        f"{scale.drop_name} (positive is worse) on the selection samples. Times in ms. A ratio is "
        "the median over rounds, so it differs a little from that of two p50. "
        "CI: confidence interval."
    )
    if any(candidate.get("roof_share") for candidate in ranked):
        legend += (
            " The roof is the most arithmetic this engine was measured to do on this device in the "
            "candidate's type; over 100 % means that the engine needs fewer multiplications than "
            "the model counts."
        )
    table = _element("table", _element("thead", head), *rows)
    return _element("p", legend, class_="small"), _element("div", table, class_="scroll")


def _losses(document: _Document) -> _Markup:
    """The operators to blame where accuracy was lost, and which stayed float for it."""
    facts: list[tuple[str, object]] = []
    for one in document["candidates"]:
        blamed = [
            f"{', '.join(group['types'])} {', '.join(group['outputs'])} ({group['sqnr_db']:g} dB)"
            for group in one.get("blame") or ()
        ]
        if blamed:
            facts.append((one["id"], "; ".join(blamed)))
        if one.get("repairs") and one["status"] in ("chosen", "kept") and one["kept_float"]:
            facts.append((f"{one['id']} keeps in float", "; ".join(one["kept_float"])))
    if not facts:
        return _Markup("")
    search = document["search"]
    told = (
        "The operators that bring the most noise to the outputs when each is quantized alone, with "
        "the signal to noise they leave. Finding what must stay float took "
        f"{search['evaluations']} evaluations on all selection samples and "
        f"{search['screenings']} on some."
    )
    return _section("Where accuracy is lost", _element("p", told, class_="small"), _facts(facts))


def _row(
    document: _Document, scale: Scale, columns: Sequence[str], number: int, candidate: _Document
) -> _Markup:
    status = candidate["status"]
    engine = f"{candidate['engine']} {candidate['engine_version'] or ''}".rstrip()
    is_reference = candidate["id"] == document["reference"]["id"]
    ratio, interval = ratio_text(candidate["latency_ratio"])
    latency = candidate["latency_ns"]
    times: tuple[str, ...] = ()
    if latency:
        spread = f"p90 {ms_text(latency['p90'])}, min {ms_text(latency['min'])}"
        times = (spread, f"{count_text(latency['samples'], 'sample')}, {latency['label']}")
        share = candidate.get("roof_share")
        times += (f"{100 * share:.0f} % of this device's roof",) if share else ()
    drop = ""
    if candidate["metric_drop"] is not None and not is_reference:
        drop = f"{scale.drop_name} {scale.drop(candidate['metric_drop'])}"
    cells = (
        (_element("span", _symbol(status), status, class_="status"),),
        (scale.value(candidate["metric"]), drop, scale.interval(candidate["metric_drop_interval"])),
        (f"{ms_text(latency['p50'])} ms" if latency else DASH, *times),
        (ratio, "the reference" if is_reference else interval),
        (bytes_text(candidate["size_bytes"]),),
        (bytes_text(candidate["peak_rss_bytes"]),),
        _placement(candidate["placement"]),
    )
    name = _element(
        "th", _element("span", candidate["id"], class_="id"), *_lines(engine, candidate["scheme"]),
        scope="row",
    )  # fmt: skip
    tds = (
        _element(
            "td",
            _element("div", main, *_lines(*details)),
            data_label=label,
            class_="unknown" if main == DASH else "known",
        )
        for label, (main, *details) in zip(columns[2:], cells, strict=True)
    )
    facts = _element("tr", _element("td", number, class_="number"), name, *tds)
    words = _element("div", candidate["reason"] or DASH, class_="reason")
    last = _element("td", words, *_lines(_more(candidate)), colspan=str(len(columns) - 1))
    more = _element("tr", _element("td"), last, class_="more")
    return _element("tbody", facts, more, class_=status)


def _lines(*lines: str) -> tuple[_Markup, ...]:
    return tuple(_element("span", line, class_="small") for line in lines if line)


def _placement(placement: _Document | None) -> tuple[str, ...]:
    """Where the work ran, the largest share first."""
    if not placement or not placement["shares"]:
        return (DASH,)
    shares = sorted(placement["shares"].items(), key=lambda pair: -pair[1])
    return tuple(f"{where} {100 * share:.0f} %" for where, share in shares)


def _more(candidate: _Document) -> str:
    """What is known beyond the columns, in one line."""
    facts = []
    placement = candidate["placement"]
    if placement:
        facts.append(f"ran with {placement['delegate']}, floats as {placement['precision']}")
    if candidate["first_run_ns"]:
        facts.append(f"first run {ms_text(candidate['first_run_ns'])} ms")
    if candidate["cosine"] is not None:
        facts.append(f"least similar output: cosine {candidate['cosine']:.4f} to the reference's")
    if candidate["build_s"]:
        facts.append(f"built in {seconds_text(candidate['build_s'])}")
    return "; ".join(facts)


# --- conditions and how to reproduce ------------------------------------------------------------

#: how a condition is shown: its name and a function of its value; others are shown as they are
_CONDITIONS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "taken": ("taken at", lambda v: str(v).replace("T", " ").replace("+00:00", " UTC")),
    "cpu": ("CPU", str),
    "arch": ("architecture", str),
    "isa": ("instruction sets", ", ".join),
    "memory_bytes": ("memory", bytes_text),
    "memory_free_bytes": ("memory free", bytes_text),
    "swap_used_bytes": ("swap used", bytes_text),
    "load_1min": ("load before (1 min)", lambda v: f"{v:.2f}"),
    "governor": ("frequency governor", str),
    "frequency_khz": ("CPU frequency", lambda v: f"{v / 1e6:.2f} GHz"),
    "temperature_mc": ("temperature", lambda v: f"{v / 1000:.0f} \u00b0C"),
    "python": ("Python", str),
    "edgekit": ("EdgeKit", str),
}


def _conditions(document: _Document) -> tuple[_Markup, ...]:
    conditions = document["conditions"]
    facts: list[tuple[str, object]] = []
    for key, value in conditions.items():
        if key == "engines":
            continue
        name, show = _CONDITIONS.get(key, (key.replace("_", " "), str))
        known = value is not None and value not in ("", [])
        facts.append((name, show(value) if known else DASH))
    facts.append(("threads", document["threads"]))
    for engine, version in (conditions.get("engines") or {}).items():
        facts.append((f"{engine} installed", version or DASH))
    facts += _roof_facts(document.get("roofline"))
    phases = ((name, seconds_text(value)) for name, value in document.get("seconds", {}).items())
    return _facts(facts), _element("h3", "Time the run took"), _facts(phases)


def _roof_facts(roofline: _Document | None) -> list[tuple[str, object]]:
    """The device's roof, as measured."""
    if not roofline:
        return []
    rate = roofline["memory_bytes_per_s"]
    found: list[tuple[str, object]] = [
        ("memory bandwidth", f"{rate / 1e9:.1f} GB/s, measured" if rate else DASH)
    ]
    for roof in roofline["compute"]:
        name = f"roof of {roof['engine']}, {roof['kind']} {roof['dtype']}"
        threads = count_text(roof["threads"], "thread")
        found.append((name, f"{roof['ops_per_s'] / 1e9:.3g} GOP/s, {threads}, measured"))
    return found


def _reproduce(document: _Document) -> tuple[_Markup, ...]:
    model, data = document["model"], document["data"]
    command = document["command"]
    how = (
        _element("pre", command)
        if command
        else _element("p", "The command was not recorded: the run was started from Python.")
    )
    facts = (
        ("EdgeKit", document["edgekit"]),
        ("model", model["path"]),
        ("model sha256", model["sha256"]),
        ("data", data["source"]),
        ("data sha256", data["sha256"]),
        ("bundle written", document["bundle"] or DASH),
        ("document", document["schema"]),
    )
    return how, _facts(facts, style="facts wide")
