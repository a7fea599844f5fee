"""The parity ledger on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgekit.cli.console import stdout
from edgekit.divergence import Divergence
from edgekit.parity import LAMBDA, Comparison

__all__ = ["show_ledger"]


def show_ledger(lines: Sequence[Comparison], titles: Sequence[str], inputs: str) -> None:
    """A row for each output of each comparison; what is wrong, and where, below."""
    for line, title in zip(lines, titles, strict=True):
        stdout.print(f"{title}: {'same' if line.passed else 'DIFFERS'}", style="bold", markup=False)
        stdout.print(_table(line))
    stdout.print(f"inputs: {inputs}", markup=False, soft_wrap=True)
    for why in dict.fromkeys(line.tolerance.why for line in lines):
        stdout.print(f"allowed: {why}", markup=False, soft_wrap=True)
    for name, moved in {o.name: o.sensitivity for one in lines for o in one.outputs}.items():
        if any(o.allowed > one.tolerance.relative for one in lines for o in one.outputs
               if o.name == name):  # fmt: skip
            stdout.print(
                f"allowed for {name}: {LAMBDA:g} times the {moved:.1e} by which one rounding of "
                "the inputs moves it", markup=False, soft_wrap=True,
            )  # fmt: skip
    for line, title in zip(lines, titles, strict=True):
        _show_fault(line, title)


def _table(line: Comparison) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("output", overflow="fold")
    for name in ("max abs", "relative", "allowed", "cosine", "SQNR", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for one in line.outputs:
        table.add_row(
            escape(one.name), _figure(one.max_abs), _figure(one.max_relative),
            _figure(one.allowed),
            "-" if one.cosine is None else f"{one.cosine:.6f}",
            "-" if one.sqnr_db is None else f"{one.sqnr_db:.0f} dB",
            "-" if one.top1 is None else f"{100 * one.top1:.1f} %",
            "same" if one.passed else "[bold red]DIFFERS[/bold red]",
        )  # fmt: skip
    return table


def _show_fault(line: Comparison, title: str) -> None:
    for one in line.outputs:
        for alarm in one.alarms:
            stdout.print(f"{title}: {one.name}: {alarm}", markup=False, soft_wrap=True)
    if line.note:
        stdout.print(f"{title}: {line.note}", markup=False, soft_wrap=True)
    where = line.divergence
    if where is not None:
        stdout.print(
            f"{title}: the first tensor that differs is {where.tensor!r}, computed by {where.node}"
            f" ({_how_far(where)}); before it agree: "
            f"{', '.join(where.agree) or 'the inputs'}. Found in {where.runs} runs among "
            f"{where.compared} tensors.", markup=False, soft_wrap=True,
        )  # fmt: skip


def _how_far(where: Divergence) -> str:
    if not where.candidate_tensor:
        return "no tensor of the result has its values"
    off = f"off by {_figure(where.relative_error)} of its greatest value"
    return (
        off
        if where.candidate_tensor == where.tensor
        else (f"in the result {where.candidate_tensor!r}, {off}")
    )


def _figure(value: Any) -> str:
    return "0" if value == 0 else f"{value:.1e}"
