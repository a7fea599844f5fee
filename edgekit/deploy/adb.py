"""A target over adb: a phone on USB, or one that listens on a network.

Speaks to the user's adb server through adbutils. Every wait is bounded here: a frozen adbd would
let `adb shell` hang for ever. Commands use the shell protocol of Android 7 and later, which brings
exit codes, standard error and standard input.
"""

from __future__ import annotations

import select
import shlex
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from edgekit.deploy.transport import Completed, Conversation, Ended, Transport
from edgekit.errors import TargetError, UsageError, one_line, require

__all__ = ["AdbTransport"]

_SERVER_S = 10.0  # for the adb server here
_DEVICE_S = 15.0  # for a device to take a connection or a packet
_SILENCE_S, _SIGN_S = 10.0, 8.0  # until a silent device is asked for a sign of life, and for that
_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = range(5)
_PACKET = struct.Struct("<BI")
_PIECE = 32 << 10  # of a packet of the shell; adbd's own are as large
_BLOCK = 64 << 10  # the most that sync takes at once
_GREETING_S = 5.0  # for a device on a network to answer its first packet
_T = TypeVar("_T")

#: what adb says of a device that cannot be used, and what to do
_STATES = {
    "unauthorized": "it has not allowed this computer: unlock it and accept the question about USB "
    "debugging",
    "offline": "it is offline: plug it in again, or turn USB debugging off and on",
    "no": "this user may not open it: udev rules for adb are missing (apt-get install "
    "android-sdk-platform-tools-common)",
    "recovery": "it is in recovery mode; start it normally",
    "bootloader": "it is in its bootloader; start it normally",
    "sideload": "it waits for a sideload; start it normally",
}


