"""`edgekit prune`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgekit.cache import Cache, write_atomically
from edgekit.cli.console import AnsweredError, TerminalObserver, print_json, size, stdout
from edgekit.cli.source import SourceOptions
from edgekit.compress.prune import Pruning
from edgekit.conversion import check_target, made_by_edgekit, write_model
from edgekit.errors import UsageError
from edgekit.measure.report_runs import runs_html
from edgekit.pruning import Pruned, PruneRequest, prune_model
from edgekit.sandbox import Limits

__all__ = ["prune"]


def prune(
    model: str,
    /,
    *,
    method: Literal["channels", "magnitude", "n-m"] = "channels",
    amount: float | None = None,
    max_drop: float | None = None,
    importance: Literal["l1", "l2", "activation", "second-order"] = "second-order",
    spread: Literal["least-loss", "even"] = "least-loss",
    minimize: Literal["macs", "latency"] = "macs",
    refit: bool = True,
    pattern: str = "2:4",
    data: str | None = None,
    calibration: str | None = None,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    multiple: int | None = None,
    source: SourceOptions | None = None,
    preprocess: Path | None = None,
    metric: str | None = None,
    seed: int = 0,
    timeout: float = 1800.0,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    keep: Annotated[bool, Parameter(negative="")] = False,
    report: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make a model smaller after training, from samples without labels.

    Channels are taken out of the ONNX graph; the result is an ordinary smaller model. What is left
    is fitted to what the layers gave before, and compared with the model as it came on samples
    that nothing was learned from.

    Parameters
    ----------
    model
        A float model of any format that edgekit convert reads.
    method
        channels: whole channels, neurons, attention heads. magnitude: single weights become zero.
        n-m: all but N of each M weights. (Zeros only make the compressed download smaller.)
    amount
        The share of the MACs (channels; with --minimize latency: of the layers' latency) or of the
        weights (magnitude) that is to go, 0.5 say.
    max_drop
        With --amount: how much may be lost, in the metric's own units. Without: as much goes as
        this allows.
    importance
        How channels are ranked: by the norm of their weights, by what they add to the layers that
        read them, or by what is lost after the others make up for them.
    spread
        Channels go where least is lost for what is saved, or the same share of every layer's
        channels, neurons and heads (always so with l1 and l2).
    minimize
        What is to be least: MACs, or the latency of the layers, measured on this machine one by one
        in ONNX Runtime with fewer and fewer channels (once; kept in the cache).
    refit
        Fit the layers that are left to what they gave before.
    pattern
        Of n-m.
    data
        Samples, as for optimize. Up to 200 are learned from, the rest is for comparing.
    calibration
        Samples to learn from alone (up to 512); their labels are not used.
    for_
        A device profile: channels that are left fill its vector registers; otherwise those of this
        machine.
    multiple
        What is left of a group of channels is a multiple of this (1: any number).
    source
        How to read the model.
    preprocess
        A .toml file with the steps from raw samples to inputs (docs/how-to/preprocess.md).
    metric
        As for optimize: top1 with labels, cosine to the model as it came without.
    seed
        For parting the data.
    timeout
        Seconds that any one step may take.
    out
        The .onnx file to write; the model's name with the method otherwise.
    keep
        Write the result even if it loses too much.
    report
        An .html file to write: the metric against the latency over smaller amounts up to this one
        (or those that --max-drop tried), and every layer.
    json
        One JSON object on stdout (schema edgekit.prune/1).
    """
    pruning = replace(
        _asked(method, amount, max_drop, importance, pattern, multiple or 1, refit=refit),
        spread=spread, minimize=minimize,
    )  # fmt: skip
    if not 0 < timeout < math.inf:
        raise UsageError(f"--timeout is {timeout}; wanted a number above 0")
    path = out or Path(f"{Path(model.partition('.py:')[0]).stem}-{method}.onnx")
    check_target(path, "onnx")
    if out is None and path.exists() and not made_by_edgekit(path):
        raise UsageError(f"{path} exists, and EdgeKit did not make it: say with -o where to write")
    if path.resolve() == Path(model).resolve():
        raise UsageError(f"-o {path} is the model itself; choose another name")
    if multiple is not None and (multiple < 1 or for_ is not None):
        raise UsageError(
            f"--multiple {multiple}: wanted 1 or more" if multiple < 1
            else "--for and --multiple both say how many channels are left: give one of them"
        )  # fmt: skip
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report {report}: wanted a file in a folder that exists")
    cache = Cache()
    with TerminalObserver() as observer:
        made = prune_model(
            PruneRequest(
                model, pruning, amount=pruning.amount if amount is not None or method == "n-m"
                else None, max_drop=max_drop, way=report is not None, data=data,
                calibration=calibration,
                preprocess=preprocess, metric=metric, seed=seed,
                profile=(for_ or "this-machine") if multiple is None else None,
                reading=(source or SourceOptions()).reading(), limits=Limits(timeout_s=timeout),
            ),
            observer, cache,
        )  # fmt: skip
    document = _document(model, made)
    written = write_model(
        made.artifact, path, rejected=not made.usable and not keep, more={"pruning": document}
    )
    cache.trim()
    if report is not None:
        write_atomically(report, runs_html([(model, document)]).encode())
        written.append(report)
    document["files"] = [str(one) for one in written]
    if json:
        print_json(document)
    else:
        _show(made, written)
    if made.reason:
        kept = "" if keep or made.usable else ", so it was not written (--keep writes it anyway)"
        raise AnsweredError(f"{made.reason}{kept}", 1)


