"""The bundle reader against everything that is not a bundle byte for byte.

Whatever is wrong with a file, the answer is a BundleError of one line, never another exception.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit_runtime import BundleError
from edgekit_runtime.bundle import (
    MANIFEST,
    MAX_BUNDLE_BYTES,
    Bundle,
    archive_entry,
    is_bundle,
    safe_path,
)
from edgekit_runtime.manifest import Deflated

CONTENTS = {
    "a/in.npz": b"in" * 20,
    "a/model.onnx": bytes(range(256)),
    "a/out.npz": b"out" * 20,
}
GOOD = bundles.bundle(bundles.make_manifest(CONTENTS), CONTENTS)
TEXT = bundles.make_manifest(CONTENTS).to_json().encode()
ENTRIES = [(MANIFEST, TEXT), *CONTENTS.items()]


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """`refused(data)` checks that `data` is refused properly; returns what the error says."""

    def check(data: bytes) -> str:
        path = tmp_path / "bad.edgekit"
        path.write_bytes(data)
        return _refusal(path)

    return check


def _refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught, Bundle(path) as bundle:
        bundle.verify()
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message.replace(str(path), "PATH")


# --- good ones ------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "good.edgekit"
    path.write_bytes(GOOD)
    with Bundle(path) as bundle:
        assert bundle.manifest == bundles.make_manifest(CONTENTS)
        assert {name: bundle.read(name) for name in CONTENTS} == CONTENTS
        assert bundle.verify() == {}
        assert bundle.verify(keep=("a/model.onnx",)) == {"a/model.onnx": CONTENTS["a/model.onnx"]}
        with pytest.raises(BundleError, match="no file 'b' in this bundle"):
            bundle.read("b")
    with zipfile.ZipFile(path) as archive:  # any unzip opens it
        assert archive.testzip() is None
        assert archive.namelist() == [MANIFEST, *CONTENTS]


def test_empty_files_are_files(tmp_path: Path) -> None:
    contents = CONTENTS | {"a/model.onnx": b""}
    path = tmp_path / "good.edgekit"
    path.write_bytes(bundles.bundle(bundles.make_manifest(contents), contents))
    with Bundle(path) as bundle:
        bundle.verify()
        assert bundle.read("a/model.onnx") == b""


def test_what_was_verified_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.edgekit"
    path.write_bytes(GOOD)
    with Bundle(path) as bundle:
        bundle.verify()
        other = tmp_path / "other"
        other.write_bytes(GOOD.replace(b"outout", b"OUTOUT"))
        other.replace(path)  # somebody installs another bundle meanwhile
        assert bundle.read("a/out.npz") == CONTENTS["a/out.npz"]


def test_a_change_in_place_after_opening_is_found(tmp_path: Path) -> None:
    path = tmp_path / "good.edgekit"
    contents = CONTENTS | {"a/model.onnx": b"model" * 100_000}  # more than a read buffer holds
    good = bundles.bundle(bundles.make_manifest(contents), contents)
    path.write_bytes(good)
    with Bundle(path) as bundle:
        path.write_bytes(good.replace(b"modelmodel", b"MODELmodel"))
        for touch in (bundle.verify, lambda: bundle.read("a/model.onnx")):
            with pytest.raises(BundleError, match=r"a/model\.onnx is damaged: SHA-256"):
                touch()
        path.write_bytes(good[: len(good) // 2])
        for touch in (bundle.verify, lambda: bundle.read("a/model.onnx")):
            with pytest.raises(BundleError, match=r"the file ends inside a/model\.onnx"):
                touch()


def test_names_and_first_bytes_make_a_bundle(tmp_path: Path) -> None:
    for name, data, wanted in (
        ("a.edgekit", b"", True),
        ("b.zip", GOOD, True),
        ("c.onnx", b"\x08\x09", False),
        ("d", b"PK", False),
    ):
        (tmp_path / name).write_bytes(data)
        assert is_bundle(tmp_path / name) is wanted
    assert is_bundle(tmp_path / "missing.edgekit")
    assert not is_bundle(tmp_path / "missing.onnx")
    assert not is_bundle(tmp_path)
    assert not is_bundle("nul\0.onnx")


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF], ids=hex)
def test_every_flipped_byte_is_found(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "bad.edgekit"
    path.write_bytes(GOOD)
    accepted = []
    with path.open("r+b", buffering=0) as file:
        for offset, byte in enumerate(GOOD):
            file.seek(offset)
            file.write(bytes([byte ^ flip]))
            try:
                with Bundle(path) as bundle:
                    bundle.verify()
                accepted.append(offset)
            except BundleError as error:
                assert "\n" not in str(error)
            file.seek(offset)
            file.write(bytes([byte]))
    assert accepted == []
    with Bundle(path) as bundle:  # the loop above did restore the file
        bundle.verify()


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "bad.edgekit"
    path.write_bytes(GOOD)
    for size in reversed(range(len(GOOD))):
        os.truncate(path, size)
        with pytest.raises(BundleError), Bundle(path) as bundle:
            bundle.verify()


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 3), st.binary(max_size=8)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_any_edit_is_found(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]
) -> None:
    data = GOOD
    for offset, removed, inserted in edits:
        data = data[:offset] + inserted + data[offset + removed :]
    path = tmp_path_factory.getbasetemp() / "edited.edgekit"
    path.write_bytes(data)
    if data == GOOD:
        with Bundle(path) as bundle:
            bundle.verify()
    else:
        _refusal(path)


@pytest.mark.parametrize(
    "extra", [b"\0", b"\n", b"PK\x05\x06", b"x" * 100, b"\0" * 70_000, GOOD], ids=lambda b: len(b)
)
def test_nothing_may_stand_before_or_after(refused: Callable[..., str], extra: bytes) -> None:
    refused(GOOD + extra)
    refused(extra + GOOD)


def test_an_archive_comment_is_no_hiding_place(refused: Callable[..., str]) -> None:
    for comment in (b"hidden", GOOD):
        data = io.BytesIO(GOOD)
        with zipfile.ZipFile(data, "a") as archive:
            archive.comment = comment
        assert "canonical" in refused(data.getvalue())


# --- names ----------------------------------------------------------------------------------------

BAD_NAMES = [
    "../x", "..", "a/../x", "a/..", "/etc/passwd", "//x", "a//b", "", ".", "./a", "a/", "a/.",
    ".hidden", "a/.hidden", "a\\b", "..\\x", "C:\\x", "C:/x", "c:x", "~/x", "a b", "a\tb", "a\nb",
    "a:b", "a*", "caf\u00e9", "\uff0e\uff0e/x", "a\u2215b", "\u2024\u2024/x", "a\u202eb",
    "\u0430/model", "a\ufeff", "\ud7ff", "x" * 256, "a\x7f", "a\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names_are_refused(refused: Callable[..., str], name: str) -> None:
    assert not safe_path(name)
    contents = {**CONTENTS, name: b"data"}
    data = bundles.archive(
        [(MANIFEST, bundles.make_manifest(contents).to_json().encode()), *contents.items()]
        if not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
        else [*ENTRIES, (name, b"data")]
    )
    message = refused(data)
    assert "refused the path" in message or "not a bundle" in message


def test_a_name_cut_by_nul_is_refused(refused: Callable[..., str]) -> None:
    data = GOOD.replace(b"a/out.npz", b"a/out\0npz")
    assert data != GOOD
    refused(data)
    # zipfile reads the name up to the NUL: nothing else may tell the two apart
    contents = {"a/in.npz": b"i", "a/model.onnx": b"m", "a/out.npz": b"o", "b": b"x"}
    good = bundles.bundle(bundles.make_manifest(contents), contents)
    end = good.rindex(b"PK\x01\x02")
    refused(good[:end] + good[end:].replace(b"b", b"\0"))


@pytest.mark.parametrize(
    "name", ["a", "a/b", "variants/x-1/model_2.onnx", "A+b-c_d/e.f", "x" * 255]
)
def test_plain_names_are_fine(name: str) -> None:
    assert safe_path(name)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_safe_paths_stay_inside(text: str) -> None:
    if safe_path(text):
        parts = text.split("/")
        assert text.isascii()
        assert not text.startswith("/")
        assert not {"", ".", ".."} & set(parts)
        assert os.path.normpath(text) == text


# --- entries --------------------------------------------------------------------------------------


def test_a_name_twice_is_refused(refused: Callable[..., str]) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):  # zipfile, about what we do to it
        data = bundles.archive([*ENTRIES, ("a/out.npz", CONTENTS["a/out.npz"])])
    assert "twice" in refused(data)
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = bundles.archive([*ENTRIES, (MANIFEST, TEXT)])
    assert "twice" in refused(data)


def test_undeclared_and_missing_files_are_named(refused: Callable[..., str]) -> None:
    message = refused(bundles.archive([*ENTRIES, ("extra", b"data")]))
    assert "'extra' is in the archive but not in the manifest" in message
    assert "'a/out.npz' is missing" in refused(bundles.archive(ENTRIES[:-1]))
    assert "no manifest.json" in refused(bundles.archive(ENTRIES[1:]))
    assert "no manifest.json" in refused(bundles.archive([]))


def test_there_is_one_order(refused: Callable[..., str]) -> None:
    for order in ([1, 0, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]):
        assert "order" in refused(bundles.archive([ENTRIES[i] for i in order]))


def test_wrong_sizes_and_hashes_are_named(refused: Callable[..., str]) -> None:
    longer = [*ENTRIES[:-1], ("a/out.npz", CONTENTS["a/out.npz"] + b"!")]
    assert "a/out.npz has 61 bytes, the manifest says 60" in refused(bundles.archive(longer))
    other = GOOD.replace(CONTENTS["a/out.npz"], b"x" * 60)
    assert "a/out.npz is damaged: SHA-256" in refused(other)


def test_checksums_of_the_archive_count_too(refused: Callable[..., str]) -> None:
    crc = struct.pack("<L", zipfile.crc32(CONTENTS["a/out.npz"]))  # type: ignore[attr-defined]
    assert GOOD.count(crc) == 2
    assert "CRC-32" in refused(GOOD.replace(crc, b"\x01\x02\x03\x04"))


def _with(change: Callable[[zipfile.ZipInfo], None], **zip_options: Any) -> bytes:
    """The good bundle, the last entry changed before it is written."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **zip_options) as archive:
        for path, data in ENTRIES:
            entry = archive_entry(path, len(data))
            if path == "a/out.npz":
                change(entry)
            archive.writestr(entry, data)
    return out.getvalue()


