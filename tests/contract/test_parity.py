"""The parity ledger: what it lets through, what it catches, and where it says the fault is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cnn import small_cnn
from small_models import onnx_model, save_onnx

from edgekit import conversion
from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.cli import main
from edgekit.conversion import Given, check, convert_with_proof, write_result
from edgekit.convert import CLEAN_UP, Edge, Step
from edgekit.divergence import runs_at_most
from edgekit.errors import EdgeKitError, InputError
from edgekit.parity import tolerance_between
from edgekit.reading import Reading, parse_inputs

pytestmark = [pytest.mark.needs("onnxruntime"), pytest.mark.needs("openvino")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


def deep_model(path: Path, *, fault: int | None = None, of: int = 100) -> Path:
    """`of` nodes, MatMul and Tanh by turns with a skip now and then; one may be off."""
    from onnx import save

    rng = np.random.default_rng(0)
    nodes, constants = [], {}
    for i in range(of):
        source = f"t{i - 1}" if i else "x"
        if i % 10 == 9:
            nodes.append(("Add", [source, f"t{i - 5}"], [f"t{i}"], {"name": f"skip_{i}"}))
        elif i % 2:
            nodes.append(("Tanh", [source], [f"t{i}"], {"name": f"tanh_{i}"}))
        else:
            weights = rng.normal(size=(8, 8)).astype(np.float32) / 2
            constants[f"w{i}"] = weights * (1.01 if i == fault else 1)
            nodes.append(("MatMul", [source, f"w{i}"], [f"t{i}"], {"name": f"dense_{i}"}))
    shape = ("float32", ["N", 8])
    save(onnx_model(nodes, {"x": shape}, {f"t{of - 1}": shape}, constants), str(path))
    return path


@pytest.mark.parametrize("fault", [0, 52])
def test_planted_fault_is_found_by_the_name_of_its_node(fault, tmp_path) -> None:
    right = open_model(deep_model(tmp_path / "right.onnx"))
    wrong = open_model(deep_model(tmp_path / "wrong.onnx", fault=fault))
    _, line = check(right, wrong)
    assert not line.passed
    where = line.divergence
    assert where is not None
    assert (where.tensor, where.node) == (f"t{fault}", f"dense_{fault} (MatMul)")
    assert where.runs <= runs_at_most(100) == 9


def test_fault_is_found_across_formats(tmp_path, cache) -> None:
    wrong = open_model(deep_model(tmp_path / "wrong.onnx", fault=10, of=20))
    ir = convert_with_proof(wrong, "openvino", cache=cache)
    assert ir.passed
    _, line = check(open_model(deep_model(tmp_path / "right.onnx", of=20)), ir.artifact)
    assert line.divergence is not None and line.divergence.node == "dense_10 (MatMul)"


def test_tolerance_is_the_formula(tmp_path) -> None:
    one = open_model(deep_model(tmp_path / "m.onnx"))
    found = tolerance_between(one, one, shapes={"x": [1, 8]})
    matmuls = sum(i % 2 == 0 for i in range(100))
    roundings = matmuls * (1 + 8) + (100 - matmuls)
    assert found.relative == pytest.approx(16 * np.sqrt(roundings) * 2.0**-24)
    assert f"{roundings} roundings" in found.why


def test_rounding_passes_and_a_hundred_times_it_does_not(tmp_path) -> None:
    right = open_model(deep_model(tmp_path / "right.onnx", of=10))
    _, same = check(right, open_model(deep_model(tmp_path / "same.onnx", of=10)))
    assert same.passed and same.outputs[0].max_abs == 0 and same.outputs[0].top1 == 1
    assert same.outputs[0].cosine == pytest.approx(1)
    _, off = check(right, open_model(deep_model(tmp_path / "off.onnx", fault=8, of=10)))
    assert not off.passed and 1e-4 < off.outputs[0].max_relative < 0.1
    one, two = off.outputs[0].sqnr_db, off.outputs[0].cosine
    assert one is not None and two is not None and 20 < one < 60 and two < 1


def _answering(path: Path, operator: str, constant: np.ndarray | None) -> Path:
    from onnx import save

    inputs = ["x"] if constant is None else ["x", "c"]
    constants = {} if constant is None else {"c": constant}
    shape = ("float32", [1, 4])
    model = onnx_model([(operator, inputs, ["y"], {})], {"x": shape}, {"y": shape}, constants)
    save(model, str(path))
    return path


@pytest.mark.parametrize(
    ("operator", "constant", "alarm"),
    [
        ("Mul", np.float32(0), "all zero, unlike the reference"),
        ("Pow", np.float32(0), "one value everywhere, unlike the reference"),
        ("Mul", np.float32(np.nan), "NaN where the reference has none"),
        ("Mul", np.array([np.inf, 1, 1, 1], np.float32), "Inf where the reference has none"),
        ("Reshape", np.array([4, 1], np.int64), "shape [1, 4] became [4, 1]"),
    ],
)
def test_alarms(operator, constant, alarm, tmp_path) -> None:
    right = open_model(_answering(tmp_path / "right.onnx", "Identity", None))
    wrong = open_model(_answering(tmp_path / "wrong.onnx", operator, constant))
    _, line = check(right, wrong)
    assert not line.passed
    assert alarm in line.outputs[0].alarms
    json.loads(json.dumps(line.to_json(), allow_nan=False))


def test_a_reference_that_draws_lots_is_not_blamed_on_the_conversion(tmp_path) -> None:
    from onnx import save

    shape = ("float32", [1, 4])
    random = onnx_model(
        [("RandomNormalLike", ["x"], ["r"], {}), ("Add", ["x", "r"], ["y"], {})],
        {"x": shape}, {"y": shape},
    )  # fmt: skip
    save(random, str(tmp_path / "random.onnx"))
    one = open_model(tmp_path / "random.onnx")
    _, line = check(one, one)
    assert not line.passed
    assert "the reference itself gives other outputs each time" in line.note


def test_models_that_take_other_inputs_are_refused_in_one_line(tmp_path, small_model) -> None:
    one = open_model(small_cnn(tmp_path / "cnn.onnx"))
    two = open_model(save_onnx(tmp_path, "linear"))
    with pytest.raises(EdgeKitError, match="takes other inputs") as caught:
        check(one, two)
    assert "\n" not in str(caught.value)


def test_a_model_that_no_noise_fits_asks_for_data(tmp_path) -> None:
    from onnx import save

    picky = onnx_model(  # takes 7 columns, which its file does not say
        [("MatMul", ["x", "w"], ["y"], {})],
        {"x": ("float32", ["a", "b"])}, {"y": ("float32", ["a", 2])},
        {"w": np.ones((7, 2), np.float32)},
    )  # fmt: skip
    save(picky, str(tmp_path / "picky.onnx"))
    one = open_model(tmp_path / "picky.onnx")
    with pytest.raises(InputError, match="--data"):
        check(one, one)
    samples = [{"x": np.ones((2, 7), np.float32)}]
    inputs, line = check(one, one, given=Given("mine", samples))
    assert line.passed and inputs == "mine"
    named = open_model(tmp_path / "picky.onnx", reading=Reading(parse_inputs(["x=1x7"])))
    assert check(named, named)[1].passed


BROKEN = Edge(
    "onnx", "openvino", "edgekit_converters.openvino:refuses", ("numpy",), "none", ("broken-tool",)
)


def test_a_way_that_fails_is_told_and_the_next_is_taken(tmp_path, cache, monkeypatch) -> None:
    real = conversion.paths_for
    monkeypatch.setattr(
        conversion, "paths_for",
        lambda *a: [(Step(BROKEN, Reading()),), *real(*a)],
    )  # fmt: skip
    found = convert_with_proof(open_model(small_cnn(tmp_path / "m.onnx")), "openvino", cache=cache)
    assert found.passed
    (attempt,) = found.attempts
    assert "broken-tool" in str(attempt.steps[0])
    assert found.ledger_json()["attempts"][0]["reason"] == attempt.reason


def test_if_no_way_works_the_first_reason_comes_first(tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "paths_for", lambda *a: [(Step(BROKEN, Reading()),)])
    with pytest.raises(EdgeKitError, match=r"\[1/1\] ONNX -> OpenVINO IR \(broken-tool\)"):
        convert_with_proof(open_model(small_cnn(tmp_path / "m.onnx")), "openvino", cache=cache)


def test_a_result_that_differs_is_not_written_but_its_ledger_is(tmp_path, cache) -> None:
    source = open_model(small_cnn(tmp_path / "m.onnx"))
    good = convert_with_proof(source, "onnx", cache=cache)
    assert [step.edge for step in good.steps] == [CLEAN_UP]
    row = replace(good.ledger[0].outputs[0], passed=False)
    wrong = replace(good, ledger=(replace(good.ledger[0], outputs=(row,)),))
    target = tmp_path / "out.onnx"
    assert write_result(wrong, target) == [tmp_path / "out.onnx.rejected.json"]
    assert not target.exists()
    (tmp_path / "out.onnx.rejected.json").unlink()
    assert write_result(wrong, target, keep=True)[0] == target
    assert {p.name for p in tmp_path.iterdir()} == {
        "m.onnx",
        "out.onnx",
        "out.onnx.provenance.json",
    }
    steps = json.loads((tmp_path / "out.onnx.provenance.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["clean-up", "parity"]


def test_ir_is_written_with_its_weights_beside_it(tmp_path, cache) -> None:
    found = convert_with_proof(open_model(small_cnn(tmp_path / "m.onnx")), "openvino", cache=cache)
    written = write_result(found, tmp_path / "a.b.xml")
    assert [path.name for path in written] == ["a.b.xml", "a.b.bin", "a.b.xml.provenance.json"]
    assert check(open_model(tmp_path / "m.onnx"), open_model(tmp_path / "a.b.xml"))[1].passed
    with pytest.raises(Exception, match=r"does not end in \.xml"):
        write_result(found, tmp_path / "a.onnx")


def test_layout_of_the_inputs_changes_and_the_numbers_do_not(tmp_path, cache) -> None:
    reading = Reading(layout="nhwc")
    source = open_model(small_cnn(tmp_path / "m.onnx"), reading=reading)
    found = convert_with_proof(source, "openvino", cache=cache)
    assert found.passed
    assert found.artifact.inputs[0].shape[1:] == (12, 12, 1)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_check_on_the_command_line(tmp_path, capsys) -> None:
    right = deep_model(tmp_path / "right.onnx", of=20)
    wrong = deep_model(tmp_path / "wrong.onnx", of=20, fault=10)
    assert run("check", str(right), str(right)) == 0
    assert run("check", str(right), str(wrong), "--json") == 1
    out = capsys.readouterr()
    document = json.loads(out.out[out.out.index("{") :])
    assert document["schema"] == "edgekit.check/1"
    assert document["divergence"]["node"] == "dense_10 (MatMul)"
    assert "the first tensor that differs is 't10'" in out.err


def test_convert_on_the_command_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small_cnn(tmp_path / "m.onnx")
    assert run("convert", "m.onnx", "--to", "openvino", "--explain") == 0
    assert "[1/1] ONNX -> OpenVINO IR (openvino)" in capsys.readouterr().out
    assert not (tmp_path / "m.xml").exists()
    assert run("convert", "m.onnx", "--to", "openvino", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == ["m.xml", "m.bin", "m.xml.provenance.json"]
    assert document["ledger"]["passed"] is True
    assert run("convert", "m.onnx", "--to", "onnx") == 0
    assert (tmp_path / "m-clean.onnx").exists()  # never over the source
    assert run("convert", "m.onnx", "--to", "onnx", "-o", "m.onnx") == 2
    assert "is the model itself" in capsys.readouterr().err
    assert run("convert", "m.onnx", "--to", "openvino", "-o", "m-clean.xml") == 0
    (tmp_path / "else.bin").write_bytes(b"precious")
    assert run("convert", "m.onnx", "--to", "openvino", "-o", "else.xml") == 2
    assert (tmp_path / "else.bin").read_bytes() == b"precious"
    (tmp_path / "m.tflite").write_bytes(b"the vendor's")
    assert run("convert", "m.onnx", "--to", "tflite") == 2
    assert (tmp_path / "m.tflite").read_bytes() == b"the vendor's"
    assert run("convert", "m.onnx", "--to", "openvino", "--timeout", "nan") == 2
    assert run("convert", "m.onnx", "--to", "openvino", "--weights", "w.pt", "-o", "q.xml") == 2
    capsys.readouterr()
    assert run("convert", "m.xml", "--to", "onnx", "-o", "back.onnx") == 2
    assert "nothing reads OpenVINO IR back" in capsys.readouterr().err
    assert run("convert", "nope.onnx", "--to", "tflite") == 2
    assert run("convert", "m.onnx", "--to", "openvino", "-o", "sub/m.xml") == 2
    assert run("convert", "m.onnx", "--to", "openvino", "--inputs", "image=1y2") == 2
