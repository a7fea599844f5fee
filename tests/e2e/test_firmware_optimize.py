"""From a trained network to what a microcontroller's firmware includes."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit_runtime import load
from edgekit_runtime.bundle import Bundle
from edgekit_runtime.errors import EdgeKitError

pytestmark = pytest.mark.needs("torch", "onnx2tf", "litert_quantizer", "tflite_micro", "ethosu")


@pytest.fixture(scope="module")
def run(edgekit, digits, tmp_path_factory):
    model, data = digits

    def optimize(profile: str, name: str, *more: str, source: Path = model) -> Any:
        out = tmp_path_factory.mktemp("firmware") / name
        done = edgekit("optimize", source, "--for", profile, "--data", data, "--max-drop", "0.02",
                       "-o", out, "--json", *more)  # fmt: skip
        return done, out

    return optimize


def row_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one for one in document["candidates"] if one["id"] == name)
    return found


def test_all_of_it_runs_on_the_npu(run, edgekit, tmp_path) -> None:
    done, out = run("corstone-300", "out")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["chosen"] == "ethos-u-int8-static"
    chosen = row_of(document, "ethos-u-int8-static")
    facts = chosen["firmware"]
    assert facts["macs_on_accelerator"] == 1 and facts["left_to_cpu"] == []
    assert facts["estimate"]["tool"].startswith("vela ") and facts["estimate"]["cycles"] > 0
    assert 0 < facts["arena_bytes"] < 2 << 20 and chosen["latency_ns"] is None
    alone = row_of(document, "tflm-int8-static")
    assert alone["status"] == "dropped" and "runs on the CPU alone" in alone["reason"]
    assert document["confirmation"]["drop"] <= 0.02
    report = (out / "report.html").read_text()
    assert "On the device" in report and "Not measured" in report
    with Bundle(out / "model.edgekit") as bundle:
        bundle.verify()
        (variant,) = bundle.manifest.variants
    assert variant.engine == "ethos-u" and variant.placement == {"ethos-u55": 1.0}
    assert variant.expected["latency_ns"]["label"].startswith("estimated (vela")
    with pytest.raises(EdgeKitError, match="ethos-u"):  # nothing here executes it
        load(out / "model.edgekit")
    shown = edgekit("inspect", out / "model.edgekit")
    assert "estimated (vela" in shown.stdout


def test_a_firmwares_sources_compile(run, edgekit, tmp_path) -> None:
    done, out = run("esp32-s3", "out")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    facts = row_of(document, document["chosen"])["firmware"]
    assert document["chosen"] == "tflm-int8-static" and facts["estimate"] is None
    whole = row_of(document, "tflm-fp32")["firmware"]
    assert whole["flash_bytes"] > 3 * facts["flash_bytes"]
    unpacked = edgekit("unpack", out / "model.edgekit", "-o", tmp_path / "files")
    assert unpacked.returncode == 0, unpacked.stderr
    (source,) = (tmp_path / "files").rglob("*_model.c")
    header, ops = (source.with_name(source.name.replace("model.c", end)).read_text()
                   for end in ("model.h", "ops.h"))  # fmt: skip
    assert f"ARENA_BYTES {-(-facts['arena_bytes'] // 16) * 16}" in header
    assert ops.count("resolver.Add") == len(facts["operators"])
    compilers = [one for one in ("aarch64-linux-gnu-gcc", "gcc") if shutil.which(one)]
    if not compilers:
        pytest.skip("no C compiler here")
    subprocess.run(
        [compilers[0], "-std=c11", "-Wall", "-Wextra", "-Werror", "-c", source,
         "-o", tmp_path / "model.o"], check=True,
    )  # fmt: skip
    assert (tmp_path / "model.o").stat().st_size > facts["flash_bytes"]


def test_what_the_npu_lacks_breaks_the_contract(run, digits, tmp_path) -> None:
    """A depthwise convolution whose strides an Ethos-U55 does not have."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(0, 0.3, (4, 1, 3, 3)), "far": rng.normal(0, 0.3, (4, 1, 3, 3)),
        "head": rng.normal(0, 0.5, (4, 10)),
    }  # fmt: skip
    shape = np.load(digits[1])["image"].shape[1:]
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "far"], ["b"], name="far", strides=[4, 4], group=4),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(value.astype(np.float32), key) for key, value in weights.items()],
    )  # fmt: skip
    path = tmp_path / "strides.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    done, out = run("corstone-300", "out", "--metric", "cosine", source=path)
    document = json.loads(done.stdout)
    assert "candidates" in document, document
    broken = row_of(document, "ethos-u-int8-static")
    assert done.returncode == 1 and document["chosen"] is None
    assert broken["status"] == "dropped" and "DEPTHWISE_CONV_2D" in broken["reason"], broken[
        "reason"
    ]
    assert not (out / "model.edgekit").exists()
    done, out = run("corstone-300", "out", "--metric", "cosine", "--allow-fallback", source=path)
    assert done.returncode == 0, done.stderr
    with Bundle(out / "model.edgekit") as bundle:
        (variant,) = bundle.manifest.variants
    left = variant.expected["firmware"]["left_to_cpu"]
    assert "DEPTHWISE_CONV_2D" in {one["type"] for one in left}
    assert variant.placement["CPU"] > 0