def _attributes(value: int) -> Callable[[zipfile.ZipInfo], None]:
    return lambda entry: setattr(entry, "external_attr", value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_attributes(0o120777 << 16), "is a link"),
        (_attributes(0o040755 << 16), "canonical"),
        (_attributes(0o010644 << 16), "canonical"),  # a pipe
        (_attributes(0o020644 << 16), "canonical"),  # a device
        (_attributes(0o104644 << 16), "canonical"),  # set-user-id
        (lambda entry: setattr(entry, "compress_type", zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda entry: setattr(entry, "compress_type", zipfile.ZIP_BZIP2), "canonical"),
        (lambda entry: setattr(entry, "compress_type", zipfile.ZIP_LZMA), "canonical"),
        (lambda entry: setattr(entry, "date_time", (2026, 1, 1, 0, 0, 0)), "canonical"),
        (lambda entry: setattr(entry, "comment", b"hidden"), "canonical"),
        (lambda entry: setattr(entry, "extra", b"\x99\x99\x02\x00hi"), "canonical"),
        (lambda entry: setattr(entry, "create_system", 0), "canonical"),
        (lambda entry: setattr(entry, "internal_attr", 1), "canonical"),
    ],
    ids=["link", "folder", "pipe", "device", "setuid", "deflated", "bzip2", "lzma", "date",
         "comment", "extra", "dos", "text"],
)  # fmt: skip
def test_other_kinds_of_entries_are_refused(
    refused: Callable[..., str], change: Callable[[zipfile.ZipInfo], None], says: str
) -> None:
    assert says in refused(_with(change))


