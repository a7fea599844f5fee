"""Ranges of activations from calibration, for quantizers that take them from outside.

Two passes of constant memory: least and greatest value of every tensor, then a histogram between
them. Nothing depends on the order of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError, UsageError

__all__ = ["METHODS", "PERCENTILE", "RangeFinder"]

METHODS = ("minmax", "percentile", "entropy", "mse")

#: best or close to it on most networks of Wu et al., "Integer Quantization for Deep Learning
#: Inference" (2020), table 5
PERCENTILE = 99.99

_BINS = 2048  # on each side of zero; Migacz, "8-bit Inference with TensorRT" (2017), page 19
_LEVELS = 256
_FEWEST = 128  # bins that a clip keeps at least; Migacz, as above
_STRIDE = 8  # bins between two clips that are tried: 0.4 % of the range
_LEAST = 1e-9  # stands for a probability of zero in a logarithm
#: values beyond are masks and paddings, not activations; they are left out
_GREATEST = 3e38

_Values = Mapping[str, NDArray[Any]]
_Array = NDArray[np.float64]


class RangeFinder:
    """Finds the range in which each tensor is quantized to 8 bits.

    method: `minmax`, what was seen. `percentile`: the middle 99.99 % of the values. `entropy`: the
    clip that keeps the distribution of magnitudes closest to the float one in the sense of Kullback
    and Leibler (Migacz, 2017). `mse`: the clip with the smallest expected squared error.

    Raises:
        UsageError: no such method.
    """

    def __init__(self, method: str) -> None:
        if method not in METHODS:
            raise UsageError(f"no way to take ranges {method!r}; known: {', '.join(METHODS)}")
        self._method = method

    def find(
        self, passes: Callable[[], Iterator[_Values]], *, symmetric: bool = False
    ) -> dict[str, tuple[float, float]]:
        """Lower and upper end of each tensor; zero is always within, and the upper end greater.

        `passes` yields the float tensors of each sample by name; called once for `minmax`, else
        twice. `symmetric`: both ends equally far from zero. Infinities and values beyond 3e38 are
        left out; a tensor that is zero all the time gets a range of one.

        Raises:
            InputError: a tensor holds NaN; or there are no samples.
        """
        seen: dict[str, _Seen] = {}
        number = -1
        for number, values in enumerate(passes()):  # wanted after the loop, too
            for name, array in values.items():
                if not seen.setdefault(name, _Seen()).widen(array):
                    raise InputError(
                        f"calibration sample {number}: the float model computes NaN in {name!r}; "
                        "leave such samples out"
                    )
        if number < 0:
            raise InputError("calibration has no samples")
        if self._method != "minmax":
            for values in passes():
                for name, array in values.items():
                    seen[name].count(array)
        return {name: self._range(one, symmetric) for name, one in seen.items()}

    def _range(self, seen: _Seen, symmetric: bool) -> tuple[float, float]:
        low, high = seen.low, seen.high
        if self._method != "minmax" and seen.counts.any():
            chosen = _CHOICES[self._method](seen, symmetric)
            low, high = max(low, chosen[0]), min(high, chosen[1])
        if low == high:
            high = 1.0
        if symmetric:
            high = max(-low, high)
            low = -high
        return low, high


@dataclass
class _Seen:
    """Of one tensor. counts: by magnitude, `_BINS` below zero and as many above, in order."""

    low: float = 0.0
    high: float = 0.0
    counts: _Array = field(default_factory=lambda: np.zeros(2 * _BINS))

    @property
    def magnitude(self) -> float:
        return max(-self.low, self.high)

    def widen(self, array: NDArray[Any]) -> bool:
        """Whether it holds no NaN."""
        if not array.size:
            return True
        low, high = float(array.min()), float(array.max())
        if np.isnan(low):
            return False
        if not (low > -_GREATEST and high < _GREATEST):
            array = _proper(array)
            if not array.size:
                return True
            low, high = float(array.min()), float(array.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        return True

    def count(self, array: NDArray[Any]) -> None:
        if self.magnitude == 0.0 or not array.size:
            return
        values = _proper(array)
        # In float64: small float32 magnitudes overflow in the quotient.
        places = values.astype(np.float64).ravel() * (_BINS / self.magnitude)
        bins = np.floor(places).astype(np.intp) + _BINS
        np.clip(bins, 0, 2 * _BINS - 1, out=bins)
        self.counts += np.bincount(bins, minlength=2 * _BINS)


def _proper(array: NDArray[Any]) -> NDArray[Any]:
    within = np.abs(array) < _GREATEST
    return array if within.all() else array[within]


def _magnitudes(seen: _Seen) -> _Array:
    """Counts of |x|, from zero on."""
    folded: _Array = seen.counts[_BINS:] + seen.counts[:_BINS][::-1]
    return folded


def _percentile(seen: _Seen, symmetric: bool) -> tuple[float, float]:
    """To the outer edge of the bin."""
    width = seen.magnitude / _BINS
    outside = (1 - PERCENTILE / 100) * seen.counts.sum()
    if symmetric:
        inside = np.cumsum(_magnitudes(seen))
        end = (int(np.searchsorted(inside, inside[-1] - outside)) + 1) * width
        return -end, end
    from_below = np.cumsum(seen.counts)
    from_above = np.cumsum(seen.counts[::-1])
    first = int(np.searchsorted(from_below, outside / 2, side="right"))
    last = int(np.searchsorted(from_above, outside / 2, side="right"))
    return min(0.0, (first - _BINS) * width), max(0.0, (_BINS - last) * width)


def _entropy(seen: _Seen, symmetric: bool) -> tuple[float, float]:
    counts = _magnitudes(seen)
    # Zero is represented exactly, however often a Relu makes it.
    counts[0] = min(counts[0], counts[1])
    total = seen.high - seen.low
    share = 0.5 if symmetric or total == 0 else seen.magnitude / total
    levels = max(1, round(_LEVELS * share))
    kept = range(max(_FEWEST, levels), _BINS + 1, _STRIDE)
    losses = [_divergence(counts, bins, levels) for bins in kept]
    end = kept[int(np.argmin(losses))] / _BINS * seen.magnitude
    return -end, end


def _divergence(counts: _Array, bins: int, levels: int) -> float:
    """Kullback-Leibler, of the counts clipped to so many bins from what `levels` levels keep."""
    inside = counts[:bins]
    wanted = inside.copy()
    wanted[-1] += counts[bins:].sum()
    if not inside.any():
        return float("inf")
    group = np.arange(bins) * levels // bins
    filled = inside > 0
    means = np.bincount(group, inside) / np.maximum(1, np.bincount(group, filled))
    kept = np.where(filled, means[group], 0.0)
    p, q = wanted / wanted.sum(), np.maximum(kept / kept.sum(), _LEAST)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


def _mse(seen: _Seen, symmetric: bool) -> tuple[float, float]:
    bins = np.arange(-_BINS, _BINS, dtype=np.float64)
    centers = (bins + 0.5) * (seen.magnitude / _BINS)
    some = seen.counts > 0
    values, weights = centers[some], seen.counts[some]
    shares = np.arange(_FEWEST, _BINS + 1, _STRIDE) / _BINS
    if symmetric:
        ends = shares * seen.magnitude
        end = float(ends[np.argmin([_error(values, weights, -one, one) for one in ends])])
        return -end, end
    low, high = seen.low, seen.high
    best = float("inf")
    while True:  # each end in turn, until neither gets better
        highs = shares * seen.high
        high = float(highs[np.argmin([_error(values, weights, low, one) for one in highs])])
        lows = shares * seen.low
        losses = [_error(values, weights, one, high) for one in lows]
        low = float(lows[np.argmin(losses)])
        if not min(losses) < best:
            return low, high
        best = min(losses)


def _error(values: _Array, weights: _Array, low: float, high: float) -> float:
    """Expected squared error of rounding to the levels from `low` to `high`, one of them zero."""
    if low == high:
        return float("inf")
    # -128 is not used where zero is in the middle.
    step = (high - low) / (_LEVELS - (2 if low == -high else 1))
    rounded = np.round(values / step) * step
    np.clip(rounded, low, high, out=rounded)
    return float(np.dot(weights, (values - rounded) ** 2))


_CHOICES: Mapping[str, Callable[[_Seen, bool], tuple[float, float]]] = {
    "percentile": _percentile, "entropy": _entropy, "mse": _mse,
}  # fmt: skip
