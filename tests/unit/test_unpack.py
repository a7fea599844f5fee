"""A bundle taken apart for an app: plain files, and words that fit them."""

import json

import bundles
import pytest

from edgekit.errors import BundleError, UsageError
from edgekit.unpack import unpack
from edgekit_runtime.manifest import InputSteps

CONTENTS = {
    "a/in.npz": b"in", "a/model.onnx": b"model", "a/out.npz": b"out", "b/model.tflite": b"TFL3",
}  # fmt: skip


@pytest.fixture
def bundle(tmp_path):
    made = bundles.make_manifest(
        CONTENTS, labels=("cat", "größte Katze"),
        variants=(
            bundles.make_variant(threads=2),
            bundles.make_variant(
                id="b", engine="litert", format="tflite", files=("b/model.tflite",),
                input_names=("in0",), output_names=("out0",),
            ),
        ),
        preprocess={"x": InputSteps("image", ({"op": "resize", "size": [8, 8]}, {"op": "scale"}))},
        postprocess=({"op": "softmax"},),
    )  # fmt: skip
    path = tmp_path / "m.edgekit"
    path.write_bytes(bundles.bundle(made, CONTENTS))
    return path


def test_files_and_words_are_there(bundle, tmp_path) -> None:
    folder = tmp_path / "app"
    folder.mkdir()  # an empty one is fine
    unpack(bundle, folder)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    golden = {f"{v}/golden-{side}.npz" for v in "ab" for side in ("inputs", "outputs")}
    words = {"labels.txt", "processing.json", "manifest.json", "HOW-TO.md"}
    assert found == {"a/model.onnx", "b/model.tflite"} | golden | words
    assert (folder / "a/model.onnx").read_bytes() == b"model"
    assert (folder / "labels.txt").read_text().splitlines() == ["cat", "größte Katze"]
    steps = json.loads((folder / "processing.json").read_text())
    assert [one["op"] for one in steps["preprocess"]["x"]["steps"]] == ["resize", "scale"]


def test_the_how_to_names_what_the_models_have(bundle, tmp_path) -> None:
    unpack(bundle, tmp_path / "app")
    text = (tmp_path / "app" / "HOW-TO.md").read_text()
    assert text.index("a/model.onnx") < text.index("b/model.tflite")
    assert 'mapOf("x" to input)' in text and 'get("y")' in text and "longArrayOf(1, 4)" in text
    assert "setIntraOpNumThreads(2)" in text
    assert "| input | `in0` | float32 | N x 4 |" in text and "writeFloat" in text
    assert "from image: resize, scale" in text and "after it: softmax" in text


@pytest.mark.parametrize("name", ["../../outside", "/outside", "..", ".hidden", "a/b", ""])
def test_a_variant_named_like_a_path_is_refused(tmp_path, name) -> None:
    made = bundles.make_manifest(CONTENTS, variants=(bundles.make_variant(id=name),))
    path = tmp_path / "m.edgekit"
    path.write_bytes(bundles.bundle(made, CONTENTS))
    with pytest.raises(BundleError, match="is no name for a folder"):
        unpack(path, tmp_path / "app")
    assert [*tmp_path.rglob("*")] == [path]


def test_nothing_is_overwritten_and_nothing_half_is_left(bundle, tmp_path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        unpack(bundle, taken)
    data = bytearray(bundle.read_bytes())
    data[data.index(b"TFL3")] ^= 1
    bundle.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BundleError, match="damaged"):
        unpack(bundle, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
