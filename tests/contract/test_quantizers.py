"""One suite for every quantizer: smaller, close to float, and refused where nothing fits."""

import numpy as np
import pytest
from cnn import cnn_data, cnn_scores, small_cnn

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.quantize import quantize
from edgekit.compress.scheme import COMPUTE_OPERATORS, Scheme
from edgekit.convert import convert
from edgekit.data import open_dataset
from edgekit.errors import ModelError
from edgekit_runtime import load

FORMATS = [
    pytest.param("onnx", marks=pytest.mark.needs("onnxruntime")),
    pytest.param("openvino", marks=[pytest.mark.needs("openvino"), pytest.mark.needs("nncf")]),
    pytest.param(
        "tflite", marks=[pytest.mark.needs("onnx2tf"), pytest.mark.needs("litert_quantizer")]
    ),
]
SCHEMES = [
    Scheme("int8-static"),
    Scheme("int8-static", COMPUTE_OPERATORS, reduce_range=True),
    Scheme("int8-dynamic"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.id}{'-7bit' * s.reduce_range}")
@pytest.mark.parametrize("fmt", FORMATS)
def test_close_to_float_and_really_int8(fmt, scheme, folder, cache) -> None:
    source = open_model(small_cnn(folder / "cnn.onnx"))
    data = open_dataset(str(cnn_data(folder / "data.npz")), source.inputs, cache)
    model = convert(source, fmt, cache=cache)
    before = [file.read_bytes() for file in model.files]
    made = quantize(model, scheme, data, np.arange(120), cache=cache)
    assert made.sha256 != model.sha256
    assert [file.read_bytes() for file in model.files] == before, "sources are never written"
    # Seen in calibration, so that clipping plays no part: this is about the grid.
    images = np.asarray(data.arrays["image"][:80])
    with load(made.path) as session:
        found = np.concatenate([session.run({"image": i[None]})["scores"] for i in images])
    wanted = cnn_scores(images)
    noise = np.mean((found - wanted) ** 2)
    sqnr_db = 10 * np.log10(np.mean(wanted**2) / max(noise, 1e-30))
    # 8 bits on a network of two layers keep 25 dB and more; float would be over 100.
    assert 20 < sqnr_db < 90
    assert made.provenance[-1]["scheme"] == scheme.to_json()


@pytest.mark.parametrize("fmt", FORMATS)
def test_calibration_decides_static_and_only_static(fmt, folder, cache) -> None:
    source = open_model(small_cnn(folder / "cnn.onnx"))
    data = open_dataset(str(cnn_data(folder / "data.npz")), source.inputs, cache)
    model = convert(source, fmt, cache=cache)
    hashes = {
        kind: [
            quantize(model, Scheme(kind), data, np.arange(n), cache=cache).sha256 for n in (16, 64)
        ]
        for kind in ("int8-static", "int8-dynamic")
    }
    assert hashes["int8-static"][0] != hashes["int8-static"][1]
    assert hashes["int8-dynamic"][0] == hashes["int8-dynamic"][1]


def test_weights_in_constant_nodes_and_old_opsets_are_prepared(tmp_path, cache) -> None:
    path = small_cnn(tmp_path / "old.onnx", constants=True, opset=11)
    source = open_model(path)
    data = open_dataset(str(cnn_data(tmp_path / "data.npz")), source.inputs, cache)
    made = quantize(source, Scheme("int8-static"), data, np.arange(32), cache=cache)
    images = np.asarray(data.arrays["image"][:20])
    with load(made.path) as session:
        found = session.run({"image": images})["scores"]
    assert np.corrcoef(found.ravel(), cnn_scores(images).ravel())[0, 1] > 0.99


@pytest.mark.needs("onnxruntime")
def test_nothing_to_quantize_is_refused(tmp_path, cache) -> None:
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["y"])], "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1, 12, 12])],
    )  # fmt: skip
    path = tmp_path / "relu.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=7), path
    )
    source = open_model(path)
    data = open_dataset(str(cnn_data(tmp_path / "data.npz")), source.inputs, cache)
    scheme = Scheme("int8-static", COMPUTE_OPERATORS)
    with pytest.raises(ModelError, match="nothing was quantized"):
        quantize(source, scheme, data, np.arange(16), cache=cache)