def test_folders_are_refused(refused: Callable[..., str]) -> None:
    out = io.BytesIO(GOOD)
    with zipfile.ZipFile(out, "a") as archive:
        archive.mkdir("folder")
    assert "refused the path 'folder/'" in refused(out.getvalue())


# Offsets in ZIP headers (APPNOTE.TXT 4.3.7 and 4.3.12): local, then central.
_FLAGS, _METHOD, _CRC, _PACKED, _PLAIN = (6, 8), (8, 10), (14, 16), (18, 20), (22, 24)
_LOCAL_AT = GOOD.index(b"PK\x03\x04", GOOD.index(b"a/model.onnx", len(TEXT)))
_CENTRAL_AT = GOOD.rindex(b"PK\x01\x02")


def _patched(field: tuple[int, int], value: bytes, *, local: bool = True) -> bytes:
    """A header field of the last entry overwritten, in the central header, too."""
    data = bytearray(GOOD)
    if local:
        data[_LOCAL_AT + field[0] : _LOCAL_AT + field[0] + len(value)] = value
    data[_CENTRAL_AT + field[1] : _CENTRAL_AT + field[1] + len(value)] = value
    return bytes(data)


def test_the_patches_hit_what_they_name() -> None:
    assert GOOD[_LOCAL_AT + 30 :].startswith(b"a/out.npz")
    assert GOOD[_CENTRAL_AT + 46 :].startswith(b"a/out.npz")
    assert _patched(_PLAIN, struct.pack("<L", 60)) == GOOD


