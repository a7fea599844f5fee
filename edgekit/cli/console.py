"""What the verbs share on screen: progress on stderr, sizes and times for people."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgekit.errors import EdgeKitError
from edgekit.observer import Observer

if TYPE_CHECKING:
    from edgekit.device import DeviceProfile
    from edgekit.plan import Candidate

__all__ = [
    "AnsweredError",
    "TerminalObserver",
    "command_line",
    "place_of",
    "print_json",
    "seconds",
    "size",
    "stderr",
    "stdout",
    "times",
]

#: what goes into a file or a pipe need not fit a terminal
_PIPED = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160

stdout = Console(highlight=False, width=_PIPED)
stderr = Console(stderr=True, highlight=False)


class AnsweredError(EdgeKitError):
    """The command's answer was printed, and the answer is no: a line on stderr and an exit code,
    but no second JSON object."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def print_json(value: dict[str, Any]) -> None:
    """Exactly one JSON object on stdout."""
    json.dump(value, sys.stdout, indent=1)
    print()


def command_line() -> str:
    """What was called, for a bundle, which goes to strangers: it says which file was used, not
    whose home it was in."""
    words = (Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:])
    return shlex.join(["edgekit", *words])


def size(size_bytes: int | None) -> str:
    """`840 kB`, `3.2 MB`; a dash for nothing."""
    if size_bytes is None:
        return "-"
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= limit:
            value = size_bytes / limit
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{size_bytes} B"


def seconds(ns: float | None) -> str:
    """Nanoseconds as `5.43 ms`, `830 us`, `1.20 s`; a dash for nothing."""
    if ns is None:
        return "-"
    for limit, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if ns >= limit:
            return f"{ns / limit:.3g} {unit}"
    return f"{ns:.0f} ns"


def times(latency: dict[str, Any] | None, key: str = "p50") -> str:
    """One figure of a `latency_ns` object."""
    return seconds(latency[key]) if latency else "-"


def place_of(document: dict[str, Any]) -> str:
    """The machine a result's conditions are of: the device and its processor."""
    facts = document["conditions"]
    cpu = str(facts["cpu"] or facts["arch"])
    device = facts.get("device")
    return f"{device} ({cpu})" if device and device != cpu else cpu


class TerminalObserver(Observer, AbstractContextManager["TerminalObserver"]):
    """Bars on a terminal; elsewhere one plain line per event, at most every ten seconds."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        if stderr.is_terminal:
            self._bars = Progress(
                TextColumn("  {task.description}"), BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
                console=stderr, transient=True,
            )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}
        self._lock = threading.Lock()  # builds report from threads

    def __enter__(self) -> TerminalObserver:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def phase(self, name: str) -> None:
        self._clear()
        self._say(f"[bold]{name}[/bold]")

    def plan(self, candidates: Sequence[Candidate], profile: DeviceProfile) -> None:
        table = Table(title=f"The plan for {profile.name}", title_justify="left", box=None)
        table.add_column("candidate", no_wrap=True)
        table.add_column("scheme", overflow="fold")
        skipped: dict[str, list[str]] = {}
        for one in candidates:
            if one.skip:
                skipped.setdefault(one.skip, []).append(one.id)
            else:
                marks = ["fixed shapes"] if one.fixed_shapes else []
                marks += ["only compared with"] if one.reference_only else []
                table.add_row(one.id, "; ".join([str(one.scheme), *marks]))
        stderr.print(table)
        for reason, names in skipped.items():
            self._say(f"skipped: {', '.join(names)}: {reason}", markup=False)

    def progress(self, task: str, done: int, total: int) -> None:
        with self._lock:
            if self._bars is not None:
                if task not in self._tasks:
                    self._tasks[task] = self._bars.add_task(task, total=total)
                self._bars.update(self._tasks[task], completed=done, total=total)
                return
            now = time.monotonic()
            if now - self._said.setdefault(task, now) >= 10:
                self._said[task] = now
                self._say(f"  {task}: {done} of {total}")

    def row(self, candidate: str, text: str) -> None:
        with self._lock:
            if self._bars is not None and candidate in self._tasks:
                self._bars.remove_task(self._tasks.pop(candidate))
        self._say(f"  {candidate}: {text}", markup=False)

    def note(self, text: str) -> None:
        self._say(f"[yellow]note:[/yellow] {escape(text)}")

    def _say(self, text: str, *, markup: bool = True) -> None:
        stderr.print(text, markup=markup, soft_wrap=True)

    def _clear(self) -> None:
        with self._lock:
            if self._bars is not None:
                for task in self._tasks.values():
                    self._bars.remove_task(task)
            self._tasks.clear()
            self._said.clear()
