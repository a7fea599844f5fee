"""What a layer takes with fewer channels: measured on this machine, alone, shape by shape.

Latency does not follow MACs: kernels work in blocks of channels, and small layers wait for memory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.layers_onnx import number
from edgekit.compress.prune_axes import Classes, Product
from edgekit.errors import require
from edgekit.sandbox import report_progress
from edgekit_runtime.engines import Binding, Options
from edgekit_runtime.timing import percentile_ns, sample

__all__ = ["Table", "interpolate", "layer_shapes", "measure_layers"]

#: {"rows": [...], "columns": [...], "ns": [[...]]}: what a layer takes with so many channels
Table = dict[str, Any]

#: channels that are measured are multiples of it: fewer only wait for the same vectors
_BLOCK = 8
_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
_ROUNDS, _BLOCK_S, _MOST_RUNS = 6, 0.003, 50


def layer_shapes(model: Any, classes: Classes) -> list[str]:
    """What each product's latency depends on, as text to look it up by; "" for those that are not
    measured: without weights of their own, grouped, turned."""
    trace = classes.trace
    found = []
    for one in trace.products:
        node, shape = model.graph.node[one.node], None
        if one.weight and node.op_type in ("Conv", "Gemm", "MatMul"):
            shape = _described(node, one, trace.shapes)
        found.append(json.dumps(shape, sort_keys=True) if shape else "")
    return found


def _described(
    node: Any, one: Product, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    x, w = shapes[node.input[0]], shapes[node.input[1]]
    if node.op_type != "Conv":
        if number(node, "transA", 0):
            return None
        return {"type": "MatMul", "x": list(x[:-1]), "rows": w[one.out_axis],
                "columns": w[one.in_axis], "group": 1}  # fmt: skip
    group = int(number(node, "group", 1))
    if group not in (1, x[1]):
        return None
    settings: dict[str, Any] = {a.name: list(a.ints) for a in node.attribute if a.ints}
    automatic = [a.s.decode() for a in node.attribute if a.name == "auto_pad"]
    if automatic:
        settings["auto_pad"] = automatic[0]
    return {
        "type": "Conv", "x": list(x), "kernel": list(w[2:]), "rows": w[0],
        "columns": x[1] if group == 1 else 1, "group": group, "settings": settings,
    }  # fmt: skip


def measure_layers(shapes: Sequence[str]) -> list[Table]:
    """Time layers of these shapes (`layer_shapes`) in ONNX Runtime, one thread, with from an eighth
    to all of their channels. Of each, the least of the medians of interleaved rounds: what else
    the machine does only adds."""
    tables = []
    for done, text in enumerate(shapes):
        tables.append(_measure(json.loads(text)))
        report_progress(done + 1, len(shapes))
    return tables


def _measure(shape: Mapping[str, Any]) -> Table:
    rows, columns = _grid(shape["rows"]), _grid(shape["columns"])
    # Bindings own the buffers that their calls read: they are kept as long as the calls are.
    bound = {(r, c): _bound(_layer(shape, r, c)) for r in rows for c in columns}
    counts, best = {}, {}
    for key, one in bound.items():
        best[key] = min(sample(one.invoke, 3))
        counts[key] = max(3, min(_MOST_RUNS, int(_BLOCK_S * 1e9 / max(1, best[key]))))
    draw = random.Random(0)  # noqa: S311  (order of measuring, no secret)
    for _ in range(_ROUNDS):
        order = list(bound)
        draw.shuffle(order)
        for key in order:
            bound[key].invoke()  # others have used the caches meanwhile
            taken = percentile_ns(sample(bound[key].invoke, counts[key]), 50)
            best[key] = min(best[key], taken)
    ns = np.array([[best[r, c] for c in columns] for r in rows], np.float64)
    # Fewer channels are never slower: they could be padded with zeros.
    ns = np.minimum.accumulate(np.minimum.accumulate(ns[::-1], axis=0)[:, ::-1], axis=1)[::-1, ::-1]
    return {"rows": rows, "columns": columns, "ns": ns.tolist()}


def _grid(size: int) -> list[int]:
    return sorted({min(size, -(-int(np.ceil(s * size)) // _BLOCK) * _BLOCK) for s in _SHARES})


def _layer(shape: Mapping[str, Any], rows: int, columns: int) -> Any:
    """A model of the one layer, with weights of 1: values do not matter to dense kernels."""
    onnx = require("onnx", extra="onnx")
    helper = onnx.helper
    if shape["type"] == "Conv":
        deep = shape["group"] > 1
        channels = max(1, rows * shape["x"][1] // shape["rows"]) if deep else columns
        each = -(-shape["rows"] // shape["x"][1]) if deep else 1
        x = [shape["x"][0], channels, *shape["x"][2:]]
        weight = np.ones((channels * each if deep else rows, 1 if deep else columns,
                          *shape["kernel"]), np.float32)  # fmt: skip
        more = {"group": channels if deep else 1, **shape["settings"]}
    else:
        x, weight, more = [*shape["x"], columns], np.ones((columns, rows), np.float32), {}
    node = helper.make_node(shape["type"], ["x", "w"], ["y"], **more)
    graph = helper.make_graph(
        [node], "layer", [helper.make_tensor_value_info("x", 1, x)],
        [helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _bound(model: Any) -> Binding:
    from edgekit_runtime.engines.onnxruntime import load

    loaded = load({"layer.onnx": model.SerializeToString()}, Options())
    binding = loaded.bind((tuple(int(n) for n in loaded.inputs[0].shape),))
    binding.inputs[0][...] = 1
    binding.invoke()  # outputs are bound from here on
    return binding


def interpolate(table: Table, rows: float, columns: float) -> float:
    """Nanoseconds, linear between what was measured."""
    ns = np.asarray(table["ns"], np.float64)
    along: NDArray[np.float64] = np.array(
        [np.interp(columns, table["columns"], line) for line in ns]
    )
    return float(np.interp(rows, table["rows"], along))
