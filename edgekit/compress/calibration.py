"""Calibration samples, streamed from the mapped data set inside the quantizer's process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.sandbox import report_progress
from edgekit_runtime.loading import load

__all__ = ["CalibrationSamples"]


class CalibrationSamples:
    """One sample after the other, shaped as the model's inputs want it; may be gone through
    again, since quantizers that take several passes do."""

    def __init__(self, model: str, data: dict[str, str], indices: str) -> None:
        self._data = Dataset(Path(data["folder"]), data["sha256"], data["source"])
        self._indices = np.load(indices)
        with load(model) as session:
            self._specs = session.inputs

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        for done, index in enumerate(self._indices):
            yield self._data.sample(int(index), self._specs)
            report_progress(done + 1, len(self._indices))
