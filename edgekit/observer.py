"""Who is told what happens while a job runs; the command line draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # verbs that never optimize need not load what optimizing needs
    from edgekit.device import DeviceProfile
    from edgekit.plan import Candidate

__all__ = ["Observer"]


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
