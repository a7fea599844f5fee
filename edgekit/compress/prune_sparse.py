"""Weights set to zero, single ones or N of M, the others making up for them.

E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in
One-Shot", ICML 2023, algorithm 1: column by column, weights go by w^2 / [U]_cc^2, and the columns
to come take the error up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.layers_onnx import Array, Layer
from edgekit.compress.prune_moments import Moments

__all__ = ["columns_first", "sparsify", "zero_by_output", "zero_smallest"]

#: added to the diagonal, as a share of its mean; columns whose masks are chosen together
_DAMPING, _COLUMNS = 0.01, 128
#: where layers share what goes, so much of what is left goes of one at most
_MOST = 0.4


def zero_smallest(rows: Array, share: float, pattern: tuple[int, int] | None) -> Array:
    """(outputs, terms) with a share of the smallest magnitudes set to zero, or, of a `pattern`
    (n, m), all but the n greatest of each m neighbours in a row."""
    made = rows.copy()
    if pattern is None:
        return np.where(_smallest(np.abs(rows), share), 0.0, made)
    width = pattern[1]
    for start in range(0, rows.shape[1] - width + 1, width):
        part = made[:, start : start + width]
        part[_least_of(np.abs(part), pattern)] = 0.0
    return made


def zero_by_output(
    rows: Array, xx: Array, share: float, pattern: tuple[int, int] | None
) -> Array:  # fmt: skip
    """The same, chosen and made up for by what the outputs are on inputs with second moments
    `xx`, (terms, terms). An output that plain zeros leave nearer keeps those."""
    upper = np.linalg.cholesky(np.linalg.inv(_damped(xx))).T
    work, terms = rows.copy(), rows.shape[1]
    span = pattern[1] if pattern else _COLUMNS
    for start in range(0, terms, span):
        stop = min(start + span, terms)
        own = np.diag(upper)[start:stop]
        scores = (work[:, start:stop] / own) ** 2
        if pattern is None:
            zero = _smallest(scores, share)
        elif stop - start == pattern[1]:
            zero = _least_of(scores, pattern)
        else:
            zero = np.zeros(scores.shape, bool)
        for column in range(start, stop):
            wanted = np.where(zero[:, column - start], 0.0, work[:, column])
            off = (work[:, column] - wanted) / upper[column, column]
            work[:, column + 1 :] -= np.outer(off, upper[column, column + 1 :])
            work[:, column] = wanted
    plain = zero_smallest(rows, share, pattern)
    better = _loss(work - rows, xx) <= _loss(plain - rows, xx)
    return np.where(better[:, None], work, plain)


def _smallest(scores: Array, share: float) -> NDArray[np.bool_]:
    count = round(share * scores.size)
    zero = np.zeros(scores.size, bool)
    if count:
        zero[np.argpartition(scores.reshape(-1), count - 1)[:count]] = True
    return zero.reshape(scores.shape)


def _least_of(scores: Array, pattern: tuple[int, int]) -> NDArray[np.bool_]:
    n, m = pattern
    zero = np.zeros(scores.shape, bool)
    np.put_along_axis(zero, np.argsort(scores, axis=1, kind="stable")[:, : m - n], True, axis=1)
    return zero


def _loss(off: Array, xx: Array) -> Array:
    loss: Array = np.einsum("ij,ij->i", off @ xx, off)
    return loss


def sparsify(  # noqa: PLR0917
    layers: Sequence[Layer], weights: dict[str, Array], moments: Mapping[str, Moments],
    amount: float, pattern: tuple[int, int] | None,
    fitted: Callable[[Layer], Moments] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Change weights in place; a row per layer with its zeros before and after. Neighbours of a
    pattern are input channels, as sparse kernels have it. `moments` are those of the model as it
    came; `fitted` fits a layer to what those before it give now, and returns the moments of that.
    """
    facts = []
    shares = {} if pattern else _shares(layers, weights, moments, amount)
    for layer in layers:
        rows = layer.rows(weights)
        before = int((rows == 0).sum())
        share = shares.get(layer.weight, amount)
        order = columns_first(layer, weights)
        if pattern and rows.shape[1] // pattern[1] == 0:
            continue
        parts = []
        known = moments.get(layer.weight)
        if known is not None and fitted is not None:
            known = fitted(layer)
            rows = layer.rows(weights)
        for number, part in enumerate(np.split(rows[:, order], layer.group)):
            if known is None:
                parts.append(zero_smallest(part, share, pattern))
            else:
                xx = known.xx[number][np.ix_(order, order)]
                parts.append(zero_by_output(part, xx, share, pattern))
        made = np.empty_like(rows)
        made[:, order] = np.concatenate(parts)
        layer.put(weights, made)
        if known is not None and layer.bias and layer.can_shift:
            lost = np.split(rows - made, layer.group)
            by = np.concatenate([one @ known.mean[n] for n, one in enumerate(lost)])
            old = weights[layer.bias]
            weights[layer.bias] = (old + by).astype(old.dtype)
        facts.append(
            {
                "name": layer.node.name,
                "type": layer.node.op_type,
                "weights": int(rows.size),
                "zeros_before": before,
                "zeros": int((made == 0).sum()),
            }
        )
    return facts


def _shares(
    layers: Sequence[Layer], weights: Mapping[str, Array], moments: Mapping[str, Moments],
    amount: float,
) -> dict[str, float]:  # fmt: skip
    """How much of each layer goes, so that `amount` of all goes where the outputs change least:
    the error that a zero makes when the others make up for it, w^2 / [inv(xx)]_cc (Hassibi and
    Stork, "Optimal Brain Surgeon", 1993), over what the layer gives, below one bound for all."""
    errors = {}
    for layer in layers:
        known = moments.get(layer.weight)
        if known is None:
            return {}
        made, energy = [], 1e-30
        for number, part in enumerate(np.split(layer.rows(weights), layer.group)):
            xx = known.xx[number]
            energy += float(np.einsum("ij,ij->", part @ xx, part))
            made.append(part**2 / np.diag(np.linalg.inv(_damped(xx))))
        errors[layer.weight] = np.sort(np.concatenate(made).reshape(-1)) / energy
    total = sum(one.size for one in errors.values())
    most = amount + _MOST * (1 - amount)
    low, high = 0.0, 1.0
    bounds = np.sort(np.concatenate(list(errors.values())))
    for _ in range(40):  # the bound, as a share of all errors
        middle = (low + high) / 2
        bound = bounds[min(int(middle * total), total - 1)]
        gone = sum(_share(one, bound, most) * one.size for one in errors.values())
        low, high = (middle, high) if gone < amount * total else (low, middle)
    bound = bounds[min(int(high * total), total - 1)]
    return {name: _share(one, bound, most) for name, one in errors.items()}


def _share(errors: Array, bound: float, most: float) -> float:
    return min(most, float(np.searchsorted(errors, bound)) / errors.size)


def _damped(xx: Array) -> Array:
    made = xx.copy()
    made[np.diag_indices_from(made)] += _DAMPING * np.diag(xx).mean() + 1e-12
    return made


def columns_first(layer: Layer, weights: Mapping[str, Array]) -> NDArray[np.int64]:
    """The order of a layer's terms in which input channels are neighbours."""
    terms = layer.rows(weights).shape[1]
    order = np.arange(terms, dtype=np.int64)
    if not layer.is_conv:
        return order
    shape = weights[layer.weight].shape
    channels = shape[0] // layer.group if layer.turned else shape[1]
    return order.reshape(channels, -1).T.reshape(-1)
