"""Installs bundles on a device: standard library only, sent with `place` to any Python there, so
that it runs before the runtime, numpy or an engine is there.

It answers JSON lines on stdin with one line each; some are followed by bytes. See `Desk`.

A bundle that is whole is tried in a child process, renamed and only then activated, by one rename
each, after everything before was synced. So a kill or a power cut leaves the old version or the new
one, and the next command removes or takes up what is left.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import time

from .place import (
    Lock,
    Place,
    Refused,
    is_hash,
    is_name,
    is_version,
    load_json,
    names,
    parse,
    read_bytes,
    remove,
    sequence,
    sha256_of,
    store,
    sync,
    to_json,
    write_all,
)  # fmt: skip

TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

__all__ = ["MAX_TRIES", "Desk", "Wire", "main", "remove_tree"]

MAX_TRIES = 3
#: a host that was cut off does not say so; one that lives says something every 5 s, at least while
#: others would have to wait for it
_IDLE_S, _PATIENT_S = 20.0, 600.0
_MAX_CHUNK = 1 << 20
_SPARE = 1 << 20  # of disk, for what is not the bundle
_SLOWEST = 1e6  # bytes a second that an old card writes


class _Gone(Exception):  # noqa: N818
    """The host has ended, or nothing was heard of it for too long."""


class Wire:
    """What the host says, on a stream that may end or fall silent."""

    def __init__(self, handle: int = 0) -> None:
        self._handle, self._pending = handle, bytearray()
        self._heard, self.idle_s = time.monotonic(), _PATIENT_S
        self.on_heard: Callable[[], None] = lambda: None

    def line(self) -> bytes:
        """The next line that is not empty: empty ones say that the host lives."""
        while True:
            while b"\n" not in self._pending:
                self._pending += self._read(1 << 16)
            end = self._pending.index(b"\n")
            found = bytes(self._pending[:end])
            del self._pending[: end + 1]
            if found.strip():
                return found

    def into(self, view: memoryview) -> None:
        """Fill it with the bytes that come next."""
        have = min(len(view), len(self._pending))
        view[:have] = self._pending[:have]
        del self._pending[:have]
        view = view[have:]
        while view:
            self._wait(self.idle_s)
            count = os.readv(self._handle, [view])
            if not count:
                raise _Gone
            view = view[count:]

    def alive(self, others: List[int], wait_s: float) -> List[int]:
        """Wait a while for any of these, and for the host; those that have something to say."""
        ready = self._ready([self._handle, *others], wait_s)
        if self._handle in ready:
            self._pending += self._read(1 << 16)
        elif time.monotonic() - self._heard > self.idle_s:
            raise _Gone
        return [one for one in ready if one != self._handle]

    def _read(self, most: int) -> bytes:
        self._wait(self.idle_s)
        data = os.read(self._handle, most)
        if not data:
            raise _Gone
        return data

    def _wait(self, wait_s: float) -> None:
        if not self._ready([self._handle], wait_s):
            raise _Gone

    def _ready(self, handles: List[int], wait_s: float) -> List[int]:
        ready = select.select(handles, [], [], wait_s)[0]
        if self._handle in ready:
            self._heard = time.monotonic()
            self.on_heard()
        return ready


class Desk:
    """Answers requests about one name, one after the other; what changes it is done under its
    lock, which is kept from then on."""

    verbs: Tuple[str, ...] = (
        "hello", "bring", "status", "begin", "have", "take", "commit", "rollback", "gc",
    )  # fmt: skip

    def __init__(self, place: Place, owner: str, wire: Wire) -> None:
        self.place, self._owner, self._wire = place, owner, wire
        self._lock: Optional[Lock] = None
        self._part = ""  # of the bundle that is coming
        self._size = 0
        self._empty = True  # a part that was not begun before
        self._known: Dict[str, Tuple[str, int, int]] = {}
        self._got: Dict[int, Tuple[str, int]] = {}

    def answer(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """The answer to a request: `do`, and what that takes."""
        verb = request.pop("do", None)
        if verb not in self.verbs:
            raise Refused(f"no request {verb!r}", 2)
        found: Dict[str, Any] = getattr(self, verb)(**request)
        return found

    def hello(self, *, runtime: str) -> Dict[str, Any]:
        """What the host wants to know before it sends anything."""
        try:
            model = read_bytes("/sys/firmware/devicetree/base/model").rstrip(b"\0").decode()
        except (OSError, ValueError):
            model = ""
        return {
            "root": self.place.root, "machine": os.uname().machine, "model": model or None,
            "python": list(sys.version_info[:3]),
            "runtime": os.path.isdir(f"{self.place.root}/.device/{runtime}"),
        }  # fmt: skip

    def bring(self, *, runtime: str, files: List[List[Any]]) -> Dict[str, Any]:
        """Take the runtime's files ([path, size], their bytes follow) into a folder of its own."""
        taken = []
        for path, size in files:
            data = memoryview(bytearray(size))
            self._wire.into(data)
            taken.append((path, data))
        if not is_name(runtime) or not all(_plain(path) for path, _ in taken):
            raise Refused("a file of the runtime has a wrong name", 2)
        folder = f"{self.place.root}/.device"
        new = f"{folder}/.new-{runtime}-{os.getpid()}"
        try:
            for path, data in taken:
                os.makedirs(os.path.dirname(f"{new}/{path}"), exist_ok=True)
                with open(f"{new}/{path}", "wb") as out:
                    out.write(data)
            os.sync()
            if not os.path.isdir(f"{folder}/{runtime}"):  # by another, meanwhile
                os.replace(new, f"{folder}/{runtime}")
                sync(folder)
        finally:
            remove_tree(new)
        return {}

    def status(self) -> Dict[str, Any]:
        """What is installed under the name."""
        active, previous = self.place.state()
        return {
            "name": self.place.name, "active": active, "previous": previous,
            "versions": self.place.installed(), "unfinished": load_json(self.place.journal) or None,
            "failed_trials": load_json(self.place.tries),
        }  # fmt: skip

    def begin(
        self, *, file: str, sha256: str, size: int, allow_older: bool = False
    ) -> Dict[str, Any]:
        """Whether this bundle may come; finishes or undoes what was left.

        {"state": "active" | "installed" | "wanted", "fresh"}: nothing to send, or chunks; of a
        fresh one the device has none.
        """
        place = self.place
        if not is_version(file) or not is_hash(sha256) or size <= 0:
            raise Refused(f"{file[:80]!r} is no name of a version", 2)
        active, _ = place.state()
        tries = load_json(place.tries).get(sha256, {})
        if tries.get("count", 0) >= MAX_TRIES:
            raise Refused(
                f"this bundle failed its trial here {tries['count']} times (last: "
                f"{tries.get('why')}); deploy another, or forget its trials with edgekit gc"
            )
        if active and not allow_older and sequence(file) < sequence(active):
            raise Refused(
                f"it has sequence {sequence(file)}, {sequence(active)} is active; go back with "
                "edgekit rollback, or deploy it with --allow-older", 2,
            )  # fmt: skip
        self._change()
        place.clear(sha256)
        if self._same(file, sha256):
            place.clear(None)
            return {"state": "active" if file == active else "installed"}
        self._part, self._size, self._got = f"{place.incoming}/{sha256}.part", size, {}
        self._empty = not os.path.exists(self._part)
        self._room()
        handle = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(handle).st_size != size:
                os.ftruncate(handle, size)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, size)
        finally:
            os.close(handle)
        self._note("receiving", file, sha256)
        self._known = self._chunks_here()
        return {"state": "wanted", "fresh": self._empty and not self._known}

    def have(self, *, chunks: List[List[Any]]) -> Dict[str, Any]:
        """Which of these ([sha256, offset, size]) are neither in the part nor in a version that is
        installed here; those of a version are copied."""
        wanted = []
        with open(self._part, "r+b", 0) as part:
            for number, (sha, offset, size) in enumerate(chunks):
                self._wire.alive([], 0)
                if not self._empty and _chunk(self._part, offset, size, sha) is not None:
                    self._got[offset] = (sha, size)
                    continue
                data = _chunk(*self._known.get(sha, ("", 0, 0)), sha)
                if data is None or len(data) != size:
                    wanted.append(number)
                else:
                    part.seek(offset)
                    write_all(part.fileno(), data)
                    self._got[offset] = (sha, size)
        return {"missing": wanted}

    def take(self, *, chunks: List[List[Any]]) -> Dict[str, Any]:
        """Chunks ([sha256, offset, size]) whose bytes follow; hashed as they come, and written
        where they belong."""
        failure: Optional[Exception] = None
        buffer = memoryview(bytearray(max((size for _, _, size in chunks), default=0)))
        handle = os.open(self._part, os.O_WRONLY) if self._part else -1
        try:
            for sha, offset, size in chunks:
                data = buffer[:size]
                self._wire.into(data)  # also after a failure: or they would be taken for requests
                try:
                    if failure is None:
                        self._write(handle, data, sha, offset)
                except (OSError, Refused) as error:
                    failure = error
        finally:
            if handle >= 0:
                os.close(handle)
        if failure is not None:
            raise failure
        return {}

    def commit(
        self, *, file: str, sha256: str, trial: List[str], limit_s: float = 300.0
    ) -> Dict[str, Any]:
        """Try what came, or is there, keep it and activate it."""
        place = self.place
        active, _ = place.state()
        here = f"{place.versions}/{file}"
        if self._lock is None or not is_version(file):
            raise Refused("it was not begun", 2)
        if self._part:
            self._whole()
            self._lock.heard(self._size / _SLOWEST)
            sync(self._part)
        self._note("trial", file, sha256)
        command = [one.replace("{bundle}", self._part or here) for one in trial]
        if active:
            command += ["--active", f"{place.versions}/{active}"]
        verdict = _try(command, limit_s, self._wire)
        if not verdict.get("ok"):
            self._failed(sha256, str(verdict.get("why")), bundles=verdict.get("code") != 3)
        if self._part:
            self._note("keeping", file, sha256)
            place.keep(self._part, file)
            chunks = [[sha, offset, size] for offset, (sha, size) in sorted(self._got.items())]
            store(f"{place.index}/{file}.json", {"sha256": sha256, "chunks": chunks})
        self._note("switching", file, sha256)
        place.activate(file)
        tries = load_json(place.tries)
        if tries.pop(sha256, None) is not None:
            store(place.tries, tries)
        place.done()
        self._part = ""
        return {"active": file, "previous": place.state()[1], "trial": verdict}

    def rollback(self) -> Dict[str, Any]:
        """Back to the version before."""
        active, previous = self.place.state()
        if previous is None:
            raise Refused("there is no version before to go back to", 2)
        self._change()
        self.place.clear(None)
        self.place.switch(previous, None)
        return {"active": previous, "left": active}

    def gc(self, *, runtime: str = "") -> Dict[str, Any]:
        """Remove versions that are neither active nor the one before, parts, failed trials, and
        other runtimes than the one named."""
        keep, freed = set(self.place.state()), 0
        if not any(keep):
            raise Refused("no version is active here; deploy one first, nothing is removed", 2)
        self._change()
        self.place.clear(None)
        for file in self.place.installed():
            if file not in keep:
                freed += os.stat(f"{self.place.versions}/{file}").st_size
                remove(f"{self.place.versions}/{file}")
                remove(f"{self.place.index}/{file}.json")
        remove(self.place.tries)
        for other in names(f"{self.place.root}/.device"):
            if runtime and other != runtime:
                remove_tree(f"{self.place.root}/.device/{other}")
        return {"freed_bytes": freed, "versions": self.place.installed()}

    def close(self) -> None:
        """The host has ended."""

    def _change(self) -> None:
        if self._lock is None:
            self.place.make()
            self._lock = Lock(self.place, self._owner)
            self._wire.on_heard, self._wire.idle_s = self._lock.heard, _IDLE_S

    def _write(self, handle: int, data: memoryview, sha: str, offset: int) -> None:
        size = len(data)
        if handle < 0 or size > _MAX_CHUNK or offset < 0 or offset + size > self._size:
            raise Refused("a chunk is larger than the bundle it is of", 2)
        if sha256_of(data).hexdigest() != sha:
            raise Refused("a chunk was damaged on the way; deploy it again")
        os.lseek(handle, offset, os.SEEK_SET)
        write_all(handle, data)
        self._got[offset] = (sha, size)

    def _whole(self) -> None:
        """Every byte was hashed, by this process."""
        at = 0
        for offset, (_, size) in sorted(self._got.items()):
            if offset != at:
                break
            at += size
        if at != self._size:
            raise Refused("the bundle did not arrive whole; deploy it again")

    def _failed(self, sha256: str, why: str, *, bundles: bool) -> None:
        """`bundles`: it is the bundle's fault, not that of what is installed here."""
        tries = load_json(self.place.tries)
        count = int(tries.get(sha256, {}).get("count", 0)) + 1
        if bundles:
            store(self.place.tries, {**tries, sha256: {"count": count, "why": why[:200]}})
        if self._part:
            remove(self._part)
            self._part = ""
        self.place.done()
        if not bundles:
            raise Refused(f"it cannot be tried: {why}; nothing changed")
        raise Refused(f"it failed its trial ({count} of {MAX_TRIES}): {why}; nothing changed")

    def _note(self, step: str, file: str, sha256: str) -> None:
        facts = {"step": step, "file": file, "sha256": sha256}
        store(self.place.journal, facts, durable=False)

    def _same(self, file: str, sha256: str) -> bool:
        digest, buffer = sha256_of(), memoryview(bytearray(1 << 20))
        try:
            with open(f"{self.place.versions}/{file}", "rb", 0) as there:
                while count := there.readinto(buffer):
                    digest.update(buffer[:count])
                    self._wire.alive([], 0)
        except FileNotFoundError:
            return False
        return bool(digest.hexdigest() == sha256)

    def _room(self) -> None:
        there = 0 if self._empty else os.stat(self._part).st_blocks * 512
        disk = os.statvfs(self.place.folder)
        free, wanted = disk.f_bavail * disk.f_frsize, self._size - there + _SPARE
        if wanted > free:
            raise Refused(
                f"no room for it beside the version that is active: it needs {wanted / 1e6:.1f} "
                f"MB, {free / 1e6:.1f} MB are free; edgekit gc removes older versions"
            )

    def _chunks_here(self) -> Dict[str, Tuple[str, int, int]]:
        """Where a chunk is to be had, of any bundle under the root."""
        found = {}
        for name in filter(is_name, names(self.place.root)):
            folder = f"{self.place.root}/{name}"
            for index in names(f"{folder}/index"):
                file = f"{folder}/versions/{index[: -len('.json')]}"
                try:
                    for sha, offset, size in load_json(f"{folder}/index/{index}").get("chunks", []):
                        found[sha] = (file, int(offset), int(size))
                except (ValueError, TypeError):
                    continue
        return found


