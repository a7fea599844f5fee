"""Prunes ONNX models in a child process, results by content."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import Artifact, open_model
from edgekit.cache import Cache, content_key
from edgekit.compress.calibration import calibration_request
from edgekit.convert import tool_versions
from edgekit.data import Dataset
from edgekit.errors import UsageError

__all__ = ["METHODS", "Pruning", "prune"]

Progress = Callable[[int, int], None]

METHODS = ("channels", "magnitude", "n-m")
_IMPORTANCES = ("l1", "l2", "activation", "second-order")
_SPREADS = ("least-loss", "even")
_AIMS = ("macs", "latency")


@dataclass(frozen=True)
class Pruning:
    """What goes.

    method: `channels` takes whole channels out; `magnitude` sets single weights to zero, `n-m` all
    but n of each m neighbours. amount: the share of what is to be least (channels) or of the
    weights that is to go, 0..1 without its ends. spread: channels go where least is lost for what
    is saved, or the same share of every layer's. minimize: MACs, or the latency of the layers as
    they were measured on this machine. refit: layers are fitted to what they gave before.
    multiple: what is left of a group of channels is a multiple of it. pattern: (n, m).
    """

    method: str
    amount: float = 0.5
    importance: str = "second-order"
    refit: bool = True
    multiple: int = 1
    pattern: tuple[int, int] = (2, 4)
    spread: str = "least-loss"
    minimize: str = "macs"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"no method {self.method!r}; wanted {', '.join(METHODS)}")
        if self.importance not in _IMPORTANCES:
            known = ", ".join(_IMPORTANCES)
            raise UsageError(f"no importance {self.importance!r}; wanted {known}")
        for word, words in ((self.spread, _SPREADS), (self.minimize, _AIMS)):
            if word not in words:
                raise UsageError(f"{word!r} is unknown; wanted {' or '.join(words)}")
        if not 0 < self.amount < 1:
            raise UsageError(f"the amount is {self.amount:g}; wanted a share between 0 and 1")
        n, m = self.pattern
        if not 0 < n < m:
            raise UsageError(f"the pattern is {n}:{m}; wanted N:M with N below M, 2:4 say")
        if self.multiple < 1:
            raise UsageError(f"multiples of {self.multiple} channels; wanted 1 or more")

    @property
    def needs_data(self) -> bool:
        """Whether it learns from samples."""
        return self.refit or (
            self.method == "channels" and self.importance in ("activation", "second-order")
        )

    @property
    def learns(self) -> str:
        """In words, what it is that needs data."""
        if self.method == "channels":
            return f"channels by {self.importance}" + (" with a refit" if self.refit else "")
        return f"{self.method} with a refit"

    @property
    def blind(self) -> str:
        """The options with which it needs none."""
        return "--importance l1 --no-refit" if self.method == "channels" else "--no-refit"

    @property
    def id(self) -> str:
        """channels-50%, magnitude-60%, n-m-2:4."""
        if self.method == "n-m":
            return f"{self.pattern[0]}of{self.pattern[1]}"
        return f"{self.method}-{100 * self.amount:g}%"


def prune(
    artifact: Artifact,
    pruning: Pruning,
    data: Dataset,
    indices: NDArray[np.int64],
    *,
    cache: Cache,
    isa: Sequence[str] = (),
    limits: sandbox.Limits | None = None,
    progress: Progress | None = None,
) -> tuple[Artifact, dict[str, Any]]:
    """The pruned model, and the facts of `prune_onnx`. What is learned from samples (`indices`) is
    kept, and serves all amounts; so is what layers take, on processors with the features `isa`.

    Raises:
        ModelError: nothing may go, or the model is quantized.
        ChildError: it crashed or went over its limits.
    """
    versions = tool_versions(("onnx", "onnxruntime"))
    importance = pruning.importance if pruning.method == "channels" else ""
    common = {
        "recipe": 6, "source": artifact.sha256, "data": [data.sha256, indices.tolist()],
        "tools": versions, "importance": importance,
    }  # fmt: skip

    def measure(folder: Path) -> None:
        sandbox.call(
            "edgekit.compress.prune_onnx:measure_onnx",
            {
                "source": list(artifact.arguments), "folder": str(folder),
                "calibration": calibration_request(data, indices, artifact.inputs, folder),
                "importance": importance,
            },
            limits=limits, progress=progress, what="measuring what flows into layers",
        )  # fmt: skip

    measured = cache.folder(content_key(kind="prune-measure", **common), measure)
    spec = {**asdict(pruning), "pattern": list(pruning.pattern)}
    if pruning.method == "channels" and pruning.minimize == "latency":
        shapes: list[str] = json.loads((measured / "shapes.json").read_text())
        spec["latencies"] = _latencies(shapes, isa, cache, limits, progress)

    def make(folder: Path) -> None:
        facts = sandbox.call(
            "edgekit.compress.prune_onnx:prune_onnx",
            {
                "measured": str(measured), "target": str(folder / "model.onnx"), "spec": spec,
                "calibration": calibration_request(data, indices, artifact.inputs, folder),
            },
            limits=limits, progress=progress, what="pruning",
        )  # fmt: skip
        (folder / "facts.json").write_text(json.dumps(facts))

    folder = cache.folder(content_key(kind="prune", spec=spec, **common), make)
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    step = {
        "step": "prune", **asdict(pruning), "pattern": list(pruning.pattern), "tools": versions,
        "calibration": data.sha256, "calibration_samples": len(indices),
        "reached": facts["reached"],
    }  # fmt: skip
    made = open_model(
        folder / "model.onnx", provenance=(*artifact.provenance, step), called="the pruned model"
    )
    return made, facts


def _latencies(
    shapes: Sequence[str], isa: Sequence[str], cache: Cache, limits: sandbox.Limits | None,
    progress: Progress | None,
) -> list[Any]:  # fmt: skip
    """The table of each layer, None for those without; measured once and kept."""
    versions = tool_versions(("onnxruntime",))
    keys = {
        shape: content_key(
            kind="layer-latency", recipe=1, shape=shape, tools=versions, isa=list(isa)
        )
        for shape in shapes if shape
    }  # fmt: skip
    missing = [shape for shape, key in keys.items() if cache.get(key) is None]
    fresh: dict[str, Any] = {}
    if missing:
        found = sandbox.call(
            "edgekit.compress.prune_latency:measure_layers", {"shapes": missing}, limits=limits,
            progress=progress, what="measuring what layers take",
        )  # fmt: skip
        fresh = dict(zip(missing, found, strict=True))

    def table(shape: str) -> Any:
        def write(folder: Path) -> None:
            (folder / "table.json").write_text(json.dumps(fresh[shape]))

        return json.loads((cache.folder(keys[shape], write) / "table.json").read_text())

    return [table(shape) if shape else None for shape in shapes]
