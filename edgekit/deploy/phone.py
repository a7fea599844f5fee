"""Devices without Python: what installs and measures there is the native runner of a capsule."""

from __future__ import annotations

import getpass
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self

from edgekit.cache import file_sha256
from edgekit.deploy.adb import AdbTransport
from edgekit.deploy.capsule import Capsule, capsule, runner_command
from edgekit.deploy.install import Device
from edgekit.deploy.runner import Done
from edgekit.deploy.transport import Transport
from edgekit.deploy.workbench import Workbench
from edgekit.errors import TargetError, UsageError
from edgekit.observer import Observer

__all__ = ["ROOT", "Phone", "PhoneWorkbench", "bring_capsule", "device_on"]

#: where a shell on Android may write and run programs
ROOT = "/data/local/tmp/edgekit"
_START_S, _TRY_S, _SLOW_S = 60.0, 300, 300.0
_OLD = 'find "$0" -maxdepth 1 -name ".new-*" -mmin +60 -exec rm -rf {} + 2>/dev/null; true'


def bring_capsule(transport: Transport, root: str, one: Capsule, observer: Observer) -> str:
    """Have a capsule on the device, whole or not at all; returns its folder there.

    Raises:
        TargetError: the device has no room, or is lost.
    """
    folder = f"{root}/.device/{one.name}"
    if transport.run(["test", "-d", folder], timeout_s=_START_S).code == 0:
        return folder
    observer.phase(f"bringing the runner ({one.size_bytes / 1e6:.0f} MB, once)")
    new = f"{root}/.device/.new-{one.name}-{os.getpid()}"
    # of hosts that were killed meanwhile
    transport.run(["sh", "-c", _OLD, f"{root}/.device"], timeout_s=_START_S)
    try:
        _must(transport, ["sh", "-c", 'umask 022; mkdir -p "$0/lib"', new])  # adbd has none
        for name, path in one.files.items():
            transport.push(path, f"{new}/{name}")
        _compare(transport, one, new)
        _must(transport, ["sh", "-c", 'chmod 755 "$0"/edgekit-run "$0"/lib/*; sync; mv "$0" "$1"',
                          new, folder])  # fmt: skip
    except BaseException:
        _remove(transport, new)
        raise
    return folder


def _compare(transport: Transport, one: Capsule, folder: str) -> None:
    """What arrived is what was sent."""
    done = _must(transport, ["sh", "-c", 'cd "$0" && sha256sum edgekit-run lib/*', folder])
    found = {line.split()[1]: line.split()[0] for line in done.splitlines() if " " in line}
    for name, path in one.files.items():
        if found.get(name) != file_sha256(path):
            raise TargetError(f"{transport.target}: {name} was damaged on the way; try again")


def _remove(transport: Transport, folder: str) -> None:
    with suppress(TargetError):
        transport.run(["rm", "-rf", folder], timeout_s=_START_S)


def _must(transport: Transport, command: list[str]) -> str:
    done = transport.run(command, timeout_s=120.0)
    if done.code != 0:
        raise TargetError(f"{transport.target}: {done.last_words}")
    return done.stdout.decode(errors="replace")


class Phone(Device):
    """The installer on a device without Python, in charge of one name, as a context.

    Raises:
        TargetError: it is no 64-bit Arm device, its disk cannot be written, or the link is lost.
    """

    def __init__(
        self, transport: Transport, name: str, *, root: str | None = None,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(transport, name, root=root or ROOT, python="")
        self._watcher = observer or Observer()

    def __enter__(self) -> Self:
        self.program = self._bring_program()
        owner = f"{getpass.getuser()}@{platform.node()} (process {os.getpid()})"
        self._talk = self.transport.converse([*self.program, "desk", self._root, self.name, owner])
        try:
            self.facts = self.ask("hello", runtime=self.runtime, timeout_s=_START_S)
        except BaseException:
            self._talk.close()
            raise
        if isinstance(self.transport, AdbTransport):
            self.facts["model"] = self.transport.properties().get("ro.product.model")
        self.folder = f"{self.facts['root']}/.device"
        return self

    def bring(self) -> None:
        """The runner is there already: it answers."""

    def trial(self, max_latency_ns: int | None) -> list[str]:
        line = [*self.program, "trial", "{bundle}", "--timeout", str(_TRY_S)]
        return line + (["--max-latency-ns", str(max_latency_ns)] if max_latency_ns else [])

    def _bring_program(self) -> list[str]:
        """Have the runner there; returns what starts it."""
        machine = _must(self.transport, ["uname", "-m"]).strip()
        if machine not in ("aarch64", "arm64"):
            raise TargetError(
                f"{self.transport.target}: it is {machine}; the native runner is for 64-bit Arm"
            )
        one = capsule(self._watcher)
        self.runtime = one.name
        return runner_command(bring_capsule(self.transport, self._root, one, self._watcher))


@contextmanager
def device_on(
    transport: Transport, name: str, *, root: str | None, python: str | None, observer: Observer
) -> Iterator[Device]:
    """What installs under a name on a target: Python there, or on adb targets the native runner.

    Raises:
        UsageError: an interpreter is named for a device without Python.
        TargetError: the device is not fit, or lost.
    """
    if not isinstance(transport, AdbTransport):
        with Device(transport, name, root=root, python=python) as device:
            yield device
        return
    if python is not None:
        raise UsageError("--python is for targets with Python; adb targets get the native runner")
    with Phone(transport, name, root=root, observer=observer) as phone:
        yield phone


class PhoneWorkbench(Phone, Workbench):
    """The native runner beside what is installed on a device without Python."""

    def __init__(
        self, transport: Transport, *, root: str | None = None, observer: Observer | None = None
    ) -> None:
        Workbench.__init__(self, transport, root=root or ROOT, python="", observer=observer)
        self._watcher = observer or Observer()

    def command(self, verb: Sequence[str]) -> list[str]:
        return [*self.program, *verb]

    def run(self, verb: Sequence[str], *, timeout_s: float = _SLOW_S, cold: bool = False) -> Done:
        return self.call(self.command(verb), timeout_s=timeout_s)  # its clock starts with it