def _plain(path: str) -> bool:
    return all(is_name(part) for part in path.split("/"))


def remove_tree(folder: str) -> None:
    if os.path.exists(folder):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def _chunk(path: str, offset: int, size: int, sha: str) -> Optional[bytes]:
    """The bytes there, if they are those with this hash."""
    if not path or not 0 < size <= _MAX_CHUNK:
        return None
    try:
        with open(path, "rb", 0) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError:
        return None
    return data if sha256_of(data).hexdigest() == sha else None


def _try(command: List[str], timeout_s: float, wire: Wire) -> Dict[str, Any]:
    """The verdict of a trial: what the child printed, or how it ended.

    Raises:
        _Gone: the host has ended meanwhile; so has the trial.
    """
    said, words = os.pipe(), os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    try:
        child = os.posix_spawnp(
            command[0], command, os.environ, setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, said[1], 1),
                (os.POSIX_SPAWN_DUP2, words[1], 2),
            ],
        )  # fmt: skip
    except OSError as error:
        for one in (said[0], words[0]):
            os.close(one)
        return {"ok": False, "why": f"{command[0]}: {error.strerror}"}
    finally:
        for one in (null, said[1], words[1]):
            os.close(one)
    heard = {said[0]: b"", words[0]: b""}
    try:
        code = _outcome(child, heard, time.monotonic() + timeout_s, wire)
    finally:
        for one in heard:
            os.close(one)
    if code is None:
        return {"ok": False, "why": f"it did not end within {timeout_s:.0f} s"}
    return _verdict(code, heard[said[0]], heard[words[0]])


