"""Accuracy won back without training: a float ONNX model is changed so that rounding costs less.

All three methods change weights and biases only, before the quantizer runs: what they leave is a
float model, and the quantizer's own rounding then does what they planned for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.layers_onnx import Array, Layer, Tap, find_layers, store_weights
from edgekit.compress.prepare_onnx import prepare_onnx, save_onnx
from edgekit.compress.recover_equalize import equalize
from edgekit.compress.recover_rounding import Grid, grid_of, round_by_output
from edgekit.compress.scheme import Scheme
from edgekit.errors import require

__all__ = ["apply", "learn", "recover"]

#: samples that rounding is learned from, positions of an image that are looked at in each
_SAMPLES, _POSITIONS = 512, 128
#: samples whose products are computed together
_TOGETHER = 8
#: terms of a sum that can be handled: the solver's time grows with their cube
_MOST_TERMS = 4608
#: sums of products that are held at once
_HELD_BYTES = 512 << 20
#: smaller ones are not stored in integers, where only the storage is
_FEWEST = 256
#: relative difference of outputs up to which two float models are the same
_SAME = 1e-3


def learn(
    source: str, target: str, scheme: dict[str, Any], halves: bool, calibration: dict[str, Any]
) -> dict[str, Any]:
    """Write the weights and biases that recovery changes (.npz, by tensor); what it says of them.
    Runs in a child process."""
    wanted = Scheme.from_json(scheme)
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
        prepared = prepare_onnx(source, folder, wanted.keep)
    before = {one.name: one.SerializeToString() for one in prepared.proto.graph.initializer}
    samples = CalibrationSamples(calibration)
    facts = recover(prepared.proto, wanted, samples, kept=prepared.kept, halves=halves)
    onnx = require("onnx", extra="onnx")
    changed = {
        one.name: onnx.numpy_helper.to_array(one)
        for one in prepared.proto.graph.initializer
        if before.get(one.name) != one.SerializeToString()
    }
    np.savez(target, allow_pickle=False, **changed)
    return facts


def apply(source: str, changes: str, keep: list[str], restore: bool, target: str) -> list[str]:
    """Write the model with what `learn` found (`restore`: but for the layers of `keep`); returns
    the first outputs of the operators that stay float. Runs in a child process."""
    onnx = require("onnx", extra="onnx")
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
        prepared = prepare_onnx(source, folder, keep)
    model = prepared.proto
    with np.load(changes) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    exact = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    weights = exact | {name: array for name, array in found.items() if name in exact}
    stays = set(prepared.kept) if restore else set()
    for layer in find_layers(model, exact):
        if layer.node.name in stays:
            for name in filter(None, (layer.weight, layer.bias)):
                weights[name] = exact[name]
        elif not layer.bias and _added_bias(layer) in found:
            _add_bias(layer, weights, found[_added_bias(layer)])
    store_weights(model, weights, exact)
    save_onnx(model, target)
    return [node.output[0] for node in model.graph.node if node.name in prepared.kept]


def recover(
    model: Any, scheme: Scheme, samples: CalibrationSamples,
    *, kept: Sequence[str] = (), halves: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Change the prepared model in place, by the methods that `scheme.recovery` names, in this
    order: equalization, learned-rounding, bias-correction. `kept`: names of nodes that stay float.
    `halves`: as in `grid_of`.

    Returns facts: how many pairs of layers were `equalized`, layers `rounded`, biases `corrected`,
    and `notes`.
    """
    onnx = require("onnx", extra="onnx")
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    layers = find_layers(model, weights, (*kept, *scheme.keep))
    notes: list[str] = []
    facts: dict[str, Any] = {"notes": notes}
    if "equalization" in scheme.recovery:
        facts["equalized"] = _equalize(model, layers, weights, samples, notes)
    exact = dict(weights)
    if "learned-rounding" in scheme.recovery:
        facts["rounded"] = _round_all(model, layers, weights, scheme, samples, notes, halves)
    if "bias-correction" in scheme.recovery:
        facts["corrected"] = _correct(model, layers, exact, weights, scheme, samples)
    store_weights(model, weights, exact)
    return facts


def _equalize(
    model: Any, layers: list[Layer], weights: dict[str, Array], samples: CalibrationSamples,
    notes: list[str],
) -> int:  # fmt: skip
    """Undone where the model does not compute the same then."""
    before = dict(weights)
    pairs = equalize(model, layers, weights, samples)
    outputs = [one.name for one in model.graph.output]
    sample = next(iter(samples))
    wanted = Tap(model, outputs).run(sample)
    store_weights(model, weights, before)
    found = Tap(model, outputs).run(sample)
    for name in outputs:
        if wanted[name].dtype.kind != "f":
            continue
        most = float(np.abs(wanted[name]).max(initial=1e-9))
        if not np.allclose(found[name] / most, wanted[name] / most, rtol=0, atol=_SAME):
            changed = dict(weights)
            weights.update(before)
            store_weights(model, weights, changed)
            notes.append(f"equalization was undone: {name!r} came out differently")
            return 0
    return pairs


# --- learned rounding -----------------------------------------------------------------------------


def _grid(layer: Layer, weights: dict[str, Array], scheme: Scheme, halves: bool = False) -> Grid:
    blocks = scheme.kind == "int4-weights" and not layer.is_conv
    if halves and layer.is_conv and layer.group > 1 and weights[layer.weight].shape[1] == 1:
        scheme = replace(scheme, reduce_range=False)  # depthwise: no sums of pairs, NNCF knows
    return grid_of(layer.rows(weights), scheme, blocks=blocks, halves=halves)


