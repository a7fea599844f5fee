"""Devices without Python: what installs and measures there is the native runner of a capsule."""

from __future__ import annotations

import getpass
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Self

from edgekit.cache import file_sha256
from edgekit.deploy.adb import AdbTransport
from edgekit.deploy.capsule import Capsule, capsule, litert_addon, runner_command
from edgekit.deploy.install import Device
from edgekit.deploy.runner import Done
from edgekit.deploy.transport import Transport
from edgekit.deploy.workbench import Workbench
from edgekit.errors import TargetError, UsageError
from edgekit.observer import Observer

__all__ = ["ROOT", "RUNNER_ENGINES", "Phone", "PhoneWorkbench", "bring_capsule", "device_on"]

#: of the native runner: in the capsule, and beside it where it is wanted
RUNNER_ENGINES = ("onnxruntime", "litert")
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
    what = "the runner" if one.engine == RUNNER_ENGINES[0] else one.engine
    observer.phase(f"bringing {what} ({one.size_bytes / 1e6:.0f} MB, once)")
    parents = sorted({str(PurePosixPath(name).parent) for name in one.files})
    new = f"{root}/.device/.new-{one.name}-{os.getpid()}"
    # of hosts that were killed meanwhile
    transport.run(["sh", "-c", _OLD, f"{root}/.device"], timeout_s=_START_S)
    try:
        make = 'umask 022; mkdir -p "$@"'  # adbd has none
        _must(transport, ["sh", "-c", make, "sh", *(f"{new}/{one}" for one in parents)])
        for name, path in one.files.items():
            transport.push(path, f"{new}/{name}")
        _compare(transport, one, new)
        _must(transport, ["sh", "-c", 'chmod -R 755 "$0"; sync; mv "$0" "$1"', new, folder])
    except BaseException:
        _remove(transport, new)
        raise
    return folder


def _compare(transport: Transport, one: Capsule, folder: str) -> None:
    """What arrived is what was sent."""
    done = _must(transport, ["sh", "-c", 'cd "$0" && sha256sum "$@"', folder, *one.files])
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

    def bring(self, engines: Sequence[str] = ()) -> None:
        """The runner is there already: it answers. Another engine is brought if a variant before
        the first that the capsule runs is for it."""
        first = list(takewhile(lambda engine: engine != RUNNER_ENGINES[0], engines))
        if RUNNER_ENGINES[1] in first:
            addon = litert_addon(self._watcher)
            folder = bring_capsule(self.transport, self._root, addon, self._watcher)
            self.program = runner_command(self._capsule, [folder])

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
        self._capsule = bring_capsule(self.transport, self._root, one, self._watcher)
        return runner_command(self._capsule)


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
        self, transport: Transport, *, root: str | None = None, engines: Sequence[str] = (),
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        Workbench.__init__(self, transport, root=root or ROOT, python="", observer=observer)
        self._watcher, self._engines = observer or Observer(), engines

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.bring([one for one in self._engines if one != RUNNER_ENGINES[0]])
        except BaseException:
            self._talk.close()
            raise
        return self

    def command(self, verb: Sequence[str]) -> list[str]:
        return [*self.program, *verb]

    def run(self, verb: Sequence[str], *, timeout_s: float = _SLOW_S, cold: bool = False) -> Done:
        return self.call(self.command(verb), timeout_s=timeout_s)  # its clock starts with it