class AdbTransport(Transport):
    """Each command is a connection of its own; nothing stays on the device when it ends."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        adbutils = require("adbutils", extra="adb")
        self._client = adbutils.AdbClient(socket_timeout=_SERVER_S)
        self._errors: tuple[type[Exception], ...] = (adbutils.AdbError, OSError, EOFError)
        wanted = target.removeprefix("adb:")
        self.serial = self._mapped(lambda: self._find(wanted), "the adb server")

    def run(self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        late = time.monotonic() + timeout_s
        shell, watch = self._shell(command), _Watch(self)
        try:
            shell.send(stdin, late)
            shell.close_stdin()
            while shell.code is None:
                if not watch.pump(shell, late):
                    raise TargetError(
                        f"{self.target}: {command[0]} did not end within {timeout_s:.0f} s"
                    )
            return Completed(shell.code, bytes(shell.stdout), bytes(shell.stderr))
        finally:
            shell.close()

    def converse(self, command: Sequence[str]) -> Conversation:
        return _AdbConversation(self, self._shell(command))

    def push(self, source: Path, target: str) -> None:
        self._mapped(lambda: self._push(source, target), f"copying {source.name}")

    def close(self) -> None:
        pass  # nothing is kept open

    def scratch(self) -> str:
        made = self.run(["mktemp", "-d", "-p", "/data/local/tmp"], timeout_s=30)
        if made.code != 0:
            raise TargetError(f"{self.target}: cannot write there: {made.last_words}")
        return made.stdout.decode().strip()

    def properties(self) -> dict[str, str]:
        """What the device says of itself: `ro.product.model` and others."""
        done = self.run(["getprop"], timeout_s=30)
        pairs = (
            line.partition("]: [") for line in done.stdout.decode(errors="replace").split("\n")
        )
        return {name[1:]: value.rstrip("]\r") for name, _, value in pairs if value}

    def _find(self, wanted: str) -> str:
        """The device's serial, connected anew if it is one on a network that was lost."""
        states = self._states()
        if not wanted:
            return self._only(states)
        networked = ":" in wanted
        if states.get(wanted) == "device" and not (networked and not self.answers(wanted)):
            return wanted
        if networked:  # after a reboot adb says "already connected", and every command fails
            self._client.disconnect(wanted)
            said = self._client.connect(wanted, timeout=_DEVICE_S)
            states = self._greeted(wanted)
            if states.get(wanted) is None:
                raise TargetError(f"{self.target}: {one_line(Exception(said))}")
        state = states.get(wanted)
        if networked and state == "offline":
            self._client.disconnect(wanted)  # or it would be listed from now on
            raise TargetError(
                f"{self.target}: nothing answers there: is the device on, with debugging over the "
                "network, and the port right?"
            )
        if state is None:
            known = ", ".join(states) or "none; is it plugged in, with USB debugging on?"
            raise TargetError(f"{self.target}: adb sees no such device; it sees: {known}")
        if state != "device":
            why = _STATES.get(state, f"adb calls its state {state!r}")
            raise TargetError(f"{self.target}: {why}")
        return wanted

    def _greeted(self, serial: str) -> dict[str, str]:
        """The states once a device that was just connected is known: until it has answered, it is
        listed as offline."""
        late = time.monotonic() + _GREETING_S
        while (states := self._states()).get(serial) in ("offline", "connecting"):
            if time.monotonic() > late:
                break
            time.sleep(0.1)
        return states

    def _only(self, states: dict[str, str]) -> str:
        if not states:
            raise TargetError(
                "adb sees no device; plug one in, turn USB debugging on, or adb connect HOST:PORT"
            )
        if len(states) > 1:
            raise UsageError(
                f"adb sees several devices, say which: adb:SERIAL of {', '.join(states)}"
            )
        ((serial, state),) = states.items()
        if state != "device":
            raise TargetError(
                f"adb:{serial}: {_STATES.get(state, f'adb calls its state {state!r}')}"
            )
        return serial

    def _states(self) -> dict[str, str]:
        return {one.serial: one.state for one in self._client.list()}

    def answers(self, serial: str | None = None) -> bool:
        """Whether a device, this one without `serial`, takes a command; waits some seconds."""
        try:
            _Shell(self._open("shell,v2,raw:true", serial or self.serial, _SIGN_S)).close()
        except self._errors:
            return False
        return True

    def _open(self, service: str, serial: str, timeout_s: float = _DEVICE_S) -> socket.socket:
        """A connection to a service of the device."""
        made = self._client.make_connection(timeout=timeout_s)
        try:
            for request in (f"host:transport:{serial}", service):
                made.send_command(request)
                made.check_okay()
        except BaseException:
            made.close()
            raise
        found: socket.socket = made.conn
        return found

    def _shell(self, command: Sequence[str]) -> _Shell:
        line = f"shell,v2,raw:{shlex.join(command)}"
        opened = self._mapped(lambda: self._open(line, self.serial), command[0])
        return _Shell(opened, self.target)

    def _push(self, source: Path, target: str) -> None:
        with source.open("rb") as file, self._open("sync:", self.serial) as made:
            mode = stat.S_IFREG | 0o755
            path = f"{target},{mode}".encode()
            made.sendall(b"SEND" + struct.pack("<I", len(path)) + path)
            while data := file.read(_BLOCK):
                made.sendall(b"DATA" + struct.pack("<I", len(data)) + data)
                if select.select([made], [], [], 0)[0]:
                    break  # it refuses already
            made.sendall(b"DONE" + struct.pack("<I", int(time.time())))
            self._await(made)
            head = _exactly(made, 8)
            if head[:4] != b"OKAY":
                size = min(struct.unpack("<I", head[4:])[0], 1024)
                words = _exactly(made, size).decode(errors="replace")
                raise TargetError(f"{self.target}: copying {source.name}: {words}")

    def _await(self, made: socket.socket) -> None:
        """Until a service has something to say: a slow card writes for minutes what it has taken,
        a device that is gone is noticed."""
        missed = 0
        while not select.select([made], [], [], 0 if missed else _SILENCE_S)[0]:
            missed = 0 if self.answers() else missed + 1
            if missed > 1:
                raise TimeoutError

    def _mapped(self, work: Callable[[], _T], what: str) -> _T:
        """The result; what adb, its server and sockets raise as one of ours."""
        try:
            return work()
        except (TargetError, UsageError):
            raise
        except TimeoutError:
            raise TargetError(
                f"{self.target}: {what}: no answer; the device is frozen, or gone"
            ) from None
        except self._errors as error:
            words = one_line(error)
            if type(error).__name__ == "AdbTimeout":
                words = "no answer; the device is frozen, or gone"
            raise TargetError(f"{self.target}: {what}: {words}") from None


