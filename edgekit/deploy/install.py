"""Installs a bundle on a target: what it lacks is sent, tried there, and activated in one step."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import edgekit_runtime.installer
from edgekit.cache import file_sha256
from edgekit.deploy.chunks import Chunk, chunks_of
from edgekit.deploy.runtime_archive import runtime_archive
from edgekit.deploy.transport import Transport
from edgekit.errors import BundleError, TargetError, UsageError
from edgekit.observer import Observer
from edgekit.profiles import load_profile, profile_ids
from edgekit_runtime.bundle import Bundle
from edgekit_runtime.errors import WrongDeviceError
from edgekit_runtime.manifest import Manifest
from edgekit_runtime.source import processing

__all__ = ["Device", "Installed", "deploy", "send"]

_FRAME = struct.Struct(">32sIQ")
_BATCH = 32 << 20  # each is a start of Python there, a second or two on a slow one
_START_S, _ANSWER_S, _TRIAL_S = 60.0, 120.0, 600.0
_LOOK = (
    "import os,sys;r=sys.argv[1] or os.environ.get('EDGEKIT_ROOT') or "
    "os.path.expanduser('~/.local/share/edgekit');os.makedirs(r+'/.device',exist_ok=True);"
    "print('%d.%d'%sys.version_info[:2],r,*[f for f in sys.argv[2:] "
    "if os.path.exists(r+'/.device/'+f)],sep='\\n')"
)


@dataclass(frozen=True)
class Installed:
    """What a deploy did: `state` is active (nothing to do), installed (was there already) or new;
    `sent_bytes` of chunks, of `size_bytes`; `trial` as `edgekit_runtime.acceptance.accept`."""

    name: str
    file: str
    previous: str | None
    state: str
    size_bytes: int
    sent_bytes: int
    trial: dict[str, Any]


class Device:
    """The installer on a target, in charge of one name, as a context.

    Raises:
        TargetError: no usable Python there, its disk cannot be written, or another deploy runs.
    """

    def __init__(
        self, transport: Transport, name: str, *, root: str | None = None, python: str | None = None
    ) -> None:
        self.transport, self.name, self._root = transport, name, root or ""
        self.python = python or (sys.executable if transport.target == "local" else "python3")

    def __enter__(self) -> Self:
        self.facts: dict[str, Any] = {}
        source = Path(edgekit_runtime.installer.__file__)
        self._installer = f"installer-{file_sha256(source)[:16]}.py"
        archive = runtime_archive()
        self.runtime = f"runtime-{hashlib.sha256(archive).hexdigest()[:16]}.pyz"
        root, there = self._look((self._installer, self.runtime))
        self.folder = f"{root}/.device"
        with tempfile.TemporaryDirectory() as work:
            packed = Path(work, "runtime.pyz")
            packed.write_bytes(archive)
            for name, path in ((self._installer, source), (self.runtime, packed)):
                if name not in there:
                    self._push(path, f"{self.folder}/{name}")
        owner = f"{getpass.getuser()}@{platform.node()} (process {os.getpid()})"
        self._talk = self.transport.converse(
            [self.python, "-u", f"{self.folder}/{self._installer}", root, self.name, owner]
        )
        try:
            self.facts = self._reply(self._talk.ask("", timeout_s=_START_S))
        except BaseException:
            self._talk.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._talk.close()

    def ask(self, do: str, *, timeout_s: float = _ANSWER_S, **facts: Any) -> dict[str, Any]:
        """One request, see `edgekit_runtime.installer`.

        Raises:
            TargetError: the device refuses (UsageError where that is for a wrong use), or is lost.
        """
        return self._reply(self._talk.ask(json.dumps({"do": do, **facts}), timeout_s=timeout_s))

    def receive(self, sha256: str, frames: bytes) -> None:
        """Send chunks into the part that `begin` made."""
        part = f"{self.folder}/../{self.name}/incoming/{sha256}.part"
        done = self.transport.run(
            [self.python, f"{self.folder}/{self._installer}", "--receive", part],
            stdin=frames, timeout_s=_TRIAL_S,
        )  # fmt: skip
        self._reply(done.stdout or json.dumps({"ok": False, "why": done.last_words}).encode())

    def trial(self, max_latency_ns: int | None) -> list[str]:
        """The command that tries `{bundle}` there."""
        line = [self.python, f"{self.folder}/{self.runtime}", "trial", "{bundle}"]
        return line + (["--max-latency-ns", str(max_latency_ns)] if max_latency_ns else [])

    def _look(self, files: Sequence[str]) -> tuple[str, list[str]]:
        done = self.transport.run(
            [self.python, "-c", _LOOK, self._root, *files], timeout_s=_START_S
        )
        where = self.transport.target
        if done.code in (126, 127):
            raise TargetError(
                f"{where}: no {self.python} there; install Python 3.9 or newer, or name one with "
                "--python"
            )
        if done.code != 0:
            raise TargetError(f"{where}: {done.last_words}")
        version, root, *there = done.stdout.decode().splitlines()
        if tuple(map(int, version.split("."))) < (3, 9):
            raise TargetError(
                f"{where}: {self.python} is Python {version}, 3.9 or newer is wanted; name another "
                "with --python"
            )
        return root, there

    def _push(self, path: Path, target: str) -> None:
        """Under another name first: a file of the right name is whole."""
        temporary = f"{target}.{os.getpid()}"
        self.transport.push(path, temporary)
        done = self.transport.run(["mv", "-f", temporary, target], timeout_s=_START_S)
        if done.code != 0:
            raise TargetError(f"{self.transport.target}: {done.last_words}")

    def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            raise TargetError(f"{self.transport.target}: it answers {line[:80]!r}") from None
        if not found.pop("ok", False):
            kind = UsageError if found.get("code") == 2 else TargetError
            raise kind(f"{self.transport.target}: {found.get('why')}")
        return found


def deploy(
    path: Path,
    device: Device,
    *,
    allow_older: bool = False,
    any_profile: bool = False,
    max_latency_ns: int | None = None,
    observer: Observer | None = None,
) -> Installed:
    """Install a bundle under the device's name, and activate it once its trial went well.

    Raises:
        BundleError: it is no sound bundle; nothing was sent.
        UsageError: older than what is active, or for another device.
        TargetError: the trial failed, or the device did; what was active still is.
    """
    observer = observer or Observer()
    with Bundle(path) as bundle:
        bundle.verify()
        manifest = bundle.manifest
        processing(manifest)
    _fits(path, manifest, device.facts, any_profile=any_profile)
    sha256, size = file_sha256(path), path.stat().st_size
    file = f"{manifest.sequence}-{manifest.bundle_id}.edgekit"
    state = device.ask("begin", file=file, sha256=sha256, size=size, allow_older=allow_older)
    pieces, sent = chunks_of(path), 0
    if state["state"] == "active":
        return Installed(device.name, file, None, "active", size, 0, {})
    listed = [[one.sha256, one.offset, one.size_bytes] for one in pieces]
    if state["state"] == "wanted":
        observer.phase("sending what the device lacks")
        missing = device.ask("missing", chunks=listed)["missing"]
        sent = send(path, [pieces[number] for number in missing], device, sha256, observer)
    observer.phase("trying it on the device")
    done = device.ask(
        "commit", file=file, sha256=sha256, chunks=listed, trial=device.trial(max_latency_ns),
        timeout_s=_TRIAL_S,
    )  # fmt: skip
    kind = "new" if state["state"] == "wanted" else "installed"
    return Installed(device.name, file, done["previous"], kind, size, sent, done["trial"])


def send(
    path: Path, pieces: Sequence[Chunk], device: Device, sha256: str, observer: Observer
) -> int:
    """Send these chunks of a bundle; returns the bytes of them.

    Raises:
        BundleError: the file is not what it was when it was cut.
        TargetError: the device refuses, or is lost.
    """
    total = sum(one.size_bytes for one in pieces)
    sent, batch = 0, bytearray()
    with path.open("rb") as file:
        for number, one in enumerate(pieces, 1):
            file.seek(one.offset)
            data = file.read(one.size_bytes)
            if hashlib.sha256(data).hexdigest() != one.sha256:
                raise BundleError(f"{path} changed while it was sent; nothing was activated")
            batch += _FRAME.pack(bytes.fromhex(one.sha256), one.size_bytes, one.offset) + data
            if len(batch) >= _BATCH or number == len(pieces):
                device.receive(sha256, bytes(batch))
                batch.clear()
            sent += one.size_bytes
            observer.progress("kB", sent // 1000, total // 1000)
    return sent


def _fits(path: Path, manifest: Manifest, facts: dict[str, Any], *, any_profile: bool) -> None:
    """What can be known before anything is sent."""
    machine = facts["machine"]
    wanted = {name for one in manifest.variants for name in one.machines}
    if all(one.machines and machine not in one.machines for one in manifest.variants):
        raise WrongDeviceError(
            f"{path} has variants for {', '.join(sorted(wanted))}; the device is {machine}"
        )
    model = facts.get("model")
    if any_profile or not model:
        return
    here = [one for one in profile_ids() if model.startswith(load_profile(one).name)]
    if here and not set(here) & set(manifest.profiles):
        raise WrongDeviceError(
            f"{path} was made for {', '.join(manifest.profiles)}, the device is a {model} "
            f"({', '.join(here)}); make one for it, or insist with --any-profile"
        )
