"""Prunes an ONNX model; runs in a child process."""

from __future__ import annotations

import copy
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.layers_onnx import PRODUCTS, Array, Layer, find_layers, store_weights
from edgekit.compress.prepare_onnx import prepare_onnx, save_onnx
from edgekit.compress.prune_axes import Classes, Product
from edgekit.compress.prune_channels import analyse, macs_of, remove, verify, weights_of
from edgekit.compress.prune_choose import choose, choose_evenly, latency_costs, share_saved
from edgekit.compress.prune_latency import layer_shapes
from edgekit.compress.prune_moments import Moments, input_moments
from edgekit.compress.prune_noise import Output, noise_db
from edgekit.compress.prune_refit import MOST_TERMS, compensated, fit_layer, refit
from edgekit.compress.prune_score import Group, curves, groups_of, norms, readers_in
from edgekit.compress.prune_sparse import sparsify
from edgekit.errors import ModelError, require
from edgekit.sandbox import report_progress

__all__ = ["measure_onnx", "prune_onnx"]

#: samples that layers are fitted on
_SAMPLES = 512
#: samples that the noise of layers is heard on
_LISTENED = 32
#: terms of a sum from which on single weights go
_FEWEST_TERMS = 16
#: opset from which on axes and sizes are inputs, and Softmax is over one axis
_OPSET = 13


def measure_onnx(
    source: list[str], folder: str, calibration: dict[str, Any], importance: str
) -> dict[str, Any]:
    """Write `prepared.onnx`, `moments.npz` and `shapes.json` into `folder`: what does not depend
    on how much goes. `importance`: one of IMPORTANCES, "" if no channels are to go.

    Raises:
        ModelError: the model is quantized, damaged, or does not run.
    """
    with tempfile.TemporaryDirectory(dir=folder) as work:
        model = prepare_onnx(source[0], work, (), _OPSET).proto
    save_onnx(model, str(Path(folder) / "prepared.onnx"))
    weights = weights_of(model)
    samples = CalibrationSamples(calibration)
    layers = _layers(model, weights)
    moments: dict[str, Moments] = {}
    if importance in ("", "activation", "second-order"):
        found = input_moments(model, layers, weights, islice(samples, _SAMPLES))
        moments = {name: replace(one, xx=one.doubted()) for name, one in found.items()}
    arrays: dict[str, Array] = {}
    for number, layer in enumerate(layers):
        if layer.weight in moments:
            arrays[f"mean-{number}"] = moments[layer.weight].mean
            arrays[f"xx-{number}"] = moments[layer.weight].xx.astype(np.float32)
    if importance:
        classes = analyse(model, next(iter(samples)))
        groups = groups_of(classes)
        _rank(groups, classes, layers, weights, moments, importance)
        for number, group in enumerate(groups):
            arrays[f"order-{number}"], arrays[f"costs-{number}"] = group.order, group.costs
        (Path(folder) / "shapes.json").write_text(json.dumps(layer_shapes(model, classes)))
    np.savez(Path(folder) / "moments.npz", allow_pickle=False, **arrays)
    return {"layers": len(layers)}


def _layers(model: Any, weights: dict[str, Array]) -> list[Layer]:
    found = find_layers(model, weights, kinds=PRODUCTS)
    return [one for one in found if one.rows(weights).shape[1] <= MOST_TERMS]


def _rank(  # noqa: PLR0917
    groups: list[Group], classes: Classes, layers: Sequence[Layer], weights: dict[str, Array],
    moments: dict[str, Moments], importance: str,
) -> None:  # fmt: skip
    if importance in ("l1", "l2"):
        score = norms(classes, 1 if importance == "l1" else 2)
        for group in groups:
            group.order = np.array(sorted(group.order, key=lambda c: score[int(c)]), np.int64)
        return
    readers = readers_in(classes, layers, weights, moments)
    curves(groups, readers, compensated=importance == "second-order")


