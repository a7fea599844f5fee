"""Small networks whose outputs numpy can compute."""

import itertools
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def small_cnn(path: Path, *, constants: bool = False, opset: int = 15) -> Path:
    """Conv 3x3 (1 -> 8) + Relu + MaxPool 4x4 + Gemm (72 -> 4); image (N, 1, 12, 12).

    `constants`: weights in Constant nodes instead of initializers, as PyTorch once exported.
    """
    weights = cnn_weights()
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["scores"], transB=1),
    ]
    if constants:
        nodes = [
            *(helper.make_node("Constant", [], [t.name], value=t) for t in tensors),
            *nodes,
        ]
    graph = helper.make_graph(
        nodes, "small_cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 12, 12])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])],
        [] if constants else tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def cnn_weights() -> dict[str, np.ndarray]:
    """The weights of `small_cnn`."""
    rng = np.random.default_rng(7)
    return {
        "w1": rng.normal(0, 0.4, (8, 1, 3, 3)).astype(np.float32),
        "b1": rng.normal(0, 0.1, 8).astype(np.float32),
        "w2": rng.normal(0, 0.3, (4, 72)).astype(np.float32),
        "b2": rng.normal(0, 0.1, 4).astype(np.float32),
    }


def cnn_scores(images: np.ndarray) -> np.ndarray:
    """What `small_cnn` computes, in numpy: (N, 1, 12, 12) -> (N, 4)."""
    w = cnn_weights()
    padded = np.pad(images[:, 0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    conv = np.einsum("nhwij,oij->nohw", windows, w["w1"][:, 0]) + w["b1"][None, :, None, None]
    pooled = np.maximum(conv, 0).reshape(len(images), 8, 3, 4, 3, 4).max(axis=(3, 5))
    return pooled.reshape(len(images), -1) @ w["w2"].T + w["b2"]


def cnn_data(path: Path, count: int = 240) -> Path:
    """Random images with the float model's own classes as labels.

    All images have the same spread: NNCF and litert-quantizer average the ranges of calibration
    samples, so that images of unequal spread would be clipped.
    """
    images = np.random.default_rng(3).normal(0, 1, (count, 1, 12, 12)).astype(np.float32)
    np.savez(path, image=images, labels=cnn_scores(images).argmax(1))
    return path


def separable_cnn(path: Path, *, side: int = 32, channels: tuple[int, ...] = (16, 32, 64)) -> Path:
    """A strided Conv 3x3, pairs of depthwise 3x3 and pointwise Convs, each with Relu, mean, Gemm:
    image (1, 3, side, side) -> scores (1, 10)."""
    rng = np.random.default_rng(0)
    tensors: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def conv(x: str, cin: int, cout: int, kernel: int, stride: int, groups: int = 1) -> str:
        number, pad = len(tensors), kernel // 2
        shape = (cout, cin // groups, kernel, kernel)
        weights = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        tensors.append(numpy_helper.from_array(weights, f"w{number}"))
        nodes.append(
            helper.make_node(
                "Conv", [x, f"w{number}"], [f"c{number}"], strides=[stride] * 2, pads=[pad] * 4,
                group=groups,
            )
        )  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        return f"r{number}"

    x = conv("image", 3, channels[0], 3, 2)
    for number, (cin, cout) in enumerate(itertools.pairwise(channels)):
        x = conv(x, cin, cin, 3, 1 + number % 2, cin)
        x = conv(x, cin, cout, 1, 1)
    last = rng.normal(0, 0.3, (10, channels[-1])).astype(np.float32)
    tensors.append(numpy_helper.from_array(last, "last"))
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "last"], ["scores"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "separable_cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 10])], tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
