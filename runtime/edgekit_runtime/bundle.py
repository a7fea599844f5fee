"""Reads bundles: a canonical ZIP whose every byte is accounted for before an engine sees any.

A bundle is the ZIP that `zipfile` writes for entries with fixed dates and no extras, stored but for
what the manifest says is deflated, `manifest.json` first. The reader rebuilds the archive's headers
from the directory and compares them with the file, so there is exactly one byte sequence per
content: no gap to hide data in, no two readings of one archive, and a flipped byte anywhere is
found. Of what is deflated both are hashed: the bytes in the archive, and what comes out of them.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import struct
import sys
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type, Union

from .errors import BundleError, one_line
from .manifest import FileEntry, Manifest

__all__ = [
    "MANIFEST",
    "MAX_BUNDLE_BYTES",
    "MAX_INFLATION",
    "Bundle",
    "archive_entry",
    "is_bundle",
    "safe_path",
]

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_BUNDLE_BYTES = (4 << 30) - (1 << 20)  # ZIP without the 64-bit extension
#: how many times larger than in the archive a deflated file may be (DEFLATE could do 1032)
MAX_INFLATION = 64
MAX_ENTRIES = 4096
_MAX_PATH = 255

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_DEFLATED = 8
_CHUNK = 1 << 20
_DOS_DATE = 0x21  # 1980-01-01, the zero of DOS dates
_MODE = 0o100644 << 16  # a plain file, rw-r--r--
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-")


def safe_path(path: str) -> bool:
    """Whether a path inside a bundle is relative, plain ASCII, without `..` or hidden parts."""
    parts = path.split("/")
    return len(path) <= _MAX_PATH and all(
        part and part[0] != "." and _LETTERS.issuperset(part) for part in parts
    )


def archive_entry(path: str, size_bytes: int, *, deflated: bool = False) -> Any:
    """The canonical directory entry for a file: what a writer gives to `zipfile`."""
    import zipfile

    entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = _MODE
    entry.file_size = size_bytes
    if deflated:
        entry.compress_type = zipfile.ZIP_DEFLATED
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
            head = opened.read(64)
    except (OSError, ValueError):
        return False
    # Other archives are models of frameworks; a bundle's first entry is its manifest.
    return head.startswith(b"PK\x03\x04") and head[30:].startswith(MANIFEST.encode())


class _Entry(NamedTuple):
    """A file in the archive's directory."""

    path: str
    method: int
    stored: int
    size: int
    crc32: int
    offset: int


