"""How good the instrument is: does `edgekit compare` tell a difference from none?

    python benchmarks/measurement_quality.py verdicts --trials 60 MODEL... [-o FILE]
    python benchmarks/measurement_quality.py overhead MODEL
    python benchmarks/measurement_quality.py operators MODEL...
    python benchmarks/measurement_quality.py tools MODEL...

`verdicts`: per trial a model is compared with itself, with itself 5 % slower and 2 % slower (a
worker that goes on counting after each run), in turn, so that a loaded minute hits all three
alike. `overhead`: what the instrument adds to a run, its memory, the size of 100,000 samples.
`operators`: the sum of a trace's operators against the warm latency. `tools`: the median against
the engine's own tool, interleaved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from edgekit.measure.compare import duel, verdict
from edgekit.measure.statistics import median_interval
from edgekit.measure.worker import Contender, Worker
from edgekit_runtime import load


def slow_worker(share: float, arguments: list[str]) -> int:
    """The runtime's worker whose every run takes `share` longer."""
    from edgekit_runtime import session
    from edgekit_runtime.__main__ import main

    clock, run = time.perf_counter_ns, session.Session.run

    def slower(self: session.Session, inputs: object) -> object:
        start = clock()
        out = run(self, inputs)  # type: ignore[arg-type]
        end = clock()
        until = end + int((end - start) * share)
        while clock() < until:
            pass
        return out

    session.Session.run = slower  # type: ignore[method-assign, assignment]
    return main(arguments)


def verdicts(models: list[Path], trials: int, out: Path | None) -> None:
    wanted = {"same": (0.0, "no difference"), "5 %": (0.05, "slower"), "2 %": (0.02, "slower")}
    rows: list[dict[str, object]] = []
    for trial in range(trials):
        model = models[trial % len(models)]
        for name, (share, right) in wanted.items():
            launcher = (sys.executable, "-P", __file__, "slow-worker", str(share)) if share else ()
            start = time.monotonic()
            found = duel(
                Contender("base", model, 1), Contender("new", model, 1, launcher=launcher),
                seed=trial,
            )  # fmt: skip
            said = verdict(found.latency)
            rows.append(
                {"trial": trial, "planted": name, "model": model.name, "verdict": said,
                 "right": said == right, **found.latency.to_json(), "starts": len(found.ratios),
                 "seconds": round(time.monotonic() - start, 1)}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    for name, (_, right) in wanted.items():
        ours = [one for one in rows if one["planted"] == name]
        hits = sum(bool(one["right"]) for one in ours)
        print(f"{name}: {right} in {hits} of {len(ours)}")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1))


def overhead(model: Path) -> None:
    """What a timed run costs on top of itself, in this process; memory of the worker against a
    script that only loads the model; the size of 100,000 samples."""
    import subprocess

    import numpy as np

    from edgekit_runtime.timing import pack_ns, sample

    empty = [int(np.median(sample(lambda: None, 20_000))) for _ in range(20)]
    print(f"timing an empty call takes {np.median(empty):.0f} ns")
    peaks = "print(int(open('/proc/self/status').read().split('VmRSS:')[1].split()[0]))"
    plain = (
        f"import numpy, onnxruntime as o\ns = o.SessionOptions(); s.intra_op_num_threads = 1\n"
        f"m = o.InferenceSession({str(model)!r}, s)\n"
        "i = m.get_inputs()[0]; x = numpy.zeros([d if isinstance(d, int) else 1 for d in i.shape],"
        "i.type[7:-1].replace('float', 'float32'))\n"
        "[m.run(None, {i.name: x}) for _ in range(200)]\n" + peaks
    )
    rows = []
    for _ in range(5):
        bare = int(subprocess.run([sys.executable, "-c", plain], capture_output=True, check=True,
                                  text=True).stdout) * 1024  # fmt: skip
        with Worker(Contender("m", model, 1, "onnxruntime"), None) as worker:
            worker.take(1.0, most=100_000)
            rows.append((worker.peak_rss_bytes - bare) / 1e6)
    print(f"the worker takes {np.median(rows):.1f} MB more than a script that runs the model")
    rng = np.random.default_rng(0)
    samples = rng.lognormal(15, 0.3, 100_000).astype(int).tolist()
    print(f"100,000 samples: {len(json.dumps(pack_ns(samples))) / 1e6:.2f} MB")


