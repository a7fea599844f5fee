"""Models read without running them: operators, shapes, MACs, memory."""

import copy
import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_models import onnx_linear, onnx_model

from edgekit.errors import ModelError, UsageError
from edgekit.graph import Graph, Operator, Tensor, read_graph, with_batch_one
from edgekit.graph.macs import count_macs
from edgekit.graph.memory import IN_PLACE, VIEWS
from edgekit.graph.model import assemble, graph_from_json
from edgekit.graph.names import canonical_name, native_names


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch) -> None:
    """Without the second that a child takes; the contract suite reads in one."""

    def call(target: str, arguments: dict[str, object], **_: object) -> object:
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
        return json.loads(json.dumps(function(**arguments)))

    monkeypatch.setattr("edgekit.sandbox.call", call)


FORMATS = [
    pytest.param("onnxruntime", marks=pytest.mark.needs("onnx")),
    pytest.param("litert", marks=pytest.mark.needs("litert")),
    pytest.param("openvino", marks=pytest.mark.needs("openvino")),
]


def _graph(
    operators: list[tuple[str, str, str]],
    sizes: dict[str, int],
    inputs: str,
    outputs: str,
    **more: Tensor,
) -> Graph:
    """A graph of `(type, inputs, outputs)`, names divided by spaces, all uint8."""
    return assemble(
        format="onnx",
        operators=[
            Operator(
                f"{kind}_{i}", kind, 1, False, tuple(ins.split()), tuple(outs.split()), 0, kind
            )
            for i, (kind, ins, outs) in enumerate(operators)
        ],
        tensors=[*(Tensor(n, "uint8", (size,)) for n, size in sizes.items()), *more.values()],
        inputs=inputs.split(),
        outputs=outputs.split(),
        weight_bytes=0,
    )


# --- memory ---------------------------------------------------------------------------------------


def test_peak_of_a_chain_is_its_widest_step() -> None:
    chain = [("Conv", "x", "a"), ("Conv", "a", "b"), ("Conv", "b", "y")]
    graph = _graph(chain, {"x": 10, "a": 50, "b": 40, "y": 1}, "x", "y")
    assert graph.peak_activation_bytes() == (90, "Conv_1")


def test_a_value_needed_later_stays() -> None:
    graph = _graph(
        [("Conv", "x", "a"), ("Conv", "a", "b"), ("Concat", "b x", "y")],
        {"x": 10, "a": 50, "b": 40, "y": 50},
        "x",
        "y",
    )
    assert graph.peak_activation_bytes() == (10 + 50 + 40, "Conv_1")


def test_an_output_stays_once_made() -> None:
    steps = [("Conv", "x", "y"), ("Conv", "x", "a"), ("Conv", "a", "z")]
    graph = _graph(steps, {"x": 1, "y": 30, "a": 20, "z": 20}, "x", "y z")
    assert graph.peak_activation_bytes() == (70, "Conv_2")


def test_in_place_only_where_nobody_needs_the_input() -> None:
    sizes = {"x": 100, "a": 100, "y": 100}
    dies = _graph([("Relu", "x", "a"), ("Add", "a a", "y")], sizes, "x", "y")
    assert dies.peak_activation_bytes() == (100, "Relu_0")
    stays = _graph([("Relu", "x", "a"), ("Add", "a x", "y")], sizes, "x", "y")
    assert stays.peak_activation_bytes() == (200, "Relu_0")


def test_views_cost_nothing_even_when_the_source_lives() -> None:
    steps = [("Reshape", "x", "a"), ("Conv", "a", "b"), ("Concat", "b x", "y")]
    graph = _graph(steps, {"x": 100, "a": 100, "b": 10, "y": 110}, "x", "y")
    assert graph.peak_activation_bytes() == (100 + 10 + 110, "Concat_2")


def test_constants_are_not_activations_and_state_always_is() -> None:
    steps = [("Conv", "x w", "a"), ("Conv", "a w", "y")]
    weights = Tensor("w", "uint8", (1000,), constant=True)
    state = Tensor("s", "uint8", (7,), state=True)
    graph = _graph(steps, {"x": 1, "a": 2, "y": 3}, "x", "y", w=weights, s=state)
    assert graph.peak_activation_bytes() == (7 + 2 + 3, "Conv_1")


