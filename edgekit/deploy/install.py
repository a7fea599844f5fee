"""Installs a bundle on a target: what it lacks is sent, tried there, and activated in one step."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import queue
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgekit.cache import file_sha256
from edgekit.deploy.chunks import Chunk, chunks_in
from edgekit.deploy.runtime_archive import runtime_files
from edgekit.deploy.transport import Ended, Transport
from edgekit.errors import BundleError, TargetError, UsageError
from edgekit.observer import Observer
from edgekit.profiles import profiles_of
from edgekit_runtime.bundle import Bundle
from edgekit_runtime.errors import WrongDeviceError
from edgekit_runtime.manifest import Manifest
from edgekit_runtime.source import processing

__all__ = ["Checked", "Device", "Hashed", "Installed", "checked", "deploy", "send"]

_SEGMENT = 2 << 20  # of chunks that are asked about and sent at once
_START_S, _ANSWER_S = 60.0, 120.0
_TRY_S = 300  # of a trial: emulated boards on a busy machine take a minute
_SLOWEST = 1e6  # bytes a second, of a small board's disk
_BEAT_S = 5.0  # the device gives up a host it has not heard of for 20 s
#: runs what comes on stdin: nothing is to be put there before, and one start of Python is enough
_BOOT = """import os,sys
if sys.version_info<(3,9):
    print('Python %d.%d'%sys.version_info[:2]);sys.exit(4)
import zlib
n=int(sys.argv.pop(1));b=b''
while len(b)<n:
    d=os.read(0,n-len(b))
    if not d:sys.exit(4)
    b+=d
def module(name,text=''):
    m=sys.modules[name]=type(sys)(name)
    m.__package__,m.__path__='edgekit_runtime',[]
    exec(compile(text,name,'exec'),m.__dict__)
    return m
module('edgekit_runtime')
for one in zlib.decompress(b).decode().split(chr(0)):
    name,_,text=one.partition(chr(10))
    last=module('edgekit_runtime.'+name,text)
