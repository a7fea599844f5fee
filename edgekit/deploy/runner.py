"""EdgeKit's runtime on a target: what takes its verbs and answers in JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgekit.errors import ChildError, TargetError, by_name

__all__ = ["Done", "Runner", "Talk", "checked"]


@dataclass(frozen=True)
class Done:
    """A verb that ended by itself: exit code, what it printed, its last words on stderr, and how
    long the process lived, by the target's clock."""

    code: int
    out: str
    words: str
    wall_ns: int

    @property
    def warning(self) -> str:
        """The runtime's warning, if its last words are one."""
        return self.words.removeprefix("edgekit-runtime: ") if "Warning: " in self.words else ""

    def document(self, what: str) -> dict[str, Any]:
        """The JSON object it printed last.

        Raises:
            EdgeKitError: it failed: a LimitError, ModelError or EngineError as the runtime said.
        """
        lines = [line for line in self.out.splitlines() if line.strip()]
        if self.code == 0 and lines:
            try:
                found: dict[str, Any] = json.loads(lines[-1])
            except ValueError:
                raise TargetError(f"{what}: it answers {lines[-1][:80]!r}") from None
            return found
        last = self.words.removeprefix("edgekit-runtime: ") or f"ended with code {self.code}"
        kind = {1: "LimitError", 2: "ModelError", 3: "EngineError"}.get(self.code, "ChildError")
        raise by_name(kind, last if self.code in (1, 2, 3) else f"{what}: {last}")


class Talk(ABC):
    """A verb of the runtime that answers lines (`worker`), frozen while nobody asks it."""

    #: the first line it said
    hello: dict[str, Any]

    @abstractmethod
    def ask(self, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """One line of JSON, and its answer.

        Raises:
            ChildError: it died or did not answer in time.
            TargetError: the link is lost.
        """

    @abstractmethod
    def close(self) -> None:
        """End it; nothing if the link is lost."""


class Runner(ABC):
    """A session with the runtime on a target, as a context: when it ends, all that was started
    there has ended, and what was put there is gone, or kept out of sight for the next time.

    The verbs and what they print are those of `python -m edgekit_runtime`; a target without Python
    brings another program that takes them. Everything raises TargetError once the link is lost.
    """

    #: what the user called the target
    target: str

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @abstractmethod
    def read(self, patterns: Sequence[str]) -> dict[str, str]:
        """What small files of the target hold, by path: those that match and can be read."""

    @abstractmethod
    def put(self, folders: Mapping[str, Mapping[str, Path]]) -> dict[str, str]:
        """Have files there: folder -> name -> file here. Returns the folders' paths there. Of what
        the target holds already nothing is sent."""

    @abstractmethod
    def run(self, verb: Sequence[str], *, timeout_s: float, cold: bool = False) -> Done:
        """Run a verb to its end; `cold`: its clock starts before the runtime is imported."""

    @abstractmethod
    def talk(self, verb: Sequence[str], *, timeout_s: float, cpus: Sequence[int] | None) -> Talk:
        """Start a verb that answers lines, on these processors.

        Raises:
            EdgeKitError: it ended, or said an error instead of a first line.
        """


def checked(answer: dict[str, Any], what: str) -> dict[str, Any]:
    """An answer of the runtime that is no error.

    Raises:
        ModelError, ChildError: it is one.
    """
    if "error" in answer:
        kind = "ModelError" if answer.get("exit_code") == 2 else "ChildError"
        raise by_name(kind, str(answer["error"]))
    if not answer:
        raise ChildError(f"{what}: an empty answer")
    return answer
