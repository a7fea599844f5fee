"""What surrounds a model: from raw samples to its inputs, from its outputs to an answer, and the
state it carries. Declared in a TOML file, checked here, run by `edgekit_runtime` everywhere.

    labels = "labels.txt"            # or a list; for postprocessing and for label names in data
    [inputs.x]
    source = "image"
    steps = [{ op = "resize", size = [224, 224] }, { op = "layout", to = "NCHW" }]
    [[outputs]]
    op = "softmax"
    [states]
    state = "stateN"                 # input = "the output fed back into it"
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.artifact import TensorSpec
from edgekit.errors import InputError, UsageError
from edgekit_runtime.manifest import InputSteps, StatePair
from edgekit_runtime.postprocess import Postprocess
from edgekit_runtime.preprocess import Preprocess
from edgekit_runtime.stream import state_pairs

__all__ = ["Pipeline", "read_pipeline"]


@dataclass(frozen=True)
class Pipeline:
    """Checked against the model it was read for."""

    preprocess: dict[str, InputSteps] = field(default_factory=dict)
    postprocess: tuple[dict[str, Any], ...] = ()
    labels: tuple[str, ...] | None = None
    states: tuple[StatePair, ...] = ()

    def for_data(self) -> dict[str, Any]:
        """What laying out samples needs, as JSON."""
        steps = {name: dataclasses.asdict(one) for name, one in self.preprocess.items()}
        return {"preprocess": steps, "labels": list(self.labels or ())}


def read_pipeline(
    path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> Pipeline:
    """Read and check a steps file.

    Raises:
        UsageError: it is not TOML, names what the model does not have, or holds an unknown step.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    unknown = sorted(set(raw) - {"inputs", "outputs", "labels", "states"})
    if unknown:
        raise UsageError(
            f"{path}: {unknown[0]!r} is unknown; known: inputs, outputs, labels, states"
        )
    labels = _labels(path, raw.get("labels"))
    try:
        states = raw.get("states", {})
        if not isinstance(states, dict):
            raise UsageError("states are a table: input = 'the output fed back into it'")
        pairs = state_pairs(None, states, inputs, outputs)
        steps = _input_steps(raw.get("inputs", {}), inputs)
        after = raw.get("outputs", [])
        if not isinstance(after, list):
            raise UsageError("outputs are a list of steps: [[outputs]]")
        answer = Postprocess(after, [spec.name for spec in outputs], labels)
        if all(isinstance(d, int) for spec in outputs for d in spec.shape[1:]):
            answer({s.name: np.zeros(s.with_batch(1), s.dtype) for s in outputs})
    except (InputError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from None
    carried = tuple(StatePair(*pair) for pair in pairs.items())
    return Pipeline(steps, tuple(after), labels, carried)


def _input_steps(raw: Any, inputs: tuple[TensorSpec, ...]) -> dict[str, InputSteps]:
    known = [spec.name for spec in inputs]
    if not isinstance(raw, dict):
        raise UsageError("inputs are tables: [inputs.NAME]")
    found = {}
    for name, one in raw.items():
        if name not in known:
            raise UsageError(f"[inputs.{name}] is no input; the model has: {', '.join(known)}")
        if not isinstance(one, dict) or "source" not in one or set(one) - {"source", "steps"}:
            listed = ", ".join(one) if isinstance(one, dict) else repr(one)
            raise UsageError(f"[inputs.{name}] holds source and steps, found: {listed}")
        steps = one.get("steps", [])
        try:
            Preprocess(one["source"], steps)
        except UsageError as error:
            raise UsageError(f"[inputs.{name}] {error}") from None
        found[name] = InputSteps(one["source"], tuple(steps))
    return found


def _labels(path: Path, raw: Any) -> tuple[str, ...] | None:
    if raw is None:
        return None
    if isinstance(raw, str):
        file = path.parent / raw
        try:
            raw = file.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot read the labels {file}: {error}") from None
    if not isinstance(raw, list) or not all(isinstance(one, str) and one for one in raw):
        raise UsageError(f"{path}: labels are a file with one name a line, or a list of names")
    return tuple(raw)
