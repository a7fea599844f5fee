"""What EdgeKit's runtime costs over the engines' own calls, side by side.

For each engine: the call its tutorial shows, the fastest call the engine offers (buffers bound
beforehand), EdgeKit's `session.run` and EdgeKit's `bound()`, on one MatMul and on a real network
(basic-pitch, from its package). Blocks of calls are interleaved in random order in one process; the
figure is the median over blocks of the mean time per call, and ratios and differences are taken
block by block. Import, load and memory are of fresh processes, interleaved. Run on an otherwise
idle machine.

    python benchmarks/runtime_overhead.py [--blocks 60] [--starts 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import ai_edge_litert.interpreter as litert
import ncnn
import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

import edgekit_runtime
from edgekit.measure.statistics import median_interval, paired_ratio

Calls = dict[str, Callable[[], object]]


def one_matmul(folder: Path) -> dict[str, Path]:
    """y = x @ w, float32 (1, 8) x (8, 8), in three formats."""
    weights = np.random.default_rng(0).random((8, 8), np.float32)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])], "one_matmul",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
            [numpy_helper.from_array(weights, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 15)], ir_version=8,
    )  # fmt: skip
    paths = {name: folder / f"m{suffix}" for name, suffix in
             (("onnxruntime", ".onnx"), ("openvino", ".xml"), ("litert", ".tflite"),
              ("ncnn", ".param"))}  # fmt: skip
    onnx.save(model, paths["onnxruntime"])
    ov.save_model(ov.Core().read_model(paths["onnxruntime"]), paths["openvino"], False)
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([1, 8], tf.float32, name="x")])
    def call(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.matmul(x, weights)}

    module = tf.Module()
    module.call = call
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [call.get_concrete_function()], module
    )
    paths["litert"].write_bytes(converter.convert())
    tensors = {n: [{"name": v, "dtype": "float32", "shape": [1, 8]}] for n, v in
               (("inputs", "x"), ("outputs", "y"))}  # fmt: skip
    layers = "Input in 0 1 x\nInnerProduct fc 1 1 x y 0=8 1=0 2=64\n"
    paths["ncnn"].write_text(f"7767517\n2 2\n{layers}")
    paths["ncnn"].with_suffix(".bin").write_bytes(bytes(4) + weights.T.copy().tobytes())
    paths["ncnn"].with_suffix(".json").write_text(json.dumps(tensors))
    return paths


def calls_of(engine: str, path: Path, x: np.ndarray) -> Calls:
    """The tutorial's call, the engine's fastest, and ours."""
    session = edgekit_runtime.load(path, threads=1)
    name = session.inputs[0].name
    feed = {name: x}
    bound = session.bind()
    bound.inputs[name][...] = x
    hooked = edgekit_runtime.load(path, threads=1)
    hooked.measure(capacity=1000).__enter__()
    ours: Calls = {
        "edgekit session.run": lambda: session.run(feed),
        "edgekit run, measured": lambda: hooked.run(feed),
        "edgekit bound()": bound,
    }
    return {**_TUTORIALS[engine](path, x), **ours}


def _onnxruntime(path: Path, x: np.ndarray) -> Calls:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options)
    name, out = session.get_inputs()[0].name, session.get_outputs()[0]
    binding = session.io_binding()
    held = x.copy()
    result = np.zeros([d if isinstance(d, int) else 1 for d in out.shape], np.float32)
    binding.bind_input(name, "cpu", 0, held.dtype, held.shape, held.ctypes.data)
    binding.bind_output(out.name, "cpu", 0, result.dtype, result.shape, result.ctypes.data)
    return {
        "tutorial": lambda: session.run(None, {name: x}),
        "engine bound": lambda: (held, result, session.run_with_iobinding(binding))[2],
    }


def _openvino(path: Path, x: np.ndarray) -> Calls:
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = ov.Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    compiled = core.compile_model(model, "CPU", config)
    request = compiled.create_infer_request()
    held = x.copy()
    result = np.zeros(tuple(compiled.outputs[0].shape), np.float32)
    request.set_input_tensor(0, ov.Tensor(held, shared_memory=True))
    request.set_output_tensor(0, ov.Tensor(result, shared_memory=True))
    return {
        "tutorial": lambda: compiled(x),
        "engine bound": lambda: (held, result, request.infer())[2],
    }


def _litert(path: Path, x: np.ndarray) -> Calls:
    runner_of = litert.Interpreter(str(path), num_threads=1)
    runner = runner_of.get_signature_runner()
    name = next(iter(runner.get_input_details()))
    plain = litert.Interpreter(str(path), num_threads=1)
    plain.allocate_tensors()
    source = plain.get_input_details()[0]["index"]
    target = plain.get_output_details()[0]["index"]

    def fastest() -> object:
        plain.set_tensor(source, x)
        plain.invoke()
        return plain.get_tensor(target)

    return {"tutorial": lambda: runner(**{name: x}), "engine bound": fastest}


def _ncnn(path: Path, x: np.ndarray) -> Calls:
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))
    bound = ncnn.Mat(x.reshape(-1)).clone()
    source, target = net.input_indexes()[0], net.output_indexes()[0]

    def tutorial() -> object:
        with net.create_extractor() as extractor:
            extractor.input("x", ncnn.Mat(x.reshape(-1)))
            return np.array(extractor.extract("y")[1])

    def fastest() -> object:
        extractor = net.create_extractor()
        extractor.input(source, bound)
        return np.array(extractor.extract(target)[1])

    return {"tutorial": tutorial, "engine bound": fastest}


_TUTORIALS = {"onnxruntime": _onnxruntime, "openvino": _openvino, "litert": _litert, "ncnn": _ncnn}


def interleave(calls: Calls, blocks: int, count: int) -> dict[str, list[float]]:
    """Mean microseconds per call, by block."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for block in range(blocks + 2):
        random.shuffle(order)
        for name in order:
            call = calls[name]
            call()
            start = time.perf_counter_ns()
            for _ in range(count):
                call()
            if block >= 2:
                taken[name].append((time.perf_counter_ns() - start) / count / 1000)
    return taken


