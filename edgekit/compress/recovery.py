"""Accuracy won back on the float ONNX model, before a quantizer of any format sees it.

What is learned of a layer hangs on the float model alone, so it is learned once, whatever stays
float later: a search over that pays for it one time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import Artifact, open_model
from edgekit.cache import Cache, content_key
from edgekit.compress.calibration import calibration_request
from edgekit.compress.scheme import Scheme
from edgekit.data import Dataset

__all__ = ["recovered"]

_FACTS, _CHANGES = "facts.json", "changes.npz"


def recovered(
    model: Artifact, scheme: Scheme, data: Dataset, indices: NDArray[np.int64],
    *, halves: bool, cache: Cache, limits: sandbox.Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Artifact, tuple[str, ...]]:  # fmt: skip
    """A float ONNX model whose weights lie where the quantizer will round them to, but for the
    operators of `scheme.keep`, which are as they were; and what these are called in it.

    halves: the grid of NNCF's 7 bits, of which the greatest weight is 63.5 steps away from 0.

    Raises:
        ModelError: the model is damaged or quantized already.
        UsageError: no operator makes a tensor of `scheme.keep`.
        ChildError: it crashed or went over its limits.
    """
    # Equalization changes layers in pairs: there is no telling them apart afterwards.
    bound = scheme.keep if "equalization" in scheme.recovery else ()
    # What is done to activations, and by whom, does not change what is learned of weights.
    wanted = replace(
        scheme, keep=bound, operators="all", activations="", symmetric=False, ranges="minmax",
        transformer=False, tool="",
    )  # fmt: skip
    key = content_key(
        kind="recover", recipe=3, model=model.sha256, scheme=wanted.to_json(), halves=halves,
        calibration=[data.sha256, indices.tolist()],
    )  # fmt: skip

    def learn(folder: Path) -> None:
        facts = sandbox.call(
            "edgekit.compress.recover_onnx:learn",
            {
                "source": str(model.path), "target": str(folder / _CHANGES),
                "scheme": wanted.to_json(), "halves": halves,
                "calibration": calibration_request(data, indices, model.inputs, folder),
            },
            limits=limits, progress=progress, what=", ".join(scheme.recovery),
        )  # fmt: skip
        (folder / _FACTS).write_text(json.dumps(facts))

    learned = cache.folder(key, learn)

    def apply(folder: Path) -> None:
        kept = sandbox.call(
            "edgekit.compress.recover_onnx:apply",
            {
                "source": str(model.path), "changes": str(learned / _CHANGES),
                "keep": list(scheme.keep), "restore": not bound,
                "target": str(folder / "model.onnx"),
            },
            limits=limits, what=", ".join(scheme.recovery),
        )  # fmt: skip
        (folder / _FACTS).write_text(json.dumps(kept))

    applied = content_key(kind="recovered", recipe=1, learned=str(key), keep=list(scheme.keep))
    folder = cache.folder(applied, apply)
    step = {
        "step": "recover", "recovery": list(scheme.recovery), "calibration": data.sha256,
        "calibration_samples": len(indices), **json.loads((learned / _FACTS).read_text()),
    }  # fmt: skip
    made = open_model(folder / "model.onnx", provenance=(*model.provenance, step))
    return made, tuple(json.loads((folder / _FACTS).read_text()))
