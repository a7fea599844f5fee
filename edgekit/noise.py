"""Seeded inputs for models whose data nobody gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import TensorSpec

__all__ = ["noise_sets"]

#: What is tried, in this order, until the model takes it: the size of free dimensions (64 and 224
#: for images, 16 and 1 for sequences), the greatest integer (100: tokens; 1: flags, indices of
#: small tables) and the scale of floats (other than 1 where outputs saturate, or hang on the last
#: bit of the inputs; 100 where pixels go in).
_TRIES = (
    (64, 100, 1.0), (224, 100, 1.0), (16, 100, 1.0), (64, 1, 1.0), (16, 1, 1.0), (1, 100, 1.0),
    (1, 1, 1.0), (64, 1, 0.5), (64, 1, 0.1), (64, 1, 100.0), (16, 1, 0.1), (16, 1, 100.0),
)  # fmt: skip
#: the sample that has other sizes
_LAST = 3
_WORDS = [
    "edge",
    "the",
    "of",
    "model",
    "a",
    "device",
    "7",
    "is",
    "it",
    "fast,",
    "and",
    "not!",
    "ok",
    "Zürich",
    "42",
    "damn",
    "hello",
    "world",
]


def noise_sets(
    specs: Sequence[TensorSpec], sizes: Mapping[str, int], *, count: int, seed: int = 0
) -> Iterator[tuple[str, list[dict[str, NDArray[Any]]]]]:
    """Sets of `count` samples, each with what to call it, until one is taken.

    Floats are uniform in 0..1 and normal by turns (scaled: normal, above 1 uniform), or uniform in
    the range that the spec states; a free first dimension is 1, and 2 in the third sample; other
    free dimensions are half as long again in the fourth. `sizes` are those of free dimensions by
    name.
    """
    batches = {spec.shape[0] for spec in specs if spec.shape} - set(sizes)
    free = any(
        isinstance(d, str) and d not in sizes and d not in batches for s in specs for d in s.shape
    )
    whole = any(spec.dtype.startswith(("int", "uint")) for spec in specs)
    seen = set()
    real = any("float" in spec.dtype and spec.range is None for spec in specs)
    for size, most, scale in _TRIES:
        one = (size if free else 0, most if whole else 0, scale if real else 1.0)
        if one in seen:
            continue
        seen.add(one)
        rng = np.random.default_rng(seed)
        text = "seeded noise"
        text += f", free dimensions {size}" if free else ""
        text += f", integers 0..{most}" if whole else ""
        text += f", times {scale:g}" if real and scale != 1 else ""
        yield text, [
            {
                spec.name: _array(spec, known, one, number, rng)
                for known in [dict.fromkeys(batches, 2 if number == 2 else 1) | dict(sizes)]
                for spec in specs
            }
            for number in range(count)
        ]  # fmt: skip


def _array(
    spec: TensorSpec,
    sizes: Mapping[int | str, int],
    tried: tuple[int, int, float],
    number: int,
    rng: np.random.Generator,
) -> NDArray[Any]:
    size, most, scale = tried
    if number == _LAST:  # a size that was baked in shows at another one
        size = max(1, size * 3 // 2)
    shape = [dim if isinstance(dim, int) else sizes.get(dim, size) for dim in spec.shape]
    low, high = spec.range or (0.0, 1.0)
    if spec.dtype == "string":
        lengths = rng.integers(3, 12, int(np.prod(shape)))
        texts = [" ".join(rng.choice(_WORDS, length)) for length in lengths]
        return np.array(texts).reshape(shape)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        limits = (int(low), int(high)) if spec.range else (0, min(most, np.iinfo(dtype).max))
        return rng.integers(limits[0], limits[1] + 1, shape).astype(dtype)
    if spec.range is None:
        even = scale > 1 or (scale == 1 and number % 2 == 0)
        made = rng.uniform(size=shape) if even else rng.normal(size=shape)
        return np.asarray(made * scale).astype(dtype)
    return np.asarray(rng.uniform(low, high, shape)).astype(dtype)