def basic_pitch(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """The network out of its package: ONNX and TFLite as they came, an IR of the former."""
    store = Path.home() / ".cache" / "edgekit-tests"
    wheels = sorted(store.glob("basic_pitch-0.4.0*.whl"))
    if not wheels:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(store),
             "basic-pitch==0.4.0"], check=True,
        )  # fmt: skip
        wheels = sorted(store.glob("basic_pitch-0.4.0*.whl"))
    with zipfile.ZipFile(wheels[0]) as archive:
        for name in archive.namelist():
            if name.endswith(("nmp.onnx", "nmp.tflite")):
                (folder / Path(name).name).write_bytes(archive.read(name))
    model = ov.Core().read_model(folder / "nmp.onnx")
    ov.save_model(model, folder / "nmp.xml", compress_to_fp16=False)
    x = np.random.default_rng(0).standard_normal((1, 43844, 1)).astype(np.float32)
    names = {"onnxruntime": "nmp.onnx", "openvino": "nmp.xml", "litert": "nmp.tflite"}
    return {engine: (folder / name, x) for engine, name in names.items()}


def shown(taken: dict[str, list[float]]) -> None:
    """Medians, and ratios to the engine's own calls."""
    for name, values in taken.items():
        ratio, low, high = median_interval(paired_ratio(values, taken["tutorial"]))
        over = [a - b for a, b in zip(values, taken["engine bound"], strict=True)]
        plain = [a - b for a, b in zip(values, taken["edgekit session.run"], strict=True)]
        print(
            f"  {name:<22} {statistics.median(values):9.2f} us   {ratio:6.3f}x the tutorial's call "
            f"({low:.3f} to {high:.3f})   {statistics.median(over):+8.2f} us over the bound one"
            + (f"   {statistics.median(plain):+.2f} us over run" if "measured" in name else "")
        )


