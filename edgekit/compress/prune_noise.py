"""How far the outputs of layers are off after pruning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.layers_onnx import Array, Tap

__all__ = ["Output", "noise_db"]


@dataclass(frozen=True)
class Output:
    """A tensor that both models make, and which entries along `axis` are left (None: all)."""

    name: str
    axis: int = 0
    kept: NDArray[np.bool_] | None = None


def noise_db(
    model: Any, made: Any, outputs: Sequence[Output], samples: Iterable[Mapping[str, Array]]
) -> list[float | None]:
    """For each output the power in `model`, of what is left, over that of the difference in `made`,
    in dB, over all samples; None where there is no difference."""
    names = [one.name for one in outputs]
    was, now = Tap(model, names), Tap(made, names)
    power, off = np.zeros(len(names)), np.zeros(len(names))
    for sample in samples:
        before, after = was.run(sample), now.run(sample)
        for place, one in enumerate(outputs):
            wanted = before[one.name].astype(np.float64)
            if one.kept is not None:
                wanted = np.compress(one.kept, wanted, one.axis)
            power[place] += (wanted**2).sum()
            off[place] += ((after[one.name] - wanted) ** 2).sum()
    return [
        round(10 * math.log10(max(p, 1e-30) / o), 1) if o > 0 else None
        for p, o in zip(power, off, strict=True)
    ]
