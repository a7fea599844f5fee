"""What profilers share: the inputs of a run, and which runs stand for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit_runtime.loading import load
from edgekit_runtime.worker import read_samples

__all__ = ["feed", "sums", "typical"]


def feed(model: Path, engine: str, inputs: str | None) -> dict[str, NDArray[Any]]:
    """One sample by input name, in the model's order."""
    with load(model, engine=engine) as session:
        sample = read_samples(session, Path(inputs) if inputs else None)[0]
        return {spec.name: sample[spec.name] for spec in session.inputs}


def sums(times: Mapping[str, Mapping[int, float]], runs: int) -> list[float]:
    """The operators' times of each run, added up."""
    return [sum(one.get(run, 0.0) for one in times.values()) for run in range(runs)]


def typical(times: Mapping[str, Mapping[int, float]], runs: int) -> dict[str, float]:
    """Each operator's time a run: the mean over the middle half of runs, by their sums.

    So the operators' times add up to a typical run's, which medians of each would not; and whole
    microseconds, which is what profilers count in, average out. `times` are by operator and run.
    """
    middle = np.argsort(sums(times, runs))[runs // 4 : runs - runs // 4]
    return {
        name: float(np.mean([one.get(int(run), 0.0) for run in middle]))
        for name, one in times.items()
    }
