"""One suite for every conversion: the same numbers come out, under the same names."""

import math

import numpy as np
import pytest
from cnn import cnn_scores, small_cnn

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.convert import convert
from edgekit.errors import EdgeKitError
from edgekit.graph import read_graph
from edgekit_runtime import load

TARGETS = [
    pytest.param("onnx", marks=pytest.mark.needs("onnxruntime")),
    pytest.param("openvino", marks=pytest.mark.needs("openvino")),
    pytest.param("tflite", marks=[pytest.mark.needs("onnx2tf"), pytest.mark.needs("tensorflow")]),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("constants", [False, True])
def test_outputs_and_names_stay(target, constants, tmp_path, cache) -> None:
    path = small_cnn(tmp_path / "cnn.onnx", constants=constants)
    before = path.read_bytes()
    source = open_model(path)
    made = convert(source, target, cache=cache)
    assert path.read_bytes() == before, "the user's file is never written"
    assert [s.name for s in made.inputs] == ["image"]
    assert [s.name for s in made.outputs] == ["scores"]
    images = np.random.default_rng(0).normal(size=(1, 1, 12, 12)).astype(np.float32)
    with load(made.path) as session:
        found = session.run({"image": images})["scores"]
    np.testing.assert_allclose(found, cnn_scores(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_exact_gelu_reaches_every_engine(target, tmp_path, cache) -> None:
    """TFLite has no Erf: without being told, onnx2tf writes a TensorFlow operator, which no
    interpreter on a device has. The reference is the C library's."""
    onnx, floats = pytest.importorskip("onnx"), 1
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Erf", ["x"], ["y"])], "g",
        [onnx.helper.make_tensor_value_info("x", floats, [1, 9])],
        [onnx.helper.make_tensor_value_info("y", floats, [1, 9])],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "e.onnx"
    )
    made = convert(open_model(tmp_path / "e.onnx"), target, cache=cache)
    x = np.linspace(-4, 4, 9, dtype=np.float32)[None]
    with load(made.path) as session:
        found = session.run({"x": x})["y"]
    np.testing.assert_allclose(found[0], [math.erf(float(v)) for v in x[0]], atol=1e-6)


@pytest.mark.needs("onnx2tf")
@pytest.mark.needs("tensorflow")
@pytest.mark.parametrize("shared", [False, True])
def test_channels_are_not_turned_back_before_a_product(shared, tmp_path, cache) -> None:
    """NCHW, flattened, times weights: the order of the rows goes into the weights, unless
    something else takes the flattened tensor, too."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(small_cnn(tmp_path / "cnn.onnx"))
    if shared:
        model.graph.node.append(onnx.helper.make_node("Identity", ["f"], ["flat"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("flat", 1, ["N", 72]))
        onnx.save(model, tmp_path / "cnn.onnx")
    made = convert(open_model(tmp_path / "cnn.onnx"), "tflite", cache=cache)
    kinds = [one.type for one in read_graph(made.path).operators]
    assert ("TRANSPOSE" in kinds) == shared
    images = np.random.default_rng(0).normal(size=(1, 1, 12, 12)).astype(np.float32)
    with load(made.path) as session:
        found = session.run({"image": images})["scores"]
    np.testing.assert_allclose(found, cnn_scores(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_second_conversion_comes_from_the_cache(target, tmp_path, cache, monkeypatch) -> None:
    source = open_model(small_cnn(tmp_path / "cnn.onnx"))
    first = convert(source, target, cache=cache)
    monkeypatch.setattr(
        "edgekit.sandbox.call",
        lambda target, *_, **__: pytest.fail(target) if "converters" in target else SPECS,
    )
    assert convert(source, target, cache=cache).sha256 == first.sha256


SPECS: dict[str, list[object]] = {"inputs": [], "outputs": []}


@pytest.mark.parametrize("target", TARGETS[1:])
def test_damaged_model_is_one_clear_error(target, tmp_path, cache) -> None:
    path = small_cnn(tmp_path / "cnn.onnx")
    whole = open_model(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(EdgeKitError) as caught:
        convert(whole, target, cache=Cache(tmp_path / "empty"))
    assert "\n" not in str(caught.value)


def test_no_path_is_said(tmp_path, cache) -> None:
    source = open_model(small_cnn(tmp_path / "cnn.onnx"))
    ir = convert(source, "openvino", cache=cache)
    with pytest.raises(EdgeKitError, match="no way from OpenVINO IR to ONNX"):
        convert(ir, "onnx", cache=cache)
