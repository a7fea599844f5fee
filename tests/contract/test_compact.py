"""Compact files hold the same model in fewer bytes."""

import numpy as np
import onnx
import onnxruntime
import pytest
from cnn import cnn_data, small_cnn
from onnxruntime import quantization

from edgekit.compress.compact import compact_ir, compact_onnx

LONG = "StatefulPartitionedCall/model/a_very_long_name_of_a_layer/"


class Samples(quantization.CalibrationDataReader):
    def __init__(self, path) -> None:
        with np.load(path) as archive:
            self.left = [{"image": one[None]} for one in archive["image"][:8]]

    def get_next(self):
        return self.left.pop() if self.left else None


def answers(model, image):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"image": image})


@pytest.mark.needs("onnxruntime")
def test_onnx_loses_names_and_copies_only(tmp_path) -> None:
    source, data = small_cnn(tmp_path / "net.onnx"), cnn_data(tmp_path / "data.npz", 16)
    net = onnx.load(source)
    shown = {one.name for one in (*net.graph.input, *net.graph.output)}
    for node in net.graph.node:
        node.output[:] = [name if name in shown else LONG + name for name in node.output]
        node.input[:] = [
            LONG + name if LONG + name in {o for n in net.graph.node for o in n.output} else name
            for name in node.input
        ]
    onnx.save(net, tmp_path / "long.onnx")
    quantization.quantize_static(
        tmp_path / "long.onnx", tmp_path / "q.onnx", Samples(data), per_channel=True
    )
    made = onnx.load(tmp_path / "q.onnx")
    before, size = onnx.load(tmp_path / "q.onnx"), made.ByteSize()
    names = {name for node in net.graph.node for name in node.output}
    compact_onnx(made, names | {one.name for one in net.graph.initializer})
    onnx.checker.check_model(made)
    assert made.ByteSize() < size - 2000
    there = {name for node in before.graph.node for name in node.output}
    image = np.random.default_rng(0).random((1, 1, 12, 12), np.float32)
    for one, other in zip(answers(made, image), answers(before, image), strict=True):
        np.testing.assert_array_equal(one, other)
    assert names & there <= {name for node in made.graph.node for name in node.output}
    for tensor in made.graph.initializer:
        tensor.ClearField("name")
    stored = [tensor.SerializeToString() for tensor in made.graph.initializer]
    assert len(stored) == len(set(stored))


@pytest.mark.needs("onnxruntime")
def test_bodies_of_if_keep_the_names_they_read() -> None:
    """And shared constants of graphs inside, which read by name, stay there."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    out = helper.make_tensor_value_info("y", floats, [2])
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "second"], ["y"])], "body", [], [out]
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    same = [onnx.numpy_helper.from_array(np.ones(2, np.float32), n) for n in ("first", "second")]
    first = helper.make_node("Mul", ["x", "first"], ["w"])
    last = helper.make_node("Add", ["w", "z"], ["r"])
    graph = helper.make_graph(
        [first, node, last], "g",
        [helper.make_tensor_value_info("x", floats, [2]),
         helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("r", floats, [2])], same,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    compact_onnx(model, set())
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": np.full(2, 3, np.float32), "c": np.array(True)})
    np.testing.assert_array_equal(found, [7, 7])


@pytest.mark.needs("openvino")
def test_ir_computes_the_same_in_fewer_bytes(tmp_path) -> None:
    import openvino as ov

    source = small_cnn(tmp_path / "net.onnx")
    path = tmp_path / "net.xml"
    ov.save_model(ov.convert_model(source), path)
    image, size = np.random.default_rng(0).random((1, 1, 12, 12), np.float32), path.stat().st_size
    wanted = ov.Core().compile_model(path, "CPU")(image)[0]
    compact_ir(path)
    assert path.stat().st_size < 0.8 * size
    np.testing.assert_array_equal(ov.Core().compile_model(path, "CPU")(image)[0], wanted)