def _entries(directory: bytes, count: int) -> List[_Entry]:
    """What a directory lists; what no bundle has is refused with the reason."""
    found = []
    position = 0
    for _ in range(count):
        head = directory[position : position + _CENTRAL.size]
        if len(head) < _CENTRAL.size or head[:4] != b"PK\x01\x02":
            raise BundleError("not a bundle: the archive's directory is damaged")
        fields = _CENTRAL.unpack(head)
        method, crc, stored, size, length, extra = *fields[6:7], *fields[9:14]
        raw = directory[position + _CENTRAL.size : position + _CENTRAL.size + length]
        position += _CENTRAL.size + length
        name = raw.decode("ascii", "replace")
        if len(raw) < length or not safe_path(name):
            raise BundleError(f"refused the path {name[:80]!r}: not a plain relative path")
        if (fields[-2] >> 16) & 0o170000 == 0o120000:
            raise BundleError(f"{name} is a link; only plain files are allowed")
        if extra:
            raise BundleError(f"the archive is not canonical at {name!r}")
        found.append(_Entry(name, method, stored, size, crc, fields[-1]))
    return found


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

    def read(self, path: str, *, verify: bool = True) -> bytes:
        """The bytes of one file, compared with the manifest's hash unless told otherwise.

        Raises:
            BundleError: the file is not in the manifest, or its hash differs.
        """
        entry = next((e for e in self.manifest.files if e.path == path), None)
        if entry is None:
            raise BundleError(f"{self.path}: no file {path!r} in this bundle")
        data = b"".join(self._content(entry, entry.size_bytes))
        if verify:
            digest = self._sha256()
            digest.update(data)
            self._compare(entry, digest.hexdigest(), entry.sha256)
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
                self._compare(entry, self._stream_hash(entry), entry.sha256)
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

    def _compare(self, entry: FileEntry, found: str, wanted: str) -> None:
        if found != wanted:
            raise BundleError(
                f"{self.path}: {entry.path} is damaged: SHA-256 {found[:12]}..., "
                f"the manifest says {wanted[:12]}...; copy the bundle again"
            )

    def _read_directory(self) -> Dict[str, _Entry]:
        """The archive's directory, after comparing every header byte with the canonical one."""
        size = self._file.seek(0, 2)
        if size == 0:
            raise BundleError("the file is empty")
        if size > MAX_BUNDLE_BYTES:
            raise BundleError(f"{size} bytes, at most {MAX_BUNDLE_BYTES} are allowed")
        self._file.seek(max(0, size - _END.size))
        end = self._file.read(_END.size)
        if len(end) < _END.size or end[:4] != b"PK\x05\x06":
            raise BundleError("not a bundle: no canonical archive ends here; it may be cut off")
        _, _, _, _, count, length, start, _ = _END.unpack(end)
        if start + length + _END.size != size:
            raise BundleError("not a bundle: the archive is damaged or not canonical")
        if count > MAX_ENTRIES:
            raise BundleError(f"{count} files, at most {MAX_ENTRIES} are allowed")
        if length > count * (_CENTRAL.size + _MAX_PATH):
            raise BundleError("the archive's directory is damaged or not canonical")
        self._file.seek(start)
        entries = _entries(self._file.read(length), count)
        names = [entry.path for entry in entries]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise BundleError(f"the file {twice!r} is in the archive twice")
        self._compare_headers(entries, start, size)
        return {entry.path: entry for entry in entries}

    def _compare_headers(self, entries: List[_Entry], start: int, size: int) -> None:
        offset, directory = 0, b""
        for entry in entries:
            name = entry.path.encode("ascii")
            sizes = (entry.stored, entry.size)
            times = (0, entry.method, 0, _DOS_DATE, entry.crc32, *sizes, len(name), 0)
            local = _LOCAL.pack(b"PK\x03\x04", 20, *times) + name
            self._file.seek(offset)
            if entry.offset != offset or self._file.read(len(local)) != local:
                raise BundleError(f"the archive is damaged or not canonical at {entry.path!r}")
            directory += _CENTRAL.pack(
                b"PK\x01\x02", 20, 3, 20, 0, *times, 0, 0, 0, _MODE, offset
            ) + name  # fmt: skip
            offset += len(local) + entry.stored
            if offset > start:
                raise BundleError(f"{entry.path} is said to be larger than the whole bundle")
        count = len(entries)
        end = _END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), offset, 0)
        self._file.seek(start)
        if offset != start or self._file.read(size) != directory + end:
            raise BundleError("the archive's directory is damaged or not canonical")

    def _read_manifest(self) -> bytes:
        entry = self._entries.get(MANIFEST)
        if entry is None:
            raise BundleError(f"no {MANIFEST}: not an EdgeKit bundle")
        if entry.stored > MAX_MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST} has {entry.stored} bytes, at most 4 MiB are allowed")
        data = b"".join(self._raw(MANIFEST))
        if zlib.crc32(data) != entry.crc32:
            raise BundleError(f"{MANIFEST} is damaged: its checksum differs")
        return data

    def _check_listing(self) -> None:
        declared = {e.path: e for e in self.manifest.files}
        if len(declared) != len(self.manifest.files):
            raise BundleError("the manifest lists a file twice")
        for path, one in self._entries.items():
            packed = declared[path].deflated if path in declared else None
            wanted = (_DEFLATED, packed.size_bytes) if packed else (0, one.size)
            if (one.method, one.stored) != wanted:
                raise BundleError(f"{path} is compressed other than the manifest says")
            if one.size > MAX_INFLATION * one.stored:
                raise BundleError(f"{path} would be over {MAX_INFLATION} times larger, inflated")
        found = set(self._entries) - {MANIFEST}
        if found != set(declared):
            odd = sorted(found ^ set(declared))[0]
            which = "in the archive but not in the manifest" if odd in found else "missing"
            raise BundleError(f"the file {odd[:80]!r} is {which}")
        if list(self._entries) != [MANIFEST, *declared]:
            raise BundleError(f"the files are not in the order of {MANIFEST}, itself first")
        for path, entry in declared.items():
            size = self._entries[path].size
            if size != entry.size_bytes:
                raise BundleError(f"{path} has {size} bytes, the manifest says {entry.size_bytes}")
            if entry.crc32 != self._entries[path].crc32:  # of the archive; hashing is `verify`'s
                raise BundleError(f"{path} has another CRC-32 in the archive than in the manifest")

    def _raw(self, path: str, most: int = _CHUNK) -> Iterator[bytes]:
        """What lies in the archive, in pieces."""
        left = self._entries[path].stored
        self._file.seek(self._entries[path].offset + _LOCAL.size + len(path))
        while left:
            chunk = self._file.read(min(left, most))
            if not chunk:
                raise BundleError(f"{self.path}: the file ends inside {path}")
            yield chunk
            left -= len(chunk)

    def _content(self, entry: FileEntry, most: int = _CHUNK) -> Iterator[bytes]:
        """What is in a file, in pieces (of `most` if stored); inflated, little over what is
        declared at most."""
        if entry.deflated is None:
            yield from self._raw(entry.path, most)
            return
        digest, inflater, left = self._sha256(), zlib.decompressobj(-15), entry.size_bytes
        try:
            for chunk in itertools.chain(self._raw(entry.path), (b"",)):
                digest.update(chunk)
                rest: Optional[bytes] = chunk
                while rest is not None and left >= 0:
                    piece = inflater.decompress(rest, _CHUNK)
                    rest, left = inflater.unconsumed_tail or None, left - len(piece)
                    yield piece
        except zlib.error:
            left = -1
        if left or not inflater.eof or inflater.unused_data:
            raise BundleError(f"{self.path}: {entry.path} is damaged: it inflates to other sizes")
        self._compare(entry, digest.hexdigest(), entry.deflated.sha256)

    def _stream_hash(self, entry: FileEntry) -> str:
        digest = self._sha256()
        for piece in self._content(entry):
            digest.update(piece)
        return str(digest.hexdigest())

    def _sha256(self) -> Any:
        """OpenSSL's is faster, and 4 MB of library in memory that few engines bring; for less than
        a mebibyte in all, Python's own takes milliseconds."""
        size = sum(entry.size_bytes for entry in self.manifest.files)
        if size < 1 << 20 and "_hashlib" not in sys.modules:
            for name in ("_sha2", "_sha256"):  # since Python 3.12, and before
                with contextlib.suppress(ImportError):
                    return importlib.import_module(name).sha256()
        import hashlib

        return hashlib.sha256()
