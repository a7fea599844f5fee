"""Runs a quantizer in a child process, results by content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import Artifact, open_model
from edgekit.cache import Cache, content_key
from edgekit.compress.calibration import calibration_request
from edgekit.compress.quantizers import quantizer_for
from edgekit.compress.scheme import Scheme
from edgekit.convert import SUFFIX, tool_versions
from edgekit.data import Dataset

__all__ = ["quantize"]

_FACTS = "facts.json"


def quantize(
    artifact: Artifact,
    scheme: Scheme,
    data: Dataset | None = None,
    indices: NDArray[np.int64] | None = None,
    *,
    target: str | None = None,
    cache: Cache,
    limits: sandbox.Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """The artifact under a scheme; `indices` are the calibration samples. `target` is the format to
    write, where a quantizer inside a converter does it; else the artifact's own.

    Raises:
        UsageError: no tool makes this scheme of the format.
        ModelError: the quantizer refuses the model.
        ChildError: it crashed or went over its limits.
    """
    made_as = target or artifact.format
    quantizer = quantizer_for(scheme, made_as, source=artifact.format)
    versions = tool_versions(quantizer.distributions)
    samples = np.zeros(0, np.int64) if indices is None else indices
    calibration = None
    if scheme.needs_data and data is not None:
        calibration = [data.sha256, samples.tolist()]
    key = content_key(
        kind="quantize", recipe=12, function=quantizer.function, source=artifact.sha256,
        scheme=scheme.to_json(), calibration=calibration, tools=versions,
    )  # fmt: skip
    name = f"model{SUFFIX[made_as]}"

    def make(folder: Path) -> None:
        request: dict[str, Any] = {
            "source": list(artifact.arguments),
            "target": str(folder / name),
            "scheme": scheme.to_json(),
            "calibration": calibration_request(data, samples, artifact.inputs, folder)
            if data is not None
            else None,
        }
        facts = sandbox.call(
            quantizer.function, request, limits=limits, progress=progress,
            what=f"quantizing ({quantizer.tool})",
        )  # fmt: skip
        (folder / _FACTS).write_text(json.dumps(facts or {}))

    folder = cache.folder(key, make)
    step: dict[str, Any] = {
        "step": "quantize", "scheme": scheme.to_json(), "tools": versions,
        **json.loads((folder / _FACTS).read_text()),
    }  # fmt: skip
    if calibration is not None and data is not None:
        step |= {"calibration": data.sha256, "calibration_samples": len(samples)}
    return open_model(
        folder / name, provenance=(*artifact.provenance, step), called="the quantized model"
    )