_RAW = {
    "onnxruntime": """
import onnxruntime as ort
start = now()
options = ort.SessionOptions(); options.intra_op_num_threads = 1
session = ort.InferenceSession(path, options)
session.run(None, {session.get_inputs()[0].name: x})
""",
    "openvino": """
import openvino as ov
start = now()
core = ov.Core(); model = core.read_model(path)
model.reshape(list(x.shape))
compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1,
    "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})
compiled(x)
""",
    "litert": """
from ai_edge_litert.interpreter import Interpreter
start = now()
interpreter = Interpreter(path, num_threads=1)
runner = interpreter.get_signature_runner()
runner(**{next(iter(runner.get_input_details())): x})
""",
}
_OURS = """
import edgekit_runtime
from edgekit_runtime.engines import import_engine
import_engine(engine)
start = now()
session = edgekit_runtime.load(path)
session.run({session.inputs[0].name: x})
"""
_START = """
import sys, json, time
now = time.perf_counter_ns
path, engine, kind = sys.argv[1:4]
import numpy as np
if kind == "import":
    start = now()
    import edgekit_runtime
    print(json.dumps([now() - start, 0])); raise SystemExit
x = np.load(sys.argv[4])
{body}
taken = now() - start
status = open("/proc/self/status").read()
print(json.dumps([taken, int(status.split("VmRSS:")[1].split()[0]) * 1024]))
"""


def starts(
    engine: str, plain: Path, bundle: Path, x: Path, times: int
) -> dict[str, list[list[int]]]:
    """[load and first run ns, RSS] of fresh processes: the engine alone and the bundle."""
    taken: dict[str, list[list[int]]] = {"raw": [], "ours": [], "import": []}
    compiled = {**os.environ, "PYTHONPYCACHEPREFIX": str(x.parent / "compiled")}
    compiled.pop("PYTHONDONTWRITEBYTECODE", None)
    for number in range(-1, times):  # the first compiles
        for kind, body, path in (("raw", _RAW[engine], plain), ("ours", _OURS, bundle),
                                 ("import", "", bundle)):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-c", _START.replace("{body}", body), str(path), engine, kind,
                 str(x)],
                capture_output=True, text=True, check=True, env=compiled,
            )  # fmt: skip
            if number >= 0:
                taken[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return taken


def bundle_of(engine: str, path: Path, out: Path) -> Path:
    """A bundle of one plain model, as `edgekit optimize` would write it."""
    from edgekit.artifact import open_model
    from edgekit.bundle import VariantSource, write_bundle

    artifact = open_model(path)
    source = VariantSource("a", engine, artifact, "fp32", 1, "float32", {"CPU": 1.0}, {})
    write_bundle(
        out, (source,), name=path.stem, inputs=artifact.inputs, outputs=artifact.outputs,
        profile="this-machine", provenance={}, work=out.parent,
    )  # fmt: skip
    return out


def sha256_ns(path: Path) -> int:
    """The time of one SHA-256 over the file, streamed; the best of five."""
    taken = []
    for _ in range(5):
        start = time.perf_counter_ns()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        taken.append(time.perf_counter_ns() - start)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--starts", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    x = np.random.default_rng(1).random((1, 8), np.float32)
    kept = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for engine, path in one_matmul(folder).items():
            print(f"{engine}, one MatMul", flush=True)
            kept[engine] = interleave(calls_of(engine, path, x), args.blocks, args.count)
            shown(kept[engine])
        for engine, (path, big) in basic_pitch(folder).items():
            print(f"{engine}, basic-pitch", flush=True)
            taken = interleave(calls_of(engine, path, big), args.blocks, 2)
            kept[f"{engine} basic-pitch"] = taken
            shown(taken)
            np.save(folder / "x.npy", big)
            bundle = bundle_of(engine, path, folder / f"{engine}.edgekit")
            cold = starts(engine, path, bundle, folder / "x.npy", args.starts)
            sha = sha256_ns(bundle)
            ratios = [
                (ours[0] - sha) / raw[0]
                for ours, raw in zip(cold["ours"], cold["raw"], strict=True)
            ]
            ratio, low, high = median_interval(ratios)
            memory = statistics.median(
                ours[1] - raw[1] for ours, raw in zip(cold["ours"], cold["raw"], strict=True)
            )
            imported = statistics.median(one[0] for one in cold["import"]) / 1e6
            print(
                f"  load and first run, less one SHA-256 ({sha / 1e6:.2f} ms): {ratio:.3f}x the "
                f"engine alone ({low:.3f} to {high:.3f}); RSS {memory / 1e6:+.2f} MB; "
                f"import edgekit_runtime {imported:.1f} ms after numpy", flush=True,
            )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
