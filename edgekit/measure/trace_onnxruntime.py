"""ONNX Runtime's profiler. The graph is the optimized one that it really runs."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.measure.trace_inputs import feed, sums, typical

__all__ = ["collect"]

#: where the weights stand among the inputs of operators that multiply and accumulate
_WEIGHTS = {
    "Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "QLinearConv": 3, "ConvInteger": 1,
    "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1, "QLinearMatMul": 3, "QGemm": 3,
    "MatMulInteger": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1,
}  # fmt: skip
_DTYPES = {"float": "float32", "double": "float64"}


def collect(
    model: str, *, threads: int, precision: str, inputs: str | None, runs: int
) -> dict[str, Any]:
    """In the child: profile, and time the same session options without the profiler in turn."""
    import onnx
    import onnxruntime as ort

    del precision  # it computes floats in float32
    with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
        optimized = Path(scratch) / "optimized.onnx"

        def session(profiled: bool) -> Any:
            settings = ort.SessionOptions()
            settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
            settings.log_severity_level = 4
            if profiled:
                settings.optimized_model_filepath = str(optimized)
                settings.enable_profiling = True
                settings.profile_file_prefix = str(Path(scratch) / "profile")
            return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

        profiled, plain = session(True), session(False)
        given = feed(Path(model), "onnxruntime", inputs)
        plain_ns = []
        for number in range(-5, runs):
            for one in (plain, profiled):
                start = time.perf_counter_ns()
                one.run(None, given)
                if one is plain and number >= 0:
                    plain_ns.append(time.perf_counter_ns() - start)
        events = json.loads(Path(profiled.end_profiling()).read_text())
        graph = onnx.load(str(optimized), load_external_data=False).graph
    steps, totals = _steps(events, graph, runs)
    return {
        "version": ort.__version__, "plain_ns": plain_ns, "starts": "measured", "steps": steps,
        "sums_ns": totals,
    }  # fmt: skip


def _steps(
    events: list[dict[str, Any]], graph: Any, runs: int
) -> tuple[list[dict[str, Any]], list[float]]:
    """The steps by their start, and their sum in each run."""
    from onnx.helper import tensor_dtype_to_np_dtype

    nodes = {node.name: node for node in graph.node}
    fixed = {one.name: list(one.dims) for one in graph.initializer}
    stored = {
        one.name: math.prod(one.dims) * tensor_dtype_to_np_dtype(one.data_type).itemsize
        for one in graph.initializer
    }
    begun = [e["ts"] for e in events if e["cat"] == "Session" and e["name"] == "model_run"][-runs:]
    times: dict[str, dict[int, float]] = {}
    starts: dict[str, list[float]] = {}
    said: dict[str, dict[str, Any]] = {}
    run = -1
    for event in sorted(events, key=lambda one: int(one["ts"])):
        if event["cat"] == "Session" and event["name"] == "model_run":
            run += event["ts"] in begun
        elif event["cat"] == "Node" and event["name"].endswith("_kernel_time") and run >= 0:
            name = event["name"].removesuffix("_kernel_time")
            starts.setdefault(name, []).append(1e3 * (event["ts"] - begun[run]))
            each = times.setdefault(name, {})  # control flow runs its body several times a run
            each[run] = each.get(run, 0.0) + 1e3 * event["dur"]
            said[name] = event["args"]
    nodes |= _nameless(graph, {name: args["op_name"] for name, args in said.items()}, nodes)
    steps = []
    for name, duration_ns in typical(times, runs).items():
        args, node = said[name], nodes.get(name)
        out = [next(iter(one.items())) for one in args.get("output_type_shape") or []]
        given = [next(iter(one.items())) for one in args.get("input_type_shape") or []]
        ins = [one for one in node.input if one and one not in fixed] if node else []
        shapes = [shape for _, shape in out]
        sizes = [
            int(args.get(f"{kind}_size", -1)) for kind in ("activation", "parameter", "output")
        ]
        # Weights that the engine packed for itself count as none in its profile.
        sizes[1] = max(sizes[1], sum(stored.get(one, 0) for one in node.input) if node else 0)
        steps.append(
            {
                "name": name, "type": args["op_name"], "inputs": ins,
                "outputs": list(node.output) if node else [], "shapes": shapes,
                "dtypes": [_DTYPES.get(kind, kind) for kind, _ in out],
                "device": args.get("provider", "?").removesuffix("ExecutionProvider"),
                "start_ns": int(np.median(starts[name])),
                "duration_ns": int(duration_ns),
                "macs": _macs(args["op_name"], node, fixed, given, shapes),
                "bytes": sum(sizes) if min(sizes) >= 0 else None,
            }
        )  # fmt: skip
    return sorted(steps, key=lambda one: int(one["start_ns"])), sums(times, runs)


def _nameless(graph: Any, kinds: dict[str, str], named: dict[str, Any]) -> dict[str, Any]:
    """Nodes without a name, which the profile calls by type and number, in the order of both."""
    found: dict[str, Any] = {}
    for kind in set(kinds.values()):
        ours = [node for node in graph.node if node.op_type == kind and not node.name]
        theirs = [
            one for one in kinds
            if kinds[one] == kind and one not in named and one.rpartition("_")[2].isdigit()
        ]  # fmt: skip
        if len(ours) == len(theirs):
            theirs.sort(key=lambda one: int(one.rpartition("_")[2]))
            found |= dict(zip(theirs, ours, strict=True))
    return found


def _macs(
    kind: str, node: Any, fixed: dict[str, list[int]], given: list[Any], shapes: list[list[int]]
) -> int | None:
    """From the shapes: an output element of a convolution takes one per weight of its filter, of a
    product as many as the dimension summed over. Channels that were added to fill the vectors of
    the CPU are computed, too, and counted."""
    if kind not in _WEIGHTS:
        return 0
    place = _WEIGHTS[kind]
    weights = None
    if node is not None and len(node.input) > place:
        weights = fixed.get(node.input[place])
    if not shapes or not shapes[0]:
        return None
    count = math.prod(shapes[0])
    if "Conv" in kind:
        return None if not weights or not weights[0] else count * math.prod(weights[1:])
    if weights:
        return count * math.prod(weights) // max(shapes[0][-1], 1)
    return count * given[0][1][-1] if given and given[0][1] else None