sys.exit(last.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Hashed:
    """A file, and what it held when it was looked at."""

    path: Path
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Checked(Hashed):
    """A bundle that is sound."""

    manifest: Manifest


def checked(path: Path) -> Checked:
    """Verify a bundle; hashing a large one takes a while, which a thread may have while a device
    is connected.

    Raises:
        BundleError: it is no sound bundle.
    """
    with Bundle(path) as bundle:
        bundle.verify()
        manifest = bundle.manifest
        processing(manifest)
    return Checked(path, file_sha256(path), path.stat().st_size, manifest)


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

    `folder` and `runtime` in it are where `bring` puts the runtime: `python folder/runtime VERB`.
    `packages` is a folder there with what the interpreter lacks (see `edgekit.deploy.provision`).

    Raises:
        TargetError: no usable Python there, or the link is lost.
    """

    #: of the runtime, in the order they import each other; the last one's `main` is run
    modules: tuple[str, ...] = ("place", "installer")

    def __init__(
        self, transport: Transport, name: str, *, root: str | None = None, python: str | None = None
    ) -> None:
        self.transport, self.name, self._root = transport, name, root or ""
        self.python = python or (
            sys.executable if transport.target in ("local", "memory") else "python3"
        )
        self._files = runtime_files()
        listed = "".join(
            name + hashlib.sha256(data).hexdigest() for name, data in self._files.items()
        )
        self.runtime = f"runtime-{hashlib.sha256(listed.encode()).hexdigest()[:16]}"
        self.facts: dict[str, Any] = {}
        self.folder, self.packages = "", ""

    def __enter__(self) -> Self:
        texts = [
            name.encode() + b"\n" + self._files[f"edgekit_runtime/{name}.py"]
            for name in self.modules
        ]
        source = zlib.compress(b"\0".join(texts), 9)
        owner = f"{getpass.getuser()}@{platform.node()} (process {os.getpid()})"
        # -I -S: nothing of the user's is imported, and it starts in half the time
        command = [self.python, "-I", "-S", "-c", _BOOT, str(len(source))]
        with self._starting():
            self._talk = self.transport.converse([*command, self._root, self.name, owner])
            try:
                self._talk.write(source)
                self.facts = self.ask("hello", runtime=self.runtime, timeout_s=_START_S)
            except BaseException:
                self._talk.close()
                raise
        self.folder = f"{self.facts['root']}/.device"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._talk.close()

    def ask(self, do: str, *, timeout_s: float = _ANSWER_S, **facts: Any) -> dict[str, Any]:
        """One request, see `edgekit_runtime.installer.Desk`.

        Raises:
            TargetError: the device refuses (UsageError where that is for a wrong use), or is lost.
        """
        self.tell(do, **facts)
        return self.hear(timeout_s=timeout_s)

    def tell(self, do: str, data: bytes = b"", **facts: Any) -> None:
        """Send a request and what follows it; `hear` returns the answer.

        Raises:
            TargetError: the device is lost.
        """
        self._talk.write(json.dumps({"do": do, **facts}).encode() + b"\n" + data)

    def hear(self, *, timeout_s: float = _ANSWER_S) -> dict[str, Any]:
        """The answer to the first request that has none yet.

        Raises:
            TargetError: as `ask`.
        """
        line = self._talk.answer(timeout_s=timeout_s, beat_s=_BEAT_S)
        if line.startswith(b"Python "):
            raise TargetError(
                f"{self.transport.target}: {self.python} is {line.decode().strip()}, 3.9 or newer "
                "is wanted; name another with --python"
            )
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            raise TargetError(f"{self.transport.target}: it answers {line[:80]!r}") from None
        if not found.pop("ok", False):
            kind = UsageError if found.get("code") == 2 else TargetError
            raise kind(f"{self.transport.target}: {found.get('why')}")
        return found

    def bring(self, engines: Sequence[str] = ()) -> None:
        """Have the runtime there; what else that takes for the `engines` of a bundle's variants, in
        its order, is for devices that are brought engines, too.

        Raises:
            TargetError: as `ask`.
        """
        if self.facts["runtime"]:
            return
        files = [[name, len(data)] for name, data in self._files.items()]
        self.tell("bring", b"".join(self._files.values()), runtime=self.runtime, files=files)
        self.hear()
        self.facts["runtime"] = True

    def trial(self, max_latency_ns: int | None) -> list[str]:
        """The command that tries `{bundle}` there."""
        line = ["env", f"PYTHONPATH={self.packages}"] if self.packages else []
        line += [self.python, f"{self.folder}/{self.runtime}", "trial", "{bundle}"]
        line += ["--timeout", str(_TRY_S)]
        return line + (["--max-latency-ns", str(max_latency_ns)] if max_latency_ns else [])

    @contextmanager
    def _starting(self) -> Iterator[None]:
        try:
            yield
        except Ended as error:
            where = self.transport.target
            if error.code in (126, 127):
                raise TargetError(
                    f"{where}: no {self.python} there; install Python 3.9 or newer, or name one "
                    "with --python"
                ) from None
            if error.code:
                words = str(error).replace(f"{where}: ", "", 1)
                raise TargetError(
                    f"{where}: {self.python} does not run as Python 3.9 or newer does: {words}; "
                    "name another with --python"
                ) from None
            raise


def deploy(
    bundle: Path | Checked,
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
    one = checked(bundle) if isinstance(bundle, Path) else bundle
    manifest, sha256, size = one.manifest, one.sha256, one.size_bytes
    _fits(one.path, manifest, device.facts, any_profile=any_profile)
    file = f"{manifest.sequence}-{manifest.bundle_id}.edgekit"
    slow_s = size / _SLOWEST
    state = device.ask(
        "begin", file=file, sha256=sha256, size=size, allow_older=allow_older,
        timeout_s=_ANSWER_S + slow_s,
    )  # fmt: skip
    if state["state"] == "active":
        return Installed(device.name, file, None, "active", size, 0, {})
    sent = 0
    if state["state"] == "wanted":
        observer.phase("sending what the device lacks")
        sent = send(one, device, fresh=state["fresh"], observer=observer)
    observer.phase("trying it on the device")
    device.bring([one.engine for one in manifest.variants])
    done = device.ask(
        "commit", file=file, sha256=sha256, trial=device.trial(max_latency_ns),
        limit_s=_TRY_S, timeout_s=_TRY_S + _START_S + slow_s,
    )  # fmt: skip
    kind = "new" if state["state"] == "wanted" else "installed"
    return Installed(device.name, file, done["previous"], kind, size, sent, done["trial"])


def send(bundle: Hashed, device: Device, *, fresh: bool, observer: Observer | None = None) -> int:
    """Send the chunks of a file that the device lacks (of a `fresh` one all); returns the bytes
    of them. The file is cut while what was cut before is on its way.

    Raises:
        BundleError: the file is not what it was when it was checked.
        TargetError: the device refuses, or is lost.
    """
    observer = observer or Observer()
    done, sent, unheard = 0, 0, 0
    with _ahead(_segments(bundle)) as segments:
        for segment in segments:
            pieces = segment
            if not fresh:
                asked = device.ask("have", chunks=_listed(segment))["missing"]
                pieces = [segment[number] for number in asked]
            if pieces:
                data = b"".join(held for _, held in pieces)
                device.tell("take", data, chunks=_listed(pieces))
                sent, unheard = sent + len(data), unheard + 1
            if unheard > (1 if fresh else 0):  # one on its way while the next is made ready
                device.hear()
                unheard -= 1
            done += sum(one.size_bytes for one, _ in segment)
            observer.progress("kB", done // 1000, bundle.size_bytes // 1000)
    for _ in range(unheard):
        device.hear()
    return sent


_Segment = list[tuple[Chunk, bytes]]


def _listed(segment: _Segment) -> list[list[Any]]:
    return [[one.sha256, one.offset, one.size_bytes] for one, _ in segment]


def _segments(bundle: Hashed) -> Iterator[_Segment]:
    found: _Segment = []
    digest, size = hashlib.sha256(), 0
    with bundle.path.open("rb") as file:
        for one, held in chunks_in(file):
            digest.update(held)
            found.append((one, held))
            size += one.size_bytes
            if size >= _SEGMENT:
                yield found
                found, size = [], 0
    if digest.hexdigest() != bundle.sha256:
        raise BundleError(f"{bundle.path} changed while it was sent; nothing was activated")
    if found:
        yield found


@contextmanager
def _ahead(source: Iterator[_Segment]) -> Iterator[Iterator[_Segment]]:
    """The same, made in a thread a few ahead of what is used."""
    made: queue.Queue[_Segment | Exception | None] = queue.Queue(4)
    over = threading.Event()

    def offer(one: _Segment | Exception | None) -> None:
        while not over.is_set():
            try:
                made.put(one, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for one in source:
                offer(one)
                if over.is_set():
                    return
            offer(None)
        except Exception as error:
            offer(error)

    def taken() -> Iterator[_Segment]:
        while (one := made.get()) is not None:
            if isinstance(one, Exception):
                raise one
            yield one

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield taken()
    finally:
        over.set()
        worker.join()


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
    here = profiles_of(model)
    if here and not set(here) & set(manifest.profiles):
        raise WrongDeviceError(
            f"{path} was made for {', '.join(manifest.profiles)}, the device is a {model} "
            f"({', '.join(here)}); make one for it, or insist with --any-profile"
        )
