"""EdgeKit's roofline beside plain numpy and plain ONNX Runtime, in the same minutes.

Whenever the roofline takes a block of ONNX Runtime's matrix product, blocks of the same size and
threads are taken of: numpy's `a @ b` (OpenBLAS, threads by environment, a process per number), and
ONNX Runtime's `session.run` on models made here with onnx.helper: MatMul in float32,
MatMulInteger and QLinearMatMul in int8, and what onnxruntime's quantizer makes of the former (QDQ,
with floats going in and out). The order is random. Of all of them the fastest block (median run)
counts, as in the roofline.

The bar: EdgeKit's onnxruntime figures are within 15 % of plain ONNX Runtime's, in float32 and int8,
and the best float32 figure over all engines is not more than 15 % below numpy's.

    python benchmarks/roofline_check.py [--threads 1 2] [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from edgekit.measure.probe_models import ProbeModel, probe_models
from edgekit.measure.roofline import FULL, QUICK, bandwidth_here, measure_roofline, run_local

ENGINES = ("onnxruntime", "openvino", "litert", "ncnn")
ALLOWED = 0.15

#: reads `[what, size, threads]`, answers nanoseconds; `prepare(what, size, threads)` gives a call
_LOOP = """
import json, sys, time
import numpy as np
{body}
clock = time.perf_counter_ns
for line in sys.stdin:
    call = prepare(*json.loads(line))
    call(); call()
    taken = []
    while not taken or sum(taken) < 15e6 and len(taken) < 400:
        start = clock(); call(); taken.append(clock() - start)
    call = None
    print(json.dumps(taken), flush=True)
"""

_NUMPY = """
rng = np.random.default_rng(3)
def prepare(what, size, threads):
    a, b = (rng.random((size, size), np.float32) for _ in range(2))
    return lambda: a @ b
"""

_ONNXRUNTIME = """
import functools, pathlib, tempfile
import onnx, onnxruntime as ort
from onnx import TensorProto as T, helper, numpy_helper

rng = np.random.default_rng(4)
work = pathlib.Path(tempfile.mkdtemp())