def test_peak_is_none_where_a_size_is_unknown() -> None:
    free = Tensor("a", "float32", ("N", 3))
    graph = _graph([("Conv", "x", "a"), ("Conv", "a", "y")], {"x": 1, "y": 1}, "x", "y", a=free)
    assert graph.peak_activation_bytes() is None
    assert graph.bytes_moved(graph.operators[0]) is None


def test_float_tensors_can_be_counted_at_another_size() -> None:
    floats = Tensor("a", "float32", (10,))
    graph = _graph([("Conv", "x", "a"), ("Conv", "a", "y")], {"x": 1, "y": 1}, "x", "y", a=floats)
    assert graph.peak_activation_bytes() == (41, "Conv_0")
    assert graph.peak_activation_bytes(dtype_bytes=1) == (11, "Conv_0")
    assert graph.bytes_moved(graph.operators[0], dtype_bytes=2) == 21


def _by_hand(graph: Graph) -> int:
    """The same bound without cleverness: at each step, look at every tensor."""
    storage = {name: name for name in graph.tensors}
    for operator in graph.operators:
        if operator.canonical in VIEWS:
            old, new = storage[operator.outputs[0]], storage[operator.inputs[0]]
            storage = {name: new if home == old else home for name, home in storage.items()}
    size: dict[str, int] = {}
    for name, tensor in graph.tensors.items():
        size[storage[name]] = max(size.get(storage[name], 0), tensor.size_bytes or 0)
    peak = 0
    for step, operator in enumerate(graph.operators):
        there = set(graph.inputs) | {o for op in graph.operators[: step + 1] for o in op.outputs}
        later = {i for op in graph.operators[step + 1 :] for i in op.inputs}
        after = {storage[name] for name in there if name in later or name in graph.outputs}
        now = {storage[name] for name in (*operator.inputs, *operator.outputs)}
        # a view made later shares what is already there
        for view in graph.operators[step + 1 :]:
            if view.canonical in VIEWS and storage[view.outputs[0]] in {storage[n] for n in there}:
                uses = {i for op in graph.operators[step + 1 :] for i in op.inputs}
                if view.outputs[0] in uses or view.outputs[0] in graph.outputs:
                    after.add(storage[view.outputs[0]])
        needed = sum(size[home] for home in now | after)
        if operator.canonical in IN_PLACE:
            target = storage[operator.outputs[0]]
            dying = {storage[i] for i in operator.inputs} - after - {target}
            needed -= max((size[d] for d in dying if size[d] == size[target]), default=0)
        peak = max(peak, needed)
    return peak


@pytest.mark.parametrize("seed", range(60))
def test_peak_equals_a_count_by_hand(seed: int) -> None:
    dice = random.Random(seed)
    names, operators, sizes = ["x"], [], {"x": dice.choice([8, 16, 32])}
    for step in range(dice.randrange(1, 12)):
        kind = dice.choice(["Conv", "Relu", "Add", "Reshape", "Concat"])
        ins = [dice.choice(names[-4:]) for _ in range(2 if kind in ("Add", "Concat") else 1)]
        name = f"t{step}"
        sizes[name] = sizes[ins[0]] if kind in ("Relu", "Reshape") else dice.choice([8, 16, 32])
        operators.append((kind, " ".join(ins), name))
        names.append(name)
    outputs = {names[-1], dice.choice(names[1:])}
    graph = _graph(operators, sizes, "x", " ".join(outputs))
    peak = graph.peak_activation_bytes()
    assert peak is not None
    assert peak[0] == _by_hand(graph)


# --- sums -----------------------------------------------------------------------------------------


def _step(kind: str, macs: int | None, scope: str = "", name: str = "") -> Operator:
    return Operator(name or kind, kind, 1, False, (), (), macs, kind, scope)


def _macs(*steps: Operator) -> int | None:
    return assemble(
        format="onnx", operators=steps, tensors=[], inputs=[], outputs=[], weight_bytes=0
    ).macs


def test_of_two_branches_the_dearer_counts() -> None:
    inner = [_step("Conv", 100, "a/If:then_branch"), _step("Conv", 30, "a/If:else_branch")]
    assert _macs(*inner, Operator("a/If", "If", 1, False, (), (), 0, "If"), _step("Gemm", 5)) == 105


def test_branches_within_branches() -> None:
    deep = "If:then_branch/Inner:else_branch"
    steps = [_step("Conv", 7, deep), _step("If", 0, "If:then_branch", "Inner"), _step("If", 0)]
    assert _macs(*steps) == 7


