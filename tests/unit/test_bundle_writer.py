"""Bundles as written by the host, read by the runtime."""

import dataclasses
import json

import numpy as np
import pytest
from cnn import cnn_scores, small_cnn

from edgekit.artifact import TensorSpec, open_model
from edgekit.bundle import VariantSource, write_bundle
from edgekit.errors import ModelError
from edgekit_runtime import load
from edgekit_runtime.bundle import Bundle
from edgekit_runtime.golden import check

pytestmark = pytest.mark.needs("onnxruntime")


def write(tmp_path, artifact, inputs, outputs):
    source = VariantSource(
        "only", "onnxruntime", artifact, "fp32", 1, "float32", {"CPU": 1.0}, {"latency_ns": None}
    )
    return write_bundle(
        tmp_path / "m.edgekit", (source,), name="m", inputs=inputs, outputs=outputs,
        profile="this-machine", provenance={"steps": []}, work=tmp_path,
    )  # fmt: skip


def test_round_trip_with_the_converters_names_mapped_to_ours(tmp_path) -> None:
    artifact = open_model(small_cnn(tmp_path / "cnn.onnx"))
    inputs = (TensorSpec("photo", "float32", ("N", 1, 12, 12), range=(-2.0, 2.0)),)
    outputs = (TensorSpec("classes", "float32", ("N", 4)),)
    write(tmp_path, artifact, inputs, outputs)
    images = np.random.default_rng(0).normal(size=(2, 1, 12, 12)).astype(np.float32)
    with load(tmp_path / "m.edgekit") as session:
        found = session.run({"photo": images})["classes"]
    np.testing.assert_allclose(found, cnn_scores(images), rtol=1e-4, atol=1e-5)
    assert all(result.ok for result in check(tmp_path / "m.edgekit"))
    with Bundle(tmp_path / "m.edgekit") as bundle:
        tolerance = bundle.manifest.variants[0].golden.tolerance
        assert list(tolerance) == ["classes"]


def test_several_renamed_outputs_are_refused(tmp_path) -> None:
    artifact = open_model(small_cnn(tmp_path / "cnn.onnx"))
    two = dataclasses.replace(artifact, outputs=(artifact.outputs[0],) * 2)
    outputs = tuple(TensorSpec(n, "float32", ("N", 4)) for n in ("a", "b"))
    with pytest.raises(ModelError, match="renamed"):
        write(tmp_path, two, artifact.inputs, outputs)
    assert not (tmp_path / "m.edgekit").exists()


def test_weights_that_give_nan_are_refused(tmp_path) -> None:
    import onnx
    from onnx import numpy_helper

    path = small_cnn(tmp_path / "cnn.onnx")
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.name == "b2")
    bias.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), "b2"))
    onnx.save(model, path)
    artifact = open_model(path)
    with pytest.raises(ModelError, match="NaN or Inf"):
        write(tmp_path, artifact, artifact.inputs, artifact.outputs)


def test_manifest_is_readable_json_inside_an_ordinary_zip(tmp_path) -> None:
    import zipfile

    artifact = open_model(small_cnn(tmp_path / "cnn.onnx"))
    write(tmp_path, artifact, artifact.inputs, artifact.outputs)
    with zipfile.ZipFile(tmp_path / "m.edgekit") as archive:
        assert archive.namelist()[0] == "manifest.json"
        assert json.loads(archive.read("manifest.json"))["schema"] == "edgekit.bundle/1"


def test_golden_inputs_have_the_shape_and_range_of_real_data(tmp_path) -> None:
    """A free dimension of 1 may be too small for a model (silero-vad pads its sequence)."""
    import io

    artifact = open_model(small_cnn(tmp_path / "cnn.onnx"))
    (spec,) = artifact.inputs
    inputs = (dataclasses.replace(spec, range=(5.0, 6.0), example=(3, 1, 12, 12)),)
    write(tmp_path, artifact, inputs, artifact.outputs)
    with Bundle(tmp_path / "m.edgekit") as bundle:
        golden = bundle.manifest.variants[0].golden
        with np.load(io.BytesIO(bundle.read(golden.inputs))) as archive:
            images = archive["image"]
        with np.load(io.BytesIO(bundle.read(golden.outputs))) as archive:
            scores = archive["scores"]
    assert images.shape == (golden.samples, 3, 1, 12, 12)
    assert images.min() >= 5.0 and images.max() <= 6.0
    np.testing.assert_allclose(scores[0], cnn_scores(images[0]), rtol=1e-3, atol=1e-3)
    with load(tmp_path / "m.edgekit") as session:
        assert session.bind().inputs["image"].shape == (3, 1, 12, 12)


def test_sparse_weights_are_stored_compressed_and_dense_ones_as_they_are(tmp_path) -> None:
    import onnx
    from onnx import numpy_helper

    rng = np.random.default_rng(0)
    sizes = {}
    for kind in ("dense", "sparse"):
        model = onnx.load(small_cnn(tmp_path / "cnn.onnx"))
        for one in model.graph.initializer:
            array = numpy_helper.to_array(one)
            if array.ndim == 4:
                wide = rng.normal(size=array.shape).astype(np.float32)
                one.CopyFrom(numpy_helper.from_array(wide, one.name))
        extra = rng.normal(size=(64, 64)).astype(np.float32)
        if kind == "sparse":
            extra[rng.random(extra.shape) < 0.6] = 0
        model.graph.initializer.append(numpy_helper.from_array(extra, "more"))
        model.graph.node.append(onnx.helper.make_node("Identity", ["more"], ["unused"]))
        onnx.save(model, tmp_path / f"{kind}.onnx")
        artifact = open_model(tmp_path / f"{kind}.onnx")
        manifest = write(tmp_path, artifact, artifact.inputs, artifact.outputs)
        (entry,) = [one for one in manifest.files if one.path.endswith(".onnx")]
        sizes[kind] = (tmp_path / "m.edgekit").stat().st_size
        assert (entry.deflated is not None) == (kind == "sparse")
        with Bundle(tmp_path / "m.edgekit") as bundle:
            assert bundle.read(entry.path) == artifact.path.read_bytes()
        assert all(result.ok for result in check(tmp_path / "m.edgekit"))
    assert sizes["sparse"] < 0.65 * sizes["dense"]
