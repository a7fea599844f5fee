"""A target for tests: this machine, behind a link that fails at the step that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from edgekit.deploy.local import LocalConversation, LocalTransport
from edgekit.deploy.transport import Completed, Conversation, Transport
from edgekit.errors import TargetError

__all__ = ["Fault", "MemoryTransport"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Fault:
    """The link is lost at this step, counted from 0: `before` what is asked for reaches the target,
    `halfway` (of what is written to a process or copied, half of the bytes arrive), or `after`,
    when it is done there and only the answer is lost."""

    step: int
    when: Literal["before", "halfway", "after"] = "before"


class MemoryTransport(Transport):
    """Every command, copy, write to a process and line of one is a step; `steps` lists them. From
    the fault on nothing gets through, and processes there hear that the link has ended."""

    def __init__(self, fault: Fault | None = None) -> None:
        super().__init__("memory")
        self.steps: list[str] = []
        self.fault, self.lost = fault, False
        self._inner = LocalTransport("local")
        self._talks: list[LocalConversation] = []

    def run(self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        return self.step("run", lambda: self._inner.run(command, stdin=stdin, timeout_s=timeout_s))

    def converse(self, command: Sequence[str]) -> Conversation:
        def work() -> Conversation:
            self._talks.append(self._inner.converse(command))
            return _MemoryConversation(self, self._talks[-1])

        return self.step("converse", work)

    def push(self, source: Path, target: str) -> None:
        def half() -> None:
            data = source.read_bytes()
            Path(target).write_bytes(data[: len(data) // 2])

        self.step("push", lambda: self._inner.push(source, target), half)

    def close(self) -> None:
        for talk in self._talks:
            talk.close()

    def step(self, what: str, work: Callable[[], _T], half: Callable[[], None] | None = None) -> _T:
        """Do it, unless the link is lost, or is to be lost now.

        Raises:
            TargetError: it is.
        """
        number = len(self.steps)
        self.steps.append(what)
        if self.lost:
            raise TargetError("memory: the connection is lost")
        if self.fault is None or self.fault.step != number:
            return work()
        if self.fault.when == "after":
            work()
        elif self.fault.when == "halfway" and half is not None:
            half()
        self.lost = True
        for talk in self._talks:
            talk.hang_up()
        raise TargetError(f"memory: the connection was lost ({what}, step {number})")


class _MemoryConversation(Conversation):
    target = "memory"

    def __init__(self, transport: MemoryTransport, inner: Conversation) -> None:
        self._transport, self._inner = transport, inner

    def write(self, data: bytes) -> None:
        self._transport.step(
            "write",
            lambda: self._inner.write(data),
            lambda: self._inner.write(data[: len(data) // 2]),
        )

    def line(self, timeout_s: float) -> bytes | None:
        return self._transport.step("line", lambda: self._inner.line(timeout_s))

    def close(self) -> None:
        self._inner.close()