def _outcome(child: int, heard: Dict[int, bytes], late: float, wire: Wire) -> Optional[int]:
    """The child's exit code, negative for a signal, None if it did not end in time; what it says
    is added to `heard`."""
    streams, ended, status = set(heard), 0, 0
    try:
        while not ended and time.monotonic() < late:
            ready = wire.alive(list(streams), 0.2 if streams else 0.01)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:  # all it said is there; what it started may say more
                ready = select.select(list(streams), [], [], 0)[0]
            for one in ready:
                data = os.read(one, 1 << 16)
                heard[one] = (heard[one] + data)[-(1 << 16) :]
                if not data:
                    streams.discard(one)
    finally:
        _end(child, reap=not ended)
    if not ended:
        return None
    return -(status & 127) if status & 127 else status >> 8


def _end(child: int, *, reap: bool) -> None:
    """The child and all it started."""
    try:
        os.killpg(child, 9)
    except OSError:
        pass
    if reap:
        os.waitpid(child, 0)


def _verdict(code: int, said: bytes, words: bytes) -> Dict[str, Any]:
    lines = words.decode(errors="replace").strip().splitlines()
    last = lines[-1].split(": ", 1)[-1][:300] if lines else "it said nothing"
    if code < 0:
        return {"ok": False, "why": f"the engine crashed with signal {-code} ({last})"}
    try:
        found = parse(said.decode().strip().rpartition("\n")[2])
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"ok": False, "why": last, "code": code}


