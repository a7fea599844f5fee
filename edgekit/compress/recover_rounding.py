"""Learned rounding: weights on the quantizer's grid that give nearly the outputs of the float ones.

E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, algorithm 1, on the grids of ONNX Runtime's quantizers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.scheme import Scheme

__all__ = ["Grid", "grid_of", "round_by_output"]

Array = NDArray[np.float64]

#: added to the diagonal, as a share of its mean (Frantar et al., section 3.3)
_DAMPING = 0.01
#: columns whose errors are handed on together (as there)
_COLUMNS = 128
#: weights this near to the end of their range, relatively, decide where it ends
_END = 1e-6


@dataclass(frozen=True)
class Grid:
    """`(q - zero) * step` for integers q from `low` to `high`; all float64 (..., outputs, terms),
    views.

    held: weights that the range, and with it the step, comes from: they are rounded as they are.
    """

    step: Array
    zero: Array
    low: Array
    high: Array
    held: NDArray[np.bool_]

    def nearest(self, rows: Array) -> Array:
        """The weights on the grid that are next to these."""
        return self._valued(rows, slice(None))

    def column(self, values: Array, column: int) -> Array:
        """The same of one column."""
        return self._valued(values, column)

    def _valued(self, values: Array, of: int | slice) -> Array:
        step, zero = self.step[..., of], self.zero[..., of]
        integers = np.clip(np.rint(values / step) + zero, self.low[..., of], self.high[..., of])
        made: Array = (integers - zero) * step
        return made

    def shaped(self, shape: tuple[int, ...]) -> Grid:
        """The same in another shape."""
        return self._each(lambda one: one.reshape(shape))

    def sorted(self, order: NDArray[np.intp]) -> Grid:
        """With the terms in this order (..., terms)."""
        return self._each(lambda one: _sorted(one, order))

    def flat(self, shape: tuple[int, int]) -> Grid:
        """Blocks one behind the other, what was filled up left out."""

        def rows(one: NDArray[Any]) -> NDArray[Any]:
            return np.ascontiguousarray(one).reshape(shape[0], -1)[:, : shape[1]]

        return self._each(rows)

    def _each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Grid:
        return Grid(*map(change, (self.step, self.zero, self.low, self.high, self.held)))


def grid_of(rows: Array, scheme: Scheme, *, blocks: bool = False, halves: bool = False) -> Grid:
    """Where ONNX Runtime's quantizer puts weights, float64 (outputs, terms): 8 bits per output or
    for all, from -127 to 127 (-64 to 64 in 7 bits), or between their ends if they are asymmetric,
    which static per-channel weights never are; `blocks`: 4 bits as MatMulNBits has them, the step
    of a block being its weight of greatest magnitude over -8. `halves`: NNCF's 7 bits, of which the
    greatest weight is 63.5 steps away from 0 and rounds to 64 or -63.
    """
    if blocks:
        return _blocks(rows, scheme)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    if not scheme.per_channel:
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    static = scheme.kind == "int8-static"
    asymmetric = not scheme.weights_symmetric and not (static and scheme.per_channel)
    least, most = (-64, 64) if scheme.reduce_range else (-128 if asymmetric else -127, 127)
    if halves and scheme.reduce_range:
        reach = np.maximum(np.maximum(-low, high), 0.0)
        zero = np.zeros_like(reach)
        step, held = _positive(reach / 63.5), np.abs(rows) >= reach * (1 - _END)
        return _spread(rows.shape, step, zero, zero - 63, zero + 64, held)
    return _grid(rows, low, high, (least, most), asymmetric=asymmetric)


def _grid(
    rows: Array, low: Array, high: Array, levels: tuple[int, int], *, asymmetric: bool
) -> Grid:
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    least, most = levels
    zero = np.zeros_like(low)
    if asymmetric:
        step = _positive((high - low) / (most - least))
        zero = np.rint(least - low / step)
        ends = np.rint(low / step) + zero, np.rint(high / step) + zero
        held = (rows <= low * (1 - _END)) | (rows >= high * (1 - _END))
    else:
        reach = np.maximum(-low, high)
        step = _positive(reach / most)
        ends = zero + least, zero + most
        held = np.abs(rows) >= reach * (1 - _END)
    return _spread(rows.shape, step, zero, *ends, held)


def _spread(shape: tuple[int, ...], *fields: NDArray[Any]) -> Grid:
    step, zero, low, high, held = (np.broadcast_to(one, shape) for one in fields)
    return Grid(step, zero, low, high, held)


def _positive(step: Array) -> Array:
    return np.where(np.abs(step) < np.finfo(np.float32).tiny, 1.0, step)


def _blocks(rows: Array, scheme: Scheme) -> Grid:
    outputs, terms = rows.shape
    short = -terms % scheme.block
    padded = np.pad(rows, ((0, 0), (0, short))).reshape(outputs, -1, scheme.block)
    low, high = padded.min(axis=2, keepdims=True), padded.max(axis=2, keepdims=True)
    if not scheme.weights_symmetric:
        return _grid(padded, low, high, (0, 15), asymmetric=True).flat(rows.shape)
    reach = np.where(-low >= high, low, high)
    held = np.abs(padded) >= np.abs(reach) * (1 - _END)
    zero = np.zeros_like(reach)
    grid = _spread(padded.shape, _positive(reach / -8), zero, zero - 8, zero + 7, held)
    return grid.flat(rows.shape)


def round_by_output(rows: Array, hessian: Array, grid: Grid) -> Array:
    """Weights on the grid: column by column, the greatest inputs first, what rounding one is off by
    is made up for in those to come. An output for which plain rounding is nearer keeps that.

    rows: (..., outputs, terms). hessian: (..., terms, terms), the sum of x x^T over the inputs x;
    leading axes (a convolution's groups) are rounded side by side.
    """
    terms = rows.shape[-1]
    order = np.argsort(-np.diagonal(hessian, axis1=-2, axis2=-1), kind="stable")
    on, exact = grid.sorted(order), _sorted(rows, order)
    damped = _sorted(np.take_along_axis(hessian, order[..., :, None], axis=-2), order)
    places = np.arange(terms)
    diagonal = damped[..., places, places]
    # An input that is always zero has no say.
    mean = diagonal.mean(axis=-1, keepdims=True)
    damped[..., places, places] += _DAMPING * mean + (diagonal <= 0)
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(damped)), -1, -2)
    work, made = exact.copy(), np.empty_like(exact)
    for start in range(0, terms, _COLUMNS):
        stop = min(start + _COLUMNS, terms)
        errors = np.empty((*work.shape[:-1], stop - start))
        for at in range(start, stop):
            wanted = np.where(on.held[..., at], exact[..., at], work[..., at])
            made[..., at] = on.column(wanted, at)
            off = (work[..., at] - made[..., at]) / upper[..., at, at, None]
            later = slice(at + 1, stop)
            work[..., later] -= off[..., None] * upper[..., at, None, later]
            errors[..., at - start] = off
        work[..., stop:] -= errors @ upper[..., start:stop, stop:]
    learned, plain = _sorted(made, np.argsort(order, kind="stable")), grid.nearest(rows)
    better = _loss(learned - rows, hessian) < _loss(plain - rows, hessian)
    return np.where(better[..., None], learned, plain)


def _sorted(values: NDArray[Any], order: NDArray[np.intp]) -> NDArray[Any]:
    return np.take_along_axis(values, order[..., None, :], axis=-1)


def _loss(off: Array, hessian: Array) -> Array:
    """The squared error of each output."""
    loss: Array = ((off @ hessian) * off).sum(axis=-1)
    return loss
