"""One suite for every quantizer: smaller, close to float, and refused where nothing fits."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cnn import cnn_data, cnn_scores, small_cnn
from small_net import net_images, net_onnx, net_scores

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.calibration import calibration_request
from edgekit.compress.quantize import quantize
from edgekit.compress.quantize_openvino import quantize_openvino
from edgekit.compress.quantizers import candidate_schemes
from edgekit.compress.scheme import COMPUTE_OPERATORS, Scheme, broken_rule, parse_scheme
from edgekit.convert import convert
from edgekit.data import open_dataset
from edgekit.device import Quantization
from edgekit.errors import ModelError, UsageError
from edgekit.graph import read_graph
from edgekit.precision import broken_promise, stored_type
from edgekit_runtime import load

FORMATS = [
    pytest.param("onnx", marks=pytest.mark.needs("onnxruntime")),
    pytest.param("openvino", marks=[pytest.mark.needs("openvino"), pytest.mark.needs("nncf")]),
    pytest.param(
        "tflite", marks=[pytest.mark.needs("onnx2tf"), pytest.mark.needs("litert_quantizer")]
    ),
]
SCHEMES = [
    Scheme("int8-static"),
    Scheme("int8-static", COMPUTE_OPERATORS, reduce_range=True),
    Scheme("int8-weights"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.id}{'-7bit' * s.reduce_range}")
@pytest.mark.parametrize("fmt", FORMATS)
def test_close_to_float_and_really_int8(fmt, scheme, folder, cache) -> None:
    if fmt == "tflite":  # its kernels do not saturate
        scheme = replace(scheme, reduce_range=False)
    source = open_model(small_cnn(folder / "cnn.onnx"))
    data = open_dataset(str(cnn_data(folder / "data.npz")), source.inputs, cache)
    model = convert(source, fmt, cache=cache)
    before = [file.read_bytes() for file in model.files]
    made = quantize(model, scheme, data, np.arange(120), cache=cache)
    assert made.sha256 != model.sha256
    assert [file.read_bytes() for file in model.files] == before, "sources are never written"
    # Seen in calibration, so that clipping plays no part: this is about the grid.
    images = np.asarray(data.arrays["image"][:80])
    with load(made.path) as session:
        found = np.concatenate([session.run({"image": i[None]})["scores"] for i in images])
    wanted = cnn_scores(images)
    noise = np.mean((found - wanted) ** 2)
    sqnr_db = 10 * np.log10(np.mean(wanted**2) / max(noise, 1e-30))
    # 8 bits on a network of two layers keep 25 dB and more; float would be over 100.
    assert 20 < sqnr_db < 90
    assert made.provenance[-1]["scheme"] == scheme.to_json()


@pytest.mark.parametrize("fmt", FORMATS)
def test_calibration_decides_static_and_only_static(fmt, folder, cache) -> None:
    source = open_model(small_cnn(folder / "cnn.onnx"))
    data = open_dataset(str(cnn_data(folder / "data.npz")), source.inputs, cache)
    model = convert(source, fmt, cache=cache)
    hashes = {
        kind: [
            quantize(model, Scheme(kind), data, np.arange(n), cache=cache).sha256 for n in (16, 64)
        ]
        for kind in ("int8-static", "int8-weights")
    }
    assert hashes["int8-static"][0] != hashes["int8-static"][1]
    assert hashes["int8-weights"][0] == hashes["int8-weights"][1]


def test_weights_in_constant_nodes_and_old_opsets_are_prepared(tmp_path, cache) -> None:
    path = small_cnn(tmp_path / "old.onnx", constants=True, opset=11)
    source = open_model(path)
    data = open_dataset(str(cnn_data(tmp_path / "data.npz")), source.inputs, cache)
    made = quantize(source, Scheme("int8-static"), data, np.arange(32), cache=cache)
    images = np.asarray(data.arrays["image"][:20])
    with load(made.path) as session:
        found = session.run({"image": images})["scores"]
    assert np.corrcoef(found.ravel(), cnn_scores(images).ravel())[0, 1] > 0.99


@pytest.mark.needs("onnxruntime")
def test_nothing_to_quantize_is_refused(tmp_path, cache) -> None:
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["y"])], "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1, 12, 12])],
    )  # fmt: skip
    path = tmp_path / "relu.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=7), path
    )
    source = open_model(path)
    data = open_dataset(str(cnn_data(tmp_path / "data.npz")), source.inputs, cache)
    scheme = Scheme("int8-static", COMPUTE_OPERATORS)
    with pytest.raises(ModelError, match="nothing was quantized"):
        quantize(source, scheme, data, np.arange(16), cache=cache)


# --- OpenVINO ------------------------------------------------------------------------------------

#: scheme -> the SQNR in decibel that it reaches at least: 6 a bit, less what clipping and the sums
#: cost
BY_NNCF = {
    "fp16": 55, "int8-static": 26, "int8-static:per-tensor": 20, "int8-static:7-bit": 22,
    "int8-static:percentile": 15,
    "int8-static:mse": 24, "int8-static:bias-correction": 26,
    "int8-static:smooth-quant": 18, "int8-weights": 36, "int8-weights:asymmetric-weights": 36,
    "int4-weights": 12, "int4-weights:block=32,asymmetric-weights": 12,
    "int4-weights:learned-rounding": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def float_ir(folder, cache):
    """The IR, and `made(scheme)`: what NNCF makes of it, in this process, with its facts."""
    source = open_model(net_onnx(folder / "net.onnx"))
    np.savez(folder / "net.npz", image=net_images().transpose(0, 3, 1, 2))
    data = open_dataset(str(folder / "net.npz"), source.inputs, cache)
    model = convert(source, "openvino", cache=cache)
    request = calibration_request(data, np.arange(len(net_images())), model.inputs, folder)

    def made(text: str, **more):
        target = Path(tempfile.mkdtemp(dir=folder)) / "model.xml"
        scheme = {**parse_scheme(text).to_json(), **more}
        return target, quantize_openvino(list(model.arguments), str(target), scheme, request)

    return model, made


def net_sqnr_db(path) -> float:
    """Computed as the file says: plug-ins without VNNI lose more where pair sums saturate."""
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = net_images().transpose(0, 3, 1, 2)
    found, wanted = compiled(images)["scores"], net_scores(net_images())
    return 10 * np.log10(np.mean(wanted**2) / np.mean((found - wanted) ** 2))


@pytest.mark.needs("nncf")
def test_nncf_keeps_what_each_scheme_promises(float_ir) -> None:
    found = {text: net_sqnr_db(float_ir[1](text)[0]) for text in BY_NNCF}
    assert {text: db for text, db in found.items() if db < BY_NNCF[text]} == {}
    assert found["int4-weights:learned-rounding"] > found["int4-weights"] + 2


@pytest.mark.needs("nncf")
def test_openvino_ranges_hold_what_a_single_sample_reaches(float_ir) -> None:
    import openvino as ov

    made = ov.Core().read_model(float_ir[1]("int8-static")[0])
    first = next(op for op in made.get_ordered_ops() if op.get_type_name() == "FakeQuantize")
    low, high = (first.input_value(at).get_node().data.item() for at in (1, 2))
    images = net_images()
    step = float(images.max() - images.min()) / 255
    assert low == pytest.approx(images.min(), abs=step)
    assert high == pytest.approx(images.max(), abs=step)


@pytest.mark.needs("nncf")
def test_openvino_weights_are_stored_as_asked(float_ir) -> None:
    made, facts = float_ir[1]("int4-weights:block=32")
    assert facts["stored"] == {"i4": 2, "i8": 1}
    assert facts["notes"] == [
        "1 of 3 weights are in 8 bits: convolutions, or rows that do not divide into blocks"
    ]
    assert float_ir[1]("int8-weights:asymmetric-weights")[1]["stored"] == {"u8": 3}
    stored = sum(file.stat().st_size for file in made.parent.glob("*.bin"))
    # 4 bits each and a float16 scale for each 32; the convolution's 8 bits and scales, and shapes
    assert stored < (128 * 64 + 64 * 10) * (0.5 + 2 / 32) + 500


@pytest.mark.needs("nncf")
def test_openvino_operators_that_are_to_stay_float_do(float_ir) -> None:
    model, make = float_ir
    conv = next(o for o in read_graph(model.path).operators if o.type == "Convolution")
    for text in ("int8-static", "int8-weights"):
        made = read_graph(make(text, keep=[conv.outputs[0]])[0])
        types = {
            one.type: stored_type(made, one.inputs[1])
            for one in made.operators
            if one.type in ("Convolution", "MatMul")
        }
        assert types == {"Convolution": "float32", "MatMul": "int8"}
    with pytest.raises(UsageError, match="no operator's first output is 'nope'"):
        make("int8-static", keep=["nope"])


@pytest.mark.needs("nncf")
def test_openvino_is_never_quantized_twice(float_ir, folder) -> None:
    made, _ = float_ir[1]("int8-weights")
    with pytest.raises(ModelError, match="quantized already"):
        quantize_openvino([str(made)], str(folder / "twice.xml"), Scheme("fp16").to_json(), None)


# --- what the profile's rules ask for is what comes out -----------------------------------------


def flat_gemm(path, *, size=64):
    """x @ w whose every 8-bit product pair is as large as can be: it saturates what can."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.full((size, 8), 0.5, np.float32)
    weights[:, ::2] *= -1
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path
    )
    rows = np.random.default_rng(0).uniform(0, 1, (64, size)).astype(np.float32)
    rows[0], rows[1] = 1, 0
    np.savez(path.with_suffix(".npz"), x=rows)
    return rows, rows @ weights


