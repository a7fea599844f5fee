"""`edgekit compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgekit.cli.console import AnsweredError, TerminalObserver, print_json, seconds, size, stdout
from edgekit.cli.contender import contender, model_bytes
from edgekit.cli.source import SourceOptions
from edgekit.errors import EdgeKitError, UsageError
from edgekit.measure.agreement import agreement
from edgekit.measure.compare import Duel, Effort, duel, ratio_of_series
from edgekit.measure.conditions import conditions
from edgekit.measure.gate import (
    Figure,
    latency_figure,
    memory_figure,
    metric_figures,
    parity_figure,
    placement_figure,
    size_figure,
    unlike_figure,
)
from edgekit.measure.record import Record, read_record, record_of
from edgekit.measure.store import Store
from edgekit.measure.worker import Contender
from edgekit.observer import Observer
from edgekit.reading import Reading
from edgekit_runtime.timing import pack_ns

__all__ = ["compare", "duration"]

_WHY = {
    "narrow": "the interval is narrow enough", "starts": "all starts are done",
    "budget": "the time is spent", "failure": "one of them failed",
}  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """BASE or NEW: something to run, or a record of it."""

    name: str
    contender: Contender | None = None
    record: Record | None = None


def compare(
    base: str,
    new: str,
    /,
    *,
    fail_over: str = "0%",
    engine: str | None = None,
    threads: int | None = None,
    input_: Annotated[Path | None, Parameter(name="--input")] = None,
    data: str | None = None,
    metric: list[str] | None = None,
    max_drop: float = 0.0,
    budget: str = "2m",
    source: SourceOptions | None = None,
    store: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Is the new one slower? Both are measured in turn, started anew several times; exit code 1 on
    a regression of latency, memory, size, metric, placement or parity.

    Parameters
    ----------
    base
        What it is compared with: a model, a bundle, a result file (.json), or a run's number in
        the store.
    new
        What is judged: the same.
    fail_over
        How much slower, larger or hungrier is no failure: 5% or 0.05.
    engine
        For models: onnxruntime, openvino, litert or ncnn, with an accelerator (ncnn:vulkan) or
        without.
    threads
        Threads for both; each one's own number, or this machine's, otherwise.
    input_
        An .npz with samples to run; seeded noise otherwise.
    data
        Labelled samples, as for eval: metrics are compared, too.
    metric
        Which; may be repeated.
    max_drop
        How much of a metric may be lost, in its own units.
    budget
        The longest time for measuring: 90s, 2m.
    source
        How to read the models.
    store
        The folder of the result store; ~/.local/share/edgekit otherwise.
    json
        One JSON object on stdout (schema edgekit.compare/1).
    """
    allowed = _share(fail_over)
    seconds_allowed = duration(budget, "--budget")
    if input_ is not None and not input_.is_file():
        raise UsageError(f"no file {input_}")
    reading = (source or SourceOptions()).reading()
    notes: list[str] = []
    with TerminalObserver() as observer, Store(store) as kept:
        sides = [
            _side(
                text, engine=engine, threads=threads, reading=reading, observer=observer, kept=kept
            )
            for text in (base, new)
        ]  # fmt: skip
        runnable = all(one.contender for one in sides)
        observer.phase("[1/3] latency and memory")
        measured = None
        if runnable:
            measured = _measured(sides, input_, seconds_allowed, observer)
            latency, memory = _from_duel(measured, allowed)
            if measured.failure:
                notes.append(f"ended early: {measured.failure}")
        else:
            notes += _warnings(sides, threads)
            latency, memory = _from_records(sides, input_, observer, notes, allowed)
        observer.phase("[2/3] size, placement and parity")
        placements = _placements(sides, measured, notes)
        if stand_ins := _stand_ins(placements):
            latency, memory = unlike_figure("latency_ns", stand_ins), None
        figures = [latency, memory, *_still(sides, placements, input_, allowed, notes)]
        observer.phase("[3/3] metrics")
        if data is not None:
            figures += _metrics(
                sides, data, metric or [], max_drop=max_drop, threads=threads, reading=reading,
                observer=observer,
            )  # fmt: skip
        found = [one for one in figures if one is not None]
        document = _document(base, new, found, measured, notes, fail_over=allowed)
        failed = [one for one in found if one.regression]
        note = "; ".join(f"{one.name}: {one.verdict}" for one in failed)
        kept.add(document, status="failed" if failed else "done", note=note)
    for line in notes:
        observer.note(line)
    if json:
        print_json(document)
    else:
        _show(document)
    if failed:
        raise AnsweredError(f"{new} against {base}: {note}", 1)