def test_bodies_of_loops_count_and_unknown_stays_unknown() -> None:
    assert _macs(_step("Conv", 7, "Loop:body"), _step("Loop", 0)) == 7
    assert _macs(_step("Conv", None, "Loop:body"), _step("Loop", 0)) is None


def test_with_batch_one_leaves_other_free_dimensions_alone() -> None:
    inputs = [
        Tensor("image", "float32", ("N", 3, 8)),
        Tensor("text", "int32", ("N", "L")),
        Tensor("rate", "int64", ()),
        Tensor("fixed", "float32", (2, 3)),
        Tensor("any", "float32", None),
    ]
    assert with_batch_one(inputs) == {"image": (1, 3, 8)}


def test_json_keeps_everything() -> None:
    weights = Tensor("w", "int8", (3,), constant=True, quantized=True, per_channel=True)
    graph = _graph([("Conv", "x w", "y")], {"x": 1, "y": 2}, "x", "y", w=weights)
    assert graph_from_json(graph.to_json()) == graph


@pytest.mark.parametrize(
    ("kind", "inputs", "output", "attributes", "macs"),
    [
        ("Conv", [(1, 8, 10, 10), (16, 4, 3, 3)], (1, 16, 8, 8), {"group": 2}, 64 * 16 * 4 * 9),
        ("ConvTranspose", [(1, 8, 5, 5), (8, 4, 2, 2)], (1, 4, 10, 10), {}, 25 * 8 * 4 * 4),
        ("MatMul", [(2, 3, 4), (4, 5)], (2, 3, 5), {}, 2 * 3 * 5 * 4),
        ("MatMul", [(4,), (4,)], (), {}, 4),
        ("Gemm", [(4, 3), (4, 5), (5,)], (3, 5), {"transA": 1}, 3 * 5 * 4),
        ("QLinearConv", [(1, 1, 4, 4), (), (), (2, 1, 3, 3)], (1, 2, 2, 2), {}, 4 * 2 * 9),
        ("LSTM", [(7, 2, 3), (1, 20, 3), (1, 20, 5)], (7, 1, 2, 5), {}, 14 * 20 * 8),
        ("GRU", [(7, 2, 3), (2, 15, 3), (2, 15, 5)], (7, 2, 2, 5), {}, 14 * 2 * 15 * 8),
        ("Einsum", [(2, 3), (3, 4)], (2, 4), {"equation": "ij, jk -> ik"}, 24),
        ("Einsum", [(2, 3), (2, 3)], (2, 3), {"equation": "ij,ij->ij"}, 0),
        ("Einsum", [(2, 3), (3, 4)], (2, 4), {"equation": "...j,jk->...k"}, None),
        ("Attention", [(1, 2, 6, 8), (1, 2, 9, 8), (1, 2, 9, 4)], (1, 2, 6, 4), {}, 12 * 9 * 12),
        ("com.microsoft:MatMulNBits", [(3, 64), (32, 2, 16)], (3, 32), {"N": 32}, 3 * 64 * 32),
        ("Relu", [(2, 3)], (2, 3), {}, 0),
        ("MatMul", [("N", 4), (4, 5)], ("N", 5), {}, None),
    ],
)
def test_formulas(kind, inputs, output, attributes, macs) -> None:
    assert count_macs("onnx", kind, inputs, [output], attributes, custom=":" in kind) == macs


def test_an_unknown_custom_operator_may_do_anything() -> None:
    assert count_macs("onnx", "my.domain:Magic", [(1,)], [(1,)], {}, custom=True) is None
    assert count_macs("onnx", "com.microsoft:QLinearAdd", [(1,)], [(1,)], {}, custom=True) == 0


# --- names ----------------------------------------------------------------------------------------


def test_names_go_both_ways() -> None:
    assert canonical_name("DEPTHWISE_CONV_2D", "tflite") == "Conv"
    assert native_names("Conv", "tflite") >= {"CONV_2D", "DEPTHWISE_CONV_2D"}
    assert native_names("MatMul", "tflite") >= {"BATCH_MATMUL", "FULLY_CONNECTED"}
    assert native_names("Conv", "openvino") == {"Convolution", "GroupConvolution"}
    assert "com.microsoft:FusedConv" in native_names("Conv", "onnx")
    assert canonical_name("QUANTIZE", "tflite") == "QuantizeLinear"
    assert canonical_name("com.microsoft:QLinearAdd", "onnx") == "Add"
    assert canonical_name("SVDF", "tflite") is None
    assert native_names("Nonsense", "tflite") == frozenset()


