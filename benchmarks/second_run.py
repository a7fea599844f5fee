"""How much of the first run a second identical one takes: `edgekit optimize` on the demo's data.

make demo && python benchmarks/second_run.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    work = Path("build/demo")
    with tempfile.TemporaryDirectory() as cache:
        taken = []
        for number in range(2):
            out = Path(cache) / f"out{number}"
            start = time.monotonic()
            subprocess.run(
                [Path(sys.executable).parent / "edgekit", "optimize", work / "model.onnx",
                 "--for", "this-machine", "--data", work / "files.npz", "-o", out],
                check=True, capture_output=True, env={**os.environ, "EDGEKIT_CACHE": cache},
            )  # fmt: skip
            taken.append(time.monotonic() - start)
            phases = json.loads((out / "result.json").read_text())["seconds"]
            print(f"run {number + 1}: {taken[-1]:.1f} s  {phases}", flush=True)
    print(f"second / first: {taken[1] / taken[0]:.3f}")


if __name__ == "__main__":
    main()