@pytest.mark.parametrize("local", [True, False], ids=["both", "central"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        (_FLAGS, b"\x01\x00"),  # encrypted
        (_FLAGS, b"\x08\x00"),  # sizes follow the data
        (_FLAGS, b"\x20\x00"),  # patched data
        (_FLAGS, b"\x41\x00"),  # strong encryption
        (_FLAGS, b"\x00\x08"),  # UTF-8 names
        (_METHOD, b"\x08\x00"),
        (_METHOD, b"\x63\x00"),
        (_METHOD, b"\xff\xff"),
        (_PACKED, struct.pack("<L", 59)),
        (_PLAIN, struct.pack("<L", 59)),  # declared small, really larger
        (_PLAIN, struct.pack("<L", 1)),
        (_PLAIN, struct.pack("<L", 0)),
        (_PLAIN, struct.pack("<L", 0x7FFFFFFF)),
        (_PLAIN, b"\xff\xff\xff\xff"),
        (_PACKED, b"\xff\xff\xff\xff"),
        (_PACKED, b"\xff\xff\xff\xff\xff\xff\xff\xff"),  # and the plain size after it
    ],
    ids=lambda v: v.hex() if isinstance(v, bytes) else f"at{v[0]}",
)
def test_headers_cannot_lie(
    refused: Callable[..., str], field: tuple[int, int], value: bytes, local: bool
) -> None:
    refused(_patched(field, value, local=local))