def prune_onnx(
    measured: str, target: str, spec: dict[str, Any], calibration: dict[str, Any]
) -> dict[str, Any]:
    """Write the pruned model; `measured` is the folder of `measure_onnx`.

    spec: `method` (channels, magnitude, n-m), `amount` (the share of the MACs, or of the weights),
    `importance`, `refit`, `multiple`, `pattern`, `spread`, `minimize`, and `latencies`, the tables
    of the products, where latency is to be least.

    Returns facts: `macs` and `parameters` [before, after], `layers`, `reached` (the share that
    went), `deflated_bytes`.

    Raises:
        ModelError: nothing may go (says why), or the result is not what was meant.
    """
    onnx = require("onnx", extra="onnx")
    folder = Path(measured)
    model = onnx.load(str(folder / "prepared.onnx"))
    weights = weights_of(model)
    layers = _layers(model, weights)
    with np.load(folder / "moments.npz") as archive:
        arrays = dict(archive)
    moments = {
        one.weight: _moments(arrays, number)
        for number, one in enumerate(layers) if f"xx-{number}" in arrays
    }  # fmt: skip
    samples = CalibrationSamples(calibration)
    if spec["method"] == "channels":
        made, facts = _channels(model, layers, weights, moments, arrays, spec, samples)
    else:
        made, facts = _zeros(model, moments, spec, samples)
    save_onnx(made, target)
    facts["deflated_bytes"] = len(zlib.compress(Path(target).read_bytes(), 6))
    return facts


def _moments(arrays: dict[str, Array], number: int) -> Moments:
    xx, mean = arrays[f"xx-{number}"].astype(np.float64), arrays[f"mean-{number}"]
    return Moments(mean, xx, np.zeros(0), np.zeros(0), 0)


def _zeros(
    model: Any, moments: dict[str, Moments], spec: dict[str, Any], samples: CalibrationSamples
) -> tuple[Any, dict[str, Any]]:
    pattern = tuple(spec["pattern"]) if spec["method"] == "n-m" else None
    made = copy.deepcopy(model)
    weights = weights_of(made)
    layers = _layers(made, weights)
    if not layers:
        raise ModelError(
            "nothing can be pruned: no Conv, ConvTranspose, Gemm or MatMul has weights of its own"
        )
    before = dict(weights)
    every = sum(layer.rows(weights).size for layer in layers)
    # Sums of a few terms (depthwise) hold few weights, and no sparse kernel is for them.
    layers = [one for one in layers if one.rows(weights).shape[1] >= _FEWEST_TERMS]
    originals = {one.weight: one for one in _layers(model, weights_of(model))}

    def again() -> Iterator[dict[str, NDArray[Any]]]:
        return islice(samples.quietly(), _SAMPLES)

    def fitted(layer: Layer) -> Moments:
        nonlocal before
        report_progress(layers.index(layer), len(layers))
        store_weights(made, weights, before)
        before = dict(weights)
        return fit_layer(model, made, originals[layer.weight], layer, weights, again)[0]

    known = moments if spec["refit"] else {}
    rows = sparsify(layers, weights, known, spec["amount"], pattern, fitted)
    store_weights(made, weights, before)
    names = {one.node.name: one.node.output[0] for one in layers}
    outputs = [Output(names[row["name"]]) for row in rows]
    heard = noise_db(model, made, outputs, islice(samples.quietly(), _LISTENED))
    for row, one in zip(rows, heard, strict=True):
        row["sqnr_db"] = one
    total, zeros = (sum(row[key] for row in rows) for key in ("weights", "zeros"))
    if not zeros:
        raise ModelError(f"no layer is wide enough for the pattern {spec['pattern']}")
    return made, {
        "layers": rows, "weights": every, "zeros": zeros, "reached": zeros / max(1, every),
        "of_covered": zeros / max(1, total),
    }  # fmt: skip


# --- channels -------------------------------------------------------------------------------------


