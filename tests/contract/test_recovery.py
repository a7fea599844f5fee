"""What wins accuracy back: the float model stays the same, rounding costs less."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.compress.recover_onnx import recover
from edgekit.compress.recover_rounding import grid_of, round_by_output
from edgekit.compress.scheme import Scheme

pytestmark = pytest.mark.needs("onnxruntime")


def net() -> onnx.ModelProto:
    """Conv - Relu - depthwise Conv - Relu - MaxPool - Conv - Relu - global mean - Gemm, with
    channels of very different sizes."""
    rng = np.random.default_rng(3)
    spread = np.exp(rng.normal(0, 2, 8)).astype(np.float32)
    weights = {
        "w1": rng.normal(size=(8, 3, 3, 3)) * spread[:, None, None, None],
        "b1": rng.normal(size=8) * spread,
        "w2": rng.normal(size=(8, 1, 3, 3)) / spread[:, None, None, None],
        "b2": rng.normal(size=8),
        "w3": rng.normal(size=(12, 8, 1, 1)),
        "w4": rng.normal(size=(5, 12)),
        "b4": rng.normal(size=5),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], name="c1"),
        helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], group=8, strides=[2, 2], name="c2"),
        helper.make_node("Relu", ["c2"], ["r2"], name="r2"),
        helper.make_node("MaxPool", ["r2"], ["p2"], kernel_shape=[2, 2], name="p2"),
        helper.make_node("Conv", ["p2", "w3"], ["c3"], name="c3"),
        helper.make_node("Relu", ["c3"], ["r3"], name="r3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["g"], name="g"),
        helper.make_node("Flatten", ["g"], ["f"], name="f"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], transB=1, name="y"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def samples(count: int = 24) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(count)]


def outputs(model: onnx.ModelProto, given: list[dict[str, np.ndarray]]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.concatenate([session.run(None, one)[0] for one in given])


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


def rounded(model: onnx.ModelProto, scheme: Scheme) -> onnx.ModelProto:
    """The model with its weights as onnxruntime's quantizer rounds them."""
    from onnxruntime.quantization.quant_utils import quantize_data

    made = onnx.ModelProto()
    made.CopyFrom(model)
    for one in made.graph.initializer:
        array = numpy_helper.to_array(one)
        if one.name.startswith("w"):
            rows = array if scheme.per_channel else array[None]
            found = [
                quantize_data(row.ravel(), TensorProto.INT8, True, scheme.reduce_range)
                for row in rows
            ]
            real = [q.astype(np.float32) * scale for _, scale, q in found]
            again = np.stack(real).reshape(array.shape).astype(np.float32)
            one.CopyFrom(numpy_helper.from_array(again, one.name))
    return made


def error(model: onnx.ModelProto, scheme: Scheme) -> float:
    given = samples(40)
    return float(np.mean((outputs(rounded(model, scheme), given) - outputs(net(), given)) ** 2))


def recovered(scheme: Scheme) -> tuple[onnx.ModelProto, dict[str, object]]:
    model = net()
    return model, recover(model, scheme, samples())  # type: ignore[arg-type]  # any iterable


