"""From a trained network to a bundle for a phone's NPU and GPU, which an emulator and a software
driver stand in for."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import make_variant
from deployable import Maker
from native_runner import engine_libraries, native_program
from onnx import TensorProto, helper, numpy_helper
from software_gpu import software_vulkan

from edgekit_runtime.bundle import Bundle

pytestmark = pytest.mark.needs("onnxruntime_qnn", "torch", "onnx2tf", "litert_quantizer", "ncnn")

#: a board with ONNX Runtime and Qualcomm's NPU
_BOARD = """schema = "edgekit.device/1"
id = "board"
name = "Board"
kind = "board"
arch = "x86_64"
[engines.onnxruntime]
[accelerators.htp]
kind = "npu"
engine = "onnxruntime"
provider = "QNNExecutionProvider"
compiler_target = "57"
dtypes = ["float16"]
static_shapes = true
[defaults]
threads = 1
[[sources]]
fields = ["engines", "accelerators", "defaults"]
kind = "choice"
title = "this test"
says = "SoC 57"
"""


@contextmanager
def found_first(edgekit, folder: Path) -> Iterator[None]:
    """What lies in a folder, before what is installed."""
    before = edgekit.environment
    path = f"{folder}:{before.get('PYTHONPATH', '')}"
    edgekit.environment = {**before, "PYTHONPATH": path}
    try:
        yield
    finally:
        edgekit.environment = before


@pytest.fixture
def without_qnn(edgekit, tmp_path) -> Iterator[None]:
    """The extra for Qualcomm's NPU, broken."""
    (tmp_path / "broken" / "onnxruntime_qnn").mkdir(parents=True)
    (tmp_path / "broken" / "onnxruntime_qnn" / "__init__.py").write_text("raise ImportError('x')")
    with found_first(edgekit, tmp_path / "broken"):
        yield


def rows_of(document: dict[str, Any]) -> dict[str, Any]:
    return {one["id"]: one for one in document["candidates"]}


