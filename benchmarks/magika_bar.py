"""The chosen magika bundle against ONNX Runtime's own `session.run` on the fp32 model.

Both in one process, interleaved call by call on the same real samples, single- and multi-threaded
as the bundle was made; and the accuracy of both on every sample that was not used to calibrate.

    make demo && python benchmarks/magika_bar.py
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

import edgekit_runtime
from edgekit.measure.statistics import median_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    with np.load(args.work / "files.npz") as archive:
        samples = archive["bytes"]
    result = json.loads((args.out / "result.json").read_text())
    session = edgekit_runtime.load(args.out / "model.edgekit")
    threads = result["threads"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin after their run would be measured in the other contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    raw = ort.InferenceSession(args.work / "model.onnx", options)

    calls = {
        "ORT fp32 session.run": lambda x: raw.run(None, {"bytes": x}),
        "bundle session.run": lambda x: session.run({"bytes": x}),
    }
    medians: dict[str, list[float]] = {name: [] for name in calls}
    draw = random.Random(0)
    order = list(calls)
    for _ in range(args.rounds):
        picked = draw.sample(range(len(samples)), 10)
        draw.shuffle(order)
        for name in order:
            calls[name](samples[:1])
            taken = []
            for index in picked:
                x = samples[index : index + 1]
                start = time.perf_counter_ns()
                calls[name](x)
                taken.append(time.perf_counter_ns() - start)
            medians[name].append(float(np.median(taken)))
    for name, values in medians.items():
        print(f"{name:<22} p50 {np.median(values) / 1e6:.2f} ms ({threads} threads)")
    base, ours = medians["ORT fp32 session.run"], medians["bundle session.run"]
    ratio, low, high = median_interval([a / b for a, b in zip(ours, base, strict=True)])
    print(f"ratio {ratio:.3f} (95 % interval {low:.3f} to {high:.3f}); chosen: {result['chosen']}")
    confirmed = result["confirmation"]
    print(
        f"held out, nothing decided on it: {confirmed['samples']} files, "
        f"{confirmed['reference_metric']:.4f} -> {confirmed['metric']:.4f} "
        f"(drop {confirmed['drop']:+.4f}, interval {confirmed['drop_interval']})"
    )


if __name__ == "__main__":
    main()
