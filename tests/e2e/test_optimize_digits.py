"""A convolutional network on all three engines, with other options than the defaults."""

import json

import numpy as np
import pytest

import edgekit_runtime

pytestmark = [pytest.mark.measures, pytest.mark.needs("torch"), pytest.mark.needs("onnx2tf")]


@pytest.fixture(scope="module")
def run(edgekit, digits, tmp_path_factory):
    model, data = digits
    folder = tmp_path_factory.mktemp("digits-out")
    with np.load(data) as archive:
        images, labels = archive["image"], archive["labels"]
    np.savez(folder / "calibration.npz", image=images[:150])
    np.savez(folder / "evaluation.npz", image=images[150:], labels=labels[150:])
    (folder / "mine.py").write_text(
        "def share_right(outputs, labels):\n"
        "    return float((outputs['logits'].argmax(1) == labels).mean())\n"
    )
    done = edgekit(
        "optimize", model, "--for", "generic-x86-64", "--threads", "1",
        "--data", folder / "evaluation.npz", "--calibration", folder / "calibration.npz",
        "--metric", f"{folder / 'mine.py'}:share_right", "--minimize", "size",
        "--max-drop", "0.005", "-o", folder / "out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def test_all_engines_and_schemes_work_on_a_plain_cnn(run) -> None:
    document, _ = run
    assert len(document["candidates"]) == 17  # ncnn in fp32 only
    for row in document["candidates"]:
        assert row["metric"] is not None, row
        assert row["metric_drop"] <= 0.005, row
        assert row["latency_ns"]["samples"] > 0


def test_fp32_computes_what_pytorch_computes(run, digits) -> None:
    for row in run[0]["candidates"]:
        if row["scheme"] == "fp32":
            assert row["cosine"] is None or row["cosine"] > 0.999999, row
    logits = np.load(digits[0].parent / "torch_logits.npy")
    with np.load(digits[1]) as archive, edgekit_runtime.load(digits[0]) as session:
        found = session.run({"image": archive["image"][:50]})["logits"]
    np.testing.assert_allclose(found, logits[:50], rtol=1e-3, atol=1e-3)


def test_size_is_minimized(run) -> None:
    document, _ = run
    sizes = [
        row["size_bytes"] for row in document["candidates"] if row["status"] in ("chosen", "kept")
    ]
    chosen = next(row for row in document["candidates"] if row["status"] == "chosen")
    assert chosen["size_bytes"] == min(sizes)
    assert chosen["size_bytes"] < 0.3 * document["model"]["size_bytes"]


def test_calibration_came_from_its_own_file(run) -> None:
    data = run[0]["data"]
    assert data["calibration"] == 150
    assert data["selection"] + data["confirmation"] == 1050
    assert data["calibration_source"].endswith("calibration.npz")


def test_bundle_checks_on_its_engine(run, edgekit) -> None:
    from edgekit_runtime.golden import check

    assert all(result.ok for result in check(run[1] / "out" / "model.edgekit"))
