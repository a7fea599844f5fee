"""Who is told what happens while a job runs; the command line draws it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # verbs that never optimize need not load what optimizing needs
    from edgekit.device import DeviceProfile
    from edgekit.plan import Candidate

__all__ = ["Diary", "Observer"]


class Observer:
    """Told what happens; does nothing by itself. Methods may be called from several threads."""

    def phase(self, name: str) -> None:
        """A new phase begins."""

    def plan(self, candidates: Sequence[Candidate], profile: DeviceProfile) -> None:
        """The plan is made; nothing has been built."""

    def progress(self, task: str, done: int, total: int) -> None:
        """`task` has come to `done` of `total`."""

    def row(self, candidate: str, text: str) -> None:
        """Something became known of a candidate."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Diary:
    """Tells an observer, and keeps what the result says of the run: its notes, and the seconds each
    phase took."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase begins, and ends with the block."""
        self.observer.phase(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - start, 3)

    def note(self, text: str) -> None:
        """Something the user should know, now and in the result."""
        self.notes.append(text)
        self.observer.note(text)