@pytest.mark.parametrize("fmt", FORMATS)
def test_sums_do_not_saturate_with_the_schemes_of_a_profile_with_reduce_range(
    fmt, tmp_path, cache
) -> None:
    """On x86 without VNNI, 8-bit pair sums lose half of these results; with the scheme the profile
    leads to nothing is lost anywhere. LiteRT keeps 8 bits: its kernels widen first."""
    rows, wanted = flat_gemm(tmp_path / "gemm.onnx")
    source = open_model(tmp_path / "gemm.onnx")
    data = open_dataset(str(tmp_path / "gemm.npz"), source.inputs, cache)
    model = convert(source, fmt, cache=cache)
    scheme = candidate_schemes(fmt, Quantization(reduce_range=True))[2]
    assert scheme.kind == "int8-static"
    made = quantize(model, scheme, data, np.arange(64), cache=cache)
    with load(made.path) as session:
        name, out = session.inputs[0].name, session.outputs[0].name
        found = np.concatenate([session.run({name: row[None]})[out] for row in rows])
    assert np.abs(found - wanted).max() < 0.06 * np.abs(wanted).max()


RULES = [
    Quantization(per_channel=False),
    Quantization(symmetric=True),
    Quantization(activations=["int8"]),
    Quantization(per_channel=False, symmetric=True, activations=["int8"]),
]


@pytest.mark.parametrize("rules", RULES, ids=["per-tensor", "symmetric", "int8", "all"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_rule_asked_for_is_kept_in_the_model_that_comes_out(fmt, rules, folder, cache) -> None:
    scheme = candidate_schemes(fmt, rules)[2]
    if broken_rule(scheme, rules, frozenset(["float32"])):
        assert fmt == "openvino"  # cannot be told to use int8, so is never planned
        return
    source = open_model(small_cnn(folder / "cnn.onnx"))
    data = open_dataset(str(cnn_data(folder / "data.npz")), source.inputs, cache)
    model = convert(source, fmt, cache=cache)
    made = quantize(model, scheme, data, np.arange(60), cache=cache)
    graph = read_graph(made.path)
    assert broken_promise(graph, rules) is None
    # The check has teeth: without the rule, the same model breaks it.
    free = quantize(
        model, candidate_schemes(fmt, Quantization())[2], data, np.arange(60), cache=cache
    )
    if not rules.per_channel:
        assert "scale per channel" in (broken_promise(read_graph(free.path), rules) or "")
    float_model = read_graph(model.path)
    if rules.activations:
        assert "in float" in (broken_promise(float_model, rules) or "")
