"""Calibration samples, streamed from the mapped data set inside the quantizer's process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import TensorSpec
from edgekit.data import Dataset
from edgekit.errors import UsageError
from edgekit.sandbox import report_progress

__all__ = ["CalibrationSamples", "calibration_request"]

#: samples whose pages are kept
_HELD = 32


def calibration_request(
    data: Dataset, indices: NDArray[np.int64], inputs: tuple[TensorSpec, ...], folder: Path
) -> dict[str, Any]:
    """What a quantizer's process needs to open the samples; writes their numbers into `folder`."""
    np.save(folder / "calibration.npy", indices)
    return {
        "folder": str(data.folder), "sha256": data.sha256, "source": data.source,
        "indices": str(folder / "calibration.npy"),
        "inputs": [[one.name, one.dtype, list(one.shape)] for one in inputs],
    }  # fmt: skip


class CalibrationSamples:
    """One sample after the other, shaped as the model's inputs want it; may be gone through
    again, since quantizers that take several passes do."""

    def __init__(self, request: Mapping[str, Any] | None) -> None:
        if request is None:
            raise UsageError("this scheme takes ranges from samples, and none were given")
        self._data = Dataset(Path(request["folder"]), request["sha256"], request["source"])
        self._indices = np.load(request["indices"])
        self._specs = tuple(
            TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in request["inputs"]
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        for done, sample in enumerate(self.quietly()):
            yield sample
            report_progress(done + 1, len(self._indices))

    def quietly(self) -> Iterator[dict[str, NDArray[Any]]]:
        """The same without reporting progress."""
        for done, index in enumerate(self._indices):
            yield self._data.sample(int(index), self._specs)
            if done % _HELD == _HELD - 1:
                self._data.release()