def test_equalization_changes_weights_and_not_what_is_computed() -> None:
    scheme = Scheme("int8-static", per_channel=False, recovery=("equalization",))
    model, facts = recovered(scheme)
    assert facts["equalized"] == 3
    given = samples(8)
    wanted = outputs(net(), given)
    np.testing.assert_allclose(outputs(model, given), wanted, atol=1e-5 * np.abs(wanted).max())
    made = np.abs(weights_of(model)["w1"]).max(axis=(1, 2, 3))
    read = np.abs(weights_of(model)["w2"]).max(axis=(1, 2, 3))
    np.testing.assert_allclose(made, read, rtol=0.02)  # the method's fixed point
    assert error(model, scheme) < 0.1 * error(net(), scheme)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_learned_rounding_is_what_the_quantizer_rounds_to(per_channel, reduce_range) -> None:
    scheme = Scheme(
        "int8-static", per_channel=per_channel, reduce_range=reduce_range,
        recovery=("learned-rounding",),
    )  # fmt: skip
    model, facts = recovered(scheme)
    assert facts["rounded"] == 4
    before, after = weights_of(model), weights_of(rounded(model, scheme))
    for name in ("w1", "w2", "w3", "w4"):
        np.testing.assert_allclose(before[name], after[name], rtol=3e-7, atol=1e-9)
    if per_channel:  # on one grid for all, small channels are zero whichever way they are rounded
        assert error(model, scheme) < 0.8 * error(net(), scheme)


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_4_bits_are_what_the_quantizer_rounds_to(symmetric) -> None:
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    terms, outputs, block = 80, 6, 32
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(300, 8)) @ rng.normal(size=(8, terms))
    scheme = Scheme("int4-weights", block=block, weights_symmetric=symmetric)
    rows = rng.normal(size=(outputs, terms)) + np.linspace(-2, 2, outputs)[:, None]
    grid = grid_of(rows, scheme, blocks=True)
    made = round_by_output(rows, inputs.T @ inputs, grid)
    lost = [np.mean((inputs @ (one - rows).T) ** 2) for one in (made, grid.nearest(rows))]
    assert lost[0] < 0.5 * lost[1]
    for one in (made, grid.nearest(rows)):
        matrix = np.zeros((96, outputs), np.float32)
        matrix[:terms] = one.T
        packed = np.zeros((outputs, 3, block // 2), np.uint8)
        scale = np.zeros((outputs, 3), np.float32)
        zero = np.zeros((outputs, 2), np.uint8)
        quantize_matmul_4bits(packed, matrix, scale, zero, block, outputs, 96, symmetric)
        found = np.stack([packed & 15, packed >> 4], -1).reshape(outputs, 3, block).astype(int)
        middle = np.stack([zero & 15, zero >> 4], -1).reshape(outputs, -1)[:, :3].astype(int)
        found -= 8 if symmetric else middle[:, :, None]
        real = (found * scale[:, :, None]).reshape(outputs, -1)[:, :terms]
        np.testing.assert_allclose(real, one, rtol=1e-6, atol=1e-7)


def test_a_clip_that_is_never_reached_is_passed_and_stays_so() -> None:
    given, found = samples(), []
    for limit in (1e9, 1.0):
        model = net()
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
        model.graph.initializer.append(numpy_helper.from_array(np.float32(limit), "limit"))
        clip = helper.make_node("Clip", ["c1", "zero", "limit"], ["r1"], name="r1")
        model.graph.node[1].CopyFrom(clip)
        wanted, before = outputs(model, given), weights_of(model)["w1"]
        scheme = Scheme("int8-static", per_channel=False, recovery=("equalization",))
        recover(model, scheme, given)  # type: ignore[arg-type]
        np.testing.assert_allclose(outputs(model, given), wanted, atol=1e-5 * np.abs(wanted).max())
        found.append(np.abs(weights_of(model)["w1"] / before - 1).max(axis=(1, 2, 3)) > 0.01)
    assert found[0].sum() >= 7, "all channels fit under it"
    assert 0 < found[1].sum() < 8, "those that reach it are left alone"


def test_a_dead_channel_is_not_blown_up() -> None:
    model = net()
    for one in model.graph.initializer:
        array = numpy_helper.to_array(one).copy()
        if one.name == "w1":
            array[3] *= 1e-17
        elif one.name == "b1":
            array[3] = -0.5
        one.CopyFrom(numpy_helper.from_array(array, one.name))
    most = np.abs(weights_of(model)["b1"]).max()
    peak = max(np.abs(outputs_of(model, "r1")).max(), most)
    recover(model, Scheme("int8-static", per_channel=False, recovery=("equalization",)), samples())  # type: ignore[arg-type]
    assert np.abs(weights_of(model)["b1"]).max() <= 1.001 * peak
    assert np.abs(outputs_of(model, "r1")).max() <= 1.001 * peak


def outputs_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.output[:]
    made.graph.output.append(onnx.ValueInfoProto(name=name))
    return outputs(made, samples())


def test_what_stays_float_is_left_alone() -> None:
    words = ("learned-rounding", "bias-correction")
    model = net()
    recover(model, Scheme("int8-static", recovery=words, keep=("c2",)), samples(), kept=("y",))  # type: ignore[arg-type]
    before, after = weights_of(net()), weights_of(model)
    same = {name for name in before if (before[name] == after[name]).all()}
    assert same == {"w2", "b2", "w4", "b4"}


def test_rounding_by_output_beats_rounding_to_nearest_on_correlated_inputs() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 24)) + 0.1 * rng.normal(size=(400, 24))
    rows = rng.normal(size=(7, 24))
    grid = grid_of(rows, Scheme("int4-weights", block=32), blocks=True)
    made, nearest = round_by_output(rows, inputs.T @ inputs, grid), grid.nearest(rows)
    np.testing.assert_allclose(made, grid.nearest(made), atol=1e-9)
    lost = [np.mean((inputs @ (one - rows).T) ** 2) for one in (made, nearest)]
    assert lost[0] < 0.3 * lost[1]


def test_bias_correction_takes_the_mean_error_back() -> None:
    scheme = Scheme("int8-static", per_channel=False, recovery=("bias-correction",))
    model, facts = recovered(scheme)
    assert facts["corrected"] == 4
    assert len(model.graph.node[5].input) == 3  # a Conv without bias has got one
    given = samples()
    first = [onnx.ModelProto(), onnx.ModelProto()]
    for made, source in zip(first, (net(), rounded(model, scheme)), strict=True):
        made.CopyFrom(source)
        made.graph.output.append(onnx.ValueInfoProto(name="c1"))
    import onnxruntime

    runs = [onnxruntime.InferenceSession(one.SerializeToString()) for one in first]
    wanted, found = ([run.run(["c1"], one)[0] for one in given] for run in runs)
    mean = np.mean(np.concatenate(found) - np.concatenate(wanted), axis=(0, 2, 3))
    plain = np.abs(np.concatenate(wanted)).mean()
    assert np.abs(mean).max() < 1e-4 * plain  # of the first layer, whose inputs are the same
