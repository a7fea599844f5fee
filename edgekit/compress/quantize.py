"""Runs a quantizer in a child process, results by content."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import Artifact, open_model
from edgekit.cache import Cache, content_key
from edgekit.compress.calibration import calibration_request
from edgekit.compress.quantizers import quantizer_for
from edgekit.compress.recovery import recovered
from edgekit.compress.scheme import Scheme
from edgekit.compress.sensitivity import aligned
from edgekit.convert import SUFFIX, convert, tool_versions
from edgekit.data import Dataset
from edgekit.errors import UsageError
from edgekit.graph import Graph, read_graph, with_batch_one

__all__ = ["quantize"]

_FACTS = "facts.json"


def quantize(
    artifact: Artifact,
    scheme: Scheme,
    data: Dataset | None = None,
    indices: NDArray[np.int64] | None = None,
    *,
    target: str | None = None,
    onnx: Artifact | None = None,
    cache: Cache,
    limits: sandbox.Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """The artifact under a scheme; `indices` are the calibration samples. `target` is the format to
    write, where a quantizer inside a converter does it; else the artifact's own. `onnx`: the same
    float model as ONNX, which recovery works on.

    Raises:
        UsageError: no tool makes this scheme of the format, or what it asks for needs ONNX.
        ModelError: the quantizer refuses the model.
        ChildError: it crashed or went over its limits.
    """
    made_as = target or artifact.format
    quantizer = quantizer_for(scheme, made_as, source=artifact.format)
    asked = scheme
    first = quantizer.recovers.get(scheme.kind, frozenset()) & set(scheme.recovery)
    if first and data is not None and indices is not None:
        source = artifact if artifact.format == "onnx" else onnx
        if source is None:
            raise UsageError(f"{', '.join(sorted(first))} needs the model as ONNX")
        artifact, scheme = _recovered(
            artifact, source, scheme, first, data, indices,
            cache=cache, limits=limits, progress=progress,
        )  # fmt: skip
    versions = tool_versions(quantizer.distributions)
    samples = np.zeros(0, np.int64) if indices is None else indices
    calibration = None
    if scheme.needs_data and data is not None:
        calibration = [data.sha256, samples.tolist()]
    key = content_key(
        kind="quantize", recipe=14, function=quantizer.function, source=artifact.sha256,
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
        "step": "quantize", "scheme": asked.to_json(), "tools": versions,
        **json.loads((folder / _FACTS).read_text()),
    }  # fmt: skip
    if calibration is not None and data is not None:
        step |= {"calibration": data.sha256, "calibration_samples": len(samples)}
    return open_model(
        folder / name, provenance=(*artifact.provenance, step), called="the quantized model"
    )


def _recovered(  # noqa: PLR0917
    artifact: Artifact, source: Artifact, scheme: Scheme, words: frozenset[str], data: Dataset,
    indices: NDArray[np.int64], *, cache: Cache, limits: sandbox.Limits | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Artifact, Scheme]:  # fmt: skip
    """The artifact made anew from the recovered ONNX model, and what is left to do of the scheme,
    with the operators that stay float called as they are in there."""
    same = artifact.format == "onnx"
    before = None if same else _graph(artifact)
    keep = scheme.keep if before is None else aligned(scheme.keep, before, _graph(source))
    now = tuple(word for word in scheme.recovery if word in words)
    made, kept = recovered(
        source, replace(scheme, recovery=now, keep=keep, ranges="minmax", tool=""), data, indices,
        halves=artifact.format == "openvino", cache=cache, limits=limits, progress=progress,
    )  # fmt: skip
    if before is not None:
        made = convert(made, artifact.format, cache=cache, limits=limits)
        kept = aligned(scheme.keep, before, _graph(made))
    left = tuple(word for word in scheme.recovery if word not in words)
    return made, replace(scheme, recovery=left, keep=kept)


def _graph(artifact: Artifact) -> Graph:
    return read_graph(artifact.path, shapes=with_batch_one(artifact.inputs))
