"""Runs an artifact on a data set's samples, one at a time, as it will run on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.sandbox import report_progress
from edgekit_runtime.loading import load

__all__ = ["outputs_of"]


def outputs_of(
    model: Path, options: dict[str, Any], data: Dataset, indices: NDArray[np.int64]
) -> Iterator[dict[str, NDArray[Any]]]:
    """The outputs by name for each sample, in order. Call in a child process.

    One at a time because that is what runs on the device: dynamic quantization takes its scales
    from the whole batch, so a batch would measure another model.
    """
    with load(model, **options) as session:
        for done, index in enumerate(indices):
            yield session.run(data.sample(int(index), session.inputs))
            if done % 50 == 49:
                report_progress(done + 1, len(indices))
