"""Calibration samples, streamed from the mapped data set inside the quantizer's process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.sandbox import report_progress
from edgekit_runtime.session import load

__all__ = ["calibration_samples"]


def calibration_samples(
    model: str, data: dict[str, str], indices: str
) -> Iterator[dict[str, NDArray[Any]]]:
    """One sample after the other, shaped as the model's inputs want it."""
    dataset = Dataset(Path(data["folder"]), data["sha256"], data["source"])
    chosen = np.load(indices)
    with load(model) as session:
        specs = session.inputs
    for done, index in enumerate(chosen):
        yield dataset.sample(int(index), specs)
        report_progress(done + 1, len(chosen))
