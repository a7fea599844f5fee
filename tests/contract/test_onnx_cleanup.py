"""Clean-up of ONNX models: the same numbers under the same names, and nothing left to do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from store import fetch_wheel

from edgekit.errors import EdgeKitError, ModelError, UsageError
from edgekit_converters import onnx_files
from edgekit_converters.onnx import add_outputs, clean_up, external_files, model_files
from edgekit_converters.onnx2tf_graph import plain_graph

pytestmark = [pytest.mark.needs("onnxruntime"), pytest.mark.needs("onnxscript")]

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
node = helper.make_node


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(numbers(*shape, seed=1)) + np.float32(0.5)


def value(name: str, shape: Any = None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    shape: Any = (2, 3, 4, 5),
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
) -> Path:
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    inputs = inputs or [value("x", shape)]
    if opset < 9:  # IR version 3: initializers are inputs too
        inputs = inputs + [value(t.name, t.dims, t.data_type) for t in stored]
    graph = helper.make_graph(nodes, "g", inputs, outputs or [value("y")], stored)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if opset < 9 else 8
    )
    onnx.save(model, path)
    return path


def session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed_of(engine: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feed = {}
    for one in engine.get_inputs():
        shape = [size if isinstance(size, int) else 4 for size in one.shape]
        if one.type == "tensor(float)":
            feed[one.name] = rng.normal(size=shape).astype(np.float32)
        else:
            feed[one.name] = rng.integers(0, 256, shape).astype(one.type[7:-1])
    return feed


def assert_same(before: Path, after: Path, feed: dict[str, np.ndarray] | None = None) -> None:
    """Equal outputs under equal names; cleaning again changes nothing."""
    old, new = session(before), session(after)
    names = [one.name for one in old.get_outputs()]
    assert [one.name for one in new.get_outputs()] == names
    assert [one.name for one in new.get_inputs()] == [one.name for one in old.get_inputs()]
    for seed in range(2):
        fed = feed or feed_of(old, seed)
        for name, a, b in zip(names, old.run(None, fed), new.run(None, fed), strict=True):
            assert a.dtype == b.dtype
            scale = max(1e-9, float(np.abs(a).max(initial=0)))
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
    again = after.with_name("again.onnx")
    clean_up([str(after)], str(again), {})
    assert again.read_bytes() == after.read_bytes(), "clean-up is idempotent"


def cleaned(path: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    target = path.with_name("cleaned.onnx")
    before = path.read_bytes()
    facts = clean_up([str(path)], str(target), options)
    assert path.read_bytes() == before, "the source is never written"
    return target, facts


def operators(path: Path) -> list[str]:
    return [one.op_type for one in onnx.load(path).graph.node]


# --- old opsets ---------------------------------------------------------------------------------

BN = {name: positive(3) for name in ("gamma", "beta", "mean", "var")}
DOUBLE = np.array([1, 1, 2, 2], np.float32)


def old_if() -> list[onnx.NodeProto]:
    """Old operators in both branches; `u` and `x` come from outside."""
    then = helper.make_graph(
        [node("Squeeze", ["u"], ["t"], axes=[0])], "then", [], [value("t")],
    )  # fmt: skip
    other = helper.make_graph(
        [node("Clip", ["x"], ["e"], min=-0.1, max=0.1)], "else", [], [value("e")],
    )  # fmt: skip
    return [
        node("Unsqueeze", ["x"], ["u"], axes=[0]),
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["c"]),
        node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]


OLD: dict[str, tuple[int, list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "upsample-7": (7, [node("Upsample", ["x"], ["y"], mode="linear", scales=DOUBLE)], {}),
    "upsample-9": (9, [node("Upsample", ["x", "s"], ["y"], mode="linear")], {"s": DOUBLE}),
    "resize-10": (10, [node("Resize", ["x", "s"], ["y"], mode="linear")], {"s": DOUBLE}),
    "resize-10-nearest": (10, [node("Resize", ["x", "s"], ["y"])], {"s": DOUBLE * 1.5}),
    "batchnorm-7": (7, [node("BatchNormalization", ["x", *BN], ["y"])], BN),
    "dropout-7": (
        7, [node("Dropout", ["x"], ["d", "mask"], ratio=0.3), node("Relu", ["d"], ["y"])], {},
    ),
    "softmax-7": (7, [node("Softmax", ["x"], ["y"])], {}),
    "softmax-11": (11, [node("Softmax", ["x"], ["y"], axis=2)], {}),
    "squeeze-9": (
        9,
        [node("Unsqueeze", ["x"], ["u"], axes=[0, 3]), node("Squeeze", ["u"], ["y"], axes=[0])],
        {},
    ),
    "clip-6": (9, [node("Clip", ["x"], ["y"], min=0.0)], {}),
    "slice-1": (9, [node("Slice", ["x"], ["y"], starts=[0, 1], ends=[9, -1], axes=[1, 3])], {}),
    "pad-2": (9, [node("Pad", ["x"], ["y"], pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.5)], {}),
    "split-2": (9, [node("Split", ["x"], ["unused", "y"], axis=3, split=[2, 3])], {}),
    "topk-1": (9, [node("TopK", ["x"], ["y", "i"], k=2, axis=3)], {}),
    "reduce-11": (11, [node("ReduceSum", ["x"], ["y"], axes=[1, 2])], {}),
    "prelu-7": (7, [node("PRelu", ["x", "slope"], ["y"])], {"slope": numbers(3, 1, 1)}),
    "if-9": (9, old_if(), {"zero": np.array(0, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD)
def test_old_opsets_compute_the_same(case: str, tmp_path: Path) -> None:
    opset, nodes, weights = OLD[case]
    path = save(tmp_path / "old.onnx", nodes, weights, opset=opset)
    target, facts = cleaned(path)
    assert facts["opset"] == 17
    assert facts["notes"] == [f"upgraded from opset {opset} to 17"]
    assert_same(path, target)


def test_softmax_of_free_dimensions(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx", [node("Softmax", ["x"], ["y"], axis=1)], opset=11,
        shape=("N", 3, "H", 5),
    )  # fmt: skip
    target, _ = cleaned(path)
    assert_same(path, target)


@pytest.mark.parametrize(
    ("opset", "nodes", "weights", "reason"),
    [
        (9, [node("Hardmax", ["x"], ["y"], axis=2)], {}, "Hardmax .* means another thing now"),
        (
            7, [node("BatchNormalization", ["x", *BN], ["y"], spatial=0)],
            {name: positive(3, 4, 5) for name in BN}, "Attribute spatial must have value 1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_upgraded_is_refused(opset, nodes, weights, reason, tmp_path) -> None:
    path = save(tmp_path / "old.onnx", nodes, weights, opset=opset)
    with pytest.raises(ModelError, match=f"from opset {opset} to 17: .*{reason}.*export it again"):
        cleaned(path)


def test_opset_is_kept_raised_but_never_lowered(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], opset=13)
    assert cleaned(path)[1]["opset"] == 13
    assert cleaned(path, opset=21)[1]["opset"] == 21
    with pytest.raises(UsageError, match="of opset 13, wanted 11: there is no way back"):
        cleaned(path, opset=11)
    with pytest.raises(UsageError, match="no opset 99"):
        cleaned(path, opset=99)
    old = save(tmp_path / "old.onnx", [node("Relu", ["x"], ["y"])], opset=6)
    with pytest.raises(ModelError, match="opset 6, which is not in 7 to"):
        cleaned(old)


# --- batch normalization ------------------------------------------------------------------------


def batchnorm(before: str, **attributes: Any) -> onnx.NodeProto:
    return node("BatchNormalization", [before, *BN], ["y"], **attributes)


def double_statistics() -> dict[str, np.ndarray]:
    return {name: positive(6) for name in BN}


FOLDS = {
    "conv": ([node("Conv", ["x", "w"], ["c"]), batchnorm("c", epsilon=1e-3)],
             {"w": numbers(3, 3, 3, 3), **BN}),
    "conv-bias": ([node("Conv", ["x", "w", "b"], ["c"]), batchnorm("c")],
                  {"w": numbers(3, 3, 1, 1), "b": numbers(3), **BN}),
    "convtranspose": ([node("ConvTranspose", ["x", "w"], ["c"], group=3), batchnorm("c")],
                      {"w": numbers(3, 2, 3, 3), **double_statistics()}),
    "gemm": ([node("Flatten", ["x"], ["f"]),
              node("Gemm", ["f", "w", "b"], ["c"], alpha=0.5, beta=2.0, transB=1), batchnorm("c")],
             {"w": numbers(3, 60), "b": numbers(1, 3), **BN}),
    # the names that the new weights would like to have are taken
    "names": ([node("Conv", ["x", "w"], ["c"]), batchnorm("c")],
              {"w": numbers(3, 3, 1, 1), "c_folded_weight": numbers(1), **BN}),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS)
def test_batchnorm_is_folded(case: str, tmp_path: Path) -> None:
    nodes, weights = FOLDS[case]
    path = save(tmp_path / "m.onnx", nodes, weights)
    target, facts = cleaned(path)
    assert facts["folded"] == 1
    assert "BatchNormalization" not in operators(target)
    assert_same(path, target)


def test_batchnorm_folds_into_weights_that_others_use(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]), batchnorm("c"),
        node("Conv", ["x", "w"], ["z"]),
    ]  # fmt: skip
    path = save(
        tmp_path / "m.onnx", nodes, {"w": numbers(3, 3, 1, 1), **BN},
        outputs=[value("y"), value("z")],
    )  # fmt: skip
    target, facts = cleaned(path)
    assert facts["folded"] == 1
    assert_same(path, target)


AFFINE = {
    "depthwise": ([node("Conv", ["x", "w"], ["c"], group=3), node("Mul", ["c", "m"], ["d"]),
                   node("Add", ["a", "d"], ["y"])],
                  {"w": numbers(3, 1, 3, 3), "m": numbers(1, 3, 1, 1), "a": numbers(3, 1, 1)}, 2),
    "scalar": ([node("Conv", ["x", "w", "b"], ["c"]), node("Mul", ["m", "c"], ["y"])],
               {"w": numbers(3, 3, 1, 1), "b": numbers(3), "m": numbers()}, 1),
    "convtranspose": ([node("ConvTranspose", ["x", "w"], ["c"], group=3),
                       node("Mul", ["c", "m"], ["y"])],
                      {"w": numbers(3, 2, 3, 3), "m": numbers(1, 6, 1, 1)}, 1),
    "gemm": ([node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "w"], ["c"]),
              node("Add", ["c", "a"], ["y"])], {"w": numbers(60, 3), "a": numbers(3)}, 1),
    # each of these gives every pixel, or every row, a value of its own, or more channels
    "pixels": ([node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "m"], ["y"])],
               {"w": numbers(3, 3, 1, 1), "m": numbers(4, 5)}, 0),
    "last axis": ([node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "a"], ["y"])],
                  {"w": numbers(5, 3, 1, 1), "a": numbers(5)}, 0),
    "broadcast": ([node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "a"], ["y"])],
                  {"w": numbers(1, 3, 1, 1), "a": numbers(1, 4, 1, 1)}, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", AFFINE)
def test_constants_per_channel_are_folded_and_no_others(case: str, tmp_path: Path) -> None:
    nodes, weights, count = AFFINE[case]
    path = save(tmp_path / "m.onnx", nodes, weights)
    target, facts = cleaned(path)
    assert facts["folded"] == count
    assert_same(path, target)


PADS = {
    "zeros": (0.0, [0, 0, 1, 0, 0, 0, 2, 1], True),
    "ones": (1.0, [0, 0, 1, 0, 0, 0, 2, 1], False),
    "channels": (0.0, [0, 1, 1, 0, 0, 0, 2, 1], False),
    "cropping": (0.0, [0, 0, -1, 0, 0, 0, 2, 1], False),
}  # fmt: skip


@pytest.mark.parametrize("case", PADS)
def test_zeros_around_an_image_go_into_the_convolution(case: str, tmp_path: Path) -> None:
    filling, pads, gone = PADS[case]
    nodes = [node("Pad", ["x", "pads", "filling"], ["p"]),
             node("Conv", ["p", "w"], ["y"], pads=[1, 0, 0, 1])]  # fmt: skip
    weights = {"pads": np.array(pads), "filling": np.array(filling, np.float32),
               "w": numbers(3, 3 + pads[1], 2, 2)}  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, weights)
    target, _ = cleaned(path)
    assert ("Pad" not in operators(target)) == gone
    assert_same(path, target)


KEPT = {
    "training": ([node("Conv", ["x", "w"], ["c"]),
                  node("BatchNormalization", ["c", *BN], ["y", "m", "v"], training_mode=1)], 1),
    "output": ([node("Conv", ["x", "w"], ["c"]), batchnorm("c")], 2),
    "two users": ([node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", *BN], ["n"]),
                   node("Add", ["n", "c"], ["y"])], 1),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_batchnorm_that_cannot_be_folded_stays(case: str, tmp_path: Path) -> None:
    nodes, count = KEPT[case]
    outputs = [value("y"), value("c")][:count]
    path = save(tmp_path / "m.onnx", nodes, {"w": numbers(3, 3, 1, 1), **BN}, outputs=outputs)
    target, facts = cleaned(path)
    assert facts["folded"] == 0
    assert_same(path, target)


def test_half_precision_stays_half(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), batchnorm("c")]
    weights = {"w": numbers(3, 3, 1, 1).astype(np.float16), **BN}
    half = TensorProto.FLOAT16
    path = save(
        tmp_path / "m.onnx", nodes, weights, inputs=[value("x", (1, 3, 4, 4), half)],
        outputs=[value("y", None, half)],
    )  # fmt: skip
    target, facts = cleaned(path)
    assert facts["folded"] == 1
    x = numbers(1, 3, 4, 4).astype(np.float16)
    before, after = (session(one).run(None, {"x": x})[0] for one in (path, target))
    assert after.dtype == np.float16
    np.testing.assert_allclose(after, before, rtol=2e-3, atol=2e-2)  # 10 bits


# --- what goes, what stays ----------------------------------------------------------------------


def test_superfluous_things_go(tmp_path: Path) -> None:
    two = numpy_helper.from_array(np.float32(2), "two")
    nodes = [
        node("Constant", [], ["two"], value=two), node("Identity", ["two"], ["same"]),
        node("Add", ["same", "same"], ["four"]), node("Mul", ["x", "four"], ["scaled"]),
        node("Identity", ["scaled"], ["i"]), node("Dropout", ["i"], ["d", "mask"]),
        node("Sin", ["x"], ["nobody"]), node("Relu", ["d"], ["y"]),
    ]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, {"unused": numbers(9)})
    target, facts = cleaned(path)
    assert operators(target) == ["Mul", "Relu"]
    assert facts["operators"] == [8, 2]
    assert len(onnx.load(target).graph.initializer) == 1
    assert_same(path, target)


def test_initializers_leave_the_inputs(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Add", ["x", "w"], ["y"])], {"w": numbers(5)}, opset=7)
    target, _ = cleaned(path)
    assert [one.name for one in onnx.load(target).graph.input] == ["x"]
    assert_same(path, target)


def test_a_default_value_that_is_lost_is_said(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx", [node("Add", ["x", "w"], ["y"])], {"w": numbers(5)},
        inputs=[value("x", (2, 5)), value("w", (5,))],
    )  # fmt: skip
    _, facts = cleaned(path)
    assert facts["notes"] == ["input 'w' is optional: its stored value was made a constant"]


def test_odd_outputs_survive(tmp_path: Path) -> None:
    """An input, an initializer, a folded constant, one tensor twice."""
    nodes = [
        node("Relu", ["x"], ["r"]), node("Identity", ["r"], ["again"]),
        node("Identity", ["x"], ["copy"]), node("Add", ["w", "w"], ["folded"]),
    ]  # fmt: skip
    names = ["x", "r", "again", "w", "copy", "folded"]
    outputs = [value(name, (2, 3, 4, 5)) for name in names]
    outputs[3], outputs[5] = value("w", (3,)), value("folded", (3,))
    path = save(tmp_path / "m.onnx", nodes, {"w": numbers(3)}, outputs=outputs)
    target, _ = cleaned(path)
    assert_same(path, target)


def test_a_branch_may_return_a_tensor_from_outside(tmp_path: Path) -> None:
    then = helper.make_graph([node("Identity", ["r"], ["t"])], "then", [], [value("t")])
    other = helper.make_graph(
        [node("Constant", [], ["k"], value=numpy_helper.from_array(numbers(5), "k")),
         node("Mul", ["r", "k"], ["e"])], "else", [], [value("e")],
    )  # fmt: skip
    nodes = [
        node("Relu", ["x"], ["r"]), node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Cast", ["s"], ["c"], to=BOOL),
        node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes)
    target, _ = cleaned(path)
    assert_same(path, target)
    zeros = {"x": np.zeros((2, 3, 4, 5), np.float32)}
    assert_same(path, target, zeros)


@pytest.mark.parametrize(
    ("wheel", "file"),
    [
        ("magika==1.0.3", "magika/models/standard_v3_3/model.onnx"),
        ("silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_op15.onnx"),
    ],
)
def test_public_models(wheel: str, file: str, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        path = Path(archive.extract(file, tmp_path))
    target, _ = cleaned(path)
    feed = None
    if "silero" in file:
        feed = {"input": numbers(1, 576) / 9, "state": numbers(2, 1, 128), "sr": np.array(16000)}
    assert_same(path, target, feed)


# --- options ------------------------------------------------------------------------------------


def two_inputs(path: Path) -> Path:
    return save(
        path, [node("Add", ["a", "b"], ["s"]), node("Relu", ["s"], ["y"])],
        inputs=[value("a", ("N", 3)), value("b", ("N", 3))], outputs=[value("y", ("N", 3))],
    )  # fmt: skip


def shapes(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path).graph
    return {
        one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in (*graph.input, *graph.output, *graph.value_info)
    }


@pytest.mark.parametrize("size", [4, "batch"])
def test_a_symbol_becomes_the_same_everywhere(size: int | str, tmp_path: Path) -> None:
    target, _ = cleaned(two_inputs(tmp_path / "m.onnx"), inputs={"a": {"shape": [size, 3]}})
    assert shapes(target) == {name: [size, 3] for name in ("a", "b", "y", "s")}


def test_fixed_shapes_reach_computed_ones(tmp_path: Path) -> None:
    """Reshape to what Shape, Gather and Concat compute, as exporters write it."""
    nodes = [
        node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "zero"], ["n"]),
        node("Concat", ["n", "rest"], ["to"], axis=0), node("Reshape", ["x", "to"], ["y"]),
    ]  # fmt: skip
    weights = {"zero": np.array([0]), "rest": np.array([-1])}
    path = save(tmp_path / "m.onnx", nodes, weights, shape=("N", 3, "?", -1))
    target, _ = cleaned(path, inputs={"x": {"shape": [2, 3, 4, 5], "dtype": "float32"}})
    assert operators(target) == ["Reshape"]
    assert shapes(target) == {"x": [2, 3, 4, 5], "y": [2, 60]}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"c": {"shape": [1, 3]}}, "no input 'c'; inputs: 'a', 'b'"),
        ({"a": {"shape": [1, 3, 3]}}, "has 2 dimensions Nx3, not"),
        ({"a": {"shape": [1, 4]}}, "is Nx3, cannot be 1x4"),
        ({"a": {"shape": [1, "C"]}}, "is Nx3, cannot be 1xC"),
        ({"a": {"shape": [1, 3]}, "b": {"shape": [2, 3]}}, "'b' is Nx3, cannot be 2x3"),
        ({"a": {"shape": [1, 3], "dtype": "int8"}}, "'a' is float32, not int8"),
    ],
)
def test_contradictions_are_refused(inputs, said, tmp_path) -> None:
    with pytest.raises(UsageError, match=said):
        cleaned(two_inputs(tmp_path / "m.onnx"), inputs=inputs)


def test_layout_of_inputs(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"w": numbers(2, 3, 3, 3)})
    target, facts = cleaned(path, layout="nhwc")
    assert facts["layouts"] == {"x": [0, 2, 3, 1]}
    assert shapes(target)["x"] == [2, 4, 5, 3]
    x = numbers(2, 3, 4, 5)
    moved = np.ascontiguousarray(x.transpose(facts["layouts"]["x"]))
    wanted = session(path).run(None, {"x": x})[0]
    np.testing.assert_array_equal(session(target).run(None, {"x": moved})[0], wanted)
    again = tmp_path / "again.onnx"
    assert clean_up([str(target)], str(again), {"layout": "nhwc"})["layouts"] == {}
    assert again.read_bytes() == target.read_bytes()
    back = clean_up([str(target)], str(again), {"layout": "nchw"})
    assert back["layouts"] == {"x": [0, 3, 1, 2]}
    assert operators(again) == ["Conv"], "the Transpose from NHWC is gone"
    assert_same(path, again)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path = two_inputs(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="four dimensions; here: 'a' Nx3"):
        cleaned(path, layout="nhwc")
    with pytest.raises(UsageError, match="--signature is not for ONNX"):
        cleaned(path, signature="serve")


# --- files --------------------------------------------------------------------------------------


def with_external_data(path: Path, location: str = "weights.bin") -> Path:
    save(path, [node("Add", ["x", "w"], ["y"])], {"w": numbers(100, 1, 3, 4, 5)})
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_external_data_is_found_and_comes_along(tmp_path: Path, monkeypatch) -> None:
    path = with_external_data(tmp_path / "m.onnx")
    assert external_files(path) == [tmp_path / "weights.bin"]
    assert model_files(str(path)) == [str(path), str(tmp_path / "weights.bin")]
    folder = tmp_path / "out"
    folder.mkdir()
    facts = clean_up([str(path)], str(folder / "m.onnx"), {})
    assert facts["files"] == [str(folder / "m.onnx")], "small enough for one file"
    assert_same(path, folder / "m.onnx")
    monkeypatch.setattr(onnx_files, "MOST_BYTES_IN_ONE_FILE", 100)
    facts = clean_up([str(path)], str(folder / "big.onnx"), {})
    assert facts["files"] == [str(folder / "big.onnx"), str(folder / "big.onnx.data")]
    assert external_files(folder / "big.onnx") == [folder / "big.onnx.data"]
    wanted = session(path).run(None, {"x": numbers(2, 3, 4, 5)})[0]
    found = session(folder / "big.onnx").run(None, {"x": numbers(2, 3, 4, 5)})[0]
    np.testing.assert_array_equal(found, wanted)


def test_external_data_in_subgraphs_counts(tmp_path: Path) -> None:
    path = with_external_data(tmp_path / "m.onnx")
    stored = onnx.load(path, load_external_data=False).graph.initializer[0]
    then = helper.make_graph([node("Add", ["x", "w"], ["t"])], "t", [], [value("t")], [stored])
    other = helper.make_graph([node("Relu", ["x"], ["e"])], "e", [], [value("e")])
    nodes = [
        node("ReduceMax", ["x"], ["s"], keepdims=0), node("Cast", ["s"], ["c"], to=BOOL),
        node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]  # fmt: skip
    save(path, nodes)
    assert external_files(path) == [tmp_path / "weights.bin"]
    target, _ = cleaned(path)
    assert_same(path, target)


def relocated(path: Path, **entry: str) -> Path:
    model = onnx.load(path, load_external_data=False)
    data = model.graph.initializer[0].external_data
    kept = {one.key: one.value for one in data} | entry
    del data[:]
    for key, text in kept.items():
        data.add(key=key, value=text)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin", "..\\secret.bin"])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(24000))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = relocated(with_external_data(folder / "m.onnx"), location=location)
    for reading in (external_files, lambda one: cleaned(one), model_files):
        with pytest.raises(ModelError, match="outside the model's folder"):
            reading(path)


def test_external_data_that_is_not_there_or_too_short(tmp_path: Path) -> None:
    path = with_external_data(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="weights.bin has 24000 bytes, weight 'w' ends at 1023000"):
        external_files(relocated(path, offset="999000"))
    with pytest.raises(ModelError, match="weight 'w' is damaged"):
        external_files(relocated(path, offset="-1"))
    relocated(path, offset="0")
    os.link(tmp_path / "weights.bin", tmp_path / "other-name.bin")
    with pytest.raises(ModelError, match="hard links"):
        external_files(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match="in weights.bin, which is not beside it"):
        external_files(path)


def test_damaged_weights_are_not_written(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Add", ["x", "w"], ["y"])], {"w": numbers(3, 4, 5)})
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = bytes(7)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError):
        cleaned(path)


def test_mutated_files_end_in_one_clear_error_or_a_model(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx", [node("Unsqueeze", ["x"], ["u"], axes=[0]), *old_if()[1:]],
        {"zero": np.array(0, np.float32)}, opset=9,
    )  # fmt: skip
    whole = path.read_bytes()
    random = np.random.default_rng(5)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(1, len(whole) + 1)])
        try:
            clean_up([str(path)], str(tmp_path / "cleaned.onnx"), {})
        except EdgeKitError as error:
            assert "\n" not in str(error)


MEASURE = """
import sys
from pathlib import Path
from edgekit_converters.onnx import clean_up
clean_up([sys.argv[1]], sys.argv[2], {})
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("external", "count"), [(False, 12), (True, 6)])
def test_memory_stays_below_two_and_a_half_models(external, count, tmp_path) -> None:
    weights = {f"w{i}": np.full((2500, 2500), i, np.float32) for i in range(count)}
    nodes = [node("Add", ["x", "w0"], ["t0"])]
    nodes += [node("Add", [f"t{i - 1}", f"w{i}"], [f"t{i}"]) for i in range(1, count)]
    path = save(
        tmp_path / "m.onnx", nodes, weights, shape=(2500, 2500), outputs=[value(f"t{count - 1}")]
    )
    if external:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.bin")
    size = 25e6 * count
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "cleaned.onnx")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    peak = int(ran.stdout) * 1024
    assert peak <= 2.5 * size  # Python and its libraries, 100 MB, included
    if external:
        assert peak <= 100e6 + size / 2, "weights are copied from file to file, not read"
    assert (tmp_path / "cleaned.onnx").stat().st_size > size


