"""OpenVINO's performance counters. The graph is the compiled one, with what was fused."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from edgekit.measure.trace_inputs import feed, sums, typical

__all__ = ["collect"]

_BITS = {"f32": 32, "f16": 16, "bf16": 16, "i8": 8, "u8": 8, "i32": 32, "i64": 64, "boolean": 8}
_PRODUCTS = ("FullyConnected", "MatMul", "Gemm")
_DTYPES = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8",
    "i32": "int32", "i64": "int64", "boolean": "bool",
}  # fmt: skip


def collect(
    model: str, *, threads: int, precision: str, inputs: str | None, runs: int
) -> dict[str, Any]:
    """In the child: profile, and time the same model compiled without counters in turn."""
    import openvino as ov

    from edgekit_runtime.engines import PRECISIONS

    core = ov.Core()
    read = core.read_model(model)
    given = feed(Path(model), "openvino", inputs)
    values = list(given.values())
    if any(port.partial_shape.is_dynamic for port in read.inputs):
        read.reshape({i: list(value.shape) for i, value in enumerate(values)})
    config = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
    }  # fmt: skip
    plain = core.compile_model(read, "CPU", config).create_infer_request()
    compiled = core.compile_model(read, "CPU", {**config, "PERF_COUNT": True})
    profiled = compiled.create_infer_request()
    plain_ns: list[int] = []
    times: dict[str, dict[int, float]] = {}
    order: list[str] = []
    kinds: dict[str, str] = {}
    for number in range(-5, runs):
        start = time.perf_counter_ns()
        plain.infer(values)
        taken = time.perf_counter_ns() - start
        profiled.infer(values)
        if number < 0:
            continue
        plain_ns.append(taken)
        for one in profiled.get_profiling_info():
            if str(one.status).endswith("EXECUTED"):
                if one.node_name not in times:
                    order.append(one.node_name)
                    times[one.node_name] = {}
                kinds[one.node_name] = one.node_type
                times[one.node_name][number] = one.real_time.total_seconds() * 1e9
    return {
        "version": str(ov.get_version()).split("-", maxsplit=1)[0], "plain_ns": plain_ns,
        "starts": "order", "sums_ns": sums(times, runs), "steps": _steps(
            compiled, order, typical(times, runs), kinds,
            _macs_of(Path(model), {name: list(value.shape) for name, value in given.items()}),
        ),
    }  # fmt: skip


def _steps(
    compiled: Any, order: list[str], times: dict[str, float], kinds: dict[str, str],
    macs: dict[str, int | None],
) -> list[dict[str, Any]]:  # fmt: skip
    nodes = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ordered_ops()}
    device = "+".join(map(str, compiled.get_property("EXECUTION_DEVICES")))
    steps, start = [], 0.0
    for name in order:
        op = nodes.get(name)
        duration = times[name]
        shapes: list[list[int]] = []
        dtypes: list[str] = []
        ins: list[str] = []
        moved: int | None = None
        counted: int | None = 0
        if op is not None:
            info = op.get_rt_info()
            ports = [*op.outputs(), *op.inputs()]
            known = all(one.get_partial_shape().is_static for one in ports)
            shapes = [list(one.get_shape()) for one in op.outputs()] if known else []
            running = info["runtimePrecision"].astype(str) if "runtimePrecision" in info else ""
            given = [one.get_element_type().get_type_name() for one in op.outputs()]
            dtypes = [_DTYPES.get(one, one) for one in given] or [_DTYPES.get(running, running)]
            ins = [_source(one.get_node(), times) for one in op.input_values()]
            if known:
                moved = sum(
                    math.prod(one.get_shape())
                    * _BITS.get(one.get_element_type().get_type_name(), 32)
                    // 8
                    for one in ports
                )
            names = info["originalLayersNames"].astype(str) if "originalLayersNames" in info else ""
            counts = [macs.get(one, 0) for one in (names or name).split(",")]
            whole = [one for one in counts if one is not None]
            counted = sum(whole) if len(whole) == len(counts) else None
            if not counted and known and kinds[name] in _PRODUCTS:  # under another name than before
                counted = math.prod(op.output(0).get_shape()) * op.input(0).get_shape()[-1]
        steps.append(
            {
                "name": name, "type": kinds[name], "inputs": ins, "outputs": [name],
                "shapes": shapes, "dtypes": dtypes, "device": device, "start_ns": int(start),
                "duration_ns": int(duration), "macs": counted, "bytes": moved,
            }
        )  # fmt: skip
        start += duration
    return steps


def _source(node: Any, ran: dict[str, float]) -> str:
    """The step a value comes from: past views and others that did not run."""
    while node.get_friendly_name() not in ran and node.get_input_size():
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name())


def _bytes(port: Any) -> int:
    bits = _BITS.get(port.get_element_type().get_type_name(), 32)
    return int(math.prod(port.get_shape())) * bits // 8


def _macs_of(path: Path, shapes: dict[str, list[int]]) -> dict[str, int | None]:
    """Multiply-accumulates by operator, of the model as it was given."""
    from importlib import import_module

    reader = "edgekit.graph.onnx" if path.suffix == ".onnx" else "edgekit.graph.openvino"
    from edgekit.graph.model import graph_from_json

    raw = import_module(reader).read(path=str(path), shapes=shapes)
    return {one.name: one.macs for one in graph_from_json(raw).operators}
