"""What is peculiar to ONNX: odd graphs, weights stored in few bits, NNCF's back end."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cnn import cnn_data, cnn_scores, small_cnn
from onnx import TensorProto, helper, numpy_helper

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.calibration import CalibrationSamples, calibration_request
from edgekit.compress.quantize_onnx import quantize_onnx
from edgekit.compress.scheme import COMPUTE_OPERATORS, Scheme
from edgekit.data import open_dataset
from edgekit.errors import ModelError, UsageError

pytestmark = pytest.mark.needs("onnxruntime")

RNG = np.random.default_rng(11)
FLOAT = TensorProto.FLOAT


def value(name, shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def tensor(array, name):
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def save(path, nodes, inputs, outputs, weights, *, opset=17):
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def run(path, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def sqnr_db(found, wanted):
    return 10 * np.log10(np.mean(wanted**2) / max(np.mean((found - wanted) ** 2), 1e-30))


def quantized(source, scheme, folder, arrays=None, **options):
    """The model made, and its facts; in this process."""
    target = folder / "made.onnx"
    request = None
    if arrays is not None:
        np.savez(folder / "data.npz", **arrays)
        artifact = open_model(source)
        data = open_dataset(str(folder / "data.npz"), artifact.inputs, Cache(folder / "cache"))
        request = calibration_request(data, np.arange(data.count), artifact.inputs, folder)
    made = Scheme(scheme, **options).to_json()
    return target, quantize_onnx([str(source)], str(target), made, request)


def text_classifier(path):
    """Embedding (600, 96), two layers with shared weights, attention-like products, Gemm."""
    weights = {
        "table": RNG.normal(0, 1, (600, 96)), "w": RNG.normal(0, 0.1, (96, 96)),
        "head": RNG.normal(0, 0.2, (7, 96)), "bias": RNG.normal(0, 1, 7),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["a"]),
        helper.make_node("Tanh", ["a"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["b"]),
        helper.make_node("ReduceMean", ["b"], ["m"], axes=[1], keepdims=0),
        helper.make_node("Gemm", ["m", "head", "bias"], ["y"], transB=1, alpha=0.5, beta=2.0),
    ]
    save(
        path, nodes, [value("tokens", ["N", 12], TensorProto.INT64)], [value("y", ["N", 7])],
        [tensor(array, name) for name, array in weights.items()],
    )  # fmt: skip
    w = {name: array.astype(np.float32).astype(np.float64) for name, array in weights.items()}

    def scores(tokens):
        mean = (np.tanh(w["table"][tokens] @ w["w"]) @ w["w"]).mean(1)
        return 0.5 * mean @ w["head"].T + 2 * w["bias"]

    return scores


WEIGHTS_ONLY = [
    # kind, options, least SQNR, greatest size
    ("fp16", {}, 60, 0.53),
    ("int8-weights", {}, 35, 0.30),
    ("int8-weights", {"weights_symmetric": False, "per_channel": False}, 30, 0.30),
    ("int4-weights", {"block": 64}, 14, 0.20),
    ("int4-weights", {"block": 32, "weights_symmetric": False}, 14, 0.21),
]


@pytest.mark.parametrize(("kind", "options", "least_db", "most"), WEIGHTS_ONLY)
def test_weights_in_few_bits_need_no_data_and_compute_nearly_the_same(
    kind, options, least_db, most, tmp_path
) -> None:
    scores = text_classifier(tmp_path / "text.onnx")
    tokens = RNG.integers(0, 600, (64, 12))
    target, facts = quantized(tmp_path / "text.onnx", kind, tmp_path, **options)
    wanted, found = scores(tokens), run(target, {"tokens": tokens})[0]
    assert found.dtype == np.float32
    assert least_db < sqnr_db(found, wanted) < 110
    overhead = 3000  # names and operators, which real models have little of
    assert target.stat().st_size < most * (tmp_path / "text.onnx").stat().st_size + overhead
    stored = {"fp16": "float16", "int8-weights": "int8", "int4-weights": "4"}[kind]
    assert all(stored in one for one in facts["stored"])
    assert sum(facts["stored"].values()) >= 3


def test_fp16_is_numpys_rounding_and_leaves_what_it_cannot_hold(tmp_path) -> None:
    weights = RNG.normal(0, 1, (40, 30)).astype(np.float32)
    great = weights * 1e5
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"]),
         helper.make_node("MatMul", ["x", "great"], ["z"])],
        [value("x", ["N", 40])], [value("y", ["N", 30]), value("z", ["N", 30])],
        [tensor(weights, "w"), tensor(great, "great")],
    )  # fmt: skip
    target, facts = quantized(path, "fp16", tmp_path)
    y, z = run(target, {"x": np.eye(40, dtype=np.float32)})
    assert np.array_equal(y, weights.astype(np.float16).astype(np.float32))
    assert np.array_equal(z, great)
    assert "1 weights do not fit into float16 (beyond 65504" in facts["notes"][0]


def test_int8_weights_are_within_half_a_step(tmp_path) -> None:
    weights = (RNG.normal(0, 1, (40, 30)) * np.geomspace(0.01, 10, 30)).astype(np.float32)
    path = save(
        tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", ["N", 40])], [value("y", ["N", 30])], [tensor(weights, "w")],
    )  # fmt: skip
    target, _ = quantized(path, "int8-weights", tmp_path)
    model = onnx.load(target)
    step = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    found = stored[step.input[0]] * stored[step.input[1]]
    half_steps = np.abs(weights).max(0) / 127 / 2
    assert (np.abs(found - weights) <= half_steps * 1.0001).all()


STATIC = [
    ("int8-static", {"ranges": "entropy"}),
    ("int8-static", {"activations": "int8", "symmetric": True}),
    ("int8-static", {"per_channel": False, "weights_symmetric": False}),
    ("int16x8", {"activations": "int16"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), STATIC, ids=str)
def test_each_static_scheme_is_close_and_in_the_type_asked_for(kind, options, tmp_path) -> None:
    path = small_cnn(tmp_path / "cnn.onnx")
    images = np.load(cnn_data(tmp_path / "images.npz"))["image"][:60]
    narrow = kind == "int8-static"  # or this machine's CPU may saturate
    target, facts = quantized(
        path, kind, tmp_path, {"image": images}, reduce_range=narrow, **options
    )
    found = run(target, {"image": images})[0]
    assert 20 < sqnr_db(found, cnn_scores(images)) < 90
    assert facts["stored"] == {"int8": 2}
    model = onnx.load(target)
    stored = {one.name: one for one in model.graph.initializer}
    zero_points = [
        stored[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"
    ]
    types = {TensorProto.DataType.Name(one.data_type).lower() for one in zero_points}
    assert types == {options.get("activations", "uint8")}
    if options.get("symmetric"):
        assert all((numpy_helper.to_array(one) == 0).all() for one in zero_points)


KINDS = [
    ("int8-static", {}), ("int8-dynamic", {}), ("int8-weights", {}), ("fp16", {}),
    ("int4-weights", {"block": 32}), ("int16x8", {"activations": "int16"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_what_is_kept_stays_float(kind, options, tmp_path) -> None:
    text_classifier(tmp_path / "text.onnx")
    arrays = {"tokens": RNG.integers(0, 600, (20, 12))}
    target, _ = quantized(
        tmp_path / "text.onnx", kind, tmp_path, arrays, keep=("y",), **options
    )  # fmt: skip
    stored = {(one.data_type, tuple(one.dims)) for one in onnx.load(target).graph.initializer}
    # int8-dynamic makes MatMul and Add of the Gemm.
    assert stored & {(FLOAT, (7, 96)), (FLOAT, (96, 7))}
    assert (FLOAT, (96, 96)) not in stored


def test_unknown_names_to_keep_are_refused(tmp_path) -> None:
    path = small_cnn(tmp_path / "cnn.onnx")
    with pytest.raises(UsageError, match="'nope', which is to stay float"):
        quantized(path, "int8-weights", tmp_path, keep=("nope",))


def test_int8_weights_of_convolutions_are_unpacked_once_and_recognised(tmp_path) -> None:
    """DequantizeLinear in front of them would run each time: twice as slow."""
    images = np.load(cnn_data(tmp_path / "images.npz"))["image"][:20]
    path = small_cnn(tmp_path / "cnn.onnx")
    target, _ = quantized(path, "int8-weights", tmp_path, weights_symmetric=False)
    assert sqnr_db(run(target, {"image": images})[0], cnn_scores(images)) > 30
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not left & {"Cast", "Sub", "Mul", "DequantizeLinear"}
    again = target.rename(tmp_path / "once.onnx")
    with pytest.raises(ModelError, match="quantized already"):
        quantized(again, "int8-weights", tmp_path)


def test_a_batch_normalization_that_cleaning_folds_can_be_kept(tmp_path) -> None:
    names = ("gamma", "beta", "mean", "var")
    weights = [tensor(RNG.normal(0, 1, (16, 3, 3, 3)), "w")]
    weights += [tensor(RNG.uniform(0.5, 1, 16), name) for name in names]
    weights += [tensor(RNG.normal(0, 1, (16, 16, 3, 3)), "w2")]
    path = save(
        tmp_path / "bn.onnx",
        [helper.make_node("Conv", ["x", "w"], ["c"]),
         helper.make_node("BatchNormalization", ["c", *names], ["b"]),
         helper.make_node("Conv", ["b", "w2"], ["y"])],
        [value("x", [1, 3, 9, 9])], [value("y", [1, 16, 5, 5])], weights,
    )  # fmt: skip
    for keep in ("c", "b"):
        target, facts = quantized(path, "int8-weights", tmp_path, keep=(keep,))
        assert facts["stored"] == {"int8": 1}
        assert [n.op_type for n in onnx.load(target).graph.node].count("Cast") == 1


# --- graphs that are known to trip quantizers -----------------------------------------------------


def odd_graph(path):
    """A weight that is an output too, one used twice, a turned one, names with spaces, an If with
    weights of the outer graph."""
    weights = [
        tensor(RNG.normal(0, 0.3, (32, 32)), "a weight/with:odd name"),
        tensor(RNG.normal(0, 0.3, (32, 32)), "seen outside"),
        tensor(RNG.normal(0, 0.3, (32, 32)), "turned"), tensor(RNG.normal(0, 1, 32), "rank one"),
    ]  # fmt: skip
    then, other = (
        helper.make_graph(
            [helper.make_node(kind, ["t", "a weight/with:odd name"], [f"{kind} out"])],
            kind, [], [value(f"{kind} out", ["N", 32])],
        )
        for kind in ("MatMul", "Gemm")
    )  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "a weight/with:odd name"], ["h 1"]),
        helper.make_node("MatMul", ["h 1", "a weight/with:odd name"], ["h 2"]),
        helper.make_node("MatMul", ["h 2", "seen outside"], ["h3"]),
        helper.make_node("Transpose", ["turned"], ["turned'"], perm=[1, 0]),
        helper.make_node("MatMul", ["h3", "turned'"], ["h4"]),
        helper.make_node("Transpose", ["rank one"], ["r"], perm=[0]),
        helper.make_node("Add", ["h4", "r"], ["t"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    return save(
        path, nodes, [value("x", ["N", 32]), value("flag", [], TensorProto.BOOL)],
        [value("y", ["N", 32]), value("seen outside", [32, 32])], weights,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["int8-static", "int8-dynamic", "int8-weights", "int4-weights",
                                  "fp16", "int16x8"])  # fmt: skip
def test_odd_graphs_load_and_stay_close(kind, tmp_path) -> None:
    path = odd_graph(tmp_path / "odd.onnx")
    rows = RNG.normal(0, 1, (40, 32)).astype(np.float32)
    options = {
        "int4-weights": {"block": 32}, "int16x8": {"activations": "int16"},
        "int8-static": {"reduce_range": True}, "int8-dynamic": {"reduce_range": True},
    }.get(kind, {})  # fmt: skip
    arrays = {"x": rows, "flag": np.ones(40, bool)}
    target, facts = quantized(path, kind, tmp_path, arrays, **options)
    feeds = {"x": rows, "flag": np.array(True)}
    wanted, found = run(path, feeds), run(target, feeds)
    assert sqnr_db(found[0], wanted[0]) > (12 if kind == "int4-weights" else 25)
    assert np.array_equal(found[1], wanted[1]), "an output is not rounded"
    assert "inside If, Loop or Scan stay float" in facts["notes"][0]


@pytest.mark.parametrize("kind", ["int8-static", "fp16"])
def test_twice_is_refused(kind, tmp_path) -> None:
    path = small_cnn(tmp_path / "cnn.onnx")
    images = np.load(cnn_data(tmp_path / "images.npz"))["image"][:20]
    target, _ = quantized(path, "int8-static", tmp_path, {"image": images})
    again = target.rename(tmp_path / "once.onnx")
    with pytest.raises(ModelError, match="quantized already"):
        quantized(again, kind, tmp_path, {"image": images})


@pytest.mark.parametrize("kind", ["int8-dynamic", "int8-weights", "fp16"])
def test_nothing_to_quantize_is_refused(kind, tmp_path) -> None:
    path = save(
        tmp_path / "relu.onnx", [helper.make_node("Relu", ["x"], ["y"])],
        [value("x", ["N", 4])], [value("y", ["N", 4])], [],
    )  # fmt: skip
    arrays = {"x": RNG.normal(0, 1, (16, 4)).astype(np.float32)}
    options = {} if kind == "fp16" else {"operators": COMPUTE_OPERATORS}
    with pytest.raises(ModelError, match="nothing was quantized"):
        quantized(path, kind, tmp_path, arrays, **options)


# --- NNCF -----------------------------------------------------------------------------------------

NNCF = [
    {"symmetric": True, "ranges": "percentile"}, {"per_channel": False, "reduce_range": True},
    {"operators": COMPUTE_OPERATORS, "recovery": ("bias-correction",)},
    {"transformer": True, "recovery": ("smooth-quant",), "keep": ("scores",)},
]  # fmt: skip


@pytest.mark.needs("nncf")
@pytest.mark.parametrize("options", NNCF, ids=str)
def test_nncf_obeys_its_options(options, tmp_path) -> None:
    from edgekit.compress.quantize_onnx_nncf import quantize_onnx_nncf

    path, target = small_cnn(tmp_path / "cnn.onnx"), tmp_path / "made.onnx"
    artifact = open_model(path)
    data = open_dataset(str(cnn_data(tmp_path / "d.npz")), artifact.inputs, Cache(tmp_path / "c"))
    request = calibration_request(data, np.arange(60), artifact.inputs, tmp_path)
    quantize_onnx_nncf(
        [str(path)], str(target), Scheme("int8-static", **options).to_json(), request
    )
    images = np.concatenate([sample["image"] for sample in CalibrationSamples(request)])
    found = np.concatenate([run(target, {"image": image[None]})[0] for image in images])
    assert 20 < sqnr_db(found, cnn_scores(images)) < 90
    graph = onnx.load(target).graph
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    weights = [array for name, array in stored.items() if array.dtype == np.int8 and array.ndim > 1]
    scales = [
        stored[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"
    ]  # fmt: skip
    assert len(weights) == (1 if "keep" in options else 2)
    assert (max(one.size for one in scales) > 1) == options.get("per_channel", True)
    assert (max(np.abs(one.astype(int)).max() for one in weights) <= 64) == options.get(
        "reduce_range", False
    )
    with pytest.raises(ModelError, match="quantized already"):
        quantize_onnx_nncf([str(target)], str(Path(tmp_path) / "x.onnx"),
                           Scheme("int8-static").to_json(), request)  # fmt: skip
