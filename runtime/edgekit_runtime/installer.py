"""Installs bundles on a device: standard library only, and a file of its own, so that it runs
before the runtime, numpy or an engine is there.

    python3 installer.py ROOT NAME OWNER       answers JSON lines on stdin, see `_Desk`
    python3 installer.py --receive PART        takes chunks on stdin: SHA-256, size, offset, bytes

    ROOT/NAME/versions/<sequence>-<id>.edgekit never changed once there
    ROOT/NAME/index/<the same>.json            its chunks: what a later version need not send again
    ROOT/NAME/active.json                      {"schema", "file", "previous"}, replaced as a whole
    ROOT/NAME/journal.json                     the step an installation has come to
    ROOT/NAME/incoming/<sha256>.part           a bundle on its way; its chunks are told by hash
    ROOT/NAME/tries.json                       how often a bundle failed its trial

A part that is whole is tried in a child process, renamed and only then activated, by one rename
each, after everything before was synced. So a kill or a power cut leaves the old version or the new
one, and the next command removes or takes up what is left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Tuple

__all__ = ["MAX_TRIES", "Refused", "main"]

MAX_TRIES = 3
_SCHEMA = "edgekit.active/1"
_IDLE_S = 30.0  # a host that was cut off does not say so
_FRAME = struct.Struct(">32sIQ")
_MAX_CHUNK = 1 << 20
_SPARE = 1 << 20  # of disk, for what is not the bundle
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_FILE = re.compile(r"([0-9]{1,20})-[0-9a-f]{8,64}\.edgekit")
_SHA = re.compile(r"[0-9a-f]{64}")


class Refused(Exception):  # noqa: N818  (what happened)
    """The device says no, in one line; `code` is the exit code of the host's command."""

    def __init__(self, text: str, code: int = 4) -> None:
        super().__init__(text)
        self.code = code


