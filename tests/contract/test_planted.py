"""Planted bad cases: each is found, the operator named, and repaired or refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.cache import Cache
from edgekit.compress.scheme import parse_scheme
from edgekit.quantization import Quantized, QuantizeRequest, quantize_model

pytestmark = pytest.mark.needs("onnxruntime")

Weights = dict[str, np.ndarray]


def save(path: Path, nodes: list[onnx.NodeProto], weights: Weights, shape: list[int]) -> Path:
    stored = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    graph = helper.make_graph(
        nodes, "planted", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored,
    )  # fmt: skip
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def data(path: Path, net: Path, samples: np.ndarray) -> str:
    """Samples, labelled with the float model's own answers."""
    import onnxruntime

    session = onnxruntime.InferenceSession(net)
    answers = [session.run(None, {"x": one[None]})[0][0] for one in samples]
    np.savez(path, x=samples, labels=np.argmax(answers, axis=-1).astype(np.int64))
    return str(path)


def lost_and_repaired(
    tmp_path: Path, net: Path, samples: np.ndarray, scheme: str
) -> tuple[Quantized, Quantized]:
    known, cache = data(tmp_path / "data.npz", net, samples), Cache(tmp_path / "cache")
    request = QuantizeRequest(str(net), parse_scheme(scheme), "onnx", data=known)
    return (
        quantize_model(request, cache=cache),
        quantize_model(replace(request, max_drop=0.05), cache=cache),
    )


def sigmoid_head(path: Path) -> Path:
    """Sigmoids of scores around 9: the answers differ in the fourth decimal place."""
    rng = np.random.default_rng(1)
    weights = {
        "w": rng.normal(0, 0.25, (16, 32)), "v": rng.normal(0, 0.5, (32, 6)),
        "b": np.full(6, 10.0),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "b"], ["scores"]),
        helper.make_node("Sigmoid", ["scores"], ["y"]),
    ]
    return save(path, nodes, weights, [16])


def test_a_sigmoid_head_stays_float(tmp_path: Path) -> None:
    samples = np.random.default_rng(2).normal(size=(300, 16)).astype(np.float32)
    net = sigmoid_head(tmp_path / "net.onnx")
    lost, found = lost_and_repaired(tmp_path, net, samples, "int8-static")
    assert lost.evaluation["drop"] > 0.3
    assert found.reason == ""
    assert "y" in found.scheme.keep
    assert found.evaluation["drop"] <= 0.05


def attention(path: Path) -> Path:
    """Two heads over 512 places: one looks at all alike, the other at one. Its ones take the range
    of the softmax, and the shares of the first, 1/512 each, are nothing in 8 bits."""
    rng = np.random.default_rng(4)
    heads = np.zeros((2, 8))
    heads[1, 0] = 40.0
    last = rng.normal(size=(16, 5))
    last[8:] *= 0.01
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["heads", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "x"], ["mixed"]),
        helper.make_node("Flatten", ["mixed"], ["flat"]),
        helper.make_node("MatMul", ["flat", "last"], ["y"]),
    ]
    return save(path, nodes, {"heads": heads, "last": last}, [512, 8])


def test_a_softmax_that_is_rounded_with_one_scale_stays_float(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    means = rng.normal(size=(240, 1, 8))
    samples = (means + rng.normal(size=(240, 512, 8))).astype(np.float32)
    net = attention(tmp_path / "net.onnx")
    lost, found = lost_and_repaired(tmp_path, net, samples, "int8-static")
    assert lost.evaluation["drop"] > 0.3
    assert found.reason == ""
    assert "shares" in found.scheme.keep
    assert found.evaluation["drop"] <= 0.05


def depthwise(path: Path) -> Path:
    """Channels a thousand times greater than others: activations have one scale, made at run time,
    and the small ones decide."""
    rng = np.random.default_rng(6)
    size = np.geomspace(1, 3000, 8)
    weights = {
        "deep": rng.normal(size=(8, 1, 3, 3)) * size.reshape(-1, 1, 1, 1),
        "next": rng.normal(size=(6, 8, 1, 1)) / size.reshape(1, -1, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["x", "deep"], ["c"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "next"], ["m"]),
        helper.make_node("GlobalAveragePool", ["m"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    return save(path, nodes, weights, [8, 8, 8])


def test_depthwise_channels_of_very_different_sizes_stay_float(tmp_path: Path) -> None:
    samples = np.random.default_rng(7).normal(size=(300, 8, 8, 8)).astype(np.float32)
    net = depthwise(tmp_path / "net.onnx")
    lost, found = lost_and_repaired(tmp_path, net, samples, "int8-static")
    assert lost.evaluation["drop"] > 0.3
    assert found.reason == ""
    assert "m" in found.scheme.keep
    assert found.evaluation["drop"] <= 0.05


def test_depthwise_with_ranges_made_at_run_time_is_refused(tmp_path: Path) -> None:
    """Nothing is left to quantize when both convolutions stay float."""
    samples = np.random.default_rng(7).normal(size=(300, 8, 8, 8)).astype(np.float32)
    net = depthwise(tmp_path / "net.onnx")
    lost, found = lost_and_repaired(tmp_path, net, samples, "int8-dynamic")
    assert lost.evaluation["drop"] > 0.3
    assert "0.05 is allowed" in found.reason
    assert any("most of the noise comes from m" in note for note in found.notes)


def test_a_layer_norm_whose_scale_vanishes_in_fp16_stays_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    weights = {
        "w": rng.normal(size=(512, 512)), "gain": np.full(512, 1e-9), "shift": np.zeros(512),
        "last": rng.normal(size=(512, 5)),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("LayerNormalization", ["h", "gain", "shift"], ["n"], axis=-1),
        helper.make_node("MatMul", ["n", "last"], ["y"]),
    ]
    net = save(tmp_path / "net.onnx", nodes, weights, [512])
    samples = rng.normal(size=(200, 512)).astype(np.float32)
    lost, found = lost_and_repaired(tmp_path, net, samples, "fp16")
    assert found.reason == lost.reason == ""
    assert found.evaluation["drop"] <= 0.01
    assert any("gain" in note and "do not fit into float16" in note for note in found.notes)
