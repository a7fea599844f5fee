"""Layers fitted anew, without labels, to what they computed before their inputs shrank.

Y. He, X. Zhang and J. Sun, "Channel pruning for accelerating very deep neural networks", ICCV
2017, section 3.1, with ridge towards the weights there are, and the mean taken up by the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.layers_onnx import PRODUCTS, Array, Layer, Tap, find_layers, store_weights
from edgekit.compress.prune_axes import Classes
from edgekit.compress.prune_channels import weights_of
from edgekit.compress.prune_moments import Moments, input_moments, outputs_at, up_to

__all__ = ["MOST_TERMS", "compensated", "fit_layer", "refit"]

#: ridge, as a share of the inputs' mean variance
_RIDGE = 0.01
#: terms of a sum that can be handled: the solver's time grows with their cube
MOST_TERMS = 4608


def compensated(
    classes: Classes, gone: NDArray[np.bool_], layers: Sequence[Layer],
    weights: Mapping[str, Array], moments: Mapping[str, Moments],
) -> dict[str, Array]:  # fmt: skip
    """Weights of the old shapes in which the channels that stay make up for those that go, as far
    as one layer can, on the original activations."""
    made = dict(weights)
    products = {one.weight: one for one in classes.trace.products if one.weight}
    for layer in layers:
        product, known = products.get(layer.weight), moments.get(layer.weight)
        if product is None or known is None or product.columns is None:
            continue
        columns = ~gone[classes.axis(product.columns)]
        if not columns.all():
            _compensate(layer, made, known, columns)
    return made


def _compensate(
    layer: Layer, made: dict[str, Array], known: Moments, columns: NDArray[np.bool_]
) -> None:
    rows = layer.rows(made)
    parts = np.split(rows, layer.group)
    bias = []
    for number, (part, own) in enumerate(
        zip(parts, np.split(columns, layer.group), strict=True)
    ):  # fmt: skip
        keep = np.repeat(own, part.shape[1] // len(own))
        xx, mean = known.xx[number], known.mean[number]
        inner = xx[np.ix_(keep, keep)]
        ridge = _RIDGE * np.diag(inner).mean() + 1e-12
        damped = inner + ridge * np.eye(len(inner))
        aim = part @ xx[:, keep] + ridge * part[:, keep]
        new = np.zeros_like(part)
        new[:, keep] = np.linalg.solve(damped, aim.T).T
        bias.append((part - new) @ mean)
        parts[number] = new
    layer.put(made, np.concatenate(parts))
    _shift(layer, made, np.concatenate(bias))


def _shift(layer: Layer, weights: dict[str, Array], by: Array) -> None:
    if layer.can_shift and layer.bias:
        old = weights[layer.bias]
        weights[layer.bias] = (old + by).astype(old.dtype)


def refit(  # noqa: PLR0917
    model: Any, smaller: Any, classes: Classes, gone: NDArray[np.bool_],
    samples: Callable[[], Iterator[Mapping[str, Array]]],
    told: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Fit the layers of the smaller model in place, one after the other, so that on its own
    activations each gives what it gave in `model` on the model's. Returns how many were."""
    weights = weights_of(smaller)
    before = dict(weights)
    originals = {
        one.weight: one for one in find_layers(model, classes.trace.weights, kinds=PRODUCTS)
    }
    products = {one.weight: one for one in classes.trace.products if one.weight}
    todo = [
        one for one in find_layers(smaller, weights, kinds=PRODUCTS)
        if one.weight in originals and one.weight in products
        and one.rows(weights).shape[1] <= MOST_TERMS
    ]  # fmt: skip
    behind = _behind(classes, gone)
    done = 0
    for number, layer in enumerate(todo):
        if told is not None:
            told(number, len(todo))
        product = products[layer.weight]
        if product.node not in behind:
            continue
        store_weights(smaller, weights, before)
        before = dict(weights)
        kept = None if product.rows is None else ~gone[classes.axis(product.rows)]
        original = originals[layer.weight]
        done += fit_layer(model, smaller, original, layer, weights, samples, kept)[1]
    store_weights(smaller, weights, before)
    return done


def fit_layer(  # noqa: PLR0917
    model: Any, changed: Any, original: Layer, layer: Layer, weights: dict[str, Array],
    samples: Callable[[], Iterator[Mapping[str, Array]]], kept: NDArray[np.bool_] | None = None,
) -> tuple[Moments, bool]:  # fmt: skip
    """Fit one layer of the `changed` model, so that on its own activations it gives what it was
    (`original`) in `model` gives there, of the outputs `kept`. `weights` change, not the model.
    Returns the moments of what flows into it, and whether it was fitted."""
    aim = _targets(model, original, kept, samples)
    known = input_moments(changed, [layer], weights, samples(), aim)[layer.weight]
    done = _fit(layer, weights, known)
    return replace(known, xx=known.doubted()), done


def _behind(classes: Classes, gone: NDArray[np.bool_]) -> set[int]:
    """The nodes whose inputs may have changed: those from the first that lost something on."""
    first = None
    for one in classes.trace.products:
        lost = any(gone[classes.axis(axis)].any() for axis in one.axes)
        if lost and first is None:
            first = one.node
    return set() if first is None else {p.node for p in classes.trace.products if p.node > first}


def _targets(
    model: Any, layer: Layer, kept: NDArray[np.bool_] | None,
    samples: Callable[[], Iterator[Mapping[str, Array]]],
) -> Iterator[dict[str, Array]]:  # fmt: skip
    name = layer.output
    tap = Tap(up_to(model, [name]), [name])
    for number, sample in enumerate(samples()):
        rows = outputs_at(layer, tap.run(sample)[name], number)
        yield {layer.weight: rows if kept is None else rows[:, kept]}


def _fit(layer: Layer, weights: dict[str, Array], known: Moments) -> bool:
    """W + (yx - W xx) (xx + doubt + ridge)^-1; the bias takes the means up."""
    rows = layer.rows(weights)
    parts = rows.reshape(layer.group, -1, rows.shape[1])
    xx = known.doubted()
    diagonal = np.einsum("gii->gi", xx)
    ridge = _RIDGE * diagonal.mean(axis=1) + 1e-12
    damped = xx + ridge[:, None, None] * np.eye(rows.shape[1])
    off = known.yx - parts @ known.xx
    new = parts + np.linalg.solve(damped, off.transpose(0, 2, 1)).transpose(0, 2, 1)
    if not np.isfinite(new).all():
        return False
    layer.put(weights, new.reshape(rows.shape))
    if layer.can_shift:
        bias = (known.target - np.einsum("got,gt->go", new, known.mean)).reshape(-1)
        if not layer.bias:
            layer.bias = f"{layer.weight}-bias"
            weights[layer.bias] = np.zeros(len(bias), np.float32)
            layer.node.input.extend([""] * (2 - len(layer.node.input)) + [layer.bias])
        weights[layer.bias] = bias.astype(weights[layer.bias].dtype)
    return True
