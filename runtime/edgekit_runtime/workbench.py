"""Measures on a device for a host: an installer that also keeps files that are no bundles, and
starts, freezes and ends processes. Sent like the installer, and with it.

A process is frozen while nobody waits for it: engines' threads spin for a while after a run, which
would be measured in the next one. All end with the host, however it ends.
"""

from __future__ import annotations

import os
import time
from glob import glob
from signal import SIGCONT, SIGKILL, SIGSTOP

from .installer import Desk, Wire, remove_tree
from .installer import main as serve
from .place import (
    Place,
    Refused,
    is_name,
    is_version,
    names,
    remove,
    store,
    sync,
    write_all,
)  # fmt: skip

TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

__all__ = ["Workbench", "main"]

_KEPT_BYTES = 256 << 20  # of files, for the next time
_MOST_READ = 1 << 16


class Workbench(Desk):
    """Answers also what follows; `scratch` is its folder, gone when it ends."""

    verbs = (*Desk.verbs, "there", "keep", "lay", "read", "call", "start", "ask", "stop", "bye")

    def __init__(self, place: Place, owner: str, wire: Wire) -> None:
        super().__init__(place, owner, wire)
        self._children: Dict[str, _Child] = {}
        self._scratch = f"{place.folder}/scratch-{os.getpid()}"

    def there(self, *, files: List[List[str]]) -> Dict[str, Any]:
        """Which of these ([name, sha256]) are here, whole. Nobody else measures from now on."""
        self._change()
        for left in names(self.place.folder):
            path = f"{self.place.folder}/{left}"
            if left.startswith("scratch-") and path != self._scratch:  # of one that was killed
                remove_tree(path)
        os.makedirs(self._scratch, exist_ok=True)
        return {"scratch": self._scratch, "there": [self._same(*one) for one in files]}

    def keep(self, *, file: str, sha256: str) -> Dict[str, Any]:
        """Keep what came, after `begin` and `take`."""
        if not self._part or not is_version(file):
            raise Refused("it was not begun", 2)
        self._whole()
        sync(self._part)
        self.place.keep(self._part, file)
        chunks = [[sha, offset, size] for offset, (sha, size) in sorted(self._got.items())]
        store(f"{self.place.index}/{file}.json", {"sha256": sha256, "chunks": chunks})
        self.place.done()
        self._part = ""
        return {}

    def lay(self, *, files: List[List[str]]) -> Dict[str, Any]:
        """Have kept files ([file, folder, name]) in folders of `scratch`, under these names."""
        for file, folder, name in files:
            if not (is_version(file) and is_name(folder) and is_name(name)):
                raise Refused("a file has a wrong name", 2)
            os.makedirs(f"{self._scratch}/{folder}", exist_ok=True)
            kept, path = f"{self.place.versions}/{file}", f"{self._scratch}/{folder}/{name}"
            remove(path)
            try:
                os.link(kept, path)
            except OSError:  # a file system without
                os.symlink(kept, path)
            os.utime(kept)
        return {}

    def read(self, *, patterns: List[str]) -> Dict[str, Any]:
        """What small files hold, by path: those that can be read."""
        found = {}
        for path in (path for one in patterns for path in sorted(glob(one))):
            try:
                with open(path, "rb") as file:
                    text = file.read(_MOST_READ).decode(errors="replace")
                found[path] = text.replace("\0", "")
            except OSError:
                pass
        return {"files": found}

    def call(
        self, *, command: List[str], environment: Dict[str, str], timeout_s: float
    ) -> Dict[str, Any]:
        """Run a command to its end: `{"code", "out", "words", "wall_ns"}`."""
        os.makedirs(self._scratch, exist_ok=True)
        start = time.perf_counter_ns()
        child = self._children["call"] = _Child(command, environment, self._scratch)
        try:
            out = child.rest(self._wire, time.monotonic() + timeout_s)
            wall_ns = time.perf_counter_ns() - start
            code = None if out is None else child.code(5.0)
            return {
                "code": code, "out": (out or b"").decode(errors="replace"),
                "words": child.last_words(), "wall_ns": wall_ns,
            }  # fmt: skip
        finally:
            self.stop(id="call")

    def start(
        self, *, id: str, command: List[str], environment: Dict[str, str], timeout_s: float,  # noqa: A002
        cpus: Optional[List[int]] = None,
    ) -> Dict[str, Any]:  # fmt: skip
        """Start what answers lines: `{"line"}` is its first, `{"ended", "words"}` without."""
        self.stop(id=id)
        child = self._children[id] = _Child(command, environment, self._scratch, cpus)
        return self._heard(child, timeout_s)

    def ask(self, *, id: str, line: str, timeout_s: float) -> Dict[str, Any]:  # noqa: A002
        """Give it a line, and its answer as `start` does."""
        child = self._children.get(id)
        if child is None:
            raise Refused(f"nothing called {id[:40]!r} was started", 2)
        child.signal(SIGCONT)
        child.say(line.encode() + b"\n")
        return self._heard(child, timeout_s)

    def stop(self, *, id: str) -> Dict[str, Any]:  # noqa: A002
        """End it, if it was started."""
        child = self._children.pop(id, None)
        if child is not None:
            child.end()
        return {}

    def bye(self) -> Dict[str, Any]:
        """End all and clean up; the host waits for it, since it may end us at once."""
        self.close()
        return {"bye": True}

    def close(self) -> None:
        for one in list(self._children):
            self.stop(id=one)
        remove_tree(self._scratch)
        self._trim()

    def _heard(self, child: _Child, timeout_s: float) -> Dict[str, Any]:
        line = child.line(self._wire, time.monotonic() + timeout_s)
        if line is None:
            return {"late": True}
        if not line:
            return {"ended": child.code(5.0), "words": child.last_words()}
        child.signal(SIGSTOP)
        return {"line": line.decode(errors="replace")}

    def _trim(self) -> None:
        """Not more than a limit is kept, what was used last first; only under the lock."""
        if self._lock is None:
            return
        kept = []
        for file in self.place.installed():
            facts = os.stat(f"{self.place.versions}/{file}")
            kept.append((facts.st_mtime, facts.st_size, file))
        room = _KEPT_BYTES
        for _, size, file in sorted(kept, reverse=True):
            room -= size
            if room < 0:
                remove(f"{self.place.versions}/{file}")
                remove(f"{self.place.index}/{file}.json")


