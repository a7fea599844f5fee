"""Core ML packages of the corpus, run by PyTorch's operators and compared with their sources.

    python benchmarks/coreml_programs.py [--only TEXT]

Core ML itself runs on Apple's systems only. For each PyTorch, Keras and TensorFlow model: what
`edgekit convert --to coreml` says, the share of the source's weights that are in the file, and how
far the written program (`tests/ml_program.py`) is from the source on four samples, as a share of
the output's greatest value. Prints Markdown; exits with 1 if a program that runs is off by more
than 1e-4.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from corpus import MODELS, Model

from edgekit import sandbox
from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.conversion import convert_with_proof
from edgekit.errors import ChildError, EdgeKitError, one_line
from edgekit.execute import run_samples
from edgekit.noise import noise_sets
from edgekit_runtime.arrays import read_npz, write_npz

__all__ = ["main", "row"]

_FAR = 1e-4
_TESTS = Path(__file__).parents[1] / "tests"


def row(model: Model, work: Path) -> tuple[str, float | None]:
    """A line of the table, and how far off the program is, if it could be run."""
    ready = model.prepare(work)
    try:
        source = open_model(ready.model, reading=ready.reading)
        found = convert_with_proof(source, "coreml", cache=Cache(work / "cache"))
    except EdgeKitError as error:
        return f"| {model.name} | refused: {one_line(error, limit=160)} | | |", None
    share = f"{100 * found.checks['weights']['share']:.1f} %"
    if ready.given is not None:
        samples = list(ready.given.samples)[:4]
    else:
        sized = [
            replace(spec, shape=one.shape, example=None)
            for spec, one in zip(source.inputs, found.artifact.inputs, strict=True)
        ]
        samples = next(noise_sets(sized, {}, count=4))[1]
    wanted = run_samples(source, samples)
    names = [spec.name for spec in found.artifact.inputs]
    given, made = work / "given.npz", work / "made.npz"
    write_npz(
        given,
        {
            f"{i}/{name}": array.astype(spec.dtype)
            for i, one in enumerate(samples)
            for name, spec, array in zip(names, found.artifact.inputs, one.values(), strict=True)
        },
    )
    folder = found.artifact.location
    try:
        sandbox.call(
            "ml_program:run", {"folder": folder, "inputs": str(given), "outputs": str(made)}
        )
    except ChildError as error:
        return f"| {model.name} | {found.label} | {share} | {one_line(error, limit=80)} |", None
    results = read_npz(made)
    ends = [spec.name for spec in found.artifact.outputs]
    off = max(
        float(np.abs(results[f"{i}/{end}"] - array).max() / max(np.abs(array).max(), 1e-30))
        for i, one in enumerate(wanted)
        for end, array in zip(ends, one.values(), strict=True)
    )
    return f"| {model.name} | {found.label} | {share} | {off:.0e} |", off


def main() -> int:
    """The table; 1 if a program is far off."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{_TESTS}:{os.environ.get('PYTHONPATH', '')}"
    worst = 0.0
    print("| model | label | weights found | program off by |\n|---|---|---|---|")
    for model in MODELS:
        if model.name.endswith((".onnx", ".tflite", ".joblib")) or asked.only not in model.name:
            continue
        with tempfile.TemporaryDirectory() as work:
            line, off = row(model, Path(work))
        print(line, flush=True)
        worst = max(worst, off or 0.0)
    return int(worst > _FAR)


if __name__ == "__main__":
    sys.exit(main())
