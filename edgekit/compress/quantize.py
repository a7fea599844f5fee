"""Runs a quantizer for a format in a child process, results by content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import Artifact, open_model
from edgekit.cache import Cache, content_key
from edgekit.compress.scheme import Scheme
from edgekit.convert import SUFFIX, tool_versions
from edgekit.data import Dataset

__all__ = ["QUANTIZERS", "quantize"]

#: format -> (function `(source, target, scheme, calibration)`, module, extra, distributions)
QUANTIZERS = {
    "onnx": (
        "edgekit.compress.quantize_onnx:quantize_onnx",
        "onnx",
        "onnx",
        ("onnxruntime", "onnx"),
    ),
    "openvino": (
        "edgekit.compress.quantize_openvino:quantize_openvino",
        "nncf",
        "openvino",
        ("nncf", "openvino"),
    ),
    "tflite": (
        "edgekit.compress.quantize_tflite:quantize_tflite",
        "litert_quantizer",
        "tflite-convert",
        ("litert-quantizer", "ai-edge-litert"),
    ),
}


def quantize(
    artifact: Artifact,
    scheme: Scheme,
    data: Dataset,
    indices: NDArray[np.int64],
    *,
    cache: Cache,
    limits: sandbox.Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """The artifact under a scheme, same format; `indices` are the calibration samples.

    Raises:
        ModelError: the quantizer refuses the model.
        ChildError: it crashed or went over its limits.
    """
    function, _, _, distributions = QUANTIZERS[artifact.format]
    versions = tool_versions(distributions)
    needs_data = scheme.kind == "int8-static"
    calibration = [data.sha256, indices.tolist()] if needs_data else None
    key = content_key(
        kind="quantize", recipe=3, function=function, source=artifact.sha256,
        scheme=scheme.to_json(), calibration=calibration, tools=versions,
    )  # fmt: skip
    name = f"model{SUFFIX[artifact.format]}"

    def make(folder: Path) -> None:
        np.save(folder / "calibration.npy", indices)
        request: dict[str, Any] = {
            "source": [str(p) for p in artifact.files],
            "target": str(folder / name),
            "scheme": scheme.to_json(),
            "data": {"folder": str(data.folder), "sha256": data.sha256, "source": data.source},
            "indices": str(folder / "calibration.npy"),
        }
        sandbox.call(
            function, request, limits=limits, progress=progress,
            what=f"quantizing ({distributions[0]})",
        )  # fmt: skip

    folder = cache.folder(key, make)
    step: dict[str, Any] = {"step": "quantize", "scheme": scheme.to_json(), "tools": versions}
    if needs_data:
        step |= {"calibration": data.sha256, "calibration_samples": len(indices)}
    return open_model(
        folder / name, provenance=(*artifact.provenance, step), called="the quantized model"
    )