class _Child:
    """A process in a group of its own: should we be killed while it is frozen, the system ends it,
    as it does with every stopped group that is orphaned (POSIX, _Exit: Consequences).
    """

    def __init__(
        self, command: List[str], environment: Dict[str, str], folder: str,
        cpus: Optional[List[int]] = None,
    ) -> None:  # fmt: skip
        mine, self._in = os.pipe()
        self._out, theirs = os.pipe()
        self._words = os.open(f"{folder}/.words", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._pid, self._status, self._pending = 0, 0, b""
        before = os.sched_getaffinity(0) if cpus else None
        try:
            if cpus:
                os.sched_setaffinity(0, cpus)  # a child inherits them
            self._pid = os.posix_spawnp(
                command[0], command, {**os.environ, **environment}, setpgroup=0,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, mine, 0), (os.POSIX_SPAWN_DUP2, theirs, 1),
                    (os.POSIX_SPAWN_DUP2, self._words, 2),
                ],
            )  # fmt: skip
        except OSError as error:
            self.end()
            raise Refused(f"{command[0]}: {error.strerror}") from None
        finally:
            if before:
                os.sched_setaffinity(0, before)
            os.close(mine)
            os.close(theirs)

    def signal(self, number: int) -> None:
        try:
            os.killpg(self._pid, number)
        except OSError:
            pass  # it has ended: reading says how

    def say(self, data: bytes) -> None:
        try:
            write_all(self._in, data)
        except BrokenPipeError:
            pass  # as above

    def line(self, wire: Wire, late: float) -> Optional[bytes]:
        """Its next line, empty at its end, None if none comes in time."""
        while b"\n" not in self._pending:
            if time.monotonic() > late:
                return None
            if wire.alive([self._out], 0.2):
                data = os.read(self._out, 1 << 16)
                if not data:
                    return b""
                self._pending += data
        found, _, self._pending = self._pending.partition(b"\n")
        return found

    def rest(self, wire: Wire, late: float) -> Optional[bytes]:
        """All it says to its end, None if that does not come in time."""
        os.close(self._in)
        self._in = -1
        said = b""
        while (line := self.line(wire, late)) != b"":
            if line is None:
                return None
            said += line + b"\n"
        return said + self._pending

    def code(self, within_s: float) -> Optional[int]:
        """How it ended: its exit code, negative for a signal; None if it has not, by then."""
        late = time.monotonic() + within_s
        while self._pid:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = 0
                self._status = -(status & 127) if status & 127 else status >> 8
            elif time.monotonic() > late:
                return None
            else:
                time.sleep(0.01)
        return self._status

    def last_words(self) -> str:
        """The last line it wrote to stderr."""
        size = os.fstat(self._words).st_size
        text = os.pread(self._words, 4000, max(0, size - 4000)).decode(errors="replace")
        return (text.strip().splitlines() or [""])[-1][:300]

    def end(self) -> None:
        if self._pid:
            self.signal(SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        for one in (self._in, self._out, self._words):
            if one >= 0:
                os.close(one)


def main(arguments: List[str]) -> int:
    """As the installer's: answer for ROOT, NAME and OWNER until the host ends."""
    return serve(arguments, Workbench)
