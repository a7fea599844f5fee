"""Reads bundles: a canonical ZIP whose every byte is accounted for before an engine sees any.

A bundle is the ZIP that `zipfile` writes for stored entries with fixed dates and no extras,
`manifest.json` first. The reader rebuilds the archive's headers from the directory and compares
them with the file, so there is exactly one byte sequence per content: no gap to hide data in, no
two readings of one archive, and a flipped byte anywhere is found.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Dict, List, Optional, Tuple, Type, Union

from .errors import BundleError, one_line
from .manifest import FileEntry, Manifest

__all__ = ["MANIFEST", "MAX_BUNDLE_BYTES", "Bundle", "archive_entry", "is_bundle", "safe_path"]

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_BUNDLE_BYTES = (4 << 30) - (1 << 20)  # ZIP without the 64-bit extension
MAX_ENTRIES = 4096

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_DOS_DATE = 0x21  # 1980-01-01, the zero of DOS dates
_MODE = 0o100644 << 16  # a plain file, rw-r--r--
_PATH = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*(/[A-Za-z0-9_+-][A-Za-z0-9._+-]*)*")


def safe_path(path: str) -> bool:
    """Whether a path inside a bundle is relative, plain ASCII, without `..` or hidden parts."""
    return len(path) <= 255 and _PATH.fullmatch(path) is not None


def archive_entry(path: str, size_bytes: int) -> zipfile.ZipInfo:
    """The canonical directory entry for a stored file."""
    entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = _MODE
    entry.file_size = size_bytes
    return entry


def is_bundle(path: Union[str, Path]) -> bool:
    """Whether the file is named or begins like a bundle; says nothing about its health."""
    file = Path(path)
    if file.suffix == ".edgekit":
        return True
    try:
        if not file.is_file():
            return False
        with file.open("rb") as opened:
            return opened.read(4) == b"PK\x03\x04"
    except (OSError, ValueError):
        return False


class Bundle:
    """An open bundle. `manifest` is checked on opening; `read` gives verified bytes.

    Raises:
        BundleError: not a bundle, damaged, hostile, or of another schema version.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)
        try:
            if self.path.exists() and not self.path.is_file():  # a pipe would block open()
                raise BundleError(f"cannot open {self.path}: not a file")
            # Held open to the end: what was verified is what is read, whatever happens to the path.
            self._file: BinaryIO = self.path.open("rb")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise BundleError(f"cannot open {str(self.path)!r}: {reason}") from None
        try:
            self._entries = self._read_directory()
            self.manifest = Manifest.from_json(self._read_manifest())
            self._check_listing()
        except BundleError as error:
            self._file.close()
            raise BundleError(f"{self.path}: {one_line(error)}") from None
        except BaseException:
            self._file.close()
            raise

    def read(self, path: str) -> bytes:
        """The bytes of one file, compared with the manifest's hash.

        Raises:
            BundleError: the file is not in the manifest, or its hash differs.
        """
        entry = next((e for e in self.manifest.files if e.path == path), None)
        if entry is None:
            raise BundleError(f"{self.path}: no file {path!r} in this bundle")
        data = self._stored(path, entry.size_bytes)
        self._compare(entry, hashlib.sha256(data).hexdigest(), zlib.crc32(data))
        return data

    def verify(self, keep: Tuple[str, ...] = ()) -> Dict[str, bytes]:
        """Hash every file once; return the bytes of those named in `keep`.

        Raises:
            BundleError: a file's hash differs from the manifest's.
        """
        kept = {}
        for entry in self.manifest.files:
            if entry.path in keep:
                kept[entry.path] = self.read(entry.path)
            else:
                self._compare(entry, *self._stream_hash(entry))
        return kept

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def _compare(self, entry: FileEntry, found: str, crc: int) -> None:
        if found != entry.sha256:
            raise BundleError(
                f"{self.path}: {entry.path} is damaged: SHA-256 {found[:12]}..., "
                f"the manifest says {entry.sha256[:12]}...; copy the bundle again"
            )
        if crc != self._entries[entry.path].CRC:
            raise BundleError(
                f"{self.path}: {entry.path} has a wrong CRC-32: copy the bundle again"
            )

    def _read_directory(self) -> Dict[str, zipfile.ZipInfo]:
        """The archive's directory, after comparing every header byte with the canonical one."""
        size = self._file.seek(0, 2)
        if size == 0:
            raise BundleError("the file is empty")
        if size > MAX_BUNDLE_BYTES:
            raise BundleError(f"{size} bytes, at most {MAX_BUNDLE_BYTES} are allowed")
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OverflowError, EOFError, struct.error, OSError,
                NotImplementedError) as error:  # fmt: skip
            raise BundleError(f"not a bundle: {one_line(error)}") from None
        if len(entries) > MAX_ENTRIES:
            raise BundleError(f"{len(entries)} files, at most {MAX_ENTRIES} are allowed")
        names = [e.filename for e in entries]
        for name in names:
            if not safe_path(name):
                raise BundleError(f"refused the path {name[:80]!r}: not a plain relative path")
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise BundleError(f"the file {twice!r} is in the archive twice")
        for entry in entries:
            if (entry.external_attr >> 16) & 0o170000 == 0o120000:
                raise BundleError(f"{entry.filename} is a link; only plain files are allowed")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise BundleError(f"{entry.filename} is compressed; bundles store files as is")
            if entry.file_size > size:
                raise BundleError(f"{entry.filename} is said to be larger than the whole bundle")
        self._compare_headers(entries, size)
        return {e.filename: e for e in entries}

    def _compare_headers(self, entries: List[zipfile.ZipInfo], size: int) -> None:
        offset, directory = 0, b""
        for entry in entries:
            name = entry.filename.encode("ascii")
            times = (0, 0, 0, _DOS_DATE, entry.CRC, entry.file_size, entry.file_size, len(name), 0)
            local = _LOCAL.pack(b"PK\x03\x04", 20, *times) + name
            self._file.seek(offset)
            if entry.header_offset != offset or self._file.read(len(local)) != local:
                raise BundleError(f"the archive is damaged or not canonical at {entry.filename!r}")
            directory += _CENTRAL.pack(
                b"PK\x01\x02", 20, 3, 20, 0, *times, 0, 0, 0, _MODE, offset
            ) + name  # fmt: skip
            offset += len(local) + entry.file_size
        count = len(entries)
        end = _END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), offset, 0)
        self._file.seek(min(offset, size))
        if self._file.read(len(directory) + len(end) + 1) != directory + end:
            raise BundleError("the archive's directory is damaged or not canonical")

    def _read_manifest(self) -> bytes:
        entry = self._entries.get(MANIFEST)
        if entry is None:
            raise BundleError(f"no {MANIFEST}: not an EdgeKit bundle")
        if entry.file_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST} has {entry.file_size} bytes, at most 4 MiB are allowed")
        data = self._stored(MANIFEST, entry.file_size)
        if zlib.crc32(data) != entry.CRC:
            raise BundleError(f"{MANIFEST} is damaged: its checksum differs")
        return data

    def _check_listing(self) -> None:
        declared = {e.path: e for e in self.manifest.files}
        if len(declared) != len(self.manifest.files):
            raise BundleError("the manifest lists a file twice")
        found = set(self._entries) - {MANIFEST}
        if found != set(declared):
            odd = sorted(found ^ set(declared))[0]
            which = "in the archive but not in the manifest" if odd in found else "missing"
            raise BundleError(f"the file {odd[:80]!r} is {which}")
        if list(self._entries) != [MANIFEST, *declared]:
            raise BundleError(f"the files are not in the order of {MANIFEST}, itself first")
        for path, entry in declared.items():
            size = self._entries[path].file_size
            if size != entry.size_bytes:
                raise BundleError(f"{path} has {size} bytes, the manifest says {entry.size_bytes}")

    def _seek(self, path: str) -> None:
        self._file.seek(self._entries[path].header_offset + _LOCAL.size + len(path))

    def _stored(self, path: str, size_bytes: int) -> bytes:
        self._seek(path)
        data = self._file.read(size_bytes)
        if len(data) != size_bytes:
            raise BundleError(f"{self.path}: the file ends inside {path}")
        return data

    def _stream_hash(self, entry: FileEntry) -> Tuple[str, int]:
        digest, crc, left = hashlib.sha256(), 0, entry.size_bytes
        self._seek(entry.path)
        while left:
            chunk = self._file.read(min(left, 1 << 20))
            if not chunk:
                raise BundleError(f"{self.path}: the file ends inside {entry.path}")
            digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
            left -= len(chunk)
        return digest.hexdigest(), crc