def _round_all(  # noqa: PLR0917
    model: Any, layers: list[Layer], weights: dict[str, Array], scheme: Scheme,
    samples: CalibrationSamples, notes: list[str], halves: bool,
) -> int:  # fmt: skip
    stored_only = scheme.kind != "int8-static"
    todo = [
        one
        for one in layers
        if one.rows(weights).shape[1] <= _MOST_TERMS
        and not (stored_only and weights[one.weight].size < _FEWEST)
    ]
    rounded = 0
    for some in _batches(todo, weights):
        sums = _hessians(model, some, weights, samples)
        for layer in some:
            if np.isfinite(sums[layer.weight]).all():
                _round(layer, weights, sums[layer.weight], _grid(layer, weights, scheme, halves))
                rounded += 1
    if rounded < len(layers):
        notes.append(f"the weights of {len(layers) - rounded} layers are rounded plainly")
    return rounded


def _round(layer: Layer, weights: dict[str, Array], hessians: Array, grid: Grid) -> None:
    rows = layer.rows(weights)
    groups = (layer.group, -1, rows.shape[1])
    made = round_by_output(rows.reshape(groups), hessians, grid.shaped(groups))
    # The quantizer finds its grid again by the greatest weights, so these stay what they are.
    layer.put(weights, np.where(grid.held, rows, made.reshape(rows.shape)))


def _batches(layers: list[Layer], weights: dict[str, Array]) -> Iterator[list[Layer]]:
    """Layers whose sums fit into memory together."""
    batch: list[Layer] = []
    held = 0
    for layer in layers:
        size = 8 * layer.group * layer.rows(weights).shape[1] ** 2
        if batch and held + size > _HELD_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(layer)
        held += size
    if batch:
        yield batch


def _hessians(
    model: Any, layers: Sequence[Layer], weights: dict[str, Array], samples: CalibrationSamples
) -> dict[str, Array]:
    """The sums of x x^T for each layer, (groups, terms, terms), from the float model's
    activations."""
    sums = {}
    for layer in layers:
        terms = layer.rows(weights).shape[1]
        sums[layer.weight] = np.zeros((layer.group, terms, terms))
    tap = Tap(model, [one.node.input[0] for one in layers])
    rng = np.random.default_rng(0)
    some: dict[str, list[Array]] = {name: [] for name in sums}

    def add() -> None:
        for name, parts in some.items():
            x = np.concatenate(parts, axis=1)
            # Of one group, numpy computes half of a product that is symmetric.
            sums[name] += x[0].T @ x[0] if len(x) == 1 else np.swapaxes(x, 1, 2) @ x
            parts.clear()

    for number, sample in enumerate(islice(samples, _SAMPLES), start=1):
        found = tap.run(sample)
        for layer in layers:
            array = found[layer.node.input[0]]
            some[layer.weight].append(layer.patches(array, weights, rng, _POSITIONS))
        if number % _TOGETHER == 0:
            add()
    if any(some.values()):
        add()
    return sums


# --- bias correction ------------------------------------------------------------------------------


def _correct(  # noqa: PLR0917
    model: Any, layers: list[Layer], exact: dict[str, Array], weights: dict[str, Array],
    scheme: Scheme, samples: CalibrationSamples,
) -> int:  # fmt: skip
    """Each output channel's mean error through the rounding of its weights is taken back by its
    bias (Nagel et al. 2019, section 4.2), measured on the float model's activations."""
    onnx = require("onnx", extra="onnx")
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    todo = [one for one in layers if one.can_shift]
    names = {one.weight: f"edgekit-error-{place}" for place, one in enumerate(todo)}
    for layer in todo:
        off = {layer.weight: exact[layer.weight]}
        rounded = _grid(layer, weights, scheme).nearest(layer.rows(weights))
        layer.put(off, rounded - layer.rows(exact))
        node, name = onnx.NodeProto(), names[layer.weight]
        node.CopyFrom(layer.node)
        del node.input[2:]
        node.name, node.input[1], node.output[0] = name, f"{name}-weight", name
        tensor = onnx.numpy_helper.from_array(off[layer.weight], node.input[1])
        tapped.graph.initializer.append(tensor)
        tapped.graph.node.append(node)
    sums = {one.weight: np.zeros(len(one.rows(weights))) for one in todo}
    counts = dict.fromkeys(sums, 0)
    tap = Tap(tapped, list(names.values()))
    for sample in samples:
        found = tap.run(sample)
        for layer in todo:
            array = found[names[layer.weight]].astype(np.float64)
            array = np.moveaxis(array, 1, -1) if layer.is_conv else array
            sums[layer.weight] += array.reshape(-1, array.shape[-1]).sum(axis=0)
            counts[layer.weight] += array.size // array.shape[-1]
    for layer in todo:
        mean = sums[layer.weight] / max(1, counts[layer.weight])
        if not layer.bias:
            _add_bias(layer, weights, np.zeros(len(mean), np.float32))
        weights[layer.bias] = (weights[layer.bias] - mean).astype(np.float32)
    return len(todo)


def _added_bias(layer: Layer) -> str:
    return f"{layer.weight}-bias"


def _add_bias(layer: Layer, weights: dict[str, Array], bias: Array) -> None:
    layer.bias = _added_bias(layer)
    weights[layer.bias] = bias
    layer.node.input.extend([layer.bias])
