"""Constants behind the flatbuffer, as quantizers write them, come along when a model is written."""

import numpy as np
import pytest

from edgekit.errors import ModelError
from edgekit.graph import read_graph
from edgekit.taps import add_tflite_outputs
from edgekit.tflite_file import read_tflite, write_tflite
from edgekit_runtime import load

pytestmark = pytest.mark.needs("litert")


def outside(content: bytes) -> bytes:
    """The same model with every constant behind the flatbuffer, 16 bytes apart."""
    model = read_tflite(content)
    behind = [one for one in model.buffers if one.data is not None and len(one.data)]
    data = [bytes(one.data) for one in behind]
    for one in behind:
        one.data, one.offset, one.size = None, 2, 1
    start, tail = len(write_tflite(model)), b""
    for one, held in zip(behind, data, strict=True):
        tail += bytes(-(start + len(tail)) % 16)
        one.offset, one.size = start + len(tail), len(held)
        tail += held
    made = write_tflite(model)
    assert len(made) == start
    return made + tail


def answer(path) -> np.ndarray:
    with load(path) as session:
        (spec,) = session.inputs
        given = np.random.default_rng(0).normal(size=[d or 1 for d in spec.with_batch(1)])
        (found,) = list(session.run({spec.name: given.astype(spec.dtype)}).values())[-1:]
        return found


def test_constants_behind_the_file_come_along(small_model, tmp_path) -> None:
    plain = small_model("litert", "linear")
    path = tmp_path / "outside.tflite"
    path.write_bytes(outside(plain.read_bytes()))
    wanted = answer(plain)
    np.testing.assert_array_equal(answer(path), wanted)
    (tmp_path / "again.tflite").write_bytes(write_tflite(read_tflite(path.read_bytes())))
    np.testing.assert_array_equal(answer(tmp_path / "again.tflite"), wanted)
    assert read_graph(path).weight_bytes == read_graph(plain).weight_bytes > 0
    graph = read_tflite(path.read_bytes()).subgraphs[0]
    name = graph.tensors[graph.operators[0].outputs[0]].name.decode()
    add_tflite_outputs(str(path), str(tmp_path / "tapped.tflite"), [name])
    np.testing.assert_array_equal(answer(tmp_path / "tapped.tflite"), wanted)


def test_constants_outside_of_the_file_are_damage(small_model, tmp_path) -> None:
    content = outside(small_model("litert", "linear").read_bytes())
    (tmp_path / "short.tflite").write_bytes(content[:-1])
    with pytest.raises(ModelError, match="damaged: a constant at bytes"):
        read_graph(tmp_path / "short.tflite")
