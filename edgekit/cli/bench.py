"""`edgekit bench`."""

from __future__ import annotations

import json as json_module
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from edgekit.cache import default_root, file_sha256, write_atomically
from edgekit.cli.compare import duration
from edgekit.cli.console import (
    AnsweredError,
    TerminalObserver,
    place_of,
    print_json,
    seconds,
    size,
    stdout,
)
from edgekit.cli.contender import contender, engine_of, model_bytes, parts
from edgekit.cli.source import SourceOptions
from edgekit.cli.target import TargetOptions
from edgekit.errors import (
    EdgeKitError,
    InterruptedRunError,
    TargetError,
    UsageError,
    one_line,
)
from edgekit.measure.conditions import Moment, wait_until_fit
from edgekit.measure.phases import STOPPED, Bench, Phases, run_phases
from edgekit.measure.site import Site
from edgekit.measure.store import Store
from edgekit.measure.target import open_site
from edgekit.measure.worker import Contender
from edgekit.observer import Observer

__all__ = ["bench"]

_PATIENCE_S = 10.0
_WHY = {
    "narrow": "the median is known well enough", "budget": "the time was spent",
    "samples": "enough samples", "failure": "it failed", STOPPED: "it was stopped",
}  # fmt: skip


def bench(
    model: str,
    /,
    *,
    engine: str | None = None,
    variant: str | None = None,
    source: SourceOptions | None = None,
    threads: str | None = None,
    intent: Literal["latency", "throughput", "balanced"] | None = None,
    input_: Annotated[Path | None, Parameter(name="--input")] = None,
    cold: int = 5,
    budget: str = "10s",
    soak: str | None = None,
    throughput: Annotated[bool, Parameter(negative="")] = False,
    allow_unfit: Annotated[bool, Parameter(negative="")] = False,
    target: TargetOptions | None = None,
    store: Path | None = None,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Time a model or bundle: cold start in fresh processes, then warm runs; on request a soak,
    throughput and a sweep over threads. Every run is kept in the result store.

    Parameters
    ----------
    model
        A bundle (.edgekit) or a model of any format that edgekit convert reads.
    engine
        For a model: onnxruntime, openvino, litert or ncnn, for which it is converted if need be,
        with an accelerator of it (onnxruntime:qnn, ncnn:vulkan; doctor lists all) or without;
        its format's own otherwise, and onnxruntime where no engine loads it as it is.
    variant
        Of a bundle, by id; the first that runs there otherwise.
    source
        How to read the model.
    threads
        Threads for the engine; several (1,2,4) are compared. The bundle's own number, or this
        machine's, otherwise.
    intent
        latency, throughput or balanced: threads and streams are chosen for it, by measuring.
    input_
        An .npz with samples to run; seeded noise otherwise.
    cold
        Fresh processes for the cold start.
    budget
        The longest time for the warm runs (10s); they end before, once the median is known to 1 %.
    soak
        Also run on for so long (30m): latency over time, and when the device begins to throttle.
    throughput
        Also inferences a second: streams x batch.
    allow_unfit
        Measure on a busy or throttled machine as well; the result says so.
    target
        How to reach the target.
    store
        The folder of the result store; ~/.local/share/edgekit otherwise.
    out
        File for the raw samples and all conditions (JSON); in the cache folder otherwise.
    json
        One JSON object on stdout (schema edgekit.bench/1), raw samples included.
    """
    counts = _counts(threads)
    if cold < 1:
        raise UsageError(f"--cold is {cold}; wanted at least 1")
    if input_ is not None and not input_.is_file():
        raise UsageError(f"no file {input_}")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"-o {out}: cannot write there; wanted a file in a folder that exists")
    budget_s, soak_s = duration(budget, "--budget"), duration(soak, "--soak") if soak else 0.0
    reading = (source or SourceOptions()).reading()
    with Store(store) as kept:  # a store that cannot be used is said before anything is measured
        with TerminalObserver() as observer:
            site = open_site((target or TargetOptions()).target(), observer)
            one = contender(
                model, engine=engine, threads=counts[0] if counts else None, reading=reading,
                observer=observer, machine=site.profile, variant=variant,
            )  # fmt: skip
            site.need([engine_of(one, site)], observer)
            with site.session():
                before, reasons = _fit(site, allow_unfit, observer)
                phases = run_phases(
                    Bench(
                        one, site.profile.cpu.cores or 1, input_, cold, budget_s, soak_s=soak_s,
                        threads=counts, intent=intent, throughput=throughput, site=site,
                    ),
                    observer,
                )  # fmt: skip
                taken_in = _conditions(site, before)
        document = _document(model, one, phases, reasons, taken_in)
        stem = Path(model).stem
        file = out or default_root() / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}.json"
        number, problems = _keep(document, phases, file, kept)
    _answer(document, phases, (file, number), problems, as_json=json)


def _keep(
    document: dict[str, Any], phases: Phases, file: Path, store: Store
) -> tuple[int | None, list[str]]:
    """Into the file and into the store: what one of them does not take is not lost to the other,
    nor to the screen."""
    number, problems = None, []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json_module.dumps(document).encode())
    except (OSError, EdgeKitError) as error:
        problems.append(f"{file}: {one_line(error)}")
    try:
        number = store.add(document, status=phases.status, note=_failures(phases))
    except EdgeKitError as error:
        problems.append(str(error))
    return number, problems


def _counts(threads: str | None) -> tuple[int, ...]:
    """`4` or `1,2,4`."""
    if threads is None:
        return ()
    try:
        counts = tuple(int(one) for one in threads.split(","))
    except ValueError:
        raise UsageError(f"--threads {threads}: wanted a number, or several: 1,2,4") from None
    if min(counts) < 1:
        raise UsageError(f"--threads is {threads}; wanted at least 1")
    return tuple(dict.fromkeys(counts))


def _fit(site: Site, allow_unfit: bool, observer: Observer) -> tuple[Moment, list[str]]:
    """The machine before; refuses one that would give figures of something else.

    Raises:
        TargetError: it is busy or throttled, and stayed so.
    """
    now, reasons = wait_until_fit(0.0 if allow_unfit else _PATIENCE_S, read=site.read)
    if reasons and not allow_unfit:
        raise TargetError(
            f"{site.name} is not fit for measuring: {'; '.join(reasons)}; wait until it is, or "
            "measure all the same with --allow-unfit, which marks the result"
        )
    if reasons:
        observer.note(f"{site.name} is not fit for measuring: {'; '.join(reasons)}")
    return now, reasons


def _conditions(site: Site, before: Moment) -> dict[str, Any]:
    """The machine's conditions, with what it said before and after: of one that is lost, what was
    known by then."""
    try:
        after = site.moment(watch_s=0.5).to_json()
        return {**site.conditions(), "before": before.to_json(), "after": after}
    except TargetError:
        return {
            "target": site.target, "device": site.name, "arch": site.profile.arch,
            "cpu": site.profile.cpu.model, "taken": before.at, "before": before.to_json(),
            "after": None,
        }  # fmt: skip


def _document(
    model: str, one: Contender, phases: Phases, reasons: list[str], taken_in: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema": "edgekit.bench/1",
        "model": str(model),
        "sha256": file_sha256(*parts(one.path)),
        "size_bytes": model_bytes(one.path),
        "engine": engine_of(replace(one, variant=phases.found.get("variant") or one.variant)),
        "variant": one.variant,
        "engine_version": None,
        "threads": one.threads,
        "placement": None,
        "latency_ns": None,
        "status": phases.status,
        "phases": phases.phases,
        **phases.found,
        "unfit": reasons,
        "notes": phases.notes,
        "conditions": {
            **taken_in,
            "during": [moment.to_json() for moment in phases.moments],
        },
    }


def _failures(phases: Phases) -> str:
    return "; ".join(f"{row['name']}: {row['failure']}" for row in phases.phases if row["failure"])


def _answer(
    document: dict[str, Any],
    phases: Phases,
    kept: tuple[Path, int | None],
    problems: list[str],
    *,
    as_json: bool,
) -> None:
    if as_json:
        print_json(document)
    else:
        _show(document)
        file, number = kept
        stdout.print(f"run {number}; samples and conditions: {file}", markup=False, soft_wrap=True)
    if problems:
        raise AnsweredError(f"the result could not be kept: {'; '.join(problems)}", 2)
    if any(row["failure"] == STOPPED for row in phases.phases):
        raise AnsweredError("stopped; what was measured is kept", InterruptedRunError.exit_code)
    if phases.status != "done":
        raise AnsweredError(_failures(phases), phases.failure_code)


def _show(document: dict[str, Any]) -> None:
    latency = document["latency_ns"]
    stdout.print(
        f"[bold]{document['model']}[/bold]  {document['engine']} "
        f"{document['engine_version'] or ''}, {document['threads']} threads, "
        f"{size(document['size_bytes'])}"
    )
    placement = document["placement"]
    if placement:
        shares = ", ".join(f"{100 * v:.0f} % {k}" for k, v in placement["shares"].items())
        stdout.print(f"ran on {shares} ({placement['delegate']}, {placement['precision']})")
    _show_cold(document.get("cold") or [])
    if latency:
        _show_latency(document, latency)
    _show_sweeps(document)
    for note in document["notes"]:
        stdout.print(f"note: {note}", markup=False, soft_wrap=True)
    if document["unfit"]:
        stdout.print(f"unfit host: {'; '.join(document['unfit'])}", style="yellow", markup=False)
    stdout.print(f"{(latency or {}).get('label', 'measured')} on {place_of(document)}",
                 markup=False)  # fmt: skip


def _show_cold(cold: list[dict[str, Any]]) -> None:
    for key, name in (("import_ns", "import"), ("load_ns", "load"), ("first_run_ns", "first run")):
        values = sorted(one[key] for one in cold)
        if not values:
            return
        memory = sorted(one["memory_bytes"][key.removesuffix("_ns")]["rss"] or 0 for one in cold)
        stdout.print(
            f"cold  {name:<10} {seconds(values[len(values) // 2]):>8}  "
            f"({seconds(values[0])} to {seconds(values[-1])}, {len(values)} fresh processes; "
            f"then {size(memory[len(memory) // 2])} resident)"
        )


def _show_latency(document: dict[str, Any], latency: dict[str, Any]) -> None:
    for key in ("p50", "p90", "p99", "p99.9"):
        if latency[key] is None:
            continue
        ends = latency["intervals"].get(key)
        span = f"  ({seconds(ends[0])} to {seconds(ends[1])})" if ends else ""
        stdout.print(f"warm  {key:<10} {seconds(latency[key]):>8}{span}")
    why = _WHY.get(document["stopped"], document["stopped"])
    cut = document.get("warm_up_samples")
    stdout.print(
        f"      {latency['samples']} samples, worth {latency['effective_samples']} independent "
        f"ones; {cut or 0} before them were warming up; ended because {why}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    stdout.print(f"cpu time a run   {seconds(document['cpu_ns_per_run']):>8}")
    stdout.print(f"peak memory      {size(document['peak_rss_bytes']):>8}")
    energy = document["energy"]
    joules = energy["joules_per_inference"]
    text = f"{1e3 * joules:.3g} mJ above idle" if joules is not None else energy["reason"]
    stdout.print(f"energy a run     {text}", markup=False, soft_wrap=True)


def _show_sweeps(document: dict[str, Any]) -> None:
    for row in document.get("threads_sweep") or []:
        p50 = row["latency_ns"]["p50"] if row["latency_ns"] else None
        stdout.print(
            f"threads {row['threads']:<3}      {row['failure'] or seconds(p50):>8}", markup=False
        )
    for row in document.get("throughput") or []:
        what = f"{row['streams'] or '?'} x {row['threads']} threads, batch {row['batch']}"
        rate = f"{row['per_second']:.4g} a second" if row["per_second"] else row["failure"]
        stdout.print(f"{what:<28} {rate}", markup=False, soft_wrap=True)
    soak = document.get("soak")
    if soak and soak["at_s"]:
        onset = soak["onset_s"]
        when = f"slower from {onset:.0f} s on" if onset is not None else "it did not slow down"
        stdout.print(
            f"soak {soak['at_s'][-1]:.0f} s: first {soak['window_s']:.0f} s "
            f"{seconds(soak['first_ns'])}, last {seconds(soak['last_ns'])} "
            f"({soak['slowdown']:.2f}x); {when}"
        )
