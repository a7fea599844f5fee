"""A model as it is, bundled, deployed and asked."""

import json

import numpy as np
import pytest
from cnn import cnn_scores, small_cnn
from deployable import Maker

import edgekit_runtime
from edgekit_runtime.bundle import Bundle

pytestmark = pytest.mark.needs("onnxruntime", "onnx", "openvino")

_STEPS = """
[inputs.image]
source = "array"
steps = [{ op = "normalize", scale = 0.00392156862745098 }]
[[outputs]]
op = "argmax"
"""


def test_a_packed_model_is_deployed_and_answers_as_numpy_does(edgekit, tmp_path) -> None:
    small_cnn(tmp_path / "net.onnx")
    sample = np.random.default_rng(0).random((1, 1, 12, 12), np.float32)
    np.save(tmp_path / "x.npy", sample)
    done = edgekit("pack", "net.onnx", "--threads", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["bundle"], made["engine"], made["threads"]) == ("net.edgekit", "onnxruntime", 1)
    with Bundle(tmp_path / "net.edgekit") as bundle:
        bundle.verify()
        manifest = bundle.manifest
    assert manifest.bundle_id == made["id"] and manifest.profiles == ("any",)
    assert manifest.provenance["command"].startswith("edgekit pack net.onnx")
    assert manifest.variants[0].expected == {}  # nothing was measured
    checked = edgekit("check", "net.edgekit", cwd=tmp_path)
    assert checked.returncode == 0 and checked.stdout.startswith("scores: ok"), checked.stderr
    there = ("--to", "local", "--root", tmp_path / "root")
    assert edgekit("deploy", tmp_path / "net.edgekit", *there).returncode == 0
    done = edgekit("run", tmp_path / "net.edgekit", "--input", tmp_path / "x.npy", "--json")
    scores = json.loads(done.stdout)["outputs"]["scores"]
    np.testing.assert_allclose(scores, cnn_scores(sample), rtol=1e-4, atol=1e-5)


def test_it_takes_steps_an_engine_and_a_profile(edgekit, tmp_path) -> None:
    small_cnn(tmp_path / "net.onnx")
    (tmp_path / "steps.toml").write_text(_STEPS)
    done = edgekit("pack", tmp_path / "net.onnx", "--engine", "openvino", "--for", "intel-n100",
                   "--preprocess", tmp_path / "steps.toml", "-o", tmp_path / "b.edgekit",
                   "--name", "pictures")  # fmt: skip
    assert done.returncode == 0, done.stderr
    raw = np.random.default_rng(1).integers(0, 256, (1, 1, 12, 12)).astype(np.float32)
    with edgekit_runtime.load(tmp_path / "b.edgekit") as session:
        assert session.manifest is not None
        assert (session.manifest.name, session.manifest.profiles) == ("pictures", ("intel-n100",))
        assert session.variant is not None and session.variant.engine == "openvino"
        answer = session.predict({"image": raw})
    assert int(answer["scores"].ravel()[0]) == cnn_scores(raw / 255).argmax()


def test_a_bundle_that_computes_something_else_is_told(edgekit, small_model, tmp_path) -> None:
    make = Maker(small_model("onnxruntime", "linear").read_bytes(), tmp_path / "bundles")
    done = edgekit("check", make(off=0.5))
    assert done.returncode == 1 and "y: DIFFERS" in done.stdout
    assert "1.edgekit does not compute its golden outputs on this machine" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nope.onnx",), "no file nope.onnx"),
        (("net.onnx", "-o", "no/such.edgekit"), "wanted a file in a folder that exists"),
        (("net.onnx", "--for", "esp32-s3"), "esp32-s3 runs firmware: edgekit optimize --for"),
        (("net.onnx", "--engine", "onnxruntime:qnn"), "is proven by edgekit optimize"),
        (("net.onnx", "--preprocess", "none.toml"), "cannot read none.toml"),
    ],
)
def test_what_is_wrong_is_one_line(words, says, edgekit, tmp_path) -> None:
    small_cnn(tmp_path / "net.onnx")
    done = edgekit("pack", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*.edgekit"))
