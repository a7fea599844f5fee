"""`edgekit optimize`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edgekit.cache import Cache
from edgekit.cli.console import (
    AnsweredError,
    TerminalObserver,
    command_line,
    place_of,
    print_json,
    size,
    stderr,
    stdout,
    times,
)
from edgekit.cli.firmware import show_firmware
from edgekit.cli.source import SourceOptions
from edgekit.cli.target import TargetOptions
from edgekit.errors import UsageError
from edgekit.measure.target import open_site
from edgekit.observer import Diary
from edgekit.optimize import optimize as run_optimize
from edgekit.outcome import plan_document
from edgekit.preparation import Request, prepare

__all__ = ["optimize"]


def optimize(
    model: str,
    /,
    *,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    data: str,
    calibration: str | None = None,
    source: SourceOptions | None = None,
    preprocess: Path | None = None,
    metric: str | None = None,
    max_drop: float = 0.01,
    slice_by: str | None = None,
    max_slice_drop: float | None = None,
    minimize: Literal["latency", "size"] = "latency",
    prune: list[float] | None = None,
    target: TargetOptions | None = None,
    budget: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    accelerator: str | None = None,
    allow_fallback: Annotated[bool, Parameter(negative="")] = False,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("out"),
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Find the fastest variant of a model within an accuracy budget, and bundle it.

    Every candidate (engine x precision) is built, evaluated on your data against the model as it
    came, and measured, interleaved with the others. What loses too much accuracy, or is neither
    faster nor smaller, is dropped with its reason. The choice is confirmed once on samples that
    nothing was decided on. A killed run resumes; Ctrl-C returns the best so far.

    Writes model.edgekit, report.html and result.json into the folder given with -o.

    Parameters
    ----------
    model
        The trained model, of any format that edgekit convert reads.
    for_
        A device profile (see `edgekit devices list`), or a .toml file; with --on, the device there
        if none is named.
    data
        Labelled samples: an .npz with arrays named like the model's inputs and 'labels', a folder
        of files with labels.csv, or module.py:function yielding (inputs, label).
    calibration
        Samples for int8 calibration; taken from the data otherwise.
    source
        How to read the model.
    preprocess
        A .toml file with the steps from raw samples to the model's inputs, from its outputs to an
        answer, and its state: they go into the bundle (docs/how-to/preprocess.md).
    metric
        top1 (default with labels), top5, accuracy, precision, recall, f1, auc, mae, rmse, cosine
        (against the model as it came; default without labels), or module.py:function.
    max_drop
        How much may be lost, in the metric's own units (0.01: one point of accuracy).
    slice_by
        An array of the data (or 'labels') that says which slice a sample is of: figures are given
        for each slice.
    max_slice_drop
        How much the worst slice may lose.
    minimize
        What to minimize within the accuracy budget.
    target
        How to reach the target.
    budget
        Time for everything: 90s, 10m, 1h. The best found by then is returned.
    threads
        Threads for every engine; the profile's number otherwise.
    prune
        Also try the model, in float and int8, without that share of its MACs (0.3 say; may be given
        more than once): channels go as edgekit prune takes them out.
    accelerator
        The profile's name of the accelerator to use (htp, gpu): an error if it is not, or runs only
        part of the model. none: the CPU alone. Otherwise all are tried, and the bundle has the
        best for the CPU, too.
    allow_fallback
        Take what an accelerator does only in part, the rest of it on the CPU; the bundle says so.
    seed
        For the split of the data and the order of measuring.
    out
        Folder for the results.
    dry_run
        Check everything and print the plan: what would be tried, what the profile rules out and
        why. Nothing is built.
    json
        One JSON object on stdout (schema edgekit.optimize/1); progress stays on stderr.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}; wanted at least 1")
    request = Request(
        Path(model), for_, data, out, calibration=calibration, preprocess=preprocess, metric=metric,
        max_drop=max_drop, slice_by=slice_by, max_slice_drop=max_slice_drop, minimize=minimize,
        budget_s=_seconds(budget),
        threads=threads, seed=seed, dry_run=dry_run, allow_fallback=allow_fallback,
        accelerator=accelerator,
        prune=tuple(prune or ()),
        reading=(source or SourceOptions()).reading(),
        command=command_line(),
    )  # fmt: skip
    with TerminalObserver() as observer:
        request = replace(
            request, site=open_site((target or TargetOptions()).target(), observer)
        )  # fmt: skip
        if dry_run:
            diary = Diary(observer)
            job = prepare(request, diary, Cache())
            if json:
                print_json(plan_document(job, diary.notes))
            return
        document = run_optimize(request, observer)
    if json:
        print_json(document)
    else:
        _show(document)
    if document["chosen"] is None:
        raise AnsweredError(f"{document['why']}; {document['report']} shows what was tried", 1)


_OUT = ("dropped", "failed", "skipped")
_SLICES = 12


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    if not found or not float(found[1]):
        raise UsageError(f"--budget is {text!r}; wanted a time such as 90s, 10m or 1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2] or "s"]


def _show(document: dict[str, Any]) -> None:
    for note in document["notes"]:
        stdout.print(f"note: {note}", markup=False, soft_wrap=True)
    rank = {"chosen": 0, "kept": 1, "dropped": 2, "failed": 3, "skipped": 4}
    failed = [c for c in document["candidates"] if c["repairs"] and c["status"] in _OUT]
    rows = sorted(
        (c for c in document["candidates"] if c not in failed),
        key=lambda c: (rank[c["status"]], _order(c, document["minimize"])),
    )
    table = Table(
        title="\nCandidates, best first",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("candidate", overflow="fold")  # figures stay whole, whatever the width
    firmware = any(row["firmware"] for row in rows)
    timed = () if firmware else ("p50", "x fp32")
    for name in (document["metric"].rpartition(":")[2], *timed, "size"):
        table.add_column(name, justify="right", no_wrap=True, min_width=min(7, len(name) + 1))
    table.add_column("", no_wrap=True, min_width=7)
    for row in rows:
        ratio = f"{row['latency_ratio'][0]:.2f}" if row["latency_ratio"] else "-"
        emulated = (row["latency_ns"] or {}).get("label") != document["label"]
        time = "simulated" if row["latency_ns"] and emulated else times(row["latency_ns"])
        figure = "-" if row["metric"] is None else f"{row['metric']:.4f}"
        colour = {"chosen": "bold green", "kept": "", "dropped": "red"}.get(row["status"], "dim")
        table.add_row(
            row["id"], figure, *(() if firmware else (time, ratio)),
            size(row["size_bytes"]),
            "reference" if row["reference_only"] and row["status"] == "kept" else row["status"],
            style=colour,
        )  # fmt: skip
    stdout.print(table)
    if firmware:
        show_firmware(rows)
    _show_reasons(rows)
    _show_repairs(document, failed)
    if not firmware:
        _show_conditions(document)
    _show_confirmation(document)
    _show_slices(document)
    if document["chosen"] is None:
        return
    stdout.print(f"\n[bold]chosen: {document['chosen']}[/bold]  {document['why']}", soft_wrap=True)
    if document.get("second"):
        stdout.print(
            f"second in the bundle: {document['second']}, for where the accelerator is not to be "
            "had", soft_wrap=True,
        )  # fmt: skip
    told = f"{document['bundle']}  {size(document['bundle_bytes'])}"
    stdout.print(f"bundle  {told}\nreport  {document['report']}", soft_wrap=True)
    if document["incomplete"]:
        stderr.print("[yellow]incomplete:[/yellow] the best found so far; the notes above say why")


def _show_conditions(document: dict[str, Any]) -> None:
    where, label = place_of(document), document["label"]
    threads = f"{document['threads']} thread{'s' if document['threads'] != 1 else ''}"
    stdout.print(f"\n{label} on {where}, {threads}, interleaved", markup=False, soft_wrap=True)
    stdout.print(
        "x fp32: median of the rounds' ratios; kept: good enough, faster or smaller than fp32"
    )


def _order(row: dict[str, Any], minimize: str) -> float:
    if minimize == "size":
        return float(row["size_bytes"] or 9e18)
    return float((row["latency_ratio"] or [9e18])[0])


def _show_reasons(rows: list[dict[str, Any]]) -> None:
    """Why candidates are out; those out for one and the same reason on one line."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] in _OUT:
            reasons.setdefault((row["status"], row["reason"]), []).append(row["id"])
    for (status, reason), names in reasons.items():
        text = reason if len(reason) <= 300 else reason[:297] + "..."
        stdout.print(f"{status}: {', '.join(names)}: {text}", markup=False, soft_wrap=True)


