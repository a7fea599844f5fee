"""Results by content: the same inputs, recipe and tool versions are never computed twice.

An entry is a folder named by a hash of everything that went into it. It is made under another
name and renamed when whole, so a killed process leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgekit.errors import OutOfSpaceError, UsageError

__all__ = [
    "Cache",
    "Key",
    "check_space",
    "content_key",
    "default_root",
    "file_sha256",
    "write_atomically",
]

_DONE = "entry.json"
_STALE_S = 24 * 3600


class Key(str):
    """A hash that remembers what it was made from, for the entry to say."""

    parts: dict[str, Any]


def content_key(**parts: Any) -> Key:
    """A hash of named parts (JSON values); the order of the names does not matter."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    key = Key(hashlib.sha256(text.encode()).hexdigest())
    key.parts = parts
    return key


def file_sha256(*paths: Path) -> str:
    """SHA-256 over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def default_root() -> Path:
    """`EDGEKIT_CACHE`, or `edgekit` in the user's cache folder."""
    if named := os.environ.get("EDGEKIT_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgekit"


def write_atomically(path: Path, data: bytes) -> None:
    """Write under another name, fsync, rename: `path` is the old or the new file, whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_space(folder: Path, *, least_bytes: int) -> None:
    """Raise where a disk has less room than that.

    Raises:
        OutOfSpaceError: says which folder's disk, and what to do.
    """
    free = shutil.disk_usage(folder).free
    if free < least_bytes:
        raise OutOfSpaceError(
            f"the disk of {folder} is full ({free / 1e6:.1f} MB free); free some space, or point "
            "-o and EDGEKIT_CACHE at another disk"
        )


class Cache:
    """A folder of entries. `folder(key, make)` returns one, made first if it is not there."""

    def __init__(self, root: Path | None = None, *, limit_bytes: int = 5 << 30) -> None:
        self.root = root or default_root()
        self.limit_bytes = limit_bytes
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make the cache folder {self.root}: {error.strerror}; "
                "set EDGEKIT_CACHE to a folder you may write"
            ) from None

    def get(self, key: Key) -> Path | None:
        """The finished entry, or None. Damaged entries are removed and count as absent."""
        folder = self.root / key[:2] / key
        try:
            listed = json.loads((folder / _DONE).read_text())["files"]
            intact = all((folder / n).stat().st_size == size for n, size in listed.items())
        except (OSError, ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
            return None
        with suppress(OSError):
            os.utime(folder)  # recently used: `trim` takes the others first
        return folder

    def folder(self, key: Key, make: Callable[[Path], None]) -> Path:
        """The entry's folder; `make(empty_folder)` fills a new one. Its errors pass through."""
        found = self.get(key)
        if found is not None:
            return found
        final = self.root / key[:2] / key
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=self.root, prefix=".making-"))
        try:
            try:
                make(work)
            except Exception:
                # Libraries report a full disk in many ways: what they say is not the reason.
                check_space(self.root, least_bytes=1 << 20)
                raise
            sizes = {
                str(p.relative_to(work)): p.stat().st_size for p in work.rglob("*") if p.is_file()
            }
            entry = {"files": sizes, "made_from": key.parts}
            write_atomically(work / _DONE, json.dumps(entry).encode())
            with suppress(OSError):  # another process was first: its entry is as good
                work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return final

    def trim(self) -> None:
        """Remove the entries not used for longest until the cache is under its limit."""
        for left in self.root.glob(".making-*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE_S:
                    shutil.rmtree(left, ignore_errors=True)
        entries = []
        for folder in self.root.glob("??/*"):
            with suppress(OSError, ValueError):
                size = sum(json.loads((folder / _DONE).read_text())["files"].values())
                entries.append((folder.stat().st_mtime, size, folder))
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total <= self.limit_bytes:
                break
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
