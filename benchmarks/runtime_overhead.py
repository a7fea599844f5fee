"""What EdgeKit's runtime costs over the engines' own calls, side by side in one process.

For each engine: the call its tutorial shows, the fastest call the engine offers (buffers bound
beforehand), EdgeKit's `session.run` and EdgeKit's `bound()`. Blocks of calls are interleaved in
random order; the figure is the median over blocks of the mean time per call, and ratios are taken
block by block. Run on an otherwise idle machine.

    python benchmarks/runtime_overhead.py [--blocks 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ai_edge_litert.interpreter as litert
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
             (("onnxruntime", ".onnx"), ("openvino", ".xml"), ("litert", ".tflite"))}  # fmt: skip
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
    return paths


def calls_of(engine: str, path: Path, x: np.ndarray) -> Calls:
    """The tutorial's call, the engine's fastest, and ours."""
    session = edgekit_runtime.load(path, threads=1)
    name = session.inputs[0].name
    feed = {name: x}
    bound = session.bind()
    bound.inputs[name][...] = x
    ours: Calls = {"edgekit session.run": lambda: session.run(feed), "edgekit bound()": bound}
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


_TUTORIALS = {"onnxruntime": _onnxruntime, "openvino": _openvino, "litert": _litert}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    x = np.random.default_rng(1).random((1, 8), np.float32)
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine, path in one_matmul(Path(folder)).items():
            taken = interleave(calls_of(engine, path, x), args.blocks, args.count)
            kept[engine] = taken
            print(engine)
            for name, values in taken.items():
                ratio, low, high = median_interval(paired_ratio(values, taken["tutorial"]))
                print(
                    f"  {name:<20} {statistics.median(values):8.2f} us"
                    f"   {ratio:5.2f}x the tutorial's call ({low:.2f} to {high:.2f})"
                )
    if args.json:
        args.json.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
