"""What is peculiar to TFLite: TensorFlow's converter, ranges from outside, weights in 4 bits."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from small_net import net_images, net_scores

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.calibration import calibration_request
from edgekit.compress.quantize_tflite import quantize_tflite
from edgekit.compress.scheme import parse_scheme
from edgekit.data import open_dataset
from edgekit.errors import ModelError, UsageError
from edgekit.graph import read_graph
from edgekit_runtime import load

pytestmark = [
    pytest.mark.needs("tensorflow"),
    pytest.mark.needs("litert_quantizer"),
    # litert-quantizer's own use of the interpreter
    pytest.mark.filterwarnings(r"ignore:\s*Warning. Enabling:UserWarning"),
]

#: scheme -> the SQNR in decibel that it reaches at least; 6 a bit, less what clipping and the sums
#: cost. Symmetric activations lose a bit behind every Relu.
BY_TENSORFLOW = {
    "fp16": 60, "int8-dynamic": 35, "int8-static": 28, "int8-static:per-tensor": 24, "int16x8": 35,
}  # fmt: skip
BY_LITERT = {
    "fp16": 60, "int8-dynamic": 35, "int8-static": 28, "int8-static:per-tensor": 24, "int16x8": 35,
    "int8-static:mse": 28,
    "int8-static:percentile": 20, "int8-static:entropy": 10, "int8-weights": 38,
    "int4-weights": 13, "int4-weights:learned-rounding": 15,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """float.tflite, and 0.tflite ... for the schemes in order."""
    folder = tmp_path_factory.mktemp("tf")
    np.savez(folder / "data.npz", image=net_images())
    program = Path(__file__).parents[1] / "tf_quantized.py"
    subprocess.run(
        [sys.executable, program, folder, *BY_TENSORFLOW], check=True, capture_output=True
    )
    return folder


def by_litert(folder: Path, text: str, **more) -> tuple[Path, dict]:
    source = open_model(folder / "float.tflite")
    data = open_dataset(str(folder / "data.npz"), source.inputs, Cache(folder / "cache"))
    work = Path(tempfile.mkdtemp(dir=folder))
    images = range(len(data.arrays["image"]))
    request = calibration_request(data, images, source.inputs, work)
    scheme = {**parse_scheme(text).to_json(), **more}
    target = work / "made.tflite"
    return target, quantize_tflite([str(source.path)], str(target), scheme, request)


def scores(path: Path) -> np.ndarray:
    with load(path) as session:
        assert [one.name for one in session.inputs] == ["image"]
        assert session.inputs[0].dtype == session.outputs[0].dtype == "float32"
        return np.concatenate([session.run({"image": i[None]})["scores"] for i in net_images()])


def sqnr_db(path: Path) -> float:
    wanted = net_scores(net_images())
    return 10 * np.log10(np.mean(wanted**2) / np.mean((scores(path) - wanted) ** 2))


def test_tensorflow_quantizes_on_the_way_under_the_names_of_the_plain_conversion(folder) -> None:
    assert sqnr_db(folder / "float.tflite") > 100
    found = {text: sqnr_db(folder / f"{at}.tflite") for at, text in enumerate(BY_TENSORFLOW)}
    assert {text: db for text, db in found.items() if db < BY_TENSORFLOW[text]} == {}
    per_tensor = read_graph(folder / "3.tflite")
    assert not any(one.per_channel for one in per_tensor.tensors.values())
    assert any(one.per_channel for one in read_graph(folder / "2.tflite").tensors.values())
    types = {one.dtype for one in read_graph(folder / "4.tflite").tensors.values()}
    assert {"int16", "int8"} <= types
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["int8-static"]["signature"] == "serving_default"


def test_litert_quantizer_keeps_what_each_scheme_promises(folder) -> None:
    found = {text: sqnr_db(by_litert(folder, text)[0]) for text in BY_LITERT}
    assert {text: db for text, db in found.items() if db < BY_LITERT[text]} == {}
    assert found["int4-weights:learned-rounding"] > found["int4-weights"] + 1
    # Both tools take the least and the greatest value seen.
    assert abs(found["int8-static"] - sqnr_db(folder / "2.tflite")) < 1


def test_a_range_holds_what_a_single_sample_reaches(folder) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    made = interpreter.Interpreter(str(by_litert(folder, "int8-static")[0]))
    images = net_images()
    wanted = (images.max() - images.min()) / 255
    steps = [one["quantization"][0] for one in made.get_tensor_details()
             if tuple(one["shape"][1:]) == (8, 8, 1) and one["dtype"] == np.int8]  # fmt: skip
    assert steps == pytest.approx([wanted], rel=1e-3)


def test_4_bits_where_there_are_kernels(folder) -> None:
    made, facts = by_litert(folder, "int4-weights:block=32")
    assert facts["stored"] == {"int4": 3}
    assert facts["notes"] == [
        "2 matrix products have weights in blocks: their activations are quantized at run time, "
        "right in XNNPACK only"
    ]
    weights = sum(t.size_bytes or 0 for t in read_graph(made).tensors.values() if t.dtype == "int4")
    assert weights == (128 * 64 + 64 * 10 + 9 * 8) / 2


def test_operators_that_are_to_stay_float_do(folder) -> None:
    graph = read_graph(folder / "float.tflite")
    conv = next(one for one in graph.operators if one.type == "CONV_2D")
    made = read_graph(by_litert(folder, "int8-static", keep=[conv.outputs[0]])[0])
    types = {
        one.type: made.tensors[one.inputs[1]].dtype
        for one in made.operators
        if one.type in ("CONV_2D", "FULLY_CONNECTED")
    }
    assert types == {"CONV_2D": "float32", "FULLY_CONNECTED": "int8"}
    with pytest.raises(UsageError, match="no operator's first output is 'nope'"):
        by_litert(folder, "int8-static", keep=["nope"])


def test_never_quantized_twice(folder) -> None:
    scheme = parse_scheme("int8-dynamic").to_json()
    for made in ("2.tflite", "1.tflite"):
        with pytest.raises(ModelError, match="quantized already"):
            quantize_tflite([str(folder / made)], str(folder / "twice.tflite"), scheme, None)
