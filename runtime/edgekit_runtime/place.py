"""Where bundles are installed on a device, and how that is changed: whole, synced, one at a time.

    ROOT/NAME/versions/<sequence>-<id>.edgekit never changed once there
    ROOT/NAME/index/<the same>.json            its chunks: what a later version need not send again
    ROOT/NAME/active.json                      {"schema", "file", "previous"}, replaced as a whole
    ROOT/NAME/journal.json                     the step an installation has come to
    ROOT/NAME/incoming/<sha256>.part           a bundle on its way; its chunks are told by hash
    ROOT/NAME/tries.json                       how often a bundle failed its trial
    ROOT/NAME/.lock                            held by who changes anything, with the owner's name
    ROOT/.device/runtime-<hash>/               the runtime that tries bundles

Sent to devices with `installer`, so it imports only what is cheap to import: `json`, `re`,
`pathlib` and `subprocess` are half a second of a small board's time, seconds of an emulated one.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional, Tuple

__all__ = [
    "SCHEMA", "Lock", "Place", "Refused", "is_hash", "is_name", "is_version", "load_json",
    "names", "parse", "read_bytes", "remove", "sequence", "sha256_of", "store", "sync", "to_json",
    "write_all",
]  # fmt: skip

SCHEMA = "edgekit.active/1"
_STALE_S = 12.0  # of silence, after which another may take over; hosts speak every 5 s
_WAIT_S = 2.0  # for one who is about to end
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_DIGITS, _HEX = frozenset("0123456789"), frozenset("0123456789abcdef")


class Refused(Exception):  # noqa: N818  (what happened)
    """The device says no, in one line; `code` is the exit code of the host's command."""

    def __init__(self, text: str, code: int = 4) -> None:
        super().__init__(text)
        self.code = code


def is_name(name: str) -> bool:
    """Whether a bundle may be installed under it."""
    return 0 < len(name) <= 64 and name[0] not in ".-" and _LETTERS.issuperset(name)


def is_version(file: Any) -> bool:
    """Whether it is the name of an installed version: `<sequence>-<id>.edgekit`."""
    if not isinstance(file, str) or not file.endswith(".edgekit"):
        return False
    sequence, _, identity = file[: -len(".edgekit")].partition("-")
    return (
        0 < len(sequence) <= 20 and _DIGITS.issuperset(sequence)
        and 8 <= len(identity) <= 64 and _HEX.issuperset(identity)
    )  # fmt: skip


def is_hash(text: str) -> bool:
    """Whether it is a SHA-256 in hexadecimal digits."""
    return len(text) == 64 and _HEX.issuperset(text)


def sequence(file: str) -> int:
    return int(file.partition("-")[0])


def parse(text: str) -> Any:
    """A JSON text.

    Raises:
        ValueError: it is none.
    """
    try:
        from _json import make_scanner
    except ImportError:  # not CPython
        import json

        return json.loads(text)
    text = text.strip()
    try:
        value, end = make_scanner(_Rules())(text, 0)  # type: ignore[arg-type]
    except (StopIteration, RecursionError):
        raise ValueError("no JSON") from None
    if end != len(text):
        raise ValueError("more than one JSON value")
    return value


class _Rules:
    """What `json.JSONDecoder` gives to its scanner."""

    strict, object_hook, object_pairs_hook, parse_float, parse_int = True, None, None, float, int
    memo: Dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> float:
        """`NaN`, `Infinity` and `-Infinity`."""
        return float(name)