def _share(text: str) -> float:
    """`5%` or `0.05` as 0.05."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise UsageError(f"--fail-over {text}: wanted a share, as 5% or 0.05")
    return value


def duration(text: str, option: str) -> float:
    """`90s`, `2m`, `1h` or seconds, in seconds.

    Raises:
        UsageError: it is none of these, or not above 0.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "s")
    try:
        value = float(number) * units[unit]
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise UsageError(f"{option} {text}: wanted a time, as 90s, 5m or 1h")
    return value


def _side(
    text: str, *, engine: str | None, threads: int | None, reading: Reading, observer: Observer,
    kept: Store,
) -> _Side:  # fmt: skip
    path = Path(text)
    if path.suffix == ".json":
        return _Side(path.name, record=read_record(path))
    if text.isdigit() and not path.exists():
        number = int(text)
        return _Side(f"run {number}", record=record_of(kept.document(number), f"run {number}"))
    one = contender(text, engine=engine, threads=threads, reading=reading, observer=observer)
    return _Side(text, contender=one)


def _measured(sides: list[_Side], inputs: Path | None, budget_s: float, observer: Observer) -> Duel:
    base, new = (one.contender for one in sides)
    assert base is not None and new is not None  # noqa: S101  (for the type checker)
    return duel(
        base, new, inputs=inputs, effort=Effort(budget_s=budget_s),
        progress=lambda done, total: observer.progress("starts", done, total),
    )  # fmt: skip


def _from_duel(found: Duel, allowed: float) -> tuple[Figure, Figure | None]:
    middle = [
        float(np.median([ns for block in blocks for ns in block]))
        for blocks in (found.base_ns, found.new_ns)
    ]
    memory = [int(np.median(one)) for one in (found.base_rss, found.new_rss)]
    return (
        latency_figure(middle[0], middle[1], found.latency, fail_over=allowed),
        memory_figure(memory[0], memory[1], found.memory, fail_over=allowed),
    )


def _from_records(
    sides: list[_Side], inputs: Path | None, observer: Observer, notes: list[str], allowed: float
) -> tuple[Figure, Figure | None]:
    """From files; a side that can be run is measured now, alone."""
    series, memory = [], []
    for one in sides:
        if one.record is not None:
            series.append(one.record.warm_ns)
            peak = one.record.document.get("peak_rss_bytes")
            memory.append(int(peak) if peak else None)
            notes += [f"{one.name}: {note}" for note in one.record.notes]
        else:
            assert one.contender is not None  # noqa: S101  (for the type checker)
            alone = duel(
                one.contender, one.contender, inputs=inputs,
                effort=Effort(least=2, most=2), progress=lambda done, total: None,
            )  # fmt: skip
            series.append([ns for block in alone.base_ns for ns in block])
            memory.append(alone.base_rss[0])
    ratio = ratio_of_series(series[0], series[1])
    middle = [float(np.median(one)) if one else float("nan") for one in series]
    if not all(series):
        notes.append("a file without samples: no latency to compare")
        return Figure("latency_ns", None, None, "not enough data"), None
    return (
        latency_figure(middle[0], middle[1], ratio, fail_over=allowed),
        memory_figure(memory[0], memory[1], None, fail_over=allowed),
    )


def _warnings(sides: list[_Side], threads: int | None) -> list[str]:
    """Why ratios of different times mean less, and what else was different."""
    lines = [
        "measured at different times: a difference may be the machine's. Give two models or "
        "bundles, and they are measured in turn"
    ]
    documents = [one.record.document for one in sides if one.record is not None]
    if len(documents) < 2:
        return lines
    for key in ("engine", "engine_version", "threads"):
        values = [one.get(key) for one in documents]
        if None not in values and values[0] != values[1]:
            lines.append(f"other {key.replace('_', ' ')}: {values[0]} and {values[1]}")
    for key in ("cpu", "arch", "kernel", "governor"):
        values = [(one.get("conditions") or {}).get(key) for one in documents]
        if None not in values and values[0] != values[1]:
            lines.append(f"other {key}: {values[0]} and {values[1]}")
    return lines


def _placements(
    sides: list[_Side], measured: Duel | None, notes: list[str]
) -> list[dict[str, Any] | None]:
    """Where both ran; what a bundle ran in place of its first variant is noted."""
    found: list[dict[str, Any] | None] = []
    for number, one in enumerate(sides):
        placement: Any = None
        if one.contender is not None and measured is not None and measured.hello:
            hello = measured.hello[number]
            placement = hello["placement"]
            if hello["passed_over"]:
                notes.append(f"{one.name}: variant {hello['variant']}; not {hello['passed_over']}")
        elif one.record is not None:
            placement = one.record.document.get("placement")
        found.append(placement if isinstance(placement, dict) else None)
    return found


