"""Kill `edgekit optimize` (SIGKILL, the whole group) at random points of its search, and resume it.

    python benchmarks/control_kills.py [--kills 30] [--seed 0]

After each kill the folder holds no bundle (only before the reference was evaluated), or one whose
golden outputs `edgekit-runtime check` finds again; the resumed run chooses what the run did
that was left alone. The net has a planted outlier channel, so that static int8 is lost and must be
repaired; the aim is size, so that the choice does not hang on timing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "contract")]

from cnn import cnn_data  # noqa: E402
from test_control import outlier_net  # noqa: E402

PROFILE = """
schema = "edgekit.device/1"
id = "kills"
name = "One engine"
kind = "board"
arch = "x86_64"

[engines.onnxruntime]

[quantization]
symmetric = true

[[sources]]
fields = ["engines", "quantization"]
kind = "choice"
title = "this benchmark"
says = "one engine is enough to be killed in"
"""


def command(folder: Path) -> list[str]:
    tool = str(Path(sys.executable).with_name("edgekit"))
    options = "--for kills.toml --data data.npz --max-drop 0.02 --minimize size --json"
    return [tool, "optimize", "net.onnx", *options.split(), "-o", str(folder)]


def run(work: Path, out: Path, cache: Path) -> dict[str, object]:
    done = subprocess.run(
        command(out), cwd=work, env={**os.environ, "EDGEKIT_CACHE": str(cache)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    loaded: dict[str, object] = json.loads(done.stdout)
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        outlier_net(work / "net.onnx", wide=512)
        cnn_data(work / "data.npz", 600)
        (work / "kills.toml").write_text(PROFILE)
        start = time.monotonic()
        whole = run(work, work / "whole", work / "cache-whole")
        length = time.monotonic() - start
        print(f"left alone: {whole['chosen']} in {length:.0f} s, {whole['search']}", flush=True)
        without = wrong = other = 0
        for number in range(args.kills):
            out, cache = work / f"out{number}", work / f"cache{number}"
            process = subprocess.Popen(
                command(out), cwd=work, env={**os.environ, "EDGEKIT_CACHE": str(cache)},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            time.sleep(draw.uniform(0, length))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            bundle = out / "model.edgekit"
            if bundle.exists():
                checked = subprocess.run(
                    [sys.executable, "-m", "edgekit_runtime", "check", str(bundle)],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                wrong += checked.returncode != 0
                if checked.returncode:
                    print(checked.stderr, flush=True)
            else:
                without += 1
            resumed = run(work, out, cache)
            other += resumed["chosen"] != whole["chosen"]
            shutil.rmtree(cache)
            print(f"kill {number}: {'bundle' if bundle.exists() else 'none yet'}", flush=True)
        print(
            f"{args.kills} kills: {without} before the first bundle, {wrong} invalid bundles, "
            f"{other} other choices after resuming"
        )


if __name__ == "__main__":
    main()
