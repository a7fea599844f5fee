"""This machine as a target."""

from __future__ import annotations

import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgekit.deploy.transport import Completed, Conversation, Transport
from edgekit.errors import TargetError
from edgekit.sandbox import child_environment

__all__ = ["LocalTransport"]


class LocalTransport(Transport):
    """Commands are child processes."""

    def run(self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, timeout=timeout_s, check=False,
                env=child_environment(),
            )  # fmt: skip
        except FileNotFoundError:
            return Completed(127, b"", f"{command[0]}: not found".encode())
        except OSError as error:
            return Completed(126, b"", f"{command[0]}: {error.strerror}".encode())
        except subprocess.TimeoutExpired:
            raise TargetError(f"{command[0]} did not end within {timeout_s:.0f} s") from None
        return Completed(done.returncode, done.stdout, done.stderr)

    def converse(self, command: Sequence[str]) -> Conversation:
        return _LocalConversation(command)

    def push(self, source: Path, target: str) -> None:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise TargetError(f"cannot write {target}: {error.strerror}") from None

    def close(self) -> None:
        pass


class _LocalConversation(Conversation):
    def __init__(self, command: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the conversation)
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                env=child_environment(), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise TargetError(f"{command[0]}: {error.strerror}") from None
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._child.stdout is not None  # noqa: S101  (for the type checker)
        with suppress(ValueError, OSError):
            for line in self._child.stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def ask(self, line: str, *, timeout_s: float) -> bytes:
        assert self._child.stdin is not None  # noqa: S101  (for the type checker)
        with suppress(OSError):  # it died: reading says how
            self._child.stdin.write(line.encode() + b"\n")
            self._child.stdin.flush()
        try:
            answer = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise TargetError(f"no answer within {timeout_s:.0f} s") from None
        if not answer:
            code = self._child.wait()
            self._log.seek(0)
            words = self._log.read().decode(errors="replace").strip().splitlines()
            raise TargetError(f"the process ended, {code}{f' ({words[-1]})' if words else ''}")
        return answer

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