def _asked(  # noqa: PLR0917
    method: str, amount: float | None, max_drop: float | None, importance: str, pattern: str,
    multiple: int, *, refit: bool,
) -> Pruning:  # fmt: skip
    if method == "n-m":
        if amount is not None:
            raise UsageError(
                "--amount and --method n-m: the pattern says how much goes (--pattern)"
            )
    elif amount is None and max_drop is None:
        raise UsageError("how much is to go: give --amount 0.5, or --max-drop 0.01")
    if amount is not None and not 0 < amount < 1:
        raise UsageError(f"--amount is {amount:g}; wanted a share between 0 and 1")
    if max_drop is not None and not 0 <= max_drop < math.inf:
        raise UsageError(f"--max-drop is {max_drop}; wanted 0 or more")
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal()):
        raise UsageError(f"--pattern is {pattern!r}; wanted N:M, 2:4 say")
    share = 1 - int(n) / int(m) if method == "n-m" and 0 < int(n) < int(m) else 0.5
    return Pruning(
        method, share if amount is None else amount, importance, refit, multiple, (int(n), int(m))
    )


def _document(model: str, made: Pruned) -> dict[str, Any]:
    return {
        "schema": "edgekit.prune/1",
        "model": model,
        "method": made.pruning.method,
        "amount": made.pruning.amount,
        "importance": made.pruning.importance,
        "refit": made.pruning.refit,
        "multiple": made.pruning.multiple,
        "spread": made.pruning.spread,
        "minimize": made.pruning.minimize,
        "size_bytes": made.artifact.size_bytes,
        "before_bytes": made.before.size_bytes,
        **made.facts,
        "evaluation": made.evaluation,
        "steps": [one.to_json() for one in made.steps],
        "passed": not made.reason,
        "reason": made.reason,
        "notes": list(made.notes),
        "provenance": list(made.artifact.provenance),
    }


def _show(made: Pruned, written: list[Path]) -> None:
    for note in made.notes:
        stdout.print(f"note: {note}", markup=False, soft_wrap=True)
    stdout.print(_channels(made) if made.pruning.method == "channels" else _zeros(made))
    if made.pruning.method == "channels":
        _show_blocked(made)
    for one in made.steps:
        stdout.print(
            f"tried {100 * one.amount:.0f} %: {100 * one.reached:.1f} % gone, drop "
            f"{one.drop:+.4f}", markup=False, soft_wrap=True,
        )  # fmt: skip
    found = made.evaluation
    interval = found.get("drop_interval")
    span = f", 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""
    stdout.print(
        f"\n{found['name']} {found['reference']:.4f} -> {found['metric']:.4f} on "
        f"{found['samples']} samples (drop {found['drop']:+.4f}{span})", markup=False,
        soft_wrap=True,
    )  # fmt: skip
    if "macs" in made.facts:
        (a, b), (c, d) = made.facts["macs"], made.facts["parameters"]
        stdout.print(
            f"MACs {a:,} -> {b:,} ({b / a:.3f}x), parameters {c:,} -> {d:,} ({d / c:.3f}x)",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if made.facts.get("latency"):
        known = made.facts["latency"]
        before, after = (f"{known[key]['p50'] / 1e6:.3f}" for key in ("before", "after"))
        stdout.print(
            f"latency {before} -> {after} ms ({known['ratio'][0]:.2f}x, 95 % interval "
            f"{known['ratio'][1]:.2f} to {known['ratio'][2]:.2f}), measured on this machine, "
            "ONNX Runtime, one thread", markup=False, soft_wrap=True,
        )  # fmt: skip
    stdout.print(
        f"size {size(made.before.size_bytes)} -> {size(made.artifact.size_bytes)}, compressed "
        f"{size(made.facts['deflated_bytes'])}", markup=False,
    )  # fmt: skip
    for path in written:
        stdout.print(f"{path}  {size(path.stat().st_size)}", markup=False, soft_wrap=True)


def _channels(made: Pruned) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("channels", "MACs", "parameters", "SQNR"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in made.facts["layers"]:
        cells = [row.get("channels"), row["macs"], row.get("parameters")]
        table.add_row(escape(row["name"]), *(_change(cell) for cell in cells), _noise(row))
    return table


def _noise(row: dict[str, Any]) -> str:
    """Of a layer's output against that of the model as it came; "same" where nothing differs."""
    if "sqnr_db" not in row:
        return "-"
    return "same" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"


def _change(cell: list[int] | None) -> str:
    if cell is None:
        return "-"
    return f"{cell[0]:,}" if cell[0] == cell[1] else f"{cell[0]:,} -> {cell[1]:,}"


def _zeros(made: Pruned) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("weights", "zeros before", "zeros", "SQNR"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in made.facts["layers"]:
        cells = (row["weights"], row["zeros_before"], row["zeros"])
        table.add_row(escape(row["name"]), *(f"{one:,}" for one in cells), _noise(row))
    return table


def _show_blocked(made: Pruned) -> None:
    """Why layers keep channels, by reason."""
    by_reason: dict[str, list[str]] = {}
    for row in made.facts["layers"]:
        if row.get("blocked"):
            by_reason.setdefault(row["blocked"], []).append(row["name"])
    for why, names in by_reason.items():
        stdout.print(f"stays: {', '.join(names)}: {why}", markup=False, soft_wrap=True)