class _Place:
    """The folder of one name."""

    def __init__(self, root: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise Refused(f"{name!r} is no name for an installed bundle", 2)
        self.name, self.root, self.folder = name, root, root / name
        self.versions, self.index = self.folder / "versions", self.folder / "index"
        self.incoming = self.folder / "incoming"
        self.active, self.journal = self.folder / "active.json", self.folder / "journal.json"
        self.tries = self.folder / "tries.json"

    def make(self) -> None:
        for folder in (self.versions, self.index, self.incoming):
            folder.mkdir(parents=True, exist_ok=True)

    def state(self) -> Tuple[Optional[str], Optional[str]]:
        """The active version and the one before; None where there is none, or it is lost."""
        raw = _load(self.active)
        if raw.get("schema") != _SCHEMA:
            return None, None
        return self._there(raw.get("file")), self._there(raw.get("previous"))

    def _there(self, name: Any) -> Optional[str]:
        named = isinstance(name, str) and _FILE.fullmatch(name)
        return name if named and (self.versions / name).is_file() else None

    def switch(self, file: str, previous: Optional[str]) -> None:
        _store(self.active, {"schema": _SCHEMA, "file": file, "previous": previous})

    def installed(self) -> List[str]:
        """Versions that are there, oldest sequence first."""
        found = [p.name for p in self.versions.glob("*.edgekit") if _FILE.fullmatch(p.name)]
        return sorted(found, key=lambda n: (_sequence(n), n))


def _sequence(file: str) -> int:
    return int(file.partition("-")[0])


def _load(path: Path) -> Dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _store(path: Path, value: Dict[str, Any]) -> None:
    """Replace a file as a whole, and have that on the disk before going on."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as out:
            os.fchmod(out.fileno(), 0o644)  # what root installs, a service user reads
            out.write(json.dumps(value).encode())
            out.flush()
            os.fsync(out.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _hash(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while True:
        data = file.read(1 << 20)
        if not data:
            return digest.hexdigest()
        digest.update(data)


class _Desk:
    """Answers requests about one name, one after the other, under its lock."""

    def __init__(self, place: _Place) -> None:
        self.place = place
        self.part: Optional[Path] = None
        self._empty = True  # a part that was not begun before

    def answer(self, request: Dict[str, Any]) -> Dict[str, Any]:
        verb = request.pop("do", None)
        if verb not in ("status", "begin", "missing", "commit", "rollback", "gc"):
            raise Refused(f"no request {verb!r}", 2)
        found: Dict[str, Any] = getattr(self, verb)(**request)
        return found

    def status(self) -> Dict[str, Any]:
        """What is installed under the name."""
        active, previous = self.place.state()
        return {
            "name": self.place.name, "active": active, "previous": previous,
            "versions": self.place.installed(), "unfinished": _load(self.place.journal) or None,
            "failed_trials": _load(self.place.tries),
        }  # fmt: skip

    def begin(
        self, *, file: str, sha256: str, size: int, allow_older: bool = False
    ) -> Dict[str, Any]:
        """Whether this bundle may come; finishes or undoes what was left.

        {"state": "active" | "installed" | "wanted"}: nothing to send, or chunks to be asked for.
        """
        name = _FILE.fullmatch(file)
        if not name or not _SHA.fullmatch(sha256) or size <= 0:
            raise Refused(f"{file[:80]!r} is no name of a version", 2)
        self._recover(sha256)
        active, _ = self.place.state()
        tries = _load(self.place.tries).get(sha256, {})
        if tries.get("count", 0) >= MAX_TRIES:
            raise Refused(
                f"this bundle failed its trial here {tries['count']} times (last: "
                f"{tries.get('why')}); deploy another, or forget its trials with edgekit gc", 4,
            )  # fmt: skip
        if active and not allow_older and _sequence(file) < _sequence(active):
            raise Refused(
                f"it has sequence {_sequence(file)}, {_sequence(active)} is active; go back with "
                "edgekit rollback, or deploy it with --allow-older", 2,
            )  # fmt: skip
        if self._same(file, sha256):
            return {"state": "active" if file == active else "installed"}
        self.part = self.place.incoming / f"{sha256}.part"
        self._empty = not self.part.exists()
        self._room(size)
        with self._opened("a+b") as part:
            if part.seek(0, 2) != size:
                part.truncate(size)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(part.fileno(), 0, size)
        self._note("receiving", file=file, sha256=sha256)
        return {"state": "wanted"}

    def missing(self, *, chunks: List[List[Any]]) -> Dict[str, Any]:
        """Which of the bundle's chunks ([sha256, offset, size]) are neither in the part nor in a
        version that is installed here; the others are copied."""
        assert self.part is not None  # noqa: S101  (begin came first)
        known = self._known()
        wanted = []
        with self._opened("r+b") as part:
            for number, (sha, offset, size) in enumerate(chunks):
                part.seek(offset)
                if not self._empty and hashlib.sha256(part.read(size)).hexdigest() == sha:
                    continue
                data = _chunk(known.get(sha))
                if data is None or len(data) != size or hashlib.sha256(data).hexdigest() != sha:
                    wanted.append(number)
                else:
                    part.seek(offset)
                    part.write(data)
        return {"missing": wanted}

    def commit(
        self, *, file: str, sha256: str, chunks: List[List[Any]], trial: List[str],
        timeout_s: float = 120.0, environment: Optional[Dict[str, str]] = None,
    ) -> Dict[str, Any]:  # fmt: skip
        """Hash the whole, try it, keep it, activate it."""
        place = self.place
        active, previous = place.state()
        here = place.versions / file
        source = here if self.part is None else self.part
        with source.open("rb") as whole:
            found = _hash(whole)
            if found != sha256:
                raise Refused("the bundle did not arrive whole; deploy it again")
            os.fsync(whole.fileno())
        self._note("trial", file=file, sha256=sha256)
        command = [one.replace("{bundle}", str(source)) for one in trial]
        if active:
            command += ["--active", str(place.versions / active)]
        verdict = _try(command, timeout_s, environment or {})
        if not verdict.get("ok"):
            self._failed(sha256, str(verdict.get("why")))
        if self.part is not None:
            self._note("keeping", file=file, sha256=sha256)
            self.part.chmod(0o644)
            self.part.replace(here)
            _sync(place.versions)
            _sync(place.incoming)
        _store(place.index / f"{file}.json", {"sha256": sha256, "chunks": chunks})
        self._note("switching", file=file, sha256=sha256)
        if file != active:
            place.switch(file, active or previous)
        tries = _load(place.tries)
        if tries.pop(sha256, None) is not None:
            _store(place.tries, tries)
        self._done()
        self.part = None
        return {"active": file, "previous": place.state()[1], "trial": verdict}

    def rollback(self) -> Dict[str, Any]:
        """Back to the version before."""
        self._recover(None)
        active, previous = self.place.state()
        if previous is None:
            raise Refused("there is no version before to go back to", 2)
        self.place.switch(previous, None)
        return {"active": previous, "left": active}

    def gc(self) -> Dict[str, Any]:
        """Remove versions that are neither active nor the one before, parts, and failed trials."""
        self._recover(None)
        keep, freed = set(self.place.state()), 0
        if not any(keep):
            raise Refused("no version is active here; deploy one first, nothing is removed", 2)
        for file in self.place.installed():
            if file not in keep:
                freed += (self.place.versions / file).stat().st_size
                _remove(self.place.versions / file)
                _remove(self.place.index / f"{file}.json")
        _remove(self.place.tries)
        return {"freed_bytes": freed, "versions": self.place.installed()}

    def _failed(self, sha256: str, why: str) -> None:
        tries = _load(self.place.tries)
        count = int(tries.get(sha256, {}).get("count", 0)) + 1
        _store(self.place.tries, {**tries, sha256: {"count": count, "why": why[:200]}})
        if self.part is not None:
            _remove(self.part)
        self._done()
        raise Refused(f"it failed its trial ({count} of {MAX_TRIES}): {why}; nothing changed", 4)

    def _recover(self, keep: Optional[str]) -> None:
        """Remove what a killed command left; a part of `keep` goes on where it was."""
        for folder in (self.place.folder, self.place.versions, self.place.index):
            for left in folder.glob(".new-*"):
                _remove(left)
        for part in self.place.incoming.glob("*.part"):
            if part.name != f"{keep}.part":
                _remove(part)
        for index in self.place.index.glob("*.json"):
            if not (self.place.versions / index.name[: -len(".json")]).exists():
                _remove(index)
        if keep is None:
            self._done()

    def _note(self, step: str, **facts: Any) -> None:
        _store(self.place.journal, {"step": step, **facts})

    def _done(self) -> None:
        _remove(self.place.journal)
        _sync(self.place.folder)

    def _same(self, file: str, sha256: str) -> bool:
        try:
            with (self.place.versions / file).open("rb") as there:
                return _hash(there) == sha256
        except FileNotFoundError:
            return False

    def _room(self, size: int) -> None:
        assert self.part is not None  # noqa: S101
        there = self.part.stat().st_blocks * 512 if self.part.exists() else 0
        free = shutil.disk_usage(str(self.place.folder)).free
        if size - there + _SPARE > free:
            raise Refused(
                f"no room for it beside the version that is active: it needs "
                f"{(size - there + _SPARE) / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; edgekit gc "
                "removes older versions", 4,
            )  # fmt: skip

    def _known(self) -> Dict[str, Tuple[Path, int, int]]:
        """Where a chunk is to be had, of any bundle under the root."""
        found = {}
        for index in sorted(self.place.root.glob("*/index/*.json")):
            file = index.parent.parent / "versions" / index.name[: -len(".json")]
            with contextlib.suppress(ValueError, TypeError):
                for sha, offset, size in _load(index).get("chunks", []):
                    found[sha] = (file, int(offset), int(size))
        return found

    def _opened(self, mode: str) -> BinaryIO:
        assert self.part is not None  # noqa: S101
        return self.part.open(mode)  # type: ignore[return-value]


def _chunk(where: Optional[Tuple[Path, int, int]]) -> Optional[bytes]:
    if where is None or not 0 < where[2] <= _MAX_CHUNK:
        return None
    try:
        with where[0].open("rb") as file:
            file.seek(where[1])
            return file.read(where[2])
    except OSError:
        return None


def _try(command: List[str], timeout_s: float, environment: Dict[str, str]) -> Dict[str, Any]:
    """The verdict of a trial: what the child printed, or how it ended."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as log:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=log,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"ok": False, "why": f"{command[0]}: {error.strerror}"}
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return {"ok": False, "why": f"it did not end within {timeout_s:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said.seek(0)
        log.seek(0)
        words = log.read().decode(errors="replace").strip().splitlines()
        lines = said.read().splitlines()
    last = words[-1].split(": ", 1)[-1][:300] if words else "it said nothing"
    if code < 0:
        return {"ok": False, "why": f"the engine crashed with signal {-code} ({last})"}
    try:
        verdict = json.loads(lines[-1])
        return verdict if isinstance(verdict, dict) else {"ok": False, "why": last}
    except (IndexError, ValueError):
        return {"ok": False, "why": last}


def _receive(part: Path, stream: BinaryIO) -> int:
    """Write chunks where they belong; returns how many came whole."""
    count = 0
    with part.open("r+b") as out:
        end = out.seek(0, 2)
        while True:
            head = stream.read(_FRAME.size)
            if len(head) < _FRAME.size:
                return count
            sha, size, offset = _FRAME.unpack(head)
            if size > _MAX_CHUNK or offset + size > end:
                raise Refused("a chunk is larger than the bundle it is of", 2)
            data = stream.read(size)
            if len(data) < size:
                return count  # the link was cut
            if hashlib.sha256(data).digest() != sha:
                raise Refused("a chunk was damaged on the way; deploy it again")
            out.seek(offset)
            out.write(data)
            out.flush()
            count += 1


@contextlib.contextmanager
def _locked(place: _Place, owner: str) -> Iterator[None]:
    with (place.folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise Refused(
                f"{place.name!r} is being changed by {lock.read().strip()[:120] or 'another'}; "
                "try again when that is done"
            ) from None
        lock.truncate(0)
        lock.write(owner)
        lock.flush()
        yield


def _requests(desk: _Desk) -> Iterator[bytes]:
    """Lines of stdin, until it ends or nothing has come for too long, on either way."""
    pending, last = b"", -1.0
    while True:
        ready, _, _ = select.select([0], [], [], _IDLE_S)
        if not ready:
            changed = desk.part.stat().st_mtime if desk.part and desk.part.exists() else 0.0
            if changed == last or desk.part is None:
                return
            last = changed
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return
        pending += data
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            yield line


def _reason(error: Exception) -> Tuple[str, int]:
    if isinstance(error, Refused):
        return str(error), error.code
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return "the disk there is full; edgekit gc removes older versions", 4
        if error.errno == errno.EROFS:
            return "the disk there is read-only", 4
        return f"{error.filename or 'the disk there'}: {error.strerror or error}", 4
    return f"{type(error).__name__}: {error}", 4


def _serve(root: Path, name: str, owner: str) -> None:
    place = _Place(root, name)
    place.make()
    with _locked(place, owner):
        desk = _Desk(place)
        for line in _requests(desk):
            _say(_reply(desk, line))


def _reply(desk: _Desk, line: bytes) -> Dict[str, Any]:
    try:
        return {"ok": True, **(desk.answer(json.loads(line)) if line else _device())}
    except Exception as error:
        return _refusal(error)[0]


def _refusal(error: Exception) -> Tuple[Dict[str, Any], int]:
    text, code = _reason(error)
    return {"ok": False, "why": " ".join(text.split()), "code": code}, code


def _device() -> Dict[str, Any]:
    """What the host wants to know before it sends anything."""
    model = Path("/sys/firmware/devicetree/base/model")
    with contextlib.suppress(OSError):
        said = model.read_bytes().rstrip(b"\0").decode(errors="replace")
        return {"model": said, "machine": os.uname().machine}
    return {"model": None, "machine": os.uname().machine}


def _say(value: Dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main(arguments: List[str]) -> int:
    """Serve one name, or receive chunks."""
    try:
        if arguments[0] == "--receive":
            _say({"ok": True, "count": _receive(Path(arguments[1]), sys.stdin.buffer)})
        else:
            _serve(Path(arguments[0]), arguments[1], arguments[2])
    except BrokenPipeError:
        return 4
    except Exception as error:
        answer, code = _refusal(error)
        _say(answer)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
