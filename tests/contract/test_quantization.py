"""`edgekit quantize`: what is refused before anything is built, and the account of what was."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from cnn import cnn_data, small_cnn
from profile_rules import BASE

from edgekit.cache import Cache
from edgekit.cli.quantize import quantize as quantize_command
from edgekit.compress.scheme import Scheme, parse_scheme
from edgekit.errors import EdgeKitError, ModelError, UsageError
from edgekit.facts import this_machine
from edgekit.graph import read_graph
from edgekit.observer import Observer
from edgekit.quantization import Quantized, QuantizeRequest, quantize_model, target_of

pytestmark = pytest.mark.needs("onnxruntime")
WITH_OPENVINO = pytest.mark.needs("openvino")
WITH_TFLITE = [pytest.mark.needs("onnx2tf"), pytest.mark.needs("litert_quantizer")]


class Phases(Observer):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def phase(self, name: str) -> None:
        self.seen.append(name)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small_cnn(folder / "cnn.onnx")
    cnn_data(folder / "data.npz", 200)
    return folder


def made(
    folder: Path, cache: Cache, scheme: str = "int8-static", target: str = "onnx", **more
) -> Quantized:
    options = {"model": str(folder / "cnn.onnx"), "data": str(folder / "data.npz"), **more}
    request = QuantizeRequest(scheme=parse_scheme(scheme), target=target, **options)
    return quantize_model(request, cache=cache)


def profile(folder: Path, rules: str) -> str:
    text = BASE.format(
        id="mine", arch=this_machine().arch, engine="", rules=f"[quantization]\n{rules}",
        fields=', "quantization"',
    )  # fmt: skip
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


@pytest.mark.parametrize(
    "target",
    [
        "onnx",
        pytest.param("openvino", marks=WITH_OPENVINO),
        pytest.param("tflite", marks=WITH_TFLITE),
    ],
)
def test_every_operator_is_accounted_for(target, folder, cache) -> None:
    found = made(folder, cache, target=target)
    multiplying = [one for one in found.operators if one.weights]
    assert len(multiplying) == 2  # Conv and Gemm
    for one in multiplying:
        assert (one.weights, one.kept) == ("int8", "")
        assert one.computed in ("int8", "uint8")
    noise = [one.sqnr_db for one in found.operators if one.sqnr_db is not None]
    # 8 bits give 6 dB each, less what the distribution wastes; float would be over 100.
    assert noise and all(10 < value < 80 or value == 200 for value in noise)
    assert found.evaluation["samples"] == 150  # 50 of 200 were for calibration
    assert found.reason == ""


def test_what_stays_float_says_why(folder, cache, tmp_path) -> None:
    ruled = made(folder, cache, profile=profile(tmp_path, 'float_operators = ["Gemm"]'))
    assert ruled.scheme.keep == ("scores",)
    gemm = next(one for one in ruled.operators if one.type == "Gemm")
    assert gemm.kept == "a rule of mine (quantization.float_operators)"
    assert (gemm.computed, gemm.weights) == ("float32", "float32")
    conv = next(one for one in ruled.operators if one.type == "Conv")
    assert conv.weights == "int8"
    asked = made(folder, cache, keep=("scores",))
    assert next(o for o in asked.operators if o.type == "Gemm").kept == "asked to stay float"


def test_a_profile_completes_the_scheme_and_the_file_obeys(folder, cache, tmp_path) -> None:
    rules = profile(tmp_path, "per_channel = false\nreduce_range = true")
    found = made(folder, cache, profile=rules)
    assert not found.scheme.per_channel and found.scheme.reduce_range
    graph = read_graph(found.artifact.path)
    assert not [name for name, one in graph.tensors.items() if one.per_channel]
    model = onnx.load(found.artifact.path)
    weights = [
        onnx.numpy_helper.to_array(one) for one in model.graph.initializer
        if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1
    ]  # fmt: skip
    assert weights and max(int(np.abs(one.astype(int)).max()) for one in weights) <= 64
    # the same without the rules has what they forbid
    free = read_graph(made(folder, cache).artifact.path)
    assert [name for name, one in free.tensors.items() if one.per_channel]


REFUSED = {
    "unknown scheme": (("int7",), "no scheme 'int7'"),
    "unknown word": (("int8-static:often",), "unknown word 'often'"),
    "not of the format": (("int16x8", "openvino"), "int16x8 cannot be made of OpenVINO IR"),
    "not of the tool": (("int8-static:entropy", "openvino"), "nncf cannot do entropy"),
    "bf16": (("bf16",), "bf16 cannot be made of ONNX"),
    "ncnn": (("fp16", "ncnn"), "nothing quantizes it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_impossible_is_refused_before_anything_is_read(case, cache, tmp_path) -> None:
    arguments, words = REFUSED[case]
    with pytest.raises(UsageError) as error:
        made(tmp_path, cache, *arguments, model="no-such-model.onnx")
    assert words in str(error.value)


RULED = {
    "activations": ('activations = ["int8"]', "int8-dynamic", "quantization.activations"),
    "weights": ('weights = ["float32"]', "int8-static", "quantization.weights"),
    "symmetric": ("symmetric = true", "int8-dynamic", "quantization.symmetric"),
    "blocks": ("per_channel = false", "int4-weights", "quantization.per_channel"),
}


@pytest.mark.parametrize("case", RULED)
def test_what_the_profile_forbids_is_refused_with_the_rules_source(
    case, folder, cache, tmp_path
) -> None:
    rules, scheme, field = RULED[case]
    observer = Phases()
    with pytest.raises(UsageError) as error:
        request = QuantizeRequest(
            str(folder / "cnn.onnx"), parse_scheme(scheme), "onnx",
            data=str(folder / "data.npz"), profile=profile(tmp_path, rules),
        )  # fmt: skip
        quantize_model(request, observer, cache)
    assert field in str(error.value) and "this benchmark" in str(error.value)
    assert "quantize" not in observer.seen


def test_nothing_is_quantized_twice(folder, cache, tmp_path) -> None:
    done = made(folder, cache).artifact.path
    with pytest.raises(ModelError, match=r"quantized already: .*give the float model"):
        made(folder, cache, model=str(done))


def test_without_a_device_it_is_for_this_machine(folder, cache) -> None:
    found = made(folder, cache)
    here = this_machine().quantization.reduce_range
    assert found.scheme.reduce_range is here
    assert any("weights are in 7 bits" in note for note in found.notes) is here


def test_no_data_is_said_loudly(folder, cache) -> None:
    found = made(folder, cache, data=None)
    assert any(note.startswith("NO DATA") for note in found.notes)
    assert found.evaluation["name"] == "cosine"


def test_an_unknown_tensor_to_keep_is_named(folder, cache) -> None:
    with pytest.raises(UsageError, match="--keep-float nowhere"):
        made(folder, cache, keep=("nowhere",))


def test_too_great_a_drop_writes_no_model(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out.onnx"
    with pytest.raises(EdgeKitError) as error:
        quantize_command(
            str(folder / "cnn.onnx"), scheme="int8-static", data=str(folder / "data.npz"),
            metric="cosine", max_drop=0.0, out=out,
        )  # fmt: skip
    assert error.value.exit_code == 1 and "--keep writes it" in str(error.value)
    assert not out.exists()
    noted = json.loads((tmp_path / "out.onnx.rejected.json").read_text())
    assert noted["quantization"]["passed"] is False


def test_what_is_written_says_what_was_done(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out.onnx"
    quantize_command(
        str(folder / "cnn.onnx"), scheme="int8-static:percentile", data=str(folder / "data.npz"),
        out=out, json=True,
    )  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "edgekit.quantize/1"
    assert Scheme.from_json(document["scheme"]).ranges == "percentile"
    assert [Path(one).name for one in document["files"]] == ["out.onnx", "out.onnx.provenance.json"]
    assert {one["type"] for one in document["operators"]} == {"Conv", "MaxPool", "Flatten", "Gemm"}
    noted = json.loads((tmp_path / "out.onnx.provenance.json").read_text())
    assert noted["steps"][-1]["scheme"]["ranges"] == "percentile"


@pytest.mark.parametrize(
    ("source", "out", "asked", "target"),
    [
        ("keras", None, None, "tflite"),
        ("torch", None, None, "onnx"),
        ("onnx", "m.tflite", None, "tflite"),
        ("onnx", None, "openvino", "openvino"),
        ("openvino", None, None, "openvino"),
    ],
)
def test_the_format_is_asked_for_or_follows(source, out, asked, target) -> None:
    assert target_of(source, Path(out) if out else None, asked) == target


def test_two_formats_asked_for_is_an_error() -> None:
    with pytest.raises(UsageError, match="--to says"):
        target_of("onnx", Path("m.tflite"), "onnx")