def to_json(value: Any) -> str:
    """JSON of None, booleans, numbers, strings, lists and dicts of them."""
    if isinstance(value, str):
        try:
            from _json import encode_basestring_ascii as quoted
        except ImportError:
            from json import dumps as quoted
        return quoted(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_json(str(k))}: {to_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return "null" if text in ("nan", "inf", "-inf") else text


def load_json(path: str) -> Dict[str, Any]:
    """A file's JSON object, empty if it is missing or damaged."""
    try:
        raw = parse(read_bytes(path).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def write_all(handle: int, data: Any) -> None:
    """All of it, however little the system takes at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def store(path: str, value: Dict[str, Any], *, durable: bool = True) -> None:
    """Replace a file as a whole, and have that on the disk before going on."""
    folder, name = os.path.split(path)
    temporary = f"{folder}/.new-{name}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        try:
            os.fchmod(handle, 0o644)  # what root installs, a service user reads
            write_all(handle, to_json(value).encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except OSError:
        remove(temporary)
        raise
    if durable:
        sync(folder)


def sync(path: str) -> None:
    """Have a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def sha256_of(data: Any = b"") -> Any:
    try:
        from _hashlib import openssl_sha256 as sha256
    except ImportError:
        from hashlib import sha256
    return sha256(data)


def names(folder: str) -> List[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


class Place:
    """The folder of one name."""

    def __init__(self, root: str, name: str) -> None:
        if not is_name(name):
            raise Refused(
                f"{name!r} is no name for an installed bundle; wanted letters, digits, '.', '_', "
                "'-'", 2,
            )  # fmt: skip
        self.name, self.root, self.folder = name, root, f"{root}/{name}"
        self.versions, self.index = f"{self.folder}/versions", f"{self.folder}/index"
        self.incoming = f"{self.folder}/incoming"
        self.active, self.journal = f"{self.folder}/active.json", f"{self.folder}/journal.json"
        self.tries = f"{self.folder}/tries.json"

    def make(self) -> None:
        """Have its folders, on the disk."""
        new = [f for f in (self.versions, self.index, self.incoming) if not os.path.isdir(f)]
        for folder in new:
            os.makedirs(folder, exist_ok=True)
        if new:
            sync(self.folder)
            sync(self.root)

    def state(self) -> Tuple[Optional[str], Optional[str]]:
        """The active version and the one before; None where there is none, or it is lost."""
        raw = load_json(self.active)
        if raw.get("schema") != SCHEMA:
            return None, None
        return self._there(raw.get("file")), self._there(raw.get("previous"))

    def _there(self, name: Any) -> Optional[str]:
        return name if is_version(name) and os.path.isfile(f"{self.versions}/{name}") else None

    def switch(self, file: str, previous: Optional[str]) -> None:
        """Activate a version that is there."""
        store(self.active, {"schema": SCHEMA, "file": file, "previous": previous})

    def activate(self, file: str) -> None:
        """Switch to a version; what was active is the one before."""
        active, previous = self.state()
        if file != active:
            self.switch(file, active or previous)

    def keep(self, part: str, file: str) -> None:
        """Rename a part that is whole and on the disk into a version."""
        os.chmod(part, 0o644)
        os.replace(part, f"{self.versions}/{file}")
        sync(self.versions)
        sync(self.incoming)

    def installed(self) -> List[str]:
        """Versions that are there, oldest sequence first."""
        found = [file for file in names(self.versions) if is_version(file)]
        return sorted(found, key=lambda n: (sequence(n), n))

    def clear(self, keep: Optional[str]) -> None:
        """Remove what a killed command left; a part of `keep` goes on where it was."""
        for folder in (self.folder, self.versions, self.index):
            for left in names(folder):
                if left.startswith(".new-"):
                    remove(f"{folder}/{left}")
        for part in names(self.incoming):
            if part != f"{keep}.part":
                remove(f"{self.incoming}/{part}")
        for index in names(self.index):
            if not os.path.exists(f"{self.versions}/{index[: -len('.json')]}"):
                remove(f"{self.index}/{index}")
        if keep is None:
            self.done()

    def done(self) -> None:
        """Nothing is under way any more."""
        if os.path.exists(self.journal):
            remove(self.journal)
            sync(self.folder)


class Lock:
    """One at a time changes a place. Who holds it is named, and one whose host has been silent for
    longer than a host that lives ever is, is ended. Without `beats` the holder is a program here,
    which needs not say that it lives.

    Raises:
        Refused: somebody else does.
    """

    def __init__(self, place: Place, owner: str, *, beats: bool = True) -> None:
        import fcntl

        self._handle = os.open(f"{place.folder}/.lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._owner, self._beats, self._written = owner, beats, -1e9
        late = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                holder = self._holder()
                if not _end_stale(holder) and time.monotonic() > late:
                    os.close(self._handle)
                    raise Refused(
                        f"{place.name!r} is being changed by {holder.get('owner') or 'another'}; "
                        "try again when that is done"
                    ) from None
                time.sleep(0.05)
        self.heard()

    def heard(self, ahead_s: float = 0.0) -> None:
        """The owner lives; `ahead_s`: and what is done next lets nothing be heard for so long."""
        now = time.monotonic()
        if now - self._written < 1 and not ahead_s:
            return
        self._written = now
        pid = os.getpid()
        facts = {
            "owner": self._owner[:120], "pid": pid, "born": _born(pid),
            "heard": now + ahead_s if self._beats else None,
        }  # fmt: skip
        try:
            os.pwrite(self._handle, to_json(facts).ljust(1000).encode(), 0)
        except OSError:
            pass  # of a disk that is full: it is locked all the same

    def _holder(self) -> Dict[str, Any]:
        try:
            found = parse(os.pread(self._handle, 1000, 0).decode())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        """Let others."""
        os.close(self._handle)


def _end_stale(holder: Dict[str, Any]) -> bool:
    heard, pid = holder.get("heard"), holder.get("pid")
    if not isinstance(heard, float) or not isinstance(pid, int) or pid <= 1:
        return False
    if time.monotonic() - heard < _STALE_S or _born(pid) != holder.get("born"):
        return False
    try:
        os.kill(pid, 9)
    except OSError:
        return False
    return True


def _born(pid: int) -> str:
    """When a process started, in ticks: what tells it from a later one of the same number."""
    try:
        return read_bytes(f"/proc/{pid}/stat").decode().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
