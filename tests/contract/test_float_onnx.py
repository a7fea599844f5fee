"""What is to stay float in a QDQ model is computed in float by ONNX Runtime, fused or not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.quantize import quantize
from edgekit.compress.quantizers import fitted, quantizer_for
from edgekit.compress.scheme import parse_scheme
from edgekit.data import open_dataset
from edgekit.device import Quantization

pytestmark = pytest.mark.needs("onnxruntime")

#: the operator that stays float: its weights for 8 channels or features
MIDDLE = {
    "Conv": ((8, 8, 3, 3), {"pads": [1, 1, 1, 1]}),
    "grouped": ((8, 1, 3, 3), {"pads": [1, 1, 1, 1], "group": 8}),
    "ConvTranspose": ((8, 8, 3, 3), {"pads": [1, 1, 1, 1]}),
    "Gemm": ((8, 12), {}),
    "turned Gemm": ((12, 8), {"transB": 1}),
}
#: of the samples behind the channels, with and without images
SIZE = {False: (8, 8), True: ()}


def net(path: Path, kind: str) -> Path:
    """The operator in the middle of two that are quantized. What it reads of the first channel is
    nothing, and its weights for that are a thousand times greater: rounded with one scale for all,
    nothing is left of the others."""
    rng = np.random.default_rng(3)
    shape, attributes = MIDDLE[kind]
    gemm = "Gemm" in kind
    middle = rng.normal(0, 0.1, shape).astype(np.float32)
    read = {"Conv": 1, "turned Gemm": 1}.get(kind, 0)
    np.moveaxis(middle, read, 0)[0] *= 1000
    sizes = {"first": (3, 8), "last": (12, 10)} if gemm else {
        "first": (8, 3, 3, 3), "last": (10, 8, 3, 3)
    }  # fmt: skip
    weights = {name: rng.normal(0, 0.3, size).astype(np.float32) for name, size in sizes.items()}
    np.moveaxis(weights["first"], 1 if gemm else 0, 0)[0] = 0
    weights |= {"middle": middle, "bias": np.zeros(12 if gemm else 8, np.float32)}
    outer = "MatMul" if gemm else "Conv"
    nodes = [
        helper.make_node(outer, ["x", "first"], ["a"]),
        helper.make_node(
            "Conv" if kind == "grouped" else kind.split()[-1], ["a", "middle", "bias"], ["m"],
            **attributes,
        ),
        helper.make_node(outer, ["m", "last"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, *SIZE[gemm]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def answers(path: Path, samples: np.ndarray, *, fused: bool) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    return np.concatenate([session.run(None, {"x": one[None]})[0] for one in samples])


@pytest.mark.parametrize("kind", MIDDLE)
def test_weights_that_stay_float_are_not_rounded_when_the_model_is_loaded(
    tmp_path: Path, kind: str
) -> None:
    model = open_model(net(tmp_path / "net.onnx", kind))
    samples = (
        np.random.default_rng(1).normal(size=(32, 3, *SIZE["Gemm" in kind])).astype(np.float32)
    )
    np.savez(tmp_path / "data.npz", x=samples)
    cache = Cache(tmp_path / "cache")
    data = open_dataset(str(tmp_path / "data.npz"), model.inputs, cache)
    scheme = parse_scheme("int8-static:7-bit,matmul")
    scheme = fitted(scheme, quantizer_for(scheme, "onnx"), Quantization())
    kept = quantize(model, replace(scheme, keep=("m",)), data, np.arange(32), cache=cache)
    wanted = answers(model.path, samples, fused=True)
    fused, plain = (answers(kept.path, samples, fused=one) for one in (True, False))
    power = float((wanted**2).mean())
    assert float(((fused - plain) ** 2).mean()) < 1e-5 * power
    assert float(((fused - wanted) ** 2).mean()) < 1e-3 * power
    stored = {one.name: one for one in onnx.load(kept.path).graph.initializer}
    size = np.prod(MIDDLE[kind][0])
    assert any(
        one.data_type == TensorProto.FLOAT and np.prod(one.dims) == size for one in stored.values()
    )