def operators(models: list[Path]) -> None:
    """The sum of operators against the latency without profiler, five traces each."""
    import numpy as np

    from edgekit.measure.trace import trace

    for model in models:
        engine = "openvino" if model.suffix == ".xml" else "onnxruntime"
        found = [trace(Contender(model.name, model, 1, engine), runs=60) for _ in range(5)]
        shares = [100 * one.covered for one in found]
        what = f"{model.name} {engine}: {found[0].latency_ns / 1e6:.2f} ms"
        spread = f"{np.median(shares):.1f} % ({min(shares):.1f} to {max(shares):.1f})"
        print(f"{what}, {len(found[0].steps)} operators, {spread}", flush=True)


def tools(models: list[Path]) -> None:
    """Medians of the engine's own tool and of ours, in turn, on one processor, 24 rounds."""
    import os

    import numpy as np

    tool_of = {".xml": _benchmark_app, ".tflite": _litert_benchmark, ".onnx": _ort_profile}
    cpu = sorted(os.sched_getaffinity(0))[:1]
    for model in models:
        ratios = []
        for _ in range(24):
            with Worker(Contender("m", model, 1), None, cpus=cpu) as worker:
                worker.take(0.3)
                before = worker.take(0.6, most=100_000).samples_ns
                theirs = tool_of[model.suffix](model, cpu[0])
                after = worker.take(0.6, most=100_000).samples_ns
            ratios.append(float(np.median(before + after)) / theirs)
        middle, low, high = median_interval(ratios)
        print(f"{model.name}: ours / theirs {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


def _run(*line: str) -> str:
    import subprocess

    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def _benchmark_app(model: Path, cpu: int) -> float:
    """Median latency in ns by OpenVINO's benchmark_app, one synchronous request, f32, with the
    input handed over in each run, as in ours."""
    folder = Path(sys.executable).parent
    with load(model) as session:
        shape = str(list(session.inputs[0].usual_shape())).replace(" ", "")
    said = _run(
        "taskset", "-c", str(cpu), str(folder / "benchmark_app"), "-m", str(model), "-api", "sync",
        "-t", "1", "-nireq", "1", "-nstreams", "1", "-nthreads", "1", "-hint", "none",
        "-infer_precision", "f32", "-d", "CPU", "-inference_only", "False", "-ip", "f32", "-shape",
        shape,
    )  # fmt: skip
    line = next(one for one in said.splitlines() if "Median" in one)
    *_, figure, unit = line.split()
    return float(figure) * {"ms": 1e6, "us": 1e3}[unit]


def _litert_benchmark(model: Path, cpu: int) -> float:
    """Median latency in ns by litert-benchmark."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "r.json"
        _run("taskset", "-c", str(cpu), str(Path(sys.executable).parent / "litert-benchmark"),
             "--model", str(model), "--num_runs", "2000", "--warmup_runs", "100", "--num_threads",
             "1", "--result_json", str(out))  # fmt: skip
        document = json.loads(out.read_text())
    return _median_of(document)


def _median_of(document: object) -> float:
    if isinstance(document, dict):
        for key, value in document.items():
            if ("median" in key or "p50" in key) and isinstance(value, (int, float)):
                return value * (1e6 if "ms" in key else 1e3)
        for value in document.values():
            found = _median_of(value)
            if found:
                return found
    return 0.0


def _ort_profile(model: Path, cpu: int) -> float:
    """Median of "model_run" in ONNX Runtime's own profile."""
    code = (
        "import json, sys, numpy, onnxruntime as o\ns = o.SessionOptions()\n"
        "s.intra_op_num_threads = 1; s.enable_profiling = True\n"
        "s.profile_file_prefix = sys.argv[2]\nm = o.InferenceSession(sys.argv[1], s)\n"
        "i = m.get_inputs()[0]; k = i.type[7:-1].replace('float', 'float32')\n"
        "d = [d if isinstance(d, int) else 1 for d in i.shape]\n"
        "x = numpy.random.default_rng(0).random(d)\n"
        "[m.run(None, {i.name: x.astype(k)}) for _ in range(300)]\n"
        "e = json.load(open(m.end_profiling()))\n"
        "print(1e3 * numpy.median([a['dur'] for a in e if a['name'] == 'model_run'][20:]))"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return float(_run("taskset", "-c", str(cpu), sys.executable, "-c", code, str(model),
                          str(Path(folder) / "p")))  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["slow-worker"]:
        return slow_worker(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("verdicts", "overhead", "operators", "tools"))
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if args.what == "verdicts":
        verdicts(args.models, args.trials, args.out)
    elif args.what == "overhead":
        overhead(args.models[0])
    elif args.what == "operators":
        operators(args.models)
    else:
        tools(args.models)
    return 0


if __name__ == "__main__":
    sys.exit(main())