def made(nodes, size, source, target, constants):
    graph = helper.make_graph(
        nodes, "plain", [helper.make_tensor_value_info("a", source, [size, size])],
        [helper.make_tensor_value_info("c", target, [size, size])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

@functools.cache
def model(what, size):
    node = helper.make_node
    floats = rng.standard_normal((size, size)).astype(np.float32)
    integers = rng.integers(-60, 61, (size, size)).astype(np.int8)
    if what == "MatMul":
        return made([node("MatMul", ["a", "b"], ["c"])], size, T.FLOAT, T.FLOAT, {"b": floats})
    if what == "MatMulInteger":
        return made([node("MatMulInteger", ["a", "b"], ["c"])], size, T.UINT8, T.INT32,
                    {"b": integers})
    if what == "QLinearMatMul":
        names = ["a", "sa", "za", "b", "sb", "zb", "sc", "zc"]
        return made([node("QLinearMatMul", names, ["c"])], size, T.UINT8, T.UINT8, {
            "sa": np.float32(0.02), "za": np.uint8(3), "b": integers, "sb": np.float32(0.01),
            "zb": np.int8(0), "sc": np.float32(0.5), "zc": np.uint8(128)})
    import logging
    logging.disable()
    from onnxruntime import quantization as q
    class Reader(q.CalibrationDataReader):
        left = 2
        def get_next(self):
            self.left -= 1
            return {"a": rng.random((size, size), np.float32)} if self.left >= 0 else None
    source, target = work / "f.onnx", work / "q.onnx"
    onnx.save(model("MatMul", size), source)
    q.quantize_static(source, target, Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True,
                      weight_type=q.QuantType.QInt8, activation_type=q.QuantType.QUInt8)
    return onnx.load(target)

def prepare(what, size, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model(what, size).SerializeToString(), options,
                                   providers=["CPUExecutionProvider"])
    kind = session.get_inputs()[0].type
    a = rng.integers(0, 256, (size, size)).astype(np.uint8)
    feed = {"a": a if kind == "tensor(uint8)" else (a / 255).astype(np.float32)}
    return lambda: session.run(None, feed)
"""


class Plain:
    """A process that measures on request, frozen while it is not its turn."""

    def __init__(self, body: str, threads: int) -> None:
        # OpenBLAS reads this when it is loaded
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LOOP.replace("{body}", body)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1,
        )  # fmt: skip

    def block(self, what: str, size: int, threads: int) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps([what, size, threads]) + "\n")
        samples = json.loads(self._process.stdout.readline())
        self._process.send_signal(signal.SIGSTOP)
        return samples

    @classmethod
    @contextmanager
    def started(cls, body: str, threads: int) -> Iterator[Plain]:
        one = cls(body, threads)
        try:
            yield one
        finally:
            one._process.kill()
            one._process.wait()


#: what is measured beside which of EdgeKit's dtypes
BESIDE = {
    "float32": ("numpy a @ b", "MatMul"),
    "int8": ("MatMulInteger", "QLinearMatMul", "QDQ by the quantizer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    best: dict[tuple[str, int], float] = {}
    beside: dict[str, list[float]] = {}
    draw = random.Random(0)
    # Many rounds: whoever else uses the machine leaves it alone now and then.
    effort = QUICK if args.quick else replace(FULL, rounds=args.rounds, time_s=60)
    start = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = stack.enter_context(run_local(ENGINES, block_s=effort.block_s))
        plain = stack.enter_context(Plain.started(_ONNXRUNTIME, 1))
        numpy = {n: stack.enter_context(Plain.started(_NUMPY, n)) for n in args.threads}

        def run_beside(model: ProbeModel, threads: int) -> list[int]:
            if (model.engine, model.kind) != ("onnxruntime", "gemm"):
                return run(model, threads)
            order = ["", *BESIDE[model.dtype]]
            draw.shuffle(order)
            taken: dict[str, list[int]] = {}
            for what in order:
                if what:
                    who = numpy[threads] if what.startswith("numpy") else plain
                    taken[what] = who.block(what, model.size, threads)
                else:
                    taken[what] = run(model, threads)
            medians = {what: statistics.median_low(ns) for what, ns in taken.items()}
            for what, ns in medians.items():
                if what:
                    rate = model.ops * 1e9 / ns
                    best[what, threads] = max(rate, best.get((what, threads), 0))
                    name = f"{what}, {threads} threads"
                    if model.size >= 320:  # below, calls and not products are compared
                        beside.setdefault(name, []).append(ns / medians[""])
            return taken[""]

        found = measure_roofline(
            lambda size: probe_models(folder, ENGINES, size=size), run_beside,
            threads=args.threads, effort=effort,
            memory_bytes_per_s=bandwidth_here(threads=max(args.threads))["bytes_per_s"],
        )  # fmt: skip
    rates = {
        (roof.engine, roof.kind, roof.dtype, roof.threads): roof.ops_per_s
        for roof in found.roofline.compute
    }
    seconds = time.perf_counter() - start
    load = os.getloadavg()[0]  # its own is about 1
    print(f"Gop/s, threads {args.threads}; all measured here in {seconds:.0f} s, load {load:.1f}")
    for kind in ("gemm", "depthwise"):
        for dtype in ("float32", "float16", "int8"):
            for engine in ENGINES:
                own = [rates.get((engine, kind, dtype, n)) for n in args.threads]
                if own[0] is not None:
                    shown = "".join(f"{rate / 1e9:9.1f}" for rate in own if rate is not None)
                    print(f"  {kind:<10} {dtype:<8} {engine:<12}{shown}")
    for dtype, names in BESIDE.items():
        for what in names:
            shown = "".join(f"{best[what, n] / 1e9:9.1f}" for n in args.threads)
            print(f"  plain      {dtype:<8} {what:<20} {shown}")
    print(f"  memory {(found.roofline.memory_bytes_per_s or 0) / 1e9:.1f} GB/s")
    for failure in found.failures:
        print(f"  not in it: {failure.engine} {failure.kind} {failure.dtype}: {failure.reason}")
    for roof in found.unconfirmed:
        print(f"  not confirmed: {roof.engine} {roof.kind} {roof.dtype}, {roof.threads} threads")
    print("EdgeKit's rate / plain rate, block by block in the same moment (median), size >= 320")
    for name, ratios in sorted(beside.items()):
        print(f"  {name:<36} {statistics.median(ratios):.3f} ({len(ratios)} pairs)")
    good = True
    verdicts = []
    for n in args.threads:
        engines = max(rates[engine, "gemm", "float32", n] for engine in ENGINES
                      if (engine, "gemm", "float32", n) in rates)  # fmt: skip
        integer = max(best["MatMulInteger", n], best["QLinearMatMul", n])
        pairs = {
            "onnxruntime float32 / plain MatMul":
                rates["onnxruntime", "gemm", "float32", n] / best["MatMul", n],
            "onnxruntime int8 / plain int8, the better":
                rates["onnxruntime", "gemm", "int8", n] / integer,
            "best float32 engine / numpy": engines / best["numpy a @ b", n],
        }  # fmt: skip
        for name, ratio in pairs.items():
            within = ratio >= 1 - ALLOWED if "numpy" in name else abs(ratio - 1) <= ALLOWED
            good &= within
            verdicts.append({"threads": n, "what": name, "ratio": ratio, "within": within})
            print(f"  {n} threads: {name:<42} {ratio:.3f}  {'ok' if within else 'NOT WITHIN'}")
    print("the bar is met" if good else "the bar is NOT met")
    if args.json:
        plain_rates = {f"{what}, {n}": rate for (what, n), rate in best.items()}
        document = {
            "roofline": found.roofline.model_dump(), "plain_ops_per_s": plain_rates,
            "pairs": beside, "verdicts": verdicts,
        }  # fmt: skip
        args.json.write_text(json.dumps(document, indent=1))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