class _Shell:
    """A process on the device, over adb's shell protocol: packets of a kind, a length, bytes."""

    def __init__(self, opened: socket.socket, target: str = "") -> None:
        self._socket, self._target = opened, target
        self._socket.setblocking(False)
        self._incoming, self._outgoing = bytearray(), bytearray()
        self.stdout, self.stderr = bytearray(), bytearray()
        self.code: int | None = None

    def send(self, data: bytes, late: float) -> None:
        """Give it bytes on its standard input; returns when they are on their way.

        Raises:
            TargetError: the link is lost, or it takes nothing until then.
        """
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._outgoing += _PACKET.pack(_STDIN, len(piece)) + piece
            while self._outgoing and self.code is None:
                if not self.pump(late):
                    raise TargetError(f"{self._target}: the device takes no more data")

    def close_stdin(self) -> None:
        """It shall see the end of its input."""
        self._outgoing += _PACKET.pack(_CLOSE_STDIN, 0)

    def pump(self, late: float) -> bool:
        """Wait for something to come or go; False if nothing does until `late`.

        Raises:
            TargetError: the link is lost.
        """
        wait = max(0.0, late - time.monotonic())
        writing = [self._socket] if self._outgoing else []
        readable, writable, _ = select.select([self._socket], writing, [], wait)
        try:
            if writable:
                del self._outgoing[: self._socket.send(self._outgoing)]
            if readable:
                data = self._socket.recv(1 << 18)
                if not data:
                    raise ConnectionResetError
                self._incoming += data
                self._sort()
        except OSError:
            if self.code is None:
                raise TargetError(
                    f"{self._target}: the link is lost: the device was unplugged or restarted, or "
                    "its adbd ended"
                ) from None
        return bool(readable or writable)

    def _sort(self) -> None:
        while len(self._incoming) >= _PACKET.size:
            kind, size = _PACKET.unpack_from(self._incoming)
            end = _PACKET.size + size
            if len(self._incoming) < end:
                return
            data = self._incoming[_PACKET.size : end]
            if kind == _STDOUT:
                self.stdout += data
            elif kind == _STDERR:
                self.stderr += data
            elif kind == _EXIT:
                self.code = data[0]
            del self._incoming[:end]

    def close(self) -> None:
        """End it; closing twice does nothing."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class _Watch:
    """Notices within half a minute that a device which says nothing is frozen or gone, where adb
    would wait for ever."""

    def __init__(self, transport: AdbTransport) -> None:
        self._transport, self._missed = transport, 0
        self._next = time.monotonic() + _SILENCE_S

    def pump(self, shell: _Shell, late: float) -> bool:
        """As `_Shell.pump`.

        Raises:
            TargetError: the link is lost, or the device gave no sign of life twice.
        """
        while not shell.pump(min(late, self._next)):
            if time.monotonic() < self._next:
                return False
            self._missed = 0 if self._transport.answers() else self._missed + 1
            if self._missed > 1:
                raise TargetError(
                    f"{self._transport.target}: it does not answer any more: it is frozen, "
                    "unplugged or gone"
                )
            self._next = time.monotonic() + (0 if self._missed else _SILENCE_S)
            if time.monotonic() >= late:
                return False
        self._next = time.monotonic() + _SILENCE_S
        return True


class _AdbConversation(Conversation):
    def __init__(self, transport: AdbTransport, shell: _Shell) -> None:
        self._transport, self._shell, self._over = transport, shell, False
        self._watch = _Watch(transport)

    @property
    def target(self) -> str:
        return self._transport.target

    def write(self, data: bytes) -> None:
        self._check()
        self._shell.send(data, time.monotonic() + 60.0)

    def line(self, timeout_s: float) -> bytes | None:
        self._check()
        late = time.monotonic() + timeout_s
        shell = self._shell
        while (end := shell.stdout.find(b"\n")) < 0:
            if shell.code is not None:
                raise self._ended(shell.code)
            if not self._watch.pump(shell, late):
                return None
        found = bytes(shell.stdout[: end + 1])
        del shell.stdout[: end + 1]
        return found

    def _ended(self, code: int) -> Ended:
        lines = self._shell.stderr.decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no last words"
        return Ended(f"{self.target}: the process there ended ({last})", code)

    def _check(self) -> None:
        if self._over:
            raise TargetError(f"{self.target}: the conversation is over")

    def close(self) -> None:
        self._over = True
        self._shell.close()


def _exactly(made: Any, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece: bytes = made.recv(size - len(found))
        if not piece:
            raise ConnectionResetError("the link is lost")
        found += piece
    return found
