"""The report: a result document (`edgekit.optimize/1`) as one HTML file that loads nothing else.

It is built with `report_page`. The look is in `report.css`; `report.js` does what needs the window:
the plot's colour scheme, and labels where there is room for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from edgekit.measure.report_figure import pareto_figure
from edgekit.measure.report_firmware import firmware_section
from edgekit.measure.report_page import Markup, element, fact_list, page, section
from edgekit.measure.report_text import (
    DASH,
    Scale,
    bytes_text,
    count_text,
    finite,
    ms_text,
    ratio_text,
    seconds_text,
    stand_in,
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
        section("What was asked", _asked(document, scale)),
        section("Confirmation on untouched samples", *_confirmation(document, scale)),
        firmware_section(ranked)
        or section("Accuracy against latency", *_plot(document, scale, ranked, figure)),
        section("All candidates", *_candidates(document, scale, ranked)),
        _losses(document),
        section("Conditions of the measurement", *_conditions(document)),
        section("How to reproduce", *_reproduce(document)),
    )
    return page(f"EdgeKit report: {_file_name(document)}", body, figure)


# --- the sections -------------------------------------------------------------------------------


def _symbol(status: str) -> Markup:
    path = element("path", d=_SHAPES[status])
    return element("svg", path, viewBox="0 0 12 12", aria_hidden="true", class_=f"symbol {status}")


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


def _judged(document: _Document) -> str:
    return "there" if document["conditions"].get("target", "local") == "local" else "on the host,"


def _headline(document: _Document, scale: Scale) -> Markup:
    name, why = document["profile"]["name"], document["why"]
    eyebrow = element("p", f"EdgeKit report: {_file_name(document)} for {name}", class_="eyebrow")
    chosen, reference = _chosen(document), document["reference"]
    if chosen is None:
        said = element("p", f"{why}.", class_="why")
        return element("header", eyebrow, element("h1", "Nothing was chosen"), said)
    same = chosen["id"] == reference["id"]
    tiles = _tiles(chosen, reference, scale, same=same)
    how, judged = f"Latency {_how(chosen)} {_where(document)}", _judged(document)
    if chosen.get("firmware"):
        how, judged = "Nothing was measured on the device", "here,"
    elif stand_in(chosen):
        how, judged = f"It ran on {stand_in(chosen)}: its outputs count, its times do not", "there"
    return element(
        "header",
        eyebrow,
        element("h1", chosen["id"]),
        element("p", _symbol("chosen"), f"Chosen: {why}." if why else "Chosen.", class_="why"),
        element("div", *tiles, class_="tiles"),
        element(
            "p",
            f"{how}. {scale.name} measured "
            f"{judged} on the {chosen['samples']} samples the choice was made with"
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
) -> tuple[Markup, ...]:
    if chosen.get("firmware"):
        return _firmware_tiles(chosen, scale)
    base = reference["scheme"]
    p50, p50_before = ((c["latency_ns"] or {}).get("p50") for c in (chosen, reference))
    if same:
        return (
            _tile(f"{ms_text(p50)} ms", "latency p50", "the model as it came"),
            _tile(bytes_text(chosen["size_bytes"]), "model file", "the model as it came"),
            _tile(scale.value(chosen["metric"]), scale.name, "the model as it came"),
        )
    ratio, interval = ratio_text(chosen["latency_ratio"])
    latency = _tile(
        ratio, f"the latency of {base}", f"{ms_text(p50_before)} \u2192 {ms_text(p50)} ms p50",
        interval,
    )  # fmt: skip
    if stand_in(chosen):
        latency = _tile("simulated", "latency", "nothing here measures it")
    size, size_before = chosen["size_bytes"], reference["size_bytes"]
    smaller = f"{size / size_before:.2f}x" if size and size_before else DASH
    return (
        latency,
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


def _firmware_tiles(chosen: _Document, scale: Scale) -> tuple[Markup, ...]:
    found = chosen["firmware"]
    estimate = found["estimate"]
    tiles: tuple[Markup, ...] = (
        _tile(bytes_text(found["arena_bytes"]), "tensor arena", f"by {found['memory_from']}"),
        _tile(bytes_text(found["flash_bytes"]), "flash", "the model"),
        _tile(
            scale.value(chosen["metric"]), scale.name,
            f"{scale.drop_name} {scale.drop(chosen['metric_drop'])}",
            scale.interval(chosen["metric_drop_interval"]),
        ),
    )  # fmt: skip
    if estimate:
        words = f"{100 * found['macs_on_accelerator']:.4g} % of the MACs on {found['accelerator']}"
        first = _tile(f"{ms_text(estimate['latency_ns'])} ms", "latency, estimated", words)
        tiles = (first, *tiles)
    return tiles


def _tile(figure: str, label: str, *details: str) -> Markup:
    return element(
        "div",
        element("span", figure, class_="figure"),
        element("span", label, class_="label"),
        *(element("span", detail, class_="small") for detail in details if detail),
    )


def _banner(document: _Document) -> Markup:
    notes, incomplete = document["notes"], document["incomplete"]
    if not notes and not incomplete:
        return Markup()
    title = "Incomplete: the run ended before everything was done" if incomplete else "Please note"
    items = element("ul", *(element("li", note) for note in notes)) if notes else ""
    return element("aside", element("strong", title), items, class_="warning", role="note")


def _asked(document: _Document, scale: Scale) -> Markup:
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
    return fact_list(
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


def _confirmation(document: _Document, scale: Scale) -> tuple[Markup, ...]:
    found = document["confirmation"]
    if document["chosen"] is None and found is None:
        return (element("p", "Nothing was chosen, so there was nothing to confirm."),)
    if found is None:
        text = (
            "Not confirmed: how accurate the choice is, is known from the selection samples only."
        )
        return (element("p", text, class_="warning"),)
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
    return element("p", _verdict(document, scale, found), class_=style), fact_list(
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
            f"{scale.drop(interval[1])}. About {found['samples_to_tell']} would tell."
        )
    return f"{within}, and so is the whole confidence interval."


# --- the plot -----------------------------------------------------------------------------------


def _plot(
    document: _Document, scale: Scale, ranked: Sequence[_Document], figure: _Document | None
) -> tuple[Markup, ...]:
    if figure is None:
        text = "Nothing to draw: no candidate has both an accuracy and a latency."
        return (element("p", text),)
    numbers = [int(text) for trace in figure["data"] for text in trace.get("text", ())]
    drawn = {ranked[number - 1]["status"] for number in numbers}
    left_out = len(ranked) - len(numbers)
    legend = [element("span", _symbol(status), status) for status in _SHAPES if status in drawn]
    if any(trace["mode"] == "lines" for trace in figure["data"]):
        legend.append(_rule("rule", "Pareto front within the budget"))
    legend.append(_rule("rule budget", "accuracy budget"))
    words = (
        "Up and to the left is better. Numbers are the rows of the table below; the area of a "
        f"mark follows the size of the model file. Latency {_how(document['reference'])} "
        f"{_where(document)}."
    )
    if left_out:
        words += (
            f" Not drawn: {count_text(left_out, 'candidate')} without accuracy, or without a "
            "latency that was measured."
        )
    return (
        element("p", *legend, class_="legend"),
        element(
            "div",
            element("noscript", "The plot needs JavaScript; the table has the same numbers."),
            id="plot", role="img", aria_label=f"{scale.name} against latency; see the table",
            style=f"height:{figure['layout']['height']}px",
        ),
        element("p", words, class_="small"),
    )  # fmt: skip


def _rule(style: str, text: str) -> Markup:
    return element("span", element("span", class_=style), text)


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
) -> tuple[Markup, ...]:
    base = document["reference"]["scheme"]
    columns = (
        "", "candidate", "status", scale.name, "latency p50", f"ratio to {base}", "size",
        "peak RSS", "placement",
    )  # fmt: skip
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    rows = (
        _row(document, scale, columns, number, candidate)
        for number, candidate in enumerate(ranked, start=1)
    )
    figures = f"{scale.name} and its {scale.drop_name} (positive is worse) on the selection samples"
    legend = (
        f"Best first. Measured {_where(document)}, candidates in turn; {figures}. Times in ms. A "
        "ratio is the median over rounds, so it differs a little from that of two p50. "
        "CI: confidence interval."
    )
    if any(candidate.get("firmware") for candidate in ranked):
        legend = f"Best first. No latency was measured; {figures}. CI: confidence interval."
    if any(candidate.get("roof_share") for candidate in ranked):
        legend += (
            " The roof is the most arithmetic this engine was measured to do on this device in the "
            "candidate's type; over 100 % means that the engine needs fewer multiplications than "
            "the model counts."
        )
    table = element("table", element("thead", head), *rows)
    return element("p", legend, class_="small"), element("div", table, class_="scroll")


def _losses(document: _Document) -> Markup:
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
        return Markup("")
    search = document["search"]
    told = (
        "The operators that bring the most noise to the outputs when each is quantized alone, with "
        "the signal to noise they leave. Finding what must stay float took "
        f"{search['evaluations']} evaluations on all selection samples and "
        f"{search['screenings']} on some."
    )
    return section("Where accuracy is lost", element("p", told, class_="small"), fact_list(facts))


def _row(
    document: _Document, scale: Scale, columns: Sequence[str], number: int, candidate: _Document
) -> Markup:
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
    first = f"{ms_text(latency['p50'])} ms" if latency else DASH
    memory = candidate["peak_rss_bytes"]
    if stand_in(candidate):
        first, times, memory = "simulated", (f"by {stand_in(candidate)}",), None
    drop = ""
    if candidate["metric_drop"] is not None and not is_reference:
        drop = f"{scale.drop_name} {scale.drop(candidate['metric_drop'])}"
    cells = (
        (element("span", _symbol(status), status, class_="status"),),
        (scale.value(candidate["metric"]), drop, scale.interval(candidate["metric_drop_interval"])),
        (first, *times),
        (ratio, "the reference" if is_reference else interval),
        (bytes_text(candidate["size_bytes"]),),
        (bytes_text(memory),),
        _placement(candidate["placement"]),
    )
    name = element(
        "th", element("span", candidate["id"], class_="id"), *_lines(engine, candidate["scheme"]),
        scope="row",
    )  # fmt: skip
    tds = (
        element(
            "td",
            element("div", main, *_lines(*details)),
            data_label=label,
            class_="unknown" if main == DASH else "known",
        )
        for label, (main, *details) in zip(columns[2:], cells, strict=True)
    )
    facts = element("tr", element("td", number, class_="number"), name, *tds)
    words = element("div", candidate["reason"] or DASH, class_="reason")
    last = element("td", words, *_lines(_more(candidate)), colspan=str(len(columns) - 1))
    more = element("tr", element("td"), last, class_="more")
    return element("tbody", facts, more, class_=status)


def _lines(*lines: str) -> tuple[Markup, ...]:
    return tuple(element("span", line, class_="small") for line in lines if line)


def _placement(placement: _Document | None) -> tuple[str, ...]:
    """Where the work ran, the largest share first."""
    if not placement or not placement["shares"]:
        return (DASH,)
    shares = sorted(placement["shares"].items(), key=lambda pair: -pair[1])
    of = placement.get("of") if placement.get("of") == "MACs" else None
    return (
        *(f"{where} {100 * share:.0f} %" for where, share in shares),
        *([f"of the {of}"] if of else []),
    )


def _more(candidate: _Document) -> str:
    """What is known beyond the columns, in one line."""
    facts = []
    placement = candidate["placement"]
    if placement:
        facts.append(f"ran with {placement['delegate']}, floats as {placement['precision']}")
        left = ", ".join(f"{kind} {name}" for _, kind, name in placement.get("left") or ())
        if left:
            facts.append(f"left to the CPU: {left}")
    if candidate["first_run_ns"] and not stand_in(candidate):
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


def _conditions(document: _Document) -> tuple[Markup, ...]:
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
    return fact_list(facts), element("h3", "Time the run took"), fact_list(phases)


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


def _reproduce(document: _Document) -> tuple[Markup, ...]:
    model, data = document["model"], document["data"]
    command = document["command"]
    how = (
        element("pre", command)
        if command
        else element("p", "The command was not recorded: the run was started from Python.")
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
    return how, fact_list(facts, style="facts wide")
