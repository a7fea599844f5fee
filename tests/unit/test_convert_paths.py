"""Which way leads where, and which step obeys which option."""

import pytest

from edgekit.convert import CLEAN_UP, EDGES, path_between, paths_for
from edgekit.errors import ModelError, UsageError
from edgekit.reading import InputDeclaration, Reading, parse_inputs, parse_values

SOURCES = {edge.source for edge in EDGES}


def names(ways) -> list[str]:
    return [" ".join([way[0].edge.source, *(s.edge.target for s in way)]) for way in ways]


@pytest.mark.parametrize(
    ("source", "target", "first"),
    [
        ("keras", "tflite", "keras savedmodel tflite"),
        ("torch", "tflite", "torch torch-export tflite"),
        ("torch", "ncnn", "torch torch-export ncnn"),
        ("torchscript", "ncnn", "torchscript ncnn"),
        ("keras", "onnx", "keras savedmodel onnx onnx"),
        ("torch", "openvino", "torch torch-export onnx openvino"),
        ("tflite", "openvino", "tflite openvino"),
        ("onnx", "onnx", "onnx onnx"),
        ("onnx", "ncnn", "onnx onnx ncnn"),
        ("sklearn", "onnx", "sklearn onnx onnx"),
        ("keras", "coreml", "keras savedmodel coreml"),
        ("torch", "coreml", "torch torch-export coreml"),
        ("torchscript", "coreml", "torchscript coreml"),
    ],
)
def test_native_edges_win_over_detours(source, target, first) -> None:
    assert names(paths_for(source, target, Reading()))[0] == first


def test_detours_come_after() -> None:
    assert names(paths_for("torch", "tflite", Reading())) == [
        "torch torch-export tflite", "torch torch-export onnx onnx tflite",
    ]  # fmt: skip


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_nothing_is_left_by_tflite_but_what_came_as_tflite(source) -> None:
    for target in ("onnx", "openvino", "ncnn"):
        for way in paths_for(source, target, Reading()):
            assert all(step.edge.source != "tflite" for step in way[1:])


def test_every_source_reaches_onnx() -> None:
    assert all(path_between(source, "onnx") is not None for source in SOURCES)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("openvino", "onnx", "nothing reads OpenVINO IR back"),
        ("ncnn", "tflite", "nothing reads ncnn back"),
        ("tflite", "tflite", "it is TFLite already"),
        ("coreml", "onnx", "nothing reads Core ML back"),
        ("onnx", "coreml", "convert the PyTorch, Keras or TensorFlow model it was made from"),
    ],
)
def test_no_way_is_said(source, target, words) -> None:
    with pytest.raises(ModelError, match=words):
        paths_for(source, target, Reading())


def test_each_option_goes_to_the_first_step_that_takes_it() -> None:
    reading = Reading(inputs=parse_inputs(["x=1x3x8x8"]), opset=17, layout="nhwc", weights=None)
    (way,) = paths_for("torch", "openvino", reading)
    given = {step.edge.function.partition(":")[2]: step.reading.to_json() for step in way}
    assert set(given["factory_to_pt2"]) == {"inputs"}
    assert set(given["pt2_to_onnx"]) == {"opset"}
    assert set(given["clean_up"]) == {"layout"}
    assert given["from_onnx"] == {}


def test_clean_up_comes_in_only_where_an_option_needs_it() -> None:
    plain, cleaned = paths_for("onnx", "openvino", Reading())
    assert [step.edge for step in plain] == [path_between("onnx", "openvino")[0]]
    assert [step.edge for step in cleaned] == [CLEAN_UP, plain[0].edge]  # if the first fails
    (fixed,) = paths_for("onnx", "openvino", Reading(inputs=parse_inputs(["x=1x3"])))
    assert fixed[0].edge is CLEAN_UP


def test_a_layout_takes_the_detour_that_can_obey_it() -> None:
    ways = paths_for("torch", "tflite", Reading(layout="nhwc"))
    assert names(ways) == ["torch torch-export onnx onnx tflite"]


def test_an_option_nobody_obeys_is_refused(monkeypatch) -> None:
    native = tuple(edge for edge in EDGES if (edge.source, edge.target) == ("savedmodel", "tflite"))
    monkeypatch.setattr("edgekit.convert.EDGES", native)
    with pytest.raises(UsageError, match="--opset cannot be obeyed from SavedModel to TFLite"):
        paths_for("savedmodel", "tflite", Reading(opset=17))


def test_values_are_for_the_clean_up() -> None:
    (way,) = paths_for("onnx", "openvino", Reading(values=parse_values(["sr=16000"])))
    assert way[0].reading.to_json() == {"values": {"sr": 16000}}
    for text in ("sr", "=3", "sr=x", "sr=nan"):
        with pytest.raises(UsageError, match="--set"):
            parse_values([text])


def test_inputs_are_read() -> None:
    assert parse_inputs(["a=1x3x224x224:float32", "b:0=Nx36"]) == {
        "a": InputDeclaration((1, 3, 224, 224), "float32"),
        "b:0": InputDeclaration(("N", 36), None),
    }
    assert parse_inputs(["a=1,b=Nx2"]) == {
        "a": InputDeclaration((1,)), "b": InputDeclaration(("N", 2)),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a", "=1x3", "a=0x3", "a=-1x3", "a=1xx3", "a=1x3:float", "a=1x?"])
def test_what_is_no_input_is_refused(text) -> None:
    with pytest.raises(UsageError, match="--inputs"):
        parse_inputs([text])


def test_an_input_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="given twice"):
        parse_inputs(["a=1", "a=2"])