def _onnx_names() -> set[str]:
    from onnx import defs

    return {schema.name for schema in defs.get_all_schemas()}


@pytest.mark.needs("onnx")
def test_canonical_names_are_onnx_operators() -> None:
    from edgekit.graph import names

    used = {n for table in names._TABLES.values() for text in table.values() for n in text.split()}
    assert used - _onnx_names() == set()
    assert _onnx_names() >= VIEWS | IN_PLACE


@pytest.mark.needs("litert")
def test_tflite_names_are_builtins() -> None:
    from ai_edge_litert import schema_py_generated as schema

    from edgekit.graph import names

    builtin = {n for n in names._TFLITE if n.isupper()}
    assert builtin - set(vars(schema.BuiltinOperator)) == set()


@pytest.mark.needs("openvino")
def test_openvino_names_are_operators() -> None:
    from openvino import opset1, opset4, opset8, opset13, opset16

    from edgekit.graph import names

    known = {n.lower() for one in (opset1, opset4, opset8, opset13, opset16) for n in dir(one)}
    snake = {n.replace("_", "") for n in known}
    missing = {n for n in names._OPENVINO if n.lower() not in snake}
    assert missing <= {"If", "Reverse", "Xor"}  # whose factories are called otherwise


# --- small models in every format -----------------------------------------------------------------


@pytest.mark.parametrize("engine", FORMATS)
def test_linear_in_every_format(engine, small_model) -> None:
    free = read_graph(small_model(engine, "linear"))
    assert free.inputs == ("x",)
    assert free.outputs == ("y",)
    assert len(free.free_dimensions()) == 1
    assert free.macs is None
    assert free.peak_activation_bytes() is None
    assert free.weight_bytes == 4 * (12 + 3)
    graph = read_graph(small_model(engine, "linear"), shapes={"x": (5, 4)})
    assert graph.macs == 5 * 4 * 3
    assert graph.free_dimensions() == ()
    assert graph.tensors["y"].shape == (5, 3)
    assert {op.canonical for op in graph.operators} <= {"MatMul", "Add", "Gemm"}
    peak = graph.peak_activation_bytes()
    assert peak is not None
    assert peak[0] == 5 * (4 + 3) * 4
    first = graph.operators[0]
    assert graph.bytes_moved(first) in (140 + 48, 140 + 60)


@pytest.mark.parametrize("engine", FORMATS)
def test_conv_in_every_format(engine, small_model) -> None:
    path = small_model(engine, "conv")
    shape = (1, 7, 9, 1) if engine == "litert" else (1, 1, 7, 9)
    assert len(read_graph(path).free_dimensions()) == 2
    graph = read_graph(path, shapes={"x": shape})
    assert graph.macs == 5 * 7 * 9
    assert sorted(graph.tensors["y"].shape or ()) == [1, 1, 5, 7]


@pytest.mark.parametrize("engine", FORMATS)
@pytest.mark.parametrize("name", ["two", "stubborn", "where", "scalar"])
def test_others_are_read(engine, name, small_model) -> None:
    graph = read_graph(small_model(engine, name))
    assert graph.macs == 0
    assert graph.operators
    if name == "two":
        assert set(graph.inputs) == {"z", "a"}
    if name == "scalar":
        assert graph.tensors["x"].shape == ()


