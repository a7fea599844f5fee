"""Archives that somebody made to do harm, each with the word that says what is wrong with it."""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

from bundles import archive

MANIFEST = "manifest.json"
_PATHS = (
    "../x", "../../etc/passwd", "a/../../x", "/etc/passwd", "//x", "a//b", "./x", "a/./b", ".x",
    "a/.ssh/x", "a\\..\\x", "C:/x", "C:\\x", "a/", "a b", "\u00e9", "x" * 300, "a\x00b", "~/x",
    "a/..", "..", ".", "\x1b[2J", "a:b", "a*",
)  # fmt: skip


def archives(good: bytes) -> list[tuple[str, bytes]]:
    """(what, bytes): none is a bundle. `good` is a sound one, of a file a/model.onnx."""
    with zipfile.ZipFile(io.BytesIO(good)) as opened:
        files = [(one.filename, opened.read(one)) for one in opened.infolist()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")
        return [*_paths(files), *_entries(files), *_manifests(files), *_bytes(good)]


def _zipped(
    files: list[tuple[str, bytes]], change: Callable[[zipfile.ZipInfo], None] = lambda _: None,
    *, compressed: bool = False, comment: bytes = b"",
) -> bytes:  # fmt: skip
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.comment = comment
        for name, data in files:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            change(entry)
            made.writestr(entry, data)
    return out.getvalue()


def _paths(files: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """A file more, and the manifest's own, under paths that lead elsewhere."""
    return [(f"path {path[:20]!r}", _zipped([*files, (path, b"x")])) for path in _PATHS]


def _entries(files: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    def mode(value: int) -> Callable[[zipfile.ZipInfo], None]:
        def change(entry: zipfile.ZipInfo) -> None:
            if entry.filename != MANIFEST:
                entry.external_attr = value << 16

        return change

    def extra(entry: zipfile.ZipInfo) -> None:
        entry.extra = struct.pack("<HHI", 0x5455, 4, 0)

    def comment(entry: zipfile.ZipInfo) -> None:
        entry.comment = b"hello"

    def later(entry: zipfile.ZipInfo) -> None:
        entry.date_time = (2026, 1, 1, 0, 0, 0)

    bomb = [files[0], *files[1:-1], (files[-1][0], bytes(200_000_000))]
    return [
        ("a link", _zipped(files, mode(0o120777))),
        ("a device", _zipped(files, mode(0o020666))),
        ("a folder's mode", _zipped(files, mode(0o040755))),
        ("an executable", _zipped(files, mode(0o100755))),
        ("a bomb", _zipped(bomb, compressed=True)),
        ("compressed", _zipped(files, compressed=True)),
        ("an extra field", _zipped(files, extra)),
        ("an entry's comment", _zipped(files, comment)),
        ("another date", _zipped(files, later)),
        ("a comment", _zipped(files, comment=b"hello")),
        ("twice the same", archive([*files, files[-1]])),
        ("two manifests", archive([files[0], *files])),
        ("manifest last", archive([*files[1:], files[0]])),
        ("no manifest", archive(files[1:])),
        ("a file more", archive([*files, ("more.bin", b"x")])),
        ("a file less", archive(files[:-1])),
        ("files exchanged", archive([files[0], files[2], files[1], *files[3:]])),
        ("many files", archive([files[0], *((f"f{n}", b"") for n in range(5000))])),
        ("a file grown", archive([*files[:-1], (files[-1][0], files[-1][1] + b"x")])),
        ("a file shrunk", archive([*files[:-1], (files[-1][0], files[-1][1][:-1])])),
    ]  # fmt: skip


def _manifests(files: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    def changed(what: str, change: Callable[[dict[str, Any]], object]) -> tuple[str, bytes]:
        raw = json.loads(files[0][1])
        change(raw)
        return what, archive([(MANIFEST, json.dumps(raw).encode()), *files[1:]])

    return [
        changed("another schema", lambda m: m.update(schema="edgekit.bundle/9")),
        changed("a wrong size", lambda m: m["files"][0].update(size_bytes=1)),
        changed("a huge size", lambda m: m["files"][0].update(size_bytes=1 << 62)),
        changed("a negative size", lambda m: m["files"][0].update(size_bytes=-1)),
        changed("a wrong hash", lambda m: m["files"][0].update(sha256="0" * 64)),
        changed("a path that leads out", lambda m: m["files"][0].update(path="../x")),
        changed("listed twice", lambda m: m["files"].append(m["files"][0])),
        changed("no variants", lambda m: m.update(variants=[])),
        changed("a list for a name", lambda m: m.update(name=[1])),
        changed("a sequence that is none", lambda m: m.update(sequence="1; rm -rf /")),
        ("no JSON", archive([(MANIFEST, b"{"), *files[1:]])),
        ("deep JSON", archive([(MANIFEST, b"[" * 100_000), *files[1:]])),
    ]


def _bytes(good: bytes) -> list[tuple[str, bytes]]:
    return [
        ("empty", b""),
        ("an empty archive", b"PK\x05\x06" + bytes(18)),
        ("cut off", good[:-1]),
        ("cut in half", good[: len(good) // 2]),
        ("a byte more", good + b"x"),
        ("a byte before", b"x" + good),
        ("two archives", good + good),
        ("noise", bytes(range(256)) * 100),
    ]
