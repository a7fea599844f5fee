"""Accelerators that really run here: Qualcomm's HTP emulator, ncnn and LiteRT on a software GPU.

Answers come from the same model on the CPU; shares from the shapes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ncnn_models import convolution
from onnx import TensorProto, helper, numpy_helper
from software_gpu import software_vulkan

from edgekit.accelerate import compile_for, macs_of, placed
from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.errors import EdgeKitError
from edgekit.facts import probe_accelerator, probe_engine
from edgekit_runtime.placement import shortfall

QNN = "onnxruntime:qnn"
_RUN = """
import json, sys
import numpy as np
from edgekit_runtime import load
path, engine, precision, feed, out = sys.argv[1:]
with load(path, engine=engine, precision=precision) as session:
    np.savez(out, **session.run(dict(np.load(feed))))
    placed = session.placement
print(json.dumps([placed.shares, placed.delegate, placed.simulated, len(placed.nodes)]))
"""


def run(
    path: Path, engine: str, feed: dict[str, Any], folder: Path, *, precision: str = "float32",
    environment: dict[str, str] | None = None,
) -> tuple[dict[str, np.ndarray], Any]:  # fmt: skip
    """Outputs and placement, by a process of its own."""
    np.savez(folder / "feed.npz", **feed)
    out = folder / "out.npz"
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(path), engine, precision, str(folder / "feed.npz"),
         str(out)],
        env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(np.load(out)), json.loads(done.stdout.splitlines()[-1])


def mixed(path: Path) -> Path:
    """Conv 3x3 (3 -> 8) on 16 x 16 and an Einsum over the columns, which the HTP has not."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((8, 3, 3, 3)), "m": random.standard_normal((16, 16))}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], "stem", pads=[1, 1, 1, 1]),
            helper.make_node("Einsum", ["a", "m"], ["y"], "mix", equation="nchw,hk->nckw"),
        ],
        "mixed", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 16, 16])],
        [numpy_helper.from_array(v.astype(np.float32) / 4, n) for n, v in weights.items()],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


# --- Qualcomm's HTP -------------------------------------------------------------------------------


@pytest.mark.needs("onnxruntime_qnn")
def test_the_htps_emulator_runs_one_operator_and_is_called_one() -> None:
    assert probe_accelerator(QNN) == "Qualcomm's HTP emulator"


@pytest.mark.needs("onnxruntime_qnn")
@pytest.mark.parametrize("soc", [None, "57"])
def test_an_operator_the_htp_lacks_is_named_and_counted(soc, tmp_path) -> None:
    model = open_model(mixed(tmp_path / "mixed.onnx"))
    macs = macs_of(model)
    assert macs == {"stem": 8 * 3 * 3 * 3 * 256, "mix": 8 * 16 * 16 * 16}
    if soc is not None:
        model = compile_for(model, QNN, soc, cache=Cache(tmp_path / "cache"))
        kinds = {node.op_type for node in onnx.load(model.path).graph.node}
        assert kinds == {"EPContext", "Einsum"}
        assert model.provenance[-1]["compiler_target"] == soc
    found = placed(model, QNN, macs)
    share = macs["stem"] / sum(macs.values())
    assert found.shares == pytest.approx({"NPU": share, "CPU": 1 - share})
    assert found.simulated == "Qualcomm's HTP emulator" and found.of == "MACs"
    assert shortfall({"NPU": 1.0}, found).startswith("not on NPU: Einsum mix; 62.79 % of its")
    x = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32)
    made, _ = run(model.path, QNN, {"x": x}, tmp_path)
    wanted, _ = run(tmp_path / "mixed.onnx", "onnxruntime", {"x": x}, tmp_path)
    assert np.abs(made["y"] - wanted["y"]).max() < 1e-2 * np.abs(wanted["y"]).max()  # float16


_BROKEN = {
    "missing": ("raise ModuleNotFoundError('no', name='onnxruntime_qnn')", "onnxruntime-qnn>=2.0"),
    "old": ("", "onnxruntime-qnn>=2.0"),
    "damaged": (
        "def get_library_path(): return '/nosuch/libqnn.so'\nget_qnn_htp_path = get_library_path",
        "nosuch",
    ),
}


