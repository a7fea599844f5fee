"""Bundles of a small linear model, sound and with faults, for deploying."""

from pathlib import Path
from typing import Any

import numpy as np
from bundles import bundle, listed, make_manifest, make_variant, npz

from edgekit_runtime import load
from edgekit_runtime.manifest import Variant


def documented(text: bytes) -> bytes:
    """A protobuf field of ModelProto (6, doc_string) that makes a model as large as wanted."""
    if not text:
        return b""
    words, size, length = text.hex().encode(), 2 * len(text), b""
    while size >= 128:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return b"\x32" + length + bytes([size]) + words


def scaled(model: bytes, factor: float) -> bytes:
    """The model with its weights multiplied: it answers differently."""
    import onnx
    from onnx import numpy_helper

    made = onnx.load_from_string(model)
    for one in made.graph.initializer:
        weights = numpy_helper.to_array(one)
        if weights.dtype == np.float32:
            one.CopyFrom(numpy_helper.from_array(weights * np.float32(factor), one.name))
    return bytes(made.SerializeToString())


class Maker:
    """`maker(sequence)` writes a bundle of the model (ONNX: x (N, 4) -> y (N, 3)) to a folder.

    `right` is what it answers to ones. `off` is added to the golden outputs, `extra` bytes make the
    bundle larger by twice as much, `before` are variants that are to be tried first; other options
    are the variant's.
    """

    def __init__(self, model: bytes, folder: Path, **manifest: Any) -> None:
        self.model, self.folder, self.manifest = model, folder, manifest
        self.inputs = np.random.default_rng(0).normal(size=(2, 1, 4)).astype(np.float32)
        folder.mkdir(exist_ok=True)
        plain = folder / "plain.onnx"
        plain.write_bytes(model)
        with load(plain) as session:
            self.outputs = np.stack([session.run({"x": one})["y"] for one in self.inputs])
            self.right = session.run({"x": np.ones((1, 4), np.float32)})["y"]

    def __call__(
        self, sequence: int = 1, *, off: float = 0.0, extra: bytes = b"",
        model: bytes | None = None, name: str = "", before: tuple[Variant, ...] = (),
        **variant: Any,
    ) -> Path:  # fmt: skip
        contents = {
            "a/model.onnx": (self.model if model is None else model) + documented(extra),
            "a/in.npz": npz(x=self.inputs), "a/out.npz": npz(y=self.outputs + np.float32(off)),
        }  # fmt: skip
        found = make_manifest(
            contents, sequence=sequence, bundle_id=f"{sequence:032x}", files=listed(contents),
            variants=(*before, make_variant(**variant)), **self.manifest,
        )  # fmt: skip
        path = self.folder / f"{name or sequence}.edgekit"
        path.write_bytes(bundle(found, contents))
        return path
