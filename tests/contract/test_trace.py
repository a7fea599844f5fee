"""Traces of engines that have a profiler, and what is planted for the advice to find."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import onnx_model

from edgekit.errors import MissingToolError
from edgekit.measure.advice import Advice, advice
from edgekit.measure.trace import Step, Trace, chrome_events, trace
from edgekit.measure.worker import Contender

RNG = np.random.default_rng(0)
SIZE = (1, 16, 32, 32)


def _weights(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def _saved(folder: Path, model: Any) -> Path:
    path = folder / "planted.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _traced(path: Path, engine: str, runs: int = 20) -> Trace:
    return trace(Contender("planted", path, 1, engine), runs=runs)


def _convolutions(folder: Path) -> Path:
    nodes = [
        ("Conv", ["x", "w1"], ["a"], {"pads": [1] * 4}),
        ("Relu", ["a"], ["b"], {}),
        ("Conv", ["b", "w2"], ["c"], {"pads": [1] * 4}),
        ("GlobalAveragePool", ["c"], ["d"], {}),
        ("Flatten", ["d"], ["e"], {}),
        ("Gemm", ["e", "w3"], ["y"], {}),
    ]
    constants = {"w1": _weights(32, 16, 3, 3), "w2": _weights(16, 32, 3, 3), "w3": _weights(16, 8)}
    return _saved(
        folder, onnx_model(nodes, {"x": ("float32", SIZE)}, {"y": ("float32", (1, 8))}, constants)
    )


@pytest.mark.needs("onnx")
@pytest.mark.parametrize(
    "engine", [pytest.param(n, marks=pytest.mark.needs(n)) for n in ("onnxruntime", "openvino")]
)
def test_a_trace_counts_what_the_network_computes(engine: str, tmp_path: Path) -> None:
    """MACs against the closed form, whatever the engine fuses."""
    found = _traced(_convolutions(tmp_path), engine)
    pixels = 32 * 32
    assert sum(one.macs or 0 for one in found.steps) == 2 * pixels * 9 * 16 * 32 + 16 * 8
    assert found.engine == engine
    assert all(one.device == "CPU" for one in found.steps)
    starts = [one.start_ns for one in found.steps]
    assert starts == sorted(starts)
    dearest = max(found.steps, key=lambda one: one.macs or 0)
    assert "Conv" in dearest.type
    assert dearest.ops_per_s == 2 * dearest.macs / dearest.duration_ns * 1e9
    assert dearest.shapes[0] in (SIZE, (1, 32, 32, 32))
    assert dearest.bytes is not None
    moved = 4 * (pixels * (16 + 32) + 9 * 16 * 32)  # both convolutions read and write as much
    assert moved <= dearest.bytes <= moved + 4 * 4 * 32
    (product,) = (one for one in found.steps if one.macs == 16 * 8)
    assert product.bytes == 4 * (16 + 16 * 8 + 8)
    document = found.to_json()
    assert document["sum_ns"] == sum(one["duration_ns"] for one in document["steps"])


@pytest.mark.needs("onnxruntime", "onnx")
def test_the_timeline_is_what_chrome_and_perfetto_read(tmp_path: Path) -> None:
    """The JSON object format of the Trace Event Format document."""
    found = _traced(_convolutions(tmp_path), "onnxruntime")
    read = json.loads(json.dumps(chrome_events(found, title="m"), allow_nan=False))
    assert read["displayTimeUnit"] in ("ms", "ns")
    complete = [one for one in read["traceEvents"] if one["ph"] == "X"]
    named = {one["tid"] for one in read["traceEvents"] if one["name"] == "thread_name"}
    assert len(complete) == len(found.steps)
    for one in complete:
        assert {"name", "cat", "ph", "ts", "dur", "pid", "tid"} <= set(one)
        assert one["ts"] >= 0
        assert one["dur"] > 0
        assert one["tid"] in named
    for one, after in itertools.pairwise(complete):
        assert after["ts"] >= one["ts"]


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_planted_dequantize_island_is_named(tmp_path: Path) -> None:
    """Two int8 convolutions with an Erf between them, which has no int8 kernel."""
    scale, zero = np.float32(0.05), np.int8(0)

    def quantized(name: str, weights: np.ndarray) -> dict[str, np.ndarray]:
        return {name: (weights * 20).clip(-127, 127).astype(np.int8)}

    nodes = [
        ("QuantizeLinear", ["x", "s", "z"], ["xq"], {}),
        ("DequantizeLinear", ["xq", "s", "z"], ["xd"], {}),
        ("DequantizeLinear", ["w1", "s", "z"], ["w1d"], {}),
        ("Conv", ["xd", "w1d"], ["a"], {"pads": [1] * 4}),
        ("QuantizeLinear", ["a", "s", "z"], ["aq"], {}),
        ("DequantizeLinear", ["aq", "s", "z"], ["ad"], {}),
        ("Erf", ["ad"], ["e"], {}),
        ("QuantizeLinear", ["e", "s", "z"], ["eq"], {}),
        ("DequantizeLinear", ["eq", "s", "z"], ["ed"], {}),
        ("DequantizeLinear", ["w2", "s", "z"], ["w2d"], {}),
        ("Conv", ["ed", "w2d"], ["b"], {"pads": [1] * 4}),
        ("QuantizeLinear", ["b", "s", "z"], ["bq"], {}),
        ("DequantizeLinear", ["bq", "s", "z"], ["y"], {}),
    ]
    constants = {
        "s": scale, "z": zero, **quantized("w1", _weights(16, 16, 3, 3)),
        **quantized("w2", _weights(16, 16, 3, 3)),
    }  # fmt: skip
    model = onnx_model(nodes, {"x": ("float32", SIZE)}, {"y": ("float32", SIZE)}, constants)
    for node in model.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    found = advice(_traced(_saved(tmp_path, model), "onnxruntime").steps)
    (island,) = [one for one in found if one.kind == "dequantize-island"]
    assert island.steps == ("Erf_e",)
    assert "Erf_e (Erf)" in island.text
    assert 0 < island.share < 1


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_planted_layout_transpose_and_a_round_trip_are_named(tmp_path: Path) -> None:
    nodes = [
        ("Transpose", ["x"], ["t"], {"perm": [0, 2, 3, 1]}),
        ("Softmax", ["t"], ["s"], {"axis": -1}),
        ("Cast", ["s"], ["d"], {"to": 11}),  # float64
        ("Floor", ["d"], ["f"], {}),
        ("Cast", ["f"], ["y"], {"to": 1}),
    ]
    shape = (1, 64, 64, 16)
    model = onnx_model(nodes, {"x": ("float32", (1, 16, 64, 64))}, {"y": ("float32", shape)})
    for node in model.graph.node:
        node.name = f"planted_{node.op_type}_{node.output[0]}"
    found = {one.kind: one for one in advice(_traced(_saved(tmp_path, model), "onnxruntime").steps)}
    assert "planted_Transpose_t" in found["layout-transpose"].steps
    assert "convert" in found["layout-transpose"].text
    trip = found["dtype-round-trip"]
    assert [name.rpartition("_")[2] for name in trip.steps] == ["d", "y"]
    assert "compute in float32 throughout" in trip.text


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_clean_network_gets_no_advice_on_casts_or_islands(tmp_path: Path) -> None:
    found = advice(_traced(_convolutions(tmp_path), "onnxruntime").steps)
    assert {one.kind for one in found} <= {"layout-transpose"}


def _step(name: str, kind: str, device: str = "NPU", **others: Any) -> Step:
    usual = {"inputs": (), "outputs": (name,), "shapes": (), "dtypes": ("float32",)}
    return Step(name, kind, device=device, start_ns=0, duration_ns=100, **{**usual, **others})


def test_operators_left_on_the_processor_are_named() -> None:
    steps = [_step("a", "Conv"), _step("b", "Resize", "CPU"), _step("c", "Conv")]
    (found,) = advice(steps)
    assert isinstance(found, Advice)
    assert (found.kind, found.steps) == ("wrong-device", ("b",))
    assert found.share == pytest.approx(1 / 3)
    assert "1 of 3 operators (Resize) ran on CPU, not on NPU" in found.text
    assert advice([_step("a", "Conv", "CPU")]) == []


def test_float_at_the_end_of_a_quantized_model_is_no_island() -> None:
    steps = [
        _step("q", "QLinearConv"),
        _step("d", "DequantizeLinear", inputs=("q",)),
        _step("s", "Softmax", inputs=("d",)),
    ]
    assert advice(steps) == []


def test_engines_without_a_profiler_say_so(tmp_path: Path) -> None:
    for name, suffix in (("litert", ".tflite"), ("ncnn", ".param")):
        path = tmp_path / f"m{suffix}"
        path.write_bytes(b"x")
        with pytest.raises(MissingToolError, match=r"(LiteRT|ncnn)'s .*--engine onnxruntime"):
            trace(Contender("m", path, 1, name))
