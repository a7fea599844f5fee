"""Makes and evaluates candidates: convert, fix shapes, quantize, run on samples; all by content."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.accelerate import DISTRIBUTIONS, compile_for, compiled_for, macs_of
from edgekit.artifact import SOURCES, Artifact
from edgekit.cache import Cache, Key, content_key
from edgekit.compress.fix_shapes import fix_shapes
from edgekit.compress.prune import prune
from edgekit.compress.quantize import quantize
from edgekit.compress.quantizers import quantizer_for, readable_as
from edgekit.conversion import Given, convert_with_proof
from edgekit.convert import convert, path_between, tool_versions
from edgekit.data import Dataset, Split
from edgekit.errors import EdgeKitError
from edgekit.evaluate import METRICS
from edgekit.plan import Candidate
from edgekit_runtime.engines.accelerators import split_engine

__all__ = ["Builder"]

Progress = Callable[[int, int], None]


def _names(artifact: Artifact) -> list[set[str]]:
    return [{one.name for one in specs} for specs in (artifact.inputs, artifact.outputs)]


@dataclass
class Builder:
    """Everything a candidate is made from. `isa` are the CPU's features that decide int8 results.
    `came` is the model as it came, where `source` is what it became for an engine to load;
    `slice_by` the array of the data by which figures are told apart.

    Methods may be called from several threads.
    """

    source: Artifact
    data: Dataset
    split: Split
    metric: str
    isa: list[str]
    cache: Cache
    reference: Candidate
    came: Artifact | None = None
    slice_by: str | None = None
    _made: dict[tuple[str, bool], Artifact | EdgeKitError] = field(default_factory=dict)
    _locks: dict[tuple[str, bool], threading.Lock] = field(default_factory=dict)

    def artifact(
        self, candidate: Candidate, limits: sandbox.Limits, progress: Progress
    ) -> Artifact:
        """The candidate's model.

        Raises:
            EdgeKitError: a converter or quantizer refuses it, crashed, or went over its limits.
        """
        made = self._uncompiled(candidate, limits, progress)
        if candidate.compiler_target is None or not compiled_for(
            candidate.engine, candidate.compiler_target
        ):
            return made
        return compile_for(
            made, candidate.engine, candidate.compiler_target, cache=self.cache, limits=limits
        )

    def macs(
        self, candidate: Candidate, limits: sandbox.Limits, progress: Progress
    ) -> dict[str, int]:
        """Multiply-accumulates by operator, before anything is compiled; empty where they are not
        known."""
        return macs_of(self._uncompiled(candidate, limits, progress))

    def _uncompiled(
        self, candidate: Candidate, limits: sandbox.Limits, progress: Progress
    ) -> Artifact:
        scheme = candidate.scheme
        if candidate.pruning is not None:
            pruned = self.onnx(candidate, limits, progress)
            artifact = convert(
                pruned, candidate.format, cache=self.cache, limits=limits, progress=progress
            )
        else:
            artifact = self._converted(candidate.format, candidate.fixed_shapes, limits, progress)
        if candidate.as_it_came:
            return artifact
        source, target = artifact, None
        came = readable_as(self.came.format) if self.came and not candidate.pruning else ""
        taken = quantizer_for(scheme, candidate.format, source=came).takes
        if came and self.came and taken != candidate.format:  # a quantizer inside a converter
            source = convert(self.came, taken, cache=self.cache, limits=limits, progress=progress)
            target = candidate.format
        onnx = None
        if scheme.recovery and candidate.format != "onnx":
            with suppress(EdgeKitError):
                onnx = self.onnx(candidate, limits, progress)
        return quantize(
            source, scheme, self.split.calibration_data, self.split.calibration, target=target,
            onnx=onnx, cache=self.cache, limits=limits, progress=progress,
        )  # fmt: skip

    def onnx(self, candidate: Candidate, limits: sandbox.Limits, progress: Progress) -> Artifact:
        """The float model as ONNX, on which sensitivity and recovery are computed; without what
        the candidate's pruning takes out.

        Raises:
            EdgeKitError: there is no way to ONNX, or it fails.
        """
        if candidate.pruning is not None:
            whole = self.onnx(replace(candidate, pruning=None), limits, progress)
            with self._locks.setdefault(("pruned", False), threading.Lock()):  # one learns for all
                return prune(
                    whole, candidate.pruning, self.split.calibration_data, self.split.calibration,
                    cache=self.cache, isa=self.isa, limits=limits, progress=progress,
                )[0]  # fmt: skip
        came = self.came
        if self.source.format != "onnx" and came and path_between(came.format, "onnx") is not None:
            return convert(came, "onnx", cache=self.cache, limits=limits, progress=progress)
        return self._converted("onnx", candidate.fixed_shapes, limits, progress)

    def _converted(
        self, fmt: str, fixed: bool, limits: sandbox.Limits, progress: Progress
    ) -> Artifact:
        """The source in a format: made once for all candidates, as is its failure."""
        key = (fmt, fixed)
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._made:
                try:
                    self._made[key] = self._directly(fmt, fixed, limits) or convert(
                        self._fixed(limits) if fixed else self.source, fmt,
                        cache=self.cache, limits=limits, progress=progress,
                    )  # fmt: skip
                except EdgeKitError as error:
                    self._made[key] = error
        found = self._made[key]
        if isinstance(found, EdgeKitError):
            raise found
        return found

    def _directly(self, fmt: str, fixed: bool, limits: sandbox.Limits) -> Artifact | None:
        """What a source framework's own converter makes of the model as it came, where there is a
        way that does not go through `source`, and it computes the same under the same names."""
        came = self.came
        if fixed or came is None or came.format not in SOURCES or fmt == self.source.format:
            return None
        if any(edge.target == self.source.format for edge in path_between(came.format, fmt) or ()):
            return None
        try:
            given = Given.of(self.data, came.inputs)
            found = convert_with_proof(came, fmt, cache=self.cache, given=given, limits=limits)
        except EdgeKitError:
            return None
        same = _names(found.artifact) == _names(self.source)
        return found.artifact if found.passed and same else None

    def _fixed(self, limits: sandbox.Limits) -> Artifact:
        sample = self.data.sample(int(self.split.selection[0]), self.source.inputs)
        shapes = {name: array.shape for name, array in sample.items()}
        return fix_shapes(self.source, shapes, cache=self.cache, limits=limits)

    def evaluate(
        self,
        candidate: Candidate,
        artifact: Artifact,
        samples: NDArray[np.int64],
        limits: sandbox.Limits,
        progress: Progress,
    ) -> dict[str, Any]:
        """The metric on these samples, paired with the reference's.

        Raises:
            EdgeKitError: the engine refuses the model, crashed, or went over its limits.
        """
        base = None
        if candidate is not self.reference:
            base = self._key(self.source, self.reference, samples)
        key = self._key(artifact, candidate, samples)

        def make(folder: Path) -> None:
            np.save(folder / "samples.npy", samples)
            result = sandbox.call(
                "edgekit.evaluate:evaluate",
                {
                    "model": str(artifact.path),
                    "options": {
                        "engine": candidate.target or candidate.engine,
                        "precision": candidate.precision,
                    },
                    "data": {
                        "folder": str(self.data.folder),
                        "sha256": self.data.sha256,
                        "source": self.data.source,
                    },
                    "indices": str(folder / "samples.npy"),
                    "metric": self.metric,
                    "folder": str(folder),
                    "reference": str(self.cache.get(base)) if base else None,
                    "slice_by": self.slice_by,
                },
                limits=limits,
                progress=progress,
                what=f"evaluating {candidate.id}",
            )
            (folder / "result.json").write_text(json.dumps(result))

        folder = self.cache.folder(key, make)
        loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return loaded

    def _key(self, artifact: Artifact, candidate: Candidate, samples: NDArray[np.int64]) -> Key:
        engine, accelerator = split_engine(candidate.engine)
        engines: tuple[str, ...] = ({"litert": "ai-edge-litert"}.get(engine, engine),)
        engines += DISTRIBUTIONS.get(candidate.engine, ())
        metric: Any = self.metric
        if metric not in METRICS:  # the user's function: what it says, not what it is called
            metric = [metric, Path(metric.rpartition(":")[0]).read_text()]
        return content_key(
            kind="evaluate", recipe=6, target=candidate.target, model=artifact.sha256,
            accelerator=accelerator,
            data=self.data.sha256,
            samples=samples.tolist(), metric=metric, slice_by=self.slice_by,
            engine=tool_versions(engines),
            # int8 results depend on the CPU's instructions, and the drop on the reference
            isa=self.isa, reference=self.source.sha256, precision=candidate.precision,
        )  # fmt: skip
