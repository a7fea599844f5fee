"""Makes bundles by hand, good and bad ones, without the host's writer."""

import dataclasses
import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np

from edgekit_runtime.bundle import MANIFEST, archive_entry
from edgekit_runtime.manifest import (
    SCHEMA,
    Deflated,
    FileEntry,
    Golden,
    Manifest,
    TensorSpec,
    Tolerance,
    Variant,
)


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def listed(contents: Mapping[str, bytes]) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(path, hashlib.sha256(data).hexdigest(), len(data), zlib.crc32(data))
        for path, data in contents.items()
    )


def make_variant(**changes: Any) -> Variant:
    fields: dict[str, Any] = {
        "id": "a", "engine": "onnxruntime", "format": "onnx", "files": ("a/model.onnx",),
        "scheme": "fp32", "threads": 1, "precision": "float32", "input_names": ("x",),
        "output_names": ("y",), "placement": {"CPU": 1.0},
        "golden": Golden("a/in.npz", "a/out.npz", 2, {"y": Tolerance(1e-5, 1e-5)}),
    }  # fmt: skip
    return Variant(**(fields | changes))


def make_manifest(contents: Mapping[str, bytes], **changes: Any) -> Manifest:
    """A manifest that fits `contents` (in that order), of one variant unless told otherwise."""
    fields: dict[str, Any] = {
        "schema": SCHEMA, "bundle_id": "0" * 32, "sequence": 1, "name": "small",
        "created": "2026-01-01T00:00:00+00:00", "profiles": ("this-machine",),
        "inputs": (TensorSpec("x", "float32", ("N", 4)),),
        "outputs": (TensorSpec("y", "float32", ("N", 3)),),
        "variants": (make_variant(),), "files": listed(contents),
    }  # fmt: skip
    return Manifest(**(fields | changes))


def archive(entries: list[tuple[str, bytes]]) -> bytes:
    """A canonical archive with these entries in this order, whatever they say."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=False) as opened:
        for path, data in entries:
            opened.writestr(archive_entry(path, len(data)), data)
    return out.getvalue()


def raw_deflate(data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(data) + packer.flush()


def deflated_bundle(
    contents: Mapping[str, bytes], name: str, *, manifest: Manifest | None = None,
    stream: bytes | None = None, **declared: Any,
) -> bytes:  # fmt: skip
    """A bundle in which one file is deflated, as this `stream` if given; `declared` changes what
    the manifest says of that."""
    packed = raw_deflate(contents[name]) if stream is None else stream
    facts = {"size_bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
    files = tuple(
        dataclasses.replace(one, deflated=Deflated(**(facts | declared)))
        if one.path == name else one
        for one in listed(contents)
    )  # fmt: skip
    made = dataclasses.replace(manifest or make_manifest(contents), files=files)
    out = io.BytesIO()
    with (
        mock.patch("zipfile._get_compressor", lambda kind, *_: _Stream(packed) if kind else None),
        zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=False) as opened,
    ):
        for path, data in [(MANIFEST, made.to_json().encode()), *contents.items()]:
            opened.writestr(archive_entry(path, len(data), deflated=path == name), data)
    return out.getvalue()


class _Stream:
    """A compressor that gives what it was made with."""

    def __init__(self, stream: bytes) -> None:
        self.stream = stream

    def compress(self, _: bytes) -> bytes:
        return b""

    def flush(self) -> bytes:
        return self.stream


def bundle(manifest: Manifest, contents: Mapping[str, bytes]) -> bytes:
    return archive([(MANIFEST, manifest.to_json().encode()), *contents.items()])