def _channels(  # noqa: PLR0917
    model: Any, layers: list[Layer], weights: dict[str, Array], moments: dict[str, Moments],
    arrays: dict[str, Array], spec: dict[str, Any], samples: CalibrationSamples,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    sample = next(iter(samples))
    classes = analyse(model, sample)
    if not len(classes.free):
        raise ModelError(f"no channel can be removed: {_why_none(model, classes)}")
    groups = groups_of(classes)
    for number, group in enumerate(groups):
        group.order, group.costs = arrays[f"order-{number}"], arrays[f"costs-{number}"]
    # Norms say nothing of what is lost: they rank, and every layer gives the same share.
    even = spec["spread"] == "even" or spec["importance"] in ("l1", "l2")
    timed = spec["minimize"] == "latency"
    costs = latency_costs(classes, spec["latencies"]) if timed else None
    gone = (choose_evenly if even else choose)(
        classes, groups, spec["amount"], spec["multiple"], costs
    )
    if not gone.any():
        raise ModelError(
            f"no channel can be removed for {spec['amount']:g} of the whole: every layer is as "
            f"small as it may be (multiples of {spec['multiple']}), or nothing is known of what "
            "reads it"
        )
    off = verify(model, classes, gone, sample)
    fitted = 0
    if spec["refit"]:
        changed = compensated(classes, gone, layers, weights, moments) if moments else None
        made = remove(model, classes, gone, changed)

        def again() -> Iterator[dict[str, NDArray[Any]]]:
            return islice(samples.quietly(), _SAMPLES)

        fitted = refit(model, made, classes, gone, again, report_progress)
    else:
        made = remove(model, classes, gone)
    noise = _noise(model, made, classes, gone, islice(samples.quietly(), _LISTENED))
    none = np.zeros(len(classes.of), bool)
    before, after = (macs_of(classes.trace.products, classes.of, one) for one in (none, gone))
    rows = [
        _row(model, classes, gone, product, (before[at], after[at])) | noise.get(product.node, {})
        for at, product in enumerate(classes.trace.products)
    ]
    total = sum(before)
    return made, {
        "layers": rows, "macs": [total, sum(after)], "refitted": fitted, "verified": off,
        "reached": share_saved(classes, gone, costs),
        "parameters": [_parameters(model), _parameters(made)],
    }  # fmt: skip


def _noise(
    model: Any, made: Any, classes: Classes, gone: NDArray[np.bool_],
    samples: Iterator[dict[str, NDArray[Any]]],
) -> dict[int, dict[str, float | None]]:  # fmt: skip
    """By node, of the outputs whose channels are known: `sqnr_db`."""
    nodes, outputs = [], []
    for one in classes.trace.products:
        node = model.graph.node[one.node]
        if one.weight and one.rows is not None:
            kept = ~gone[classes.axis(one.rows)]
            nodes.append(one.node)
            outputs.append(Output(node.output[0], 1 if "Conv" in node.op_type else -1, kept))
    found = noise_db(model, made, outputs, samples)
    return {node: {"sqnr_db": one} for node, one in zip(nodes, found, strict=True)}


def _parameters(model: Any) -> int:
    return sum(array.size for array in weights_of(model).values() if array.dtype.kind == "f")


def _row(
    model: Any, classes: Classes, gone: NDArray[np.bool_], one: Product, macs: tuple[int, int]
) -> dict[str, Any]:
    node = model.graph.node[one.node]
    row: dict[str, Any] = {"name": node.name, "type": node.op_type, "macs": list(macs)}
    if not one.weight or one.rows is None:
        return row
    labels = classes.axis(one.rows)
    row["channels"] = [len(labels), int((~gone[labels]).sum())]
    shape = list(classes.trace.weights[one.weight].shape)
    cut = list(shape)
    for place, axis in enumerate(classes.trace.axes(one.weight)):
        if axis is not None:
            cut[place] = int((~gone[classes.axis(axis)]).sum())
    row["parameters"] = [int(np.prod(shape)), int(np.prod(cut))]
    row["blocked"] = _blocked(classes, labels)
    return row


def _blocked(classes: Classes, labels: NDArray[np.int64]) -> str:
    """Why channels of a layer stay; "" if none must."""
    reasons = Counter(classes.reasons[int(c)] for c in labels if int(c) in classes.reasons)
    return reasons.most_common(1)[0][0] if reasons else ""


def _why_none(model: Any, classes: Classes) -> str:
    rows = []
    for one in classes.trace.products:
        node = model.graph.node[one.node]
        if not one.weight or one.rows is None:
            rows.append(f"{node.name}: its channels do not come from weights of its own, or stay")
        else:
            rows.append(f"{node.name}: {_blocked(classes, classes.axis(one.rows))}")
    if not rows:
        return "no Conv, Gemm or MatMul in it"
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return "; ".join(rows[:8]) + more