def _reason(error: Exception) -> Tuple[str, int]:
    if isinstance(error, Refused):
        return str(error), error.code
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk there is full; edgekit gc removes older versions", 4
        if error.errno == errno.EROFS:
            return "the disk there is read-only", 4
        return f"{error.filename or 'the disk there'}: {error.strerror or error}", 4
    return f"{type(error).__name__}: {error}", 4


def _reply(desk: Desk, line: bytes) -> Dict[str, Any]:
    try:
        return {"ok": True, **desk.answer(parse(line.decode()))}
    except _Gone:
        raise
    except Exception as error:
        text, code = _reason(error)
        return {"ok": False, "why": " ".join(text.split()), "code": code}


def _root(given: str) -> str:
    chosen = given or os.environ.get("EDGEKIT_ROOT") or "~/.local/share/edgekit"
    return os.path.abspath(os.path.expanduser(chosen))


def main(arguments: List[str], make: Callable[[Place, str, Wire], Desk] = Desk) -> int:
    """Answer for ROOT (empty: the usual one), NAME and OWNER until the host ends."""
    root, name, owner = arguments
    wire, desk, failure = Wire(), None, None
    try:
        desk = make(Place(_root(root), name), owner, wire)
    except Refused as error:
        failure = {"ok": False, "why": str(error), "code": error.code}
    try:
        while True:
            line = wire.line()
            answer = _reply(desk, line) if desk else failure
            write_all(1, to_json(answer).encode() + b"\n")
    except (_Gone, BrokenPipeError):
        return 0
    finally:
        if desk:
            desk.close()