def _raw(entries: list[tuple[bytes, bytes, dict[str, int]]], *, gap: bytes = b"") -> bytes:
    """An archive written field by field; each entry may lie about `size` and `offset`."""
    body, directory = b"", b""
    for name, data, lies in entries:
        size, offset = lies.get("size", len(data)), lies.get("offset", len(body))
        crc = zipfile.crc32(data)  # type: ignore[attr-defined]
        common = struct.pack("<4H3L2H", 0, 0, 0, 0x21, crc, size, size, len(name), 0)
        body += b"PK\x03\x04\x14\x00" + common + name + data + gap
        directory += (
            b"PK\x01\x02\x14\x03\x14\x00" + common
            + struct.pack("<3H2L", 0, 0, 0, 0o100644 << 16, offset) + name
        )  # fmt: skip
    count = len(entries)
    return (
        body + directory
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)
    )  # fmt: skip


def _honest() -> list[tuple[bytes, bytes, dict[str, int]]]:
    return [(name.encode(), data, {}) for name, data in ENTRIES]


def test_the_raw_archive_is_the_real_one() -> None:
    assert _raw(_honest()) == GOOD


def test_gaps_and_overlaps_are_refused(refused: Callable[..., str]) -> None:
    assert "canonical" in refused(_raw(_honest(), gap=b"hidden"))
    overlapping = _honest()
    overlapping[3] = (b"a/out.npz", CONTENTS["a/out.npz"], {"offset": 0})
    assert "canonical" in refused(_raw(overlapping))
    # Two entries over the same bytes: a "better zip bomb" quotes one local header in another.
    inner = b"PK\x03\x04" + bytes(26) + b"b" + b"x" * 50
    quoting = [*_honest(), (b"b", b"", {"offset": len(GOOD) // 2, "size": 50}), (b"c", inner, {})]
    assert "canonical" in refused(_raw(quoting))


@pytest.mark.parametrize("size", [61, 1 << 20, (1 << 32) - 1, (1 << 32) - 60])
def test_sizes_beyond_the_file_are_refused(refused: Callable[..., str], size: int) -> None:
    """The last one's end would not even fit the directory's 32 bits."""
    entries = _honest()
    entries[3] = (b"a/out.npz", CONTENTS["a/out.npz"], {"size": size})
    refused(_raw(entries))
    refused(_raw([entries[3], *entries[:3]]))


def test_64_bit_archives_are_refused(refused: Callable[..., str]) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, data in ENTRIES:
            with archive.open(archive_entry(path, len(data)), "w", force_zip64=True) as entry:
                entry.write(data)
    refused(out.getvalue())
    # Sizes in a 64-bit extra field, far over what the 32-bit ones could say.
    for size in (60, 1 << 33, 1 << 40, (1 << 64) - 1):
        extra = struct.pack("<2H2Q", 1, 16, size, size)
        name, huge = b"a/out.npz", b"\xff\xff\xff\xff"
        data = bytearray(GOOD)
        at = _CENTRAL_AT
        data[at + 20 : at + 28] = huge + huge
        data[at + 30 : at + 32] = struct.pack("<H", len(extra))
        data[at + 46 + len(name) : at + 46 + len(name)] = extra
        data[-10:-6] = struct.pack("<L", struct.unpack("<L", data[-10:-6])[0] + len(extra))
        with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:  # zipfile believes it
            assert archive.infolist()[-1].file_size == size
        refused(bytes(data))


def test_bombs_are_refused_unopened(refused: Callable[..., str]) -> None:
    bomb = b"\0" * (64 << 20)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(archive_entry(MANIFEST, len(TEXT)), TEXT)
        entry = archive_entry("a/in.npz", len(bomb))
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, bomb)
    data = out.getvalue()
    assert len(data) < 100_000
    assert "is compressed" in refused(data)
    small = data.replace(struct.pack("<L", len(bomb)), struct.pack("<L", 40))  # declared small
    assert small != data
    assert "is compressed" in refused(small)


# --- deflated files -------------------------------------------------------------------------------

SPARSE = {**CONTENTS, "a/model.onnx": bytes(range(64)) + bytes(700) + b"end" * 40}


def test_what_the_manifest_says_is_deflated_is_inflated(tmp_path: Path) -> None:
    path = tmp_path / "sparse.edgekit"
    path.write_bytes(bundles.deflated_bundle(SPARSE, "a/model.onnx"))
    with Bundle(path) as bundle:
        assert {name: bundle.read(name) for name in SPARSE} == SPARSE
        assert bundle.read("a/model.onnx", verify=False) == SPARSE["a/model.onnx"]
        assert bundle.verify(keep=("a/model.onnx",)) == {"a/model.onnx": SPARSE["a/model.onnx"]}
        (entry,) = [one for one in bundle.manifest.files if one.deflated]
        assert entry.deflated.size_bytes < entry.size_bytes / 4
    with zipfile.ZipFile(path) as archive:  # any unzip opens it
        assert archive.testzip() is None
        assert archive.read("a/model.onnx") == SPARSE["a/model.onnx"]


def test_flipped_bits_of_a_deflated_file_are_found(tmp_path: Path) -> None:
    """Among them those that inflate to the same: what fills the last byte up."""
    data = bundles.deflated_bundle(SPARSE, "a/model.onnx")
    packed = bundles.raw_deflate(SPARSE["a/model.onnx"])
    start, path = data.index(packed), tmp_path / "flipped.edgekit"
    for bit in (*range(0, 8 * len(packed), 7), *range(8 * len(packed) - 16, 8 * len(packed))):
        made = bytearray(data)
        made[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(made)
        assert "is damaged" in _refusal(path)


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"size_bytes": 3}, "is compressed other than"),
        ({"sha256": "0" * 64}, "is damaged: SHA-256"),
    ],
)
def test_deflated_files_are_what_the_manifest_says(
    refused: Callable[..., str], declared: dict[str, Any], says: str
) -> None:
    assert says in refused(bundles.deflated_bundle(SPARSE, "a/model.onnx", **declared))