def _stand_ins(placements: list[dict[str, Any] | None]) -> str:
    """What stood in for accelerators on this machine, if anything did."""
    names = [str(one["simulated"]) for one in placements if one and one.get("simulated")]
    return " and ".join(dict.fromkeys(names))


def _still(
    sides: list[_Side], placements: list[dict[str, Any] | None], inputs: Path | None,
    allowed: float, notes: list[str],
) -> list[Figure | None]:  # fmt: skip
    """What does not vary from run to run."""
    sizes = []
    for one in sides:
        if one.contender is not None:
            sizes.append(model_bytes(one.contender.path))
        else:
            sizes.append((one.record.document if one.record else {}).get("size_bytes") or 0)
    figures = [
        size_figure(sizes[0], sizes[1], fail_over=allowed),
        placement_figure(placements[0], placements[1]),
    ]
    base, new = (one.contender for one in sides)
    if base is not None and new is not None:
        try:
            figures.append(parity_figure(agreement(base, new, inputs=inputs)))
        except EdgeKitError as error:
            notes.append(f"parity was not compared: {error}")
    return figures


def _metrics(
    sides: list[_Side], data: str, metrics: list[str], *, max_drop: float, threads: int | None,
    reading: Reading, observer: Observer,
) -> list[Figure]:  # fmt: skip
    from edgekit.assessment import EvalRequest, assess_model
    from edgekit.cache import Cache
    from edgekit_runtime.bundle import is_bundle

    if not all(one.contender for one in sides):
        raise UsageError("--data judges models and bundles; a result file cannot be run")
    paired = not is_bundle(Path(sides[0].name))
    results = []
    for one in sides[1:] if paired else sides:
        request = EvalRequest(
            one.name,
            data,
            tuple(metrics),
            threads=threads,
            reading=reading,
            reference=sides[0].name if paired else None,
        )
        results.append(assess_model(request, observer, Cache())["results"][0]["metrics"])
    return metric_figures(results[0] if not paired else [], results[-1], max_drop=max_drop)


def _document(
    base: str, new: str, figures: list[Figure], measured: Duel | None, notes: list[str], *,
    fail_over: float,
) -> dict[str, Any]:  # fmt: skip
    document: dict[str, Any] = {
        "schema": "edgekit.compare/1",
        "base": base,
        "new": new,
        "fail_over": fail_over,
        "verdict": figures[0].verdict,
        "regression": any(one.regression for one in figures),
        "figures": [one.to_json() for one in figures],
        "interleaved": measured is not None,
        "notes": notes,
        "conditions": conditions(),
    }
    if measured is not None:
        document["starts"] = [round(one, 5) for one in measured.ratios]
        document["stopped"] = measured.stopped
        for name, blocks in (("base", measured.base_ns), ("new", measured.new_ns)):
            document[f"{name}_samples_ns"] = pack_ns([ns for block in blocks for ns in block])
    return document


def _show(document: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure", no_wrap=True)
    for name in ("base", "new", "new/base (95 %)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for one in document["figures"]:
        style = "red" if one["regression"] else ""
        said = one["verdict"] + (f" ({one['note']})" if one["note"] else "")
        cells = (_value(one["figure"], one["base"]), _value(one["figure"], one["new"]))
        table.add_row(
            one["figure"].removesuffix("_ns").removesuffix("_bytes").replace("_", " "),
            *map(escape, cells), _ratio(one), escape(said), style=style,
        )  # fmt: skip
    stdout.print(table)
    how = "in turn" if document["interleaved"] else "at different times"
    if document["interleaved"]:
        why = _WHY.get(document["stopped"], document["stopped"])
        how += f", {len(document['starts'])} starts; ended because {why}"
    stdout.print(f"measured {how}", markup=False)


def _value(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if name.endswith("_ns"):
        return seconds(value)
    return size(int(value)) if name.endswith("_bytes") else f"{value:.4f}"


def _ratio(one: dict[str, Any]) -> str:
    if one["ratio"] is None:
        return ""
    ends = one["interval"]
    exact = ends is None or ends[0] == ends[1]
    return f"{one['ratio']:.3f}" + ("" if exact else f" ({ends[0]:.3f} to {ends[1]:.3f})")