@pytest.mark.needs("onnxruntime_qnn")
@pytest.mark.parametrize("how", _BROKEN)
def test_a_missing_or_broken_provider_is_an_error(how, tmp_path, monkeypatch) -> None:
    code, says = _BROKEN[how]
    (tmp_path / "onnxruntime_qnn").mkdir()
    (tmp_path / "onnxruntime_qnn" / "__init__.py").write_text(code)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{before}")
    fault = probe_engine(QNN)
    assert fault is not None and says in fault and "\n" not in fault


@pytest.mark.needs("onnxruntime")
def test_a_provider_that_is_not_there_is_never_replaced_by_the_cpu() -> None:
    with pytest.raises(EdgeKitError, match="no CUDAExecutionProvider; it has .*CPUExecution"):
        probe_accelerator("onnxruntime:cuda")


# --- GPUs, on a software driver -------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> dict[str, str]:
    return software_vulkan()


@pytest.mark.needs("ncnn")
@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-3), ("float16", 1e-2)])
def test_ncnn_on_vulkan_computes_what_it_does_on_the_cpu(precision, most, gpu, tmp_path) -> None:
    random = np.random.default_rng(2)
    path = convolution(tmp_path, random.standard_normal((16, 8, 3, 3)).astype(np.float32) / 8)
    x = random.standard_normal((1, 8, 24, 24)).astype(np.float32)
    wanted, _ = run(path, "ncnn", {"x": x}, tmp_path)
    made, found = run(path, "ncnn:vulkan", {"x": x}, tmp_path, precision=precision,
                      environment=gpu)  # fmt: skip
    assert np.abs(made["y"] - wanted["y"]).max() < most * np.abs(wanted["y"]).max()
    shares, _, simulated, nodes = found
    assert shares == {"GPU": 1.0} and "SwiftShader" in simulated and nodes


@pytest.mark.needs("litert")
@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-3), ("float16", 1e-2)])
def test_litert_on_webgpu_computes_what_it_does_on_the_cpu(
    precision, most, gpu, small_model, tmp_path
) -> None:
    path = small_model("litert", "linear")
    x = np.random.default_rng(3).standard_normal((1, 4)).astype(np.float32)
    wanted, _ = run(path, "litert", {"x": x}, tmp_path)
    made, found = run(path, "litert:gpu", {"x": x}, tmp_path, precision=precision,
                      environment=gpu)  # fmt: skip
    (name,) = wanted
    assert np.abs(made[name] - wanted[name]).max() < most * np.abs(wanted[name]).max()
    shares, delegate, simulated, _ = found
    assert shares == {"GPU": 1.0} and "WebGPU" in delegate and "SwiftShader" in simulated


@pytest.mark.parametrize("engine", ["ncnn:vulkan", "litert:gpu"])
def test_without_a_driver_a_gpu_is_missing(engine, monkeypatch) -> None:
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nosuch/icd.json")
    fault = probe_engine(engine)
    assert fault is not None and "driver" in fault


def test_a_gpu_that_is_there_runs_one_operator(gpu) -> None:
    code = (
        "from edgekit.facts import probe_accelerator\n"
        "print(probe_accelerator('ncnn:vulkan'), probe_accelerator('litert:gpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=gpu, text=True, check=True,
                          capture_output=True)  # fmt: skip
    assert done.stdout.count("SwiftShader") == 2


# --- LiteRT's delegates ---------------------------------------------------------------------------


def test_what_a_delegate_runs_is_between_what_it_takes_and_gives() -> None:
    from edgekit_runtime.engines.litert import _taken

    # 0 -> a -> 1 -> b -> 2 -> c -> 3, and 1 -> d -> 4; a delegate for b and c
    chain = [("A", [0], [1]), ("B", [1], [2]), ("C", [2], [3]), ("D", [1], [4])]
    assert _taken([*chain, ("DELEGATE", [1], [3])]) == {1, 2}
    assert _taken([*chain, ("DELEGATE", [0], [3]), ("DELEGATE", [1], [4])]) == {0, 1, 2, 3}
    assert _taken(chain) == set()