# --- looking inside -----------------------------------------------------------------------------


def test_intermediate_tensors_become_outputs(tmp_path: Path) -> None:
    nodes = [
        node("Mul", ["x", "w"], ["product"]), node("Relu", ["product"], ["r"]),
        node("ArgMax", ["r"], ["i"], axis=1), node("Neg", ["r"], ["y"]),
    ]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, {"w": numbers(5)})
    target = tmp_path / "tapped.onnx"
    add_outputs(str(path), str(target), ["product", "i", "y", "w"])
    x = numbers(2, 3, 4, 5)
    engine = session(target)
    assert [one.name for one in engine.get_outputs()] == ["y", "product", "i", "w"]
    y, product, i, w = engine.run(None, {"x": x})
    np.testing.assert_allclose(product, x * numbers(5), rtol=1e-6)
    np.testing.assert_array_equal(i[:, 0], np.maximum(product, 0).argmax(1))
    np.testing.assert_array_equal(y, -np.maximum(product, 0))
    np.testing.assert_array_equal(w, numbers(5))
    with pytest.raises(UsageError, match="no tensor 'nope' in the outermost graph of m.onnx"):
        add_outputs(str(path), str(target), ["nope"])


# --- for onnx2tf --------------------------------------------------------------------------------


def odd_model(path: Path, sums: str = "x") -> Path:
    """Names TensorFlow refuses, slices onnx2tf gets wrong, an If, an output of rank 4."""
    then = helper.make_graph([node("Mul", ["a;b", "two"], ["t"])], "then", [], [value("t")])
    other = helper.make_graph([node("Sub", ["a;b", "two"], ["t"])], "else", [], [value("t")])
    nodes = [
        node("Conv", ["x:0", "w"], ["c@1"], pads=[1, 1, 1, 1]),
        node("Slice", ["c@1", "starts", "ends", "axes"], ["a;b"]),
        node("ReduceSum", ["x:0"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["if"], then_branch=then, else_branch=other),
        node("Relu", ["if"], ["/out/put"]),
        node("Flatten", ["if"], ["flat"]),
    ]
    weights = {
        "w": numbers(6, 3, 3, 3), "two": np.array(2, np.float32), "zero": np.array(0, np.float32),
        "starts": np.array([0, -3, 1, 0]), "ends": np.array([2**31 - 1, 2**31 - 1, 9, 2**63 - 1]),
        "axes": np.array([0, 2, 1, 3]),
    }  # fmt: skip
    return save(
        path, nodes, weights, inputs=[value("x:0", ("N", 3, 4, 5))],
        outputs=[value("/out/put"), value("flat")],
    )  # fmt: skip


def test_plain_graph_computes_the_same(tmp_path: Path) -> None:
    path = odd_model(tmp_path / "m.onnx")
    target, _ = cleaned(path, inputs={"x:0": {"shape": [1, 3, 4, 5]}})
    plain = tmp_path / "plain.onnx"
    inputs, outputs = plain_graph(onnx_files.load_model(target), plain)
    graph = onnx.load(plain).graph
    assert "If" not in operators(plain)
    names = [name for one in graph.node for name in (one.name, *one.output)]
    assert all(name.replace("_", "").replace(".", "").isalnum() for name in names), names
    for seed in range(3):  # both branches
        x = numbers(1, 3, 4, 5, seed=seed)
        wanted = session(path).run(None, {"x:0": x})
        found = session(plain).run(outputs, dict(zip(inputs, [x], strict=True)))
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.needs("onnx2tf")
@pytest.mark.needs("tensorflow")
def test_tflite_of_an_odd_model(tmp_path: Path) -> None:
    from edgekit import sandbox
    from edgekit_runtime import load

    path = odd_model(tmp_path / "m.onnx")
    target = tmp_path / "made" / "m.tflite"
    target.parent.mkdir()
    facts = sandbox.call(
        "edgekit_converters.onnx2tf:from_onnx",
        {"source": [str(path)], "target": str(target), "options": {}},
    )
    assert facts["notes"] == ["the free batch dimension of input 'x:0' was set to 1"]
    assert list(target.parent.iterdir()) == [target], "nothing is left behind"
    x = numbers(1, 3, 4, 5)
    wanted = session(path).run(None, {"x:0": x})
    with load(target) as engine:
        found = engine.run({"x:0": x})
    assert list(found) == ["/out/put", "flat"]
    for a, b in zip(wanted, found.values(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.needs("onnx2tf")
@pytest.mark.needs("tensorflow")
def test_free_dimensions_are_asked_for(tmp_path: Path) -> None:
    from edgekit_converters.onnx2tf import from_onnx

    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], shape=("N", 3, "H", "W"))
    with pytest.raises(UsageError, match="--inputs x=Nx3xHxW with numbers"):
        from_onnx([str(path)], str(tmp_path / "m.tflite"), {})
    assert list(tmp_path.iterdir()) == [path]