def test_stored_files_are_not_said_to_be_deflated(refused: Callable[..., str]) -> None:
    data, name = SPARSE["a/model.onnx"], "a/model.onnx"
    deflated = Deflated(len(data), "0" * 64)
    files = tuple(
        replace(one, deflated=deflated) if one.path == name else one
        for one in bundles.listed(SPARSE)
    )
    made = bundles.bundle(bundles.make_manifest(SPARSE, files=files), SPARSE)
    assert "is compressed other than" in refused(made)


@pytest.mark.parametrize("kind", ["more", "less", "behind", "cut"])
def test_streams_that_inflate_to_something_else_are_refused(
    refused: Callable[..., str], kind: str
) -> None:
    """The archive and the manifest agree on sizes and hashes; the stream is another one."""
    data, name = SPARSE["a/model.onnx"], "a/model.onnx"
    stream = {
        "more": bundles.raw_deflate(data + bytes(5 << 20)),
        "less": bundles.raw_deflate(data[:-1]),
        "behind": bundles.raw_deflate(data) + b"hidden",
        "cut": bundles.raw_deflate(data)[:-4],
    }[kind]
    made = bundles.deflated_bundle(SPARSE, name, stream=stream)
    assert "it inflates to other sizes" in refused(made)


def test_declared_bombs_are_refused_unopened(refused: Callable[..., str]) -> None:
    bomb = {**SPARSE, "a/model.onnx": bytes(1 << 20)}
    assert "times larger, inflated" in refused(bundles.deflated_bundle(bomb, "a/model.onnx"))


