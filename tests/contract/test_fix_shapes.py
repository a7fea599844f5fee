"""Free dimensions set, for each format: same numbers, fixed interface, refused where impossible."""

import numpy as np
import pytest
from cnn import cnn_data, cnn_scores, small_cnn

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.fix_shapes import fix_shapes, has_free_dimensions
from edgekit.convert import convert
from edgekit.errors import ModelError
from edgekit.graph import read_graph
from edgekit_runtime import load

FORMATS = [
    pytest.param("onnx", marks=pytest.mark.needs("onnxruntime")),
    pytest.param("openvino", marks=pytest.mark.needs("openvino")),
]


@pytest.mark.parametrize("fmt", FORMATS)
def test_fixed_it_computes_the_same(fmt, tmp_path) -> None:
    cache = Cache(tmp_path / "cache")
    model = convert(open_model(small_cnn(tmp_path / "cnn.onnx")), fmt, cache=cache)
    assert has_free_dimensions(model)
    shape = (1, *model.inputs[0].shape[1:])
    fixed = fix_shapes(model, {model.inputs[0].name: shape}, cache=cache)
    assert not has_free_dimensions(fixed)
    assert fixed.inputs[0].shape == shape
    assert not read_graph(fixed.path).free_dimensions()
    with np.load(cnn_data(tmp_path / "data.npz")) as archive:
        images = archive["image"][:8]
    with load(fixed.path) as session:
        found = np.concatenate([session.run({"image": one[None]})["scores"] for one in images])
    np.testing.assert_allclose(found, cnn_scores(images), atol=1e-4)
    assert fixed.provenance[-1]["step"] == "fix-shapes"


@pytest.mark.parametrize("fmt", FORMATS)
def test_shapes_a_model_cannot_compute_are_refused(fmt, tmp_path) -> None:
    cache = Cache(tmp_path / "cache")
    model = convert(open_model(small_cnn(tmp_path / "cnn.onnx")), fmt, cache=cache)
    with pytest.raises(ModelError) as caught:
        fix_shapes(model, {model.inputs[0].name: (1, 7)}, cache=cache)
    assert "\n" not in str(caught.value)


@pytest.mark.needs("litert")
@pytest.mark.needs("tensorflow")
def test_tflite_is_fixed_to_the_shapes_it_was_written_with(keras_cnn, tmp_path) -> None:
    path, data = keras_cnn
    cache = Cache(tmp_path / "cache")
    model = open_model(path)
    assert has_free_dimensions(model)
    fixed = fix_shapes(model, {"image": (1, 28, 28, 1)}, cache=cache)
    assert fixed.inputs[0].shape == (1, 28, 28, 1)
    assert fixed.outputs[0].shape == (1, 10)
    with np.load(data) as archive:
        images = archive["image"][:8]
    with load(path) as before, load(fixed.path) as after:
        for image in images:
            want = next(iter(before.run({"image": image[None]}).values()))
            np.testing.assert_array_equal(
                next(iter(after.run({"image": image[None]}).values())), want
            )
    with pytest.raises(ModelError, match=r"was written for \[1, 28, 28, 1\], wanted \[4, 28"):
        fix_shapes(model, {"image": (4, 28, 28, 1)}, cache=cache)
