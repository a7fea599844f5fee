"""This machine as a target."""

from __future__ import annotations

import os
import queue
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgekit.deploy.transport import Completed, Conversation, Ended, Transport
from edgekit.errors import TargetError
from edgekit.sandbox import child_environment

__all__ = ["LocalConversation", "LocalTransport"]

_WRITE_S = 60.0


class LocalTransport(Transport):
    """Commands are child processes, each in a process group of its own."""

    def run(self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        try:
            child = _start(command, stderr=subprocess.PIPE)
        except FileNotFoundError:
            return Completed(127, b"", f"{command[0]}: not found".encode())
        except OSError as error:
            return Completed(126, b"", f"{command[0]}: {error.strerror}".encode())
        try:
            stdout, stderr = child.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TargetError(f"{command[0]} did not end within {timeout_s:.0f} s") from None
        finally:
            _kill(child)
        return Completed(child.returncode, stdout, stderr)

    def converse(self, command: Sequence[str]) -> LocalConversation:
        return LocalConversation(command)

    def push(self, source: Path, target: str) -> None:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise TargetError(
                f"cannot copy {source} to {target}: {error.strerror or error}"
            ) from None

    def close(self) -> None:
        pass


class LocalConversation(Conversation):
    """A child process that answers lines."""

    target = "local"

    def __init__(self, command: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the conversation)
        try:
            self._child = _start(command, stderr=self._log)
        except OSError as error:
            self._log.close()
            code = 127 if isinstance(error, FileNotFoundError) else 126
            raise Ended(f"local: {command[0]}: {error.strerror}", code) from None
        assert self._child.stdin is not None  # noqa: S101  (for the type checker)
        self._input = self._child.stdin.fileno()
        os.set_blocking(self._input, False)
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None  # noqa: S101  (for the type checker)
        with suppress(ValueError, OSError):
            for line in self._child.stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def write(self, data: bytes) -> None:
        if self._log.closed:
            raise TargetError("local: the conversation is over")
        view = memoryview(data)
        while view:
            if not select.select([], [self._input], [], _WRITE_S)[1]:
                raise TargetError(f"local: the process takes nothing for {_WRITE_S:.0f} s")
            try:
                view = view[os.write(self._input, view) :]
            except OSError:  # it died: reading says how
                return

    def line(self, timeout_s: float) -> bytes | None:
        if self._log.closed:
            raise TargetError("local: the conversation is over")
        try:
            found = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if not found:
            raise self._ended()
        return found

    def _ended(self) -> Ended:
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(5)  # it closed its output: it has ended, or will never answer
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines()
        self.close()
        said = f" ({words[-1]})" if words else ""
        code = self._child.returncode
        return Ended(f"local: the process ended, {code}{said}", code)

    def hang_up(self) -> None:
        """End as a link ends: what is on its way arrives, then nothing."""
        if not self._log.closed:
            with suppress(OSError):
                assert self._child.stdin is not None  # noqa: S101  (for the type checker)
                self._child.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
            self.close()

    def close(self) -> None:
        _kill(self._child, self._reader)
        self._log.close()


def _start(command: Sequence[str], *, stderr: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        env=child_environment(), start_new_session=True,
    )  # fmt: skip


def _kill(child: subprocess.Popen[bytes], reader: threading.Thread | None = None) -> None:
    """End it and all it started, and close its streams."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if reader is not None:
        reader.join(5)  # the stream it reads ends with the process
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # a reader may be in it
                stream.close()
