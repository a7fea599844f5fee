"""Transport: run a command on a target and copy files there; the same for every kind of target."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgekit.errors import TargetError, UsageError

__all__ = ["Completed", "Conversation", "Ended", "Transport", "connect"]

#: scheme of a TARGET -> (module, class)
_TRANSPORTS = {
    "local": ("edgekit.deploy.local", "LocalTransport"),
    "ssh": ("edgekit.deploy.ssh", "SshTransport"),
    "adb": ("edgekit.deploy.adb", "AdbTransport"),
}


@dataclass(frozen=True)
class Completed:
    """A command that ended by itself: its exit code and what it wrote."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def last_words(self) -> str:
        """The last line of what it wrote to stderr or stdout, for messages."""
        for text in (self.stderr, self.stdout):
            lines = [one for one in text.decode(errors="replace").splitlines() if one.strip()]
            if lines:
                return lines[-1].strip()[:200]
        return "nothing"


class Ended(TargetError):  # noqa: N818  (what happened)
    """The process of a conversation has ended; `code` is None if nobody says how."""

    def __init__(self, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.code = code


class Conversation(ABC):
    """A process on the target that answers each line it is sent with one line."""

    def ask(self, line: str, *, timeout_s: float, beat_s: float | None = None) -> bytes:
        """Send a line, return the answer.

        Raises:
            TargetError: the connection was lost, the process died (Ended), or it did not answer in
                time.
        """
        self.write(line.encode() + b"\n")
        return self.answer(timeout_s=timeout_s, beat_s=beat_s)

    def answer(self, *, timeout_s: float, beat_s: float | None = None) -> bytes:
        """The next line of the process. With `beat_s` an empty line is sent every so often, for a
        process that wants to know that we are there.

        Raises:
            TargetError: as `ask`.
        """
        late = time.monotonic() + timeout_s
        try:
            while (left := late - time.monotonic()) > 0:
                found = self.line(min(left, beat_s or left))
                if found is not None:
                    return found
                if beat_s:
                    self.write(b"\n")
            raise TargetError(f"{self.target}: no answer within {timeout_s:.0f} s")
        except TargetError:
            self.close()  # or a late answer would be taken for the next one's
            raise

    @property
    @abstractmethod
    def target(self) -> str:
        """Where the process is, for messages."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Send bytes as they are; returns when they are on their way.

        Raises:
            TargetError: the connection was lost, or the process takes nothing for a minute.
        """

    @abstractmethod
    def line(self, timeout_s: float) -> bytes | None:
        """The next line of the process, None if there is none yet.

        Raises:
            TargetError: the connection was lost, or the process has ended (Ended).
        """

    @abstractmethod
    def close(self) -> None:
        """End the process; closing twice does nothing."""


class Transport(ABC):
    """A connection to a target. `target` is what the user called it."""

    def __init__(self, target: str) -> None:
        self.target = target

    @abstractmethod
    def run(self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        """Run a command (no shell words: arguments are passed as they are) and wait for its end.

        Raises:
            TargetError: the connection was lost, or it did not end in time (it is killed).
        """

    @abstractmethod
    def converse(self, command: Sequence[str]) -> Conversation:
        """Start a command that answers lines.

        Raises:
            TargetError: it does not start.
        """

    @abstractmethod
    def push(self, source: Path, target: str) -> None:
        """Copy a file to a path on the target.

        Raises:
            TargetError: the connection was lost, or the target cannot write it.
        """

    @abstractmethod
    def close(self) -> None:
        """End the connection; closing twice does nothing."""

    def scratch(self) -> str:
        """A new folder on the target that only its user can enter.

        Raises:
            TargetError: the target cannot write to its folder for temporary files.
        """
        made = self.run(["mktemp", "-d"], timeout_s=30)
        if made.code != 0:
            raise TargetError(f"{self.target}: cannot write there: {made.last_words}")
        return made.stdout.decode().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def connect(target: str, *, accept_new_host_key: bool = False) -> Transport:
    """A connection to `local`, `ssh://user@host:port` or `adb:SERIAL`. With `accept_new_host_key` a
    host that known_hosts does not know is added to it; one whose key has changed never is.

    Raises:
        UsageError: not a target this version knows.
        TargetError: it cannot be reached, or does not let us in.
    """
    scheme = target.partition(":")[0]
    begins = {"local": "local", "ssh": "ssh://", "adb": "adb:"}.get(scheme, scheme)
    wrong = not target.startswith(begins) or (scheme == "local" and target != "local")
    if scheme not in _TRANSPORTS or wrong:
        raise UsageError(f"no target {target!r}; known: local, ssh://user@host:port, adb:SERIAL")
    module, name = _TRANSPORTS[scheme]
    kind = getattr(importlib.import_module(module), name)
    options = {"accept_new_host_key": accept_new_host_key} if scheme == "ssh" else {}
    opened: Transport = kind(target, **options)
    return opened