def test_compressed_manifests_are_refused(refused: Callable[..., str]) -> None:
    def written(text: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for path, data in [(MANIFEST, text), *ENTRIES[1:]]:
                entry = archive_entry(path, len(data), deflated=path == MANIFEST)
                archive.writestr(entry, data, compresslevel=0 if len(text) > 9999 else 6)
        return out.getvalue()

    assert "is damaged" in refused(written(TEXT))
    large = written(bytes(5 << 20))  # level 0: as many bytes as it says, and some more
    assert "at most 4 MiB" in refused(large)
    assert "at most 4 MiB" in refused(large.replace(struct.pack("<L", 5 << 20), b"\1\0\0\0"))


def test_a_bundle_in_a_bundle_is_not_opened(refused: Callable[..., str]) -> None:
    assert "no manifest.json" in refused(bundles.archive([("inner.edgekit", GOOD)]))
    assert "not JSON" in refused(bundles.archive([(MANIFEST, GOOD), *ENTRIES[1:]]))
    declared = bundles.archive([*ENTRIES, ("inner.edgekit", GOOD)])
    assert "'inner.edgekit' is in the archive but not in the manifest" in refused(declared)
    # The inner one's end is not the file's end, though it is the last one a search would find.
    refused(bundles.archive([*ENTRIES[:3], ("a/out.npz", GOOD)]) + GOOD[-22:])


def test_too_many_files_are_refused(refused: Callable[..., str]) -> None:
    many = [(f"f{n}", b"") for n in range(4096)]
    assert "4100 files, at most 4096" in refused(bundles.archive([*ENTRIES, *many]))


def test_a_huge_manifest_is_refused(refused: Callable[..., str]) -> None:
    text = TEXT + b" " * (4 << 20)
    assert "at most 4 MiB" in refused(bundles.archive([(MANIFEST, text), *ENTRIES[1:]]))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ((b'"small"', b'"sm\\u0061\\nll"'), "control characters"),
        ((b'"small"', b'"sm\\ud800ll"'), "control characters"),
        ((b'"CPU"', b'"C\\u001bU"'), "control characters"),
        ((b'"sequence"', b'"seq\\nuence"'), "unknown key"),
        ((b'"edgekit.bundle/1"', b'"edgekit.bundle/2\\n"'), "schema"),
        ((b'"fp32"', b'"fp32", "scheme": "int8"'), "twice"),
    ],
    ids=lambda v: v if isinstance(v, str) else v[1].decode(),
)
def test_what_the_manifest_holds_cannot_spoil_the_message(
    refused: Callable[..., str], edit: tuple[bytes, bytes], says: str
) -> None:
    text = TEXT.replace(*edit)
    assert text != TEXT
    assert says in refused(bundles.archive([(MANIFEST, text), *ENTRIES[1:]]))


# --- paths ----------------------------------------------------------------------------------------


def test_an_empty_file_is_refused(refused: Callable[..., str]) -> None:
    assert "empty" in refused(b"")


@pytest.mark.parametrize("data", [b"x", b"PK", b"PK\x05\x06", b"PK\x03\x04", b"\0" * 22, TEXT])
def test_other_files_are_refused(refused: Callable[..., str], data: bytes) -> None:
    assert "not a bundle" in refused(data)


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.edgekit"
    path.write_bytes(GOOD)
    os.truncate(path, MAX_BUNDLE_BYTES + 1)  # a sparse file
    assert "are allowed" in _refusal(path)


def test_folders_missing_files_and_pipes_are_refused(tmp_path: Path) -> None:
    assert "not a file" in _refusal(tmp_path)
    assert "No such file" in _refusal(tmp_path / "missing.edgekit")
    (tmp_path / "file").write_bytes(GOOD)
    assert "cannot open" in _refusal(tmp_path / "file" / "inside.edgekit")
    assert "cannot open" in _refusal(Path("nul\0.edgekit"))
    assert "cannot open" in _refusal(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in _refusal(tmp_path / "pipe")


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root may read everything: be somebody else meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    path = tmp_path / "secret.edgekit"
    path.write_bytes(GOOD)
    path.chmod(0)
    return path


@pytest.mark.usefixtures("unreadable", "nobody")
def test_unreadable_files_are_refused(unreadable: Path) -> None:
    assert "Permission denied" in _refusal(unreadable)