def _show_slices(document: dict[str, Any]) -> None:
    """What each slice lost in the chosen one, the worst first."""
    chosen = [c for c in document["candidates"] if c["id"] == document["chosen"] and c["slices"]]
    for row in chosen:
        slices = sorted(row["slices"], key=lambda one: -(one["drop"] or 0.0))
        for one in slices[:_SLICES]:
            figure = "-" if one["metric"] is None else f"{one['metric']:.4f}"
            drop = "-" if one["drop"] is None else f"{one['drop']:+.4f}"
            stdout.print(
                f"slice {one['name']}: {document['metric']} {figure} (drop {drop}) on "
                f"{one['samples']} samples", markup=False, soft_wrap=True,
            )  # fmt: skip
        if len(slices) > _SLICES:
            stdout.print(f"and {len(slices) - _SLICES} slices that lost less")


def _show_repairs(document: dict[str, Any], failed: list[dict[str, Any]]) -> None:
    """What the search for operators to leave in float came to."""
    search, found = document["search"], [
        c for c in document["candidates"] if c["repairs"] and c not in failed
    ]  # fmt: skip
    if not failed and not found:
        return
    stdout.print(
        f"repair: {len(failed) + len(found)} builds, {search['evaluations']} evaluated on all "
        f"samples, {search['screenings']} screened on some first; {len(found)} within the budget",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    for one in found:
        kept = one["kept_float"]
        names = f": {', '.join(kept[:5])}{' ...' if len(kept) > 5 else ''}" if kept else ""
        told = f"{len(kept)} operators in float{names}" if kept else one["scheme"]
        stdout.print(f"repaired: {one['id']}: {told}", markup=False, soft_wrap=True)
    if failed:
        least = min(failed, key=lambda c: c["metric_drop"] if c["metric_drop"] is not None else 9e9)
        drop = least["metric_drop"]
        if drop is not None and not found:
            stdout.print(
                f"the nearest was {least['id']}, which loses {drop:.4f}", markup=False,
                soft_wrap=True,
            )  # fmt: skip


def _show_confirmation(document: dict[str, Any]) -> None:
    confirmed = document["confirmation"]
    if not confirmed:
        stdout.print("not confirmed on untouched samples")
        return
    interval = confirmed["drop_interval"]
    span = f", 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""
    stdout.print(
        f"confirmed on {confirmed['samples']} untouched samples: {document['metric']} "
        f"{confirmed['reference_metric']:.4f} -> {confirmed['metric']:.4f} "
        f"(drop {confirmed['drop']:+.4f}{span}; allowed {document['max_drop']:g})",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    needed = confirmed["samples_to_tell"]
    if needed is not None:
        stdout.print(
            f"NOT CERTAIN: the interval holds both more and less than is allowed; about {needed} "
            "samples would tell",
            markup=False, soft_wrap=True,
        )  # fmt: skip