@pytest.mark.parametrize("engine", FORMATS)
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1, 4)}, "no input 'z'; inputs: x"),
        ({"x": (4,)}, "input 'x' has 2 dimensions, not 1"),
        ({"x": (1, 5)}, "cannot be [1, 5]"),
        ({"x": (0, 4)}, "not all numbers from 1 on"),
    ],
)
def test_wrong_shapes_are_refused(engine, shapes, message, small_model) -> None:
    with pytest.raises(UsageError) as caught:
        read_graph(small_model(engine, "linear"), shapes=shapes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", FORMATS)
def test_damaged_files_are_one_line(engine, small_model, tmp_path) -> None:
    whole = small_model(engine, "linear")
    path = tmp_path / whole.name
    for companion in whole.parent.glob(f"{whole.stem}.bin"):
        (tmp_path / companion.name).write_bytes(companion.read_bytes())
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ModelError) as caught:
        read_graph(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_a_model(tmp_path) -> None:
    with pytest.raises(ModelError, match="no file"):
        read_graph(tmp_path / "absent.onnx")
    (tmp_path / "empty.tflite").write_bytes(b"")
    with pytest.raises(ModelError, match="is empty"):
        read_graph(tmp_path / "empty.tflite")
    with pytest.raises(ModelError, match="not a model the runtime loads"):
        read_graph(tmp_path / "model.h5")


# --- ONNX -----------------------------------------------------------------------------------------


def _saved(model: object, folder: Path) -> Path:
    import onnx

    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.needs("onnx")
def test_one_symbol_is_one_number(tmp_path) -> None:
    path = _saved(
        onnx_model(
            [("Add", ["a", "b"], ["y"], {})],
            {"a": ("float32", ("N", 2)), "b": ("float32", ("N", 2))},
            {"y": ("float32", ("N", 2))},
        ),
        tmp_path,
    )
    assert read_graph(path, shapes={"a": (3, 2)}).tensors["b"].shape == (3, 2)
    with pytest.raises(UsageError, match="cannot be"):
        read_graph(path, shapes={"a": (3, 2), "b": (4, 2)})


@pytest.mark.needs("onnx")
def test_computed_shapes_are_worked_out(tmp_path) -> None:
    """x -> Reshape to [shape(x)[0], -1], as exporters write it."""
    path = _saved(
        onnx_model(
            [
                ("Shape", ["x"], ["s"], {}),
                ("Gather", ["s", "zero"], ["n"], {}),
                ("Unsqueeze", ["n", "axis"], ["n1"], {}),
                ("Concat", ["n1", "rest"], ["to"], {"axis": 0}),
                ("Reshape", ["x", "to"], ["flat"], {}),
                ("MatMul", ["flat", "w"], ["y"], {}),
            ],
            {"x": ("float32", ("N", 2, 3))},
            {"y": ("float32", ("M", 5))},
            {
                "zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1]),
                "w": np.zeros((6, 5), np.float32),
            },
        ),
        tmp_path,
    )  # fmt: skip
    graph = read_graph(path, shapes={"x": (4, 2, 3)})
    assert graph.tensors["y"].shape == (4, 5)
    assert graph.macs == 4 * 6 * 5
    folded = {op.type for op in graph.operators if graph.folded(op)}
    assert folded == {"Shape", "Gather", "Unsqueeze", "Concat"}


def _loop(kind: str, **attributes: object) -> object:
    """A model whose If or Loop multiplies (1, 4) by (4, 4) inside."""
    from onnx import TensorProto, helper

    def info(name: str, shape: tuple[int, ...] = (1, 4), kind: int = TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    product = helper.make_node("MatMul", ["x" if kind == "If" else "v", "w"], ["p"])
    through = helper.make_node("Identity", ["c"], ["c2"])
    if kind == "If":
        other = helper.make_node("Identity", ["x"], ["q"])
        node = helper.make_node(
            "If", ["c0"], ["y"], name="choose",
            then_branch=helper.make_graph([product], "then", [], [info("p")]),
            else_branch=helper.make_graph([other], "else", [], [info("q")]),
        )  # fmt: skip
    else:
        flags = info("c", (), TensorProto.BOOL), info("c2", (), TensorProto.BOOL)
        inputs = [info("i", (), TensorProto.INT64), flags[0], info("v")]
        body = helper.make_graph([through, product], "body", inputs, [flags[1], info("p")])
        node = helper.make_node("Loop", ["n", "", "x"], ["y"], name="repeat", body=body)
    weights = helper.make_tensor("w", TensorProto.FLOAT, (4, 4), [0.0] * 16)
    times = helper.make_tensor("n", TensorProto.INT64, (), [3])
    inputs = [info("x"), info("c0", (), TensorProto.BOOL)]
    graph = helper.make_graph([node], "main", inputs, [info("y")], [weights, times])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.needs("onnx")
def test_branches_are_listed_before_their_operator(tmp_path) -> None:
    graph = read_graph(_saved(_loop("If"), tmp_path))
    assert {(op.type, op.scope) for op in graph.operators[:2]} == {
        ("MatMul", "choose:then_branch"),
        ("Identity", "choose:else_branch"),
    }
    assert graph.operators[2].path == "choose"
    assert graph.macs == 16
    peak = graph.peak_activation_bytes()
    assert peak is not None
    assert peak[0] == 16 + 1 + 16  # x, the condition, y


@pytest.mark.needs("onnx")
def test_loops_of_known_length_multiply(tmp_path) -> None:
    graph = read_graph(_saved(_loop("Loop"), tmp_path))
    assert graph.macs == 3 * 16
    assert {op.scope for op in graph.operators} == {"repeat:body", ""}


@pytest.mark.needs("onnx")
def test_constant_nodes_are_weights(tmp_path) -> None:
    import onnx
    from onnx import helper

    model = onnx_linear()
    for tensor in list(model.graph.initializer):
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(0, node)
    del model.graph.initializer[:]
    onnx.checker.check_model(model)
    graph = read_graph(_saved(model, tmp_path))
    assert [op.type for op in graph.operators] == ["MatMul", "Add"]
    assert graph.tensors["w"].constant
    assert graph.weight_bytes == 60


@pytest.mark.needs("onnx")
def test_weights_in_another_file_need_not_be_there(tmp_path) -> None:
    import onnx

    model = onnx_linear(weights=np.zeros((4, 3), np.float32))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    graph = read_graph(path, shapes={"x": (2, 4)})
    assert graph.macs == 24
    assert graph.weight_bytes == 60


@pytest.mark.needs("onnx")
@pytest.mark.parametrize("zero", [0, 3])
def test_quantized_tensors(tmp_path, zero) -> None:
    path = _saved(
        onnx_model(
            [
                ("QuantizeLinear", ["x", "s", "z"], ["q"], {}),
                ("DequantizeLinear", ["q", "s", "z"], ["d"], {}),
                ("DequantizeLinear", ["w", "ws"], ["wd"], {"axis": 1}),
                ("MatMul", ["d", "wd"], ["y"], {}),
            ],
            {"x": ("float32", (1, 4))},
            {"y": ("float32", (1, 3))},
            {
                "s": np.array(0.5, np.float32), "z": np.array(zero, np.int8),
                "w": np.zeros((4, 3), np.int8), "ws": np.ones(3, np.float32),
            },
        ),
        tmp_path,
    )  # fmt: skip
    graph = read_graph(path)
    activation, weights = graph.tensors["q"], graph.tensors["w"]
    assert (activation.quantized, activation.per_channel) == (True, False)
    assert activation.symmetric is (zero == 0)
    assert (weights.quantized, weights.per_channel, weights.symmetric) == (True, True, True)
    assert not graph.tensors["d"].quantized
    assert graph.tensors["wd"].constant
    assert graph.macs == 12
    assert {op.version for op in graph.operators if op.type == "MatMul"} == {13}


@pytest.mark.needs("onnx")
def test_shapes_go_through_fused_operators(tmp_path) -> None:
    """What ONNX Runtime writes when it optimizes or quantizes."""
    from onnx import helper

    model = onnx_model(
        [("Conv", ["x", "k"], ["c"], {"pads": [1, 1, 1, 1]}), ("Add", ["c", "c"], ["y"], {})],
        {"x": ("float32", ("N", 1, 6, 5))},
        {"y": ("float32", ("N", 2, None, None))},
        {"k": np.zeros((2, 1, 3, 3), np.float32)},
    )
    fused = model.graph.node[0]
    fused.domain, fused.op_type = "com.microsoft", "FusedConv"
    fused.attribute.append(helper.make_attribute("activation", "Relu"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    graph = read_graph(_saved(model, tmp_path), shapes={"x": (3, 1, 6, 5)})
    assert graph.tensors["y"].shape == (3, 2, 6, 5)
    assert graph.macs == 3 * 2 * 6 * 5 * 9
    assert (graph.operators[0].type, graph.operators[0].canonical, graph.operators[0].custom) == (
        "com.microsoft:FusedConv", "Conv", True,
    )  # fmt: skip


@pytest.mark.needs("onnx")
def test_unnamed_dimensions_are_called_by_their_place(tmp_path) -> None:
    model = onnx_model(
        [("Add", ["a", "b"], ["y"], {})],
        {"a": ("float32", (None, "unk__7")), "b": ("float32", ("?", "?"))},
        {"y": ("float32", (None, "unk__7"))},
    )
    path = _saved(model, tmp_path)
    assert read_graph(path).free_dimensions() == ("a_0", "unk__7", "b_0", "b_1")
    graph = read_graph(path, shapes={"a": (2, 3), "b": (1, 3)})
    assert graph.tensors["y"].shape == (2, 3)


@pytest.mark.needs("onnx")
def test_unknown_operators_are_listed(tmp_path) -> None:
    from onnx import helper

    model = onnx_linear()
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    model.graph.node[1].domain, model.graph.node[1].op_type = "my.domain", "Magic"
    graph = read_graph(_saved(model, tmp_path))
    magic = graph.operators[1]
    assert (magic.type, magic.custom, magic.version) == ("my.domain:Magic", True, 0)
    assert (magic.macs, magic.canonical) == (None, None)
    assert graph.opsets["my.domain"] == 1
    assert graph.opset == 17


# --- TFLite ---------------------------------------------------------------------------------------


def _edited(path: Path, folder: Path, edit: Callable[..., None]) -> Path:
    """A TFLite model after `edit(schema, model)`."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    edit(schema, model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    (folder / "edited.tflite").write_bytes(bytes(builder.Output()))
    return folder / "edited.tflite"


@pytest.mark.needs("litert")
def test_bodies_of_while_are_listed(small_model, tmp_path) -> None:
    def loop(schema, model) -> None:
        model.subgraphs.append(copy.deepcopy(model.subgraphs[0]))
        model.operatorCodes.append(schema.OperatorCodeT())
        model.operatorCodes[-1].builtinCode = schema.BuiltinOperator.WHILE
        options = schema.WhileOptionsT()
        options.condSubgraphIndex = options.bodySubgraphIndex = 1
        operator = model.subgraphs[0].operators[0]
        operator.opcodeIndex, operator.builtinOptions = len(model.operatorCodes) - 1, options
        operator.builtinOptionsType = schema.BuiltinOptions.WhileOptions

    path = _edited(small_model("litert", "linear"), tmp_path, loop)
    graph = read_graph(path)
    assert [(op.path, op.canonical) for op in graph.operators] == [
        ("WHILE#0:cond/FULLY_CONNECTED#0", "Gemm"),
        ("WHILE#0:body/FULLY_CONNECTED#0", "Gemm"),
        ("WHILE#0", "Loop"),
    ]
    assert graph.macs is None


@pytest.mark.needs("litert")
def test_subgraphs_in_a_circle_are_damage(small_model, tmp_path) -> None:
    def circle(schema, model) -> None:
        model.operatorCodes[0].builtinCode = schema.BuiltinOperator.CALL
        options = schema.CallOptionsT()
        operator = model.subgraphs[0].operators[0]
        operator.builtinOptions = options
        operator.builtinOptionsType = schema.BuiltinOptions.CallOptions

    path = _edited(small_model("litert", "linear"), tmp_path, circle)
    with pytest.raises(ModelError, match="circles"):
        read_graph(path)


@pytest.mark.needs("litert")
def test_custom_operators_by_their_own_name(small_model, tmp_path) -> None:
    def custom(schema, model) -> None:
        code = model.operatorCodes[0]
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
        code.customCode = "FlexMagic"

    path = _edited(small_model("litert", "linear"), tmp_path, custom)
    (operator,) = read_graph(path).operators
    assert (operator.type, operator.custom, operator.macs) == ("FlexMagic", True, None)
    with pytest.raises(ModelError, match="LiteRT cannot give it these shapes"):
        read_graph(path, shapes={"x": (2, 4)})


@pytest.mark.needs("litert")
def test_tflite_quantization(small_model, tmp_path) -> None:
    def quantized(schema, model) -> None:
        for tensor, scales, zeros in zip(
            model.subgraphs[0].tensors, ([1], [1], [1, 2, 3]), ([0], [5], [0, 0, 0]), strict=False
        ):
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.array(scales, np.float32)
            tensor.quantization.zeroPoint = np.array(zeros, np.int64)

    path = _edited(small_model("litert", "linear"), tmp_path, quantized)
    tensors = read_graph(path).tensors
    marks = {n: (t.quantized, t.per_channel, t.symmetric) for n, t in tensors.items()}
    assert marks["x"] == (True, False, True)
    assert marks["y"] == (True, False, False)
    assert marks["tensor/w"] == (True, True, True)
    assert marks["tensor/b"] == (False, None, None)
