"""Public networks on accelerators that an emulator or a software driver stands in for.

    python benchmarks/accelerators.py FOLDER [NET ...]

Qualcomm's HTP (emulator): int8 models that EdgeKit made, compiled for the SM8650, beside the same
model on ONNX Runtime's CPU: the share of test samples with the same top-1, and where the
multiply-accumulates are. GPUs (SwiftShader): the float model on ncnn's Vulkan and LiteRT's WebGPU
beside the same engine's CPU: the furthest output, in units of the greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from firmware import edgekit
from numpy.typing import NDArray
from quantization_data import Case, prepare
from software_gpu import software_vulkan

from edgekit.accelerate import compile_for, macs_of, placed
from edgekit.artifact import open_model
from edgekit.cache import Cache

__all__ = ["main"]

#: the only input of each network, one sample at a time
FIXED = {
    "vww": "input_1=1x96x96x3", "kws": "input_1=1x50x10x1", "digits": "x=1x1x28x28",
    "fashion": "image=1x28x28x1",
}  # fmt: skip
NPU, GPU = ("vww", "kws", "digits"), ("digits", "fashion")
SAMPLES, GPU_SAMPLES = 300, 50
_QNN, _SM8650 = "onnxruntime:qnn", "57"
_RUN = """
import json, sys
import numpy as np
from edgekit_runtime import load
path, engine, precision, feed, out = sys.argv[1:]
rows = np.load(feed)
with load(path, engine=engine, precision=precision) as session:
    (name,), placed = [spec.name for spec in session.inputs], session.placement
    np.save(out, np.stack([next(iter(session.run({name: row}).values())) for row in rows]))
print(json.dumps([str(placed), placed.simulated]))
"""


def outputs(
    path: Path, engine: str, rows: NDArray[Any], *, precision: str = "float32",
    environment: dict[str, str] | None = None,
) -> tuple[NDArray[Any], str]:  # fmt: skip
    """The first output for each row, and the placement, by a process of its own."""
    feed, out = path.parent / "feed.npy", path.parent / "out.npy"
    np.save(feed, rows)
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(path), engine, precision, str(feed), str(out)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{engine}, {path.name}: {done.stderr}")
    return np.load(out), str(json.loads(done.stdout.splitlines()[-1])[0])


def rows_of(case: Case, count: int) -> NDArray[Any]:
    """Test samples, each with a batch of one."""
    with np.load(case.test) as arrays:
        whole = arrays[next(key for key in arrays.files if key != "labels")]
    return np.asarray(whole[:count])[:, None]


def converted(case: Case, fmt: str, folder: Path) -> Path:
    """The trained model with fixed shapes."""
    suffix = {"onnx": ".onnx", "tflite": ".tflite", "ncnn": ".param"}[fmt]
    path = folder / f"{case.name}-fixed{suffix}"
    source = ["--weights", case.weights, "--trust-source"] if case.weights else []
    edgekit("convert", case.model, *source, "--to", fmt, "--inputs", FIXED[case.name], "-o",
            str(path))  # fmt: skip
    return path


def tell_npu(case: Case, folder: Path) -> None:
    """The int8 model on the CPU and on the HTP's emulator, and the float model there."""
    plain = converted(case, "onnx", folder)
    made = folder / f"{case.name}-int8.onnx"
    edgekit("quantize", str(plain), "--scheme", "int8-static", "--for", "galaxy-s24", "--data",
            case.test, "--calibration", case.calibration, "-o", str(made), "--keep")  # fmt: skip
    rows = rows_of(case, SAMPLES)
    reference, _ = outputs(plain, "onnxruntime", rows)
    print(f"{case.name}: {len(rows)} samples, Qualcomm's HTP (SM8650), emulated")
    for path, kind in ((made, "int8"), (plain, "float")):
        model, cache = open_model(path), Cache(folder / "cache")
        compiled = compile_for(model, _QNN, _SM8650, cache=cache)
        where = placed(compiled, _QNN, macs_of(model))
        on_cpu, _ = outputs(path, "onnxruntime", rows)
        on_npu, _ = outputs(compiled.path, _QNN, rows)
        size = np.abs(on_cpu).max()
        print(
            f"  {kind}: top-1 equal to the CPU's on {same(on_npu, on_cpu):.1%}, to the float "
            f"model's on {same(on_npu, reference):.1%} (CPU {same(on_cpu, reference):.1%}); "
            f"outputs at most {np.abs(on_npu - on_cpu).max() / size:.1e} of the greatest apart; "
            f"{where.shares} of the {where.of}"
        )


def same(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The share of rows with the same greatest output."""
    flat = len(a), -1
    return float(np.mean(a.reshape(flat).argmax(1) == b.reshape(flat).argmax(1)))


def tell_gpu(case: Case, folder: Path) -> None:
    """The float model on two engines' CPU and GPU."""
    rows, environment = rows_of(case, GPU_SAMPLES), {**os.environ, **software_vulkan()}
    print(f"{case.name}: {len(rows)} samples, GPUs by SwiftShader")
    for fmt, engine, accelerator in (("ncnn", "ncnn", "vulkan"), ("tflite", "litert", "gpu")):
        path = converted(case, fmt, folder)
        wanted, _ = outputs(path, engine, rows)
        for precision in ("float32", "float16"):
            made, where = outputs(path, f"{engine}:{accelerator}", rows, precision=precision,
                                  environment=environment)  # fmt: skip
            off = np.abs(made - wanted).max() / np.abs(wanted).max()
            print(
                f"  {engine}:{accelerator} {precision}: at most {off:.1e} of the greatest from "
                f"the CPU, top-1 equal on {same(made, wanted):.1%}; {where}"
            )


def main() -> None:
    """The evidence of docs/evidence/accelerators.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("nets", nargs="*", default=list(FIXED))
    arguments = parser.parse_args()
    for name in arguments.nets:
        case = prepare(name, arguments.folder.resolve())
        folder = arguments.folder.resolve() / name
        if name in NPU:
            tell_npu(case, folder)
        if name in GPU:
            tell_gpu(case, folder)


if __name__ == "__main__":
    main()