@pytest.fixture(scope="module")
def phone(edgekit, digits, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """400 digits for galaxy-s24, with a GPU's driver in software."""
    model, data = digits
    folder = tmp_path_factory.mktemp("phone")
    np.savez(folder / "data.npz", **{name: one[:400] for name, one in np.load(data).items()})
    before, driver = edgekit.environment, software_vulkan()
    wanted = ("LD_LIBRARY_PATH", "VK_ICD_FILENAMES")
    edgekit.environment = {**before, **{name: driver[name] for name in wanted}}
    try:
        done = edgekit("optimize", model, "--for", "galaxy-s24", "--data", folder / "data.npz",
                       "--max-drop", "0.05", "-o", folder / "out", "--json")  # fmt: skip
    finally:
        edgekit.environment = before
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder / "out"


def test_a_phones_npu_and_gpu_are_tried_and_called_simulated(phone) -> None:
    document, _ = phone
    rows = rows_of(document)
    reference = rows["onnxruntime-fp32"]["metric"]
    for name, device, stand_in in (
        ("onnxruntime-qnn-int8-static", "NPU", "HTP emulator"),
        ("onnxruntime-qnn-fp32", "NPU", "HTP emulator"),
        ("ncnn-vulkan-fp32", "GPU", "SwiftShader"), ("ncnn-vulkan-fp16", "GPU", "SwiftShader"),
        ("litert-gpu-fp32", "GPU", "SwiftShader"), ("litert-gpu-fp16", "GPU", "SwiftShader"),
    ):  # fmt: skip
        row = rows[name]
        assert row["status"] in ("chosen", "kept"), row
        assert row["placement"]["shares"] == {device: 1.0}, row["placement"]
        assert stand_in in row["placement"]["simulated"]
        assert abs(row["metric"] - reference) <= 0.01
        assert row["latency_ns"] is None or row["latency_ns"]["label"] == "simulated"


def test_the_bundle_promises_the_npu_and_has_a_variant_for_the_cpu(phone, edgekit) -> None:
    document, out = phone
    assert document["chosen"].startswith("onnxruntime-qnn-")
    with Bundle(out / "model.edgekit") as bundle:
        bundle.verify()
        first, second = bundle.manifest.variants
        nodes = {n.op_type for n in onnx.load_from_string(bundle.read(first.files[0])).graph.node}
    assert first.engine == "onnxruntime:qnn" and "EPContext" in nodes
    assert first.placement == {"NPU": 1.0} and first.on_misplacement == "refuse"
    assert sum(first.macs.values()) > 1e6
    assert first.expected["latency_ns"]["label"] == "simulated"
    assert ":" not in second.engine and second.placement == {"CPU": 1.0}
    report = (out / "report.html").read_text()
    assert "simulated" in report and "HTP emulator" in report
    shown = subprocess.run(
        [sys.executable, "-m", "edgekit_runtime", "check", str(out / "model.edgekit")],
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    inside = edgekit("inspect", out / "model.edgekit")
    assert inside.returncode == 0 and "simulated" in inside.stdout


def test_a_phone_without_the_engine_takes_the_second_variant_and_says_so(phone) -> None:
    _, out = phone
    done = subprocess.run(
        [native_program(), "check", str(out / "model.edgekit")], env=engine_libraries(), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FallbackWarning" in done.stderr and "no engine 'onnxruntime:qnn'" in done.stderr


def test_bench_says_which_variant_ran_and_measures_another_by_name(phone, edgekit) -> None:
    document, out = phone
    common = ("bench", out / "model.edgekit", "--budget", "1s", "--cold", "1", "--allow-unfit")
    done = edgekit(*common, "--variant", document["second"], "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["variant"] == document["second"] and found["engine"] in document["second"]
    assert found["latency_ns"]["label"] == "measured" and found["notes"] == []
    unknown = edgekit(*common, "--variant", "fastest")
    assert unknown.returncode == 2
    assert f"no variant 'fastest' in this bundle; it has: {document['chosen']}" in unknown.stderr


def test_compare_compares_no_emulators_time(phone, edgekit) -> None:
    bundle = phone[1] / "model.edgekit"
    done = edgekit("compare", bundle, bundle, "--budget", "20s", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    figures = {one["figure"]: one for one in found["figures"]}
    assert found["verdict"] == figures["latency_ns"]["verdict"] == "not compared"
    assert "HTP emulator" in figures["latency_ns"]["note"] and "peak_rss_bytes" not in figures
    assert figures["placement"]["verdict"] == "same" and "NPU" in figures["placement"]["base"]
    assert figures["parity"]["verdict"] == "agrees"


@pytest.mark.usefixtures("without_qnn")
def test_bench_says_what_runs_in_its_place(phone, edgekit) -> None:
    document, out = phone
    said = f"runs variant {document['second']}; not {document['chosen']}: onnxruntime has no QNN"
    done = edgekit("bench", out / "model.edgekit", "--budget", "1s", "--cold", "1",
                   "--allow-unfit", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["variant"], ":" in found["engine"]) == (document["second"], False)
    assert any(said in note for note in found["notes"])


def test_deploy_says_what_runs_in_its_place(edgekit, small_model, tmp_path) -> None:
    make = Maker(small_model("onnxruntime", "linear").read_bytes(), tmp_path / "bundles")
    gpu = make_variant(id="gpu", engine="onnxruntime:cuda", placement={"GPU": 1.0})
    done = edgekit("deploy", make(before=(gpu,)), "--to", "local", "--as", "linear", "--root",
                   tmp_path / "root")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "it runs variant a; not gpu: this onnxruntime has no CUDAExec" in done.stdout


def test_an_app_is_shown_how_to_ask_for_the_npu(phone, edgekit, tmp_path) -> None:
    _, out = phone
    done = edgekit("unpack", out / "model.edgekit", "-o", tmp_path / "app")
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "app" / "HOW-TO.md").read_text()
    assert "onnxruntime-android-qnn" in words and "options.addQnn(" in words


# --- what the accelerator lacks -------------------------------------------------------------------


@pytest.fixture
def lacking(tmp_path) -> tuple[Path, Path, Path]:
    """A network with an operator that the HTP lacks, as PyTorch exports it; data; a board."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((4, 3, 3, 3)), "m": random.standard_normal((8, 8))}
    mix = helper.make_node("Einsum", ["a", "m"], ["b"], "node_einsum", equation="nchw,hk->nckw")
    scopes = mix.metadata_props.add()
    scopes.key, scopes.value = "pkg.torch.onnx.name_scopes", "['', 'blocks.0.mix', 'einsum']"
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], "node_conv2d", pads=[1, 1, 1, 1]), mix,
            helper.make_node("Flatten", ["b"], ["y"], "node_view"),
        ],
        "lacking", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 256])],
        [numpy_helper.from_array(v.astype(np.float32) / 4, n) for n, v in weights.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    x = random.standard_normal((80, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=random.integers(0, 256, 80))
    (tmp_path / "board.toml").write_text(_BOARD)
    return tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "board.toml"


def test_a_broken_contract_ends_the_run_with_the_operators_name(lacking, edgekit, tmp_path) -> None:
    model, data, board = lacking
    out = tmp_path / "out"
    done = edgekit("optimize", model, "--for", board, "--data", data, "--accelerator", "htp", "-o",
                   out, "--max-drop", "0.5")  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = (one for one in done.stderr.splitlines() if one.startswith("edgekit: "))
    assert line.startswith("edgekit: htp was asked for and not used: onnxruntime-qnn-fp32: not on "
                           "NPU: Einsum node_einsum (in blocks.0.mix); 77.14 % of its")  # fmt: skip
    assert not (out / "model.edgekit").exists()


def test_an_allowed_fallback_is_in_the_bundle_and_warned_of(lacking, edgekit, tmp_path) -> None:
    model, data, board = lacking
    out = tmp_path / "out"
    done = edgekit("optimize", model, "--for", board, "--data", data, "--accelerator", "htp", "-o",
                   out, "--max-drop", "0.5", "--allow-fallback", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["chosen"] == "onnxruntime-qnn-fp32"
    left = rows_of(document)["onnxruntime-qnn-fp32"]["placement"]["left"]
    assert ["CPU", "Einsum", "node_einsum"] in [one[:3] for one in left]
    with Bundle(out / "model.edgekit") as bundle:
        first = bundle.manifest.variants[0]
    assert first.on_misplacement == "warn" and first.placement == {"NPU": 1.0}
    assert ["CPU", "Einsum", "node_einsum"] in first.expected["placement"]["left"]

    def said(verb: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "edgekit_runtime", verb, str(out / "model.edgekit")]
        done = subprocess.run(command, text=True, capture_output=True, check=True)
        return done.stdout, done.stderr

    words, warning = said("check")
    assert "FallbackWarning" in warning and "not on NPU: Einsum node_einsum; 77.14 %" in warning
    assert ("as the bundle allows" in warning and words.startswith("output y")) or "y: ok" in words
    assert "else it warns" in said("info")[0]


@pytest.mark.usefixtures("without_qnn")
def test_an_accelerator_that_cannot_be_used_is_said(lacking, edgekit, tmp_path) -> None:
    model, data, board = lacking
    common = ("optimize", model, "--for", board, "--data", data, "-o", tmp_path / "out",
              "--dry-run")  # fmt: skip
    asked = edgekit(*common, "--accelerator", "htp")
    left_open = edgekit(*common, "--json")
    assert asked.returncode == 3
    assert "htp was asked for and cannot be used here: " in asked.stderr
    assert "onnxruntime-qnn>=2.0" in asked.stderr
    assert left_open.returncode == 0
    plan = rows_of(json.loads(left_open.stdout))
    assert "onnxruntime-qnn>=2.0" in plan["onnxruntime-qnn-fp32"]["skip"]
    unknown = edgekit(*common, "--accelerator", "npu7")
    assert unknown.returncode == 2 and "no accelerator 'npu7'; it has htp" in unknown.stderr


_PLUG_IN = """
import shutil
from edgekit_runtime.engines import litert
from edgekit_runtime.engines.accelerators import Accelerator
from edgekit_runtime.placement import Placement

def load(files, options):
    loaded = litert.load(files, options)
    shares, nodes = {"NPU": 1.0}, (("NPU", "compiled", "all of it"),)
    loaded.placement = lambda operators=True: Placement(shares, "mine", "float32", {}, nodes)
    return loaded

def compile(source, target, compiler_target):
    assert compiler_target == "chip-7"
    shutil.copyfile(source, target)

MINE = Accelerator("NPU", "mine-npu", load=load, probe=lambda: "1.0", compile=compile)
"""


def test_an_accelerator_that_plugs_in_is_compiled_for_measured_and_promised(
    edgekit, small_model, tmp_path
) -> None:
    info = tmp_path / "site" / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgekit.accelerators]\nlitert.mine = mine:MINE\n")
    (tmp_path / "site" / "mine.py").write_text(_PLUG_IN)
    board = _BOARD.replace("engines.onnxruntime", "engines.litert").replace("float16", "float32")
    board = board.replace("QNNExecutionProvider", "mine-npu").replace('"57"', '"chip-7"')
    board = board.replace('engine = "onnxruntime"', 'engine = "litert"').replace("htp", "npu")
    (tmp_path / "board.toml").write_text(board.replace("SoC 57", "chip-7"))
    x = np.random.default_rng(0).standard_normal((80, 4)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    with found_first(edgekit, tmp_path / "site"):
        done = edgekit("optimize", small_model("litert", "linear"), "--for", tmp_path /
                       "board.toml", "--data", tmp_path / "d.npz", "--accelerator", "npu", "-o",
                       tmp_path / "out", "--max-drop", "0.1", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["chosen"] == "litert-mine-fp32"
    assert "litert:mine is not verified: no test of EdgeKit itself runs it" in document["notes"]
    row = rows_of(document)["litert-mine-fp32"]
    assert row["placement"]["shares"] == {"NPU": 1.0} and row["placement"]["of"] == "MACs"
    assert row["latency_ns"]["label"] == "measured"
    with Bundle(tmp_path / "out" / "model.edgekit") as bundle:
        (variant,) = bundle.manifest.variants
        steps = bundle.manifest.provenance["steps"]
    assert variant.engine == "litert:mine" and variant.placement == {"NPU": 1.0}
    assert sum(variant.macs.values()) == 12
    assert [one["compiler_target"] for one in steps if one["step"] == "compile"] == ["chip-7"]
    alone = subprocess.run(  # where nothing plugs in
        [sys.executable, "-m", "edgekit_runtime", "check", str(tmp_path / "out/model.edgekit")],
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 3 and "no accelerator 'mine'; known: litert:gpu" in alone.stderr
