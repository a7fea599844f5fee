"""A convolution and two matrix products: in numpy, and as ONNX; `tf_quantized.py` makes it in
TensorFlow."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def net_weights() -> dict[str, np.ndarray]:
    """Per-channel spreads from 0.1 to 1, so that one scale per tensor is worse."""
    rng = np.random.default_rng(5)
    spread = np.geomspace(0.1, 1, 8)
    return {
        "conv": (rng.normal(0, 0.4, (3, 3, 1, 8)) * spread).astype(np.float32),
        "bias": rng.normal(0, 0.1, 8).astype(np.float32),
        "first": rng.normal(0, 0.15, (128, 64)).astype(np.float32),
        "second": rng.normal(0, 0.2, (64, 10)).astype(np.float32),
    }


def net_scores(images: np.ndarray) -> np.ndarray:
    """(N, 8, 8, 1) -> (N, 10), in float64."""
    w = net_weights()
    padded = np.pad(images[..., 0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    conv = np.maximum(np.einsum("nhwij,ijo->nhwo", windows, w["conv"][:, :, 0]) + w["bias"], 0)
    pooled = conv.reshape(-1, 4, 2, 4, 2, 8).max(axis=(2, 4)).reshape(len(images), -1)
    return np.maximum(pooled @ w["first"], 0) @ w["second"]


def net_images(count: int = 120) -> np.ndarray:
    """Smooth images, as photos are: most of their pixels follow from a few numbers. The last is
    three times as bright: what only one sample reaches is in the range all the same."""
    rng = np.random.default_rng(6)
    basis = rng.normal(0, 1, (6, 64))
    images = rng.normal(0, 0.4, (count, 6)) @ basis + rng.normal(0, 0.05, (count, 64))
    images[-1] *= 3
    return images.reshape(count, 8, 8, 1).astype(np.float32)


def net_onnx(path: Path) -> Path:
    """As ONNX: image (N, 1, 8, 8), so transpose the images."""
    w = net_weights()
    # The same pixels, channels first.
    w["first"] = w["first"].reshape(4, 4, 8, 64).transpose(2, 0, 1, 3).reshape(128, 64)
    w["conv"] = w["conv"].transpose(3, 2, 0, 1)
    nodes = [
        helper.make_node("Conv", ["image", "conv", "bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "first"], ["m"]),
        helper.make_node("Relu", ["m"], ["h"]),
        helper.make_node("MatMul", ["h", "second"], ["scores"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("image", ["N", 1, 8, 8]), ("scores", ["N", 10]))
    ]
    stored = [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in w.items()]
    graph = helper.make_graph(nodes, "small_net", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
