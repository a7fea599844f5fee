"""`edgekit trace`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgekit.cache import Cache, write_atomically
from edgekit.cli.console import TerminalObserver, print_json, seconds, stdout
from edgekit.cli.contender import contender, engine_of
from edgekit.cli.source import SourceOptions
from edgekit.errors import UsageError
from edgekit.measure.advice import advice
from edgekit.measure.conditions import conditions
from edgekit.measure.roof import roofline_here
from edgekit.measure.store import Store
from edgekit.measure.trace import COLLECTORS, Trace, chrome_events
from edgekit.measure.trace import trace as run_trace

__all__ = ["trace"]


def trace(
    model: str,
    /,
    *,
    engine: str | None = None,
    threads: int = 1,
    input_: Annotated[Path | None, Parameter(name="--input")] = None,
    runs: int = 50,
    top: int = 15,
    roof: Annotated[bool, Parameter(negative="")] = False,
    source: SourceOptions | None = None,
    store: Path | None = None,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show where a model's time goes, operator by operator, and what to fix.

    The times are of the engine's own profiler (onnxruntime, openvino).

    Parameters
    ----------
    model
        A bundle (.edgekit) or a model of any format that edgekit convert reads.
    engine
        onnxruntime or openvino, for which the model is converted if need be; its format's own
        otherwise.
    threads
        Threads for the engine; operators of one thread add up best.
    input_
        An .npz with samples, of which the first is run; seeded noise otherwise.
    runs
        How many runs are profiled.
    top
        How many operators the table shows.
    roof
        Also compare with what this machine can do at most, measured in seconds the first time.
    source
        How to read the model.
    store
        The folder of the result store; ~/.local/share/edgekit otherwise.
    out
        File for the timeline, for chrome://tracing or ui.perfetto.dev (JSON).
    json
        One JSON object on stdout (schema edgekit.trace/1).
    """
    if runs < 4:
        raise UsageError(f"--runs is {runs}; wanted at least 4")
    if top < 1:
        raise UsageError(f"--top is {top}; wanted at least 1")
    if input_ is not None and not input_.is_file():
        raise UsageError(f"no file {input_}")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"-o {out}: cannot write there; wanted a file in a folder that exists")
    with TerminalObserver() as observer, Store(store) as kept:
        one = contender(
            model, engine=engine, threads=threads, observer=observer,
            reading=(source or SourceOptions()).reading(),
        )  # fmt: skip
        where = conditions()
        peak, rate = _roof(engine_of(one), threads, where) if roof else (None, None)
        observer.phase("profiling")
        found = run_trace(one, inputs=input_, runs=runs)
        document = {
            "schema": "edgekit.trace/1", "model": str(model), **found.to_json(),
            "roof_gop_per_s": peak, "roof_bytes_per_s": rate,
            "advice": [line.to_json() for line in advice(found.steps)], "conditions": where,
        }  # fmt: skip
        kept.add(document)
    if out is not None:
        events = chrome_events(found, title=Path(model).name)
        write_atomically(out, json_module.dumps(events).encode())
    if json:
        print_json(document)
        return
    _show(document, found, top)
    if out is not None:
        stdout.print(f"timeline for ui.perfetto.dev: {out}", markup=False, soft_wrap=True)


def _roof(engine: str, threads: int, where: dict[str, Any]) -> tuple[float | None, float | None]:
    """The most this engine did here in float32, in operations a second over 1e9, and the bytes a
    second that memory gave."""
    if engine not in COLLECTORS:
        return None, None
    found = roofline_here([engine], threads, where, Cache())
    rates = [
        one.ops_per_s for one in found.compute
        if (one.engine, one.dtype, one.threads, one.kind) == (engine, "float32", threads, "gemm")
    ]  # fmt: skip
    return (max(rates) / 1e9 if rates else None), found.memory_bytes_per_s


def _show(document: dict[str, Any], found: Trace, top: int) -> None:
    covered = 100 * found.covered
    stdout.print(
        f"{document['model']}  {found.engine} {found.engine_version}, {found.threads} threads: "
        f"{len(found.steps)} operators, {seconds(found.sum_ns)} together, {covered:.0f} % of the "
        f"{seconds(found.latency_ns)} a run takes without profiler",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    peak = document["roof_gop_per_s"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = ["time", "share", "type", "operator", "output", "GOP/s"]
    for name in [*names, *(["roof"] * bool(peak))]:
        words = name in ("type", "operator", "output")
        table.add_column(
            name, justify="left" if words else "right", no_wrap=True, min_width=None if words else 7
        )
    for one in sorted(found.steps, key=lambda step: -step.duration_ns)[:top]:
        rate = one.ops_per_s
        shape = "x".join(map(str, one.shapes[0])) if one.shapes else ""
        row = [
            seconds(one.duration_ns), f"{100 * one.duration_ns / max(found.sum_ns, 1):.1f} %",
            one.type, escape(_short(one.name)), shape,
            f"{rate / 1e9:.3g}" if rate else "",
        ]  # fmt: skip
        if peak:
            row.append(f"{rate / 1e7 / peak:.0f} %" if rate else "")
        table.add_row(*row)
    stdout.print(table)
    if len(found.steps) > top:
        stdout.print(f"and {len(found.steps) - top} more (--top N, --json)", markup=False)
    for line in document["advice"]:
        stdout.print(f"fix: {line['text']}", markup=False, soft_wrap=True)
    if not document["advice"]:
        stdout.print("nothing to fix that this trace would show", markup=False)


def _short(name: str) -> str:
    """The end of a name says more than its beginning."""
    return name if len(name) <= 26 else f"...{name[-23:]}"
