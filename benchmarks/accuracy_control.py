"""Accuracy control beside NNCF's own loop: evaluations of the data, time, and what is lost.

    python benchmarks/accuracy_control.py MODEL.onnx TEST.npz CALIBRATION.npz --max-drop 0.01

Both quantize the same model for OpenVINO and read the same samples: NNCF by
`nncf.quantize_with_accuracy_control` with its defaults, EdgeKit by `edgekit quantize --max-drop`.
Every sample that goes through a compiled model to look at its answer is counted; what is counted is
divided by the number of samples, so that 1 is the data once. NNCF selects on all of it, EdgeKit on
one half and confirms on the other, so the loss of both is given on all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def accuracy(model: Any, pairs: Iterable[tuple[Any, int]]) -> tuple[float, list[float]]:
    """Top-1 of a compiled model, and each sample's part in it."""
    request = model.create_infer_request()
    right = []
    for x, label in pairs:
        scores = request.infer({0: x[None]})[0]
        right.append(float(int(scores.argmax()) == label))
    return float(np.mean(right)), right


def nncf_loop(model: Path, test: Any, calibration: Any, max_drop: float) -> dict[str, Any]:
    """NNCF's loop on an IR; test and calibration: arrays (samples, ...), test with labels."""
    import nncf
    import openvino as ov

    core = ov.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    source = ov.convert_model(model)
    x, labels = test
    seen = 0

    def validate(compiled: Any, items: Any) -> tuple[float, list[float]]:
        nonlocal seen
        pairs = list(items)
        seen += len(pairs)
        return accuracy(compiled, pairs)

    start = time.monotonic()
    made = nncf.quantize_with_accuracy_control(
        source,
        nncf.Dataset(list(calibration), lambda one: one[None]),
        nncf.Dataset(list(zip(x, labels, strict=True))),
        validate,
        max_drop=max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
    )
    seconds = time.monotonic() - start
    pairs = list(zip(x, labels, strict=True))
    before = accuracy(core.compile_model(source, "CPU"), pairs)[0]
    after = accuracy(core.compile_model(made, "CPU"), pairs)[0]
    rounded = sum(one.get_type_name() == "FakeQuantize" for one in made.get_ops())
    return {
        "evaluations": seen / len(x), "seconds": seconds, "drop": before - after,
        "fake_quantize": rounded,
    }  # fmt: skip


def ours(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """`edgekit quantize --max-drop` with an empty cache."""
    tool, out = str(Path(sys.executable).with_name("edgekit")), work / "made.xml"
    start = time.monotonic()
    done = subprocess.run(
        [tool, "quantize", str(args.model), "--to", "openvino", "--scheme", "int8-static",
         "--data", str(args.test),
         "--calibration", str(args.calibration), "--max-drop", str(args.max_drop), "--json",
         "-o", str(out)],
        env={**os.environ, "EDGEKIT_CACHE": str(work / "cache")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    seconds = time.monotonic() - start
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    document = json.loads(done.stdout)
    return {"seconds": seconds, "exit": done.returncode, **document}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--max-drop", type=float, default=0.01)
    args = parser.parse_args()
    with np.load(args.test) as file:
        name = next(one for one in file.files if one != "labels")
        test = file[name], file["labels"]
    with np.load(args.calibration) as file:
        calibration = file[next(one for one in file.files if one != "labels")]
    with tempfile.TemporaryDirectory() as folder:
        found = ours(args, Path(folder))
        kept = ("seconds", "exit", "scheme_text", "evaluation", "search", "reason")
        print("EdgeKit", json.dumps({k: found[k] for k in kept}), flush=True)
    print("NNCF", json.dumps(nncf_loop(args.model, test, calibration, args.max_drop)))


if __name__ == "__main__":
    main()
