"""A model, the inputs it was given, and what it made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Artifact
from edgekit.errors import EdgeKitError
from edgekit.execute import Sample, run_samples
from edgekit.sandbox import Limits

__all__ = ["Transposes", "Trial", "inputs_for", "output_names"]

#: input name -> the order of axes that turns an array for one model into one for the other
Transposes = Mapping[str, Sequence[int]]

#: relative: from one float32 to the next
_ONE_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Trial:
    """A model with the inputs it was given and what it made of them, sample by sample.

    `sensitivity`: how far each output moves, as a share of its greatest value, when every number
    of the inputs is moved by one rounding. It is the error that no implementation can be without:
    great where the model subtracts nearly equal numbers, takes logarithms near 0, or saturates.
    `per_sample` is the same for each sample, over all outputs.
    """

    artifact: Artifact
    samples: Sequence[Sample]
    outputs: Sequence[Mapping[str, NDArray[Any]]]
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    per_sample: Sequence[float] = ()

    @classmethod
    def of(
        cls, artifact: Artifact, samples: Sequence[Sample], limits: Limits | None = None
    ) -> Trial:
        """Run it.

        Raises:
            EdgeKitError: it cannot be run on these inputs.
        """
        return cls(artifact, samples, run_samples(artifact, samples, limits=limits))

    @classmethod
    def twice(
        cls, artifact: Artifact, samples: Sequence[Sample], limits: Limits | None = None
    ) -> Trial:
        """Run it on the samples, and on the same moved by one rounding: with its sensitivity.

        Raises:
            EdgeKitError: it cannot be run on these inputs.
        """
        moved = [_moved(sample) for sample in samples]
        both = run_samples(artifact, [*samples, *moved], limits=limits)
        ours, theirs = both[: len(samples)], both[len(samples) :]
        found = {
            name: _relative([one[name] for one in ours], [one[name] for one in theirs])
            for name in ours[0]
        }
        greatest = {name: _greatest([one[name] for one in ours]) for name in ours[0]}
        per_sample = [
            max(_error(one[name], other[name]) / (greatest[name] or 1.0) for name in one)
            for one, other in zip(ours, theirs, strict=True)
        ]
        return cls(artifact, samples, ours, found, tuple(per_sample))

    def steady(self, limit: float) -> Trial:
        """Without the samples at which one rounding of the inputs moves an output by more than
        `limit` of its greatest value, if others are left: at those the model is on an edge (a
        tree's threshold, a tie), and either side of it is right."""
        kept = [place for place, one in enumerate(self.per_sample) if one <= limit]
        if not kept or len(kept) == len(self.samples):
            return self
        return Trial.twice(self.artifact, [self.samples[place] for place in kept])

    def varies(self) -> bool:
        """Whether some output tells the samples apart."""
        first, *rest = self.outputs
        return not rest or any(
            one.shape != array.shape
            or (
                _relative([one], [array]) > _TELLS_APART
                if array.dtype.kind in "fiub"
                else not np.array_equal(one, array)
            )
            for name, array in first.items()
            for one in (other[name] for other in rest)
        )

    def as_sensitive_as(self, reference: Trial) -> Trial:
        """With the sensitivity of what it is compared with, under its own names."""
        names = output_names(reference.artifact, self.artifact)
        known = {names[name]: value for name, value in reference.sensitivity.items()}
        return replace(self, sensitivity=known)


#: of an output's greatest value
_TELLS_APART = 1e-4


def _moved(sample: Sample) -> dict[str, NDArray[Any]]:
    """Every float moved up or down by one rounding of float32, by lot."""
    rng = np.random.default_rng(0)
    moved = {}
    for name, array in sample.items():
        moved[name] = array
        if array.dtype.kind == "f":
            signs = rng.choice([-1.0, 1.0], array.shape)
            moved[name] = np.asarray(array * (1 + signs * _ONE_ROUNDING)).astype(array.dtype)
    return moved


def _relative(ones: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]]) -> float:
    """The greatest difference over the greatest absolute value, over all samples."""
    greatest = _greatest(ones)
    error = max(_error(one, other) for one, other in zip(ones, others, strict=True))
    return error / greatest if greatest else 0.0


def _greatest(arrays: Sequence[NDArray[Any]]) -> float:
    found = 0.0
    for array in arrays:
        if array.dtype.kind in "fiub":
            values = np.abs(array.astype(np.float64))
            found = max(found, float(np.max(values[np.isfinite(values)], initial=0.0)))
    return found


def _error(one: NDArray[Any], other: NDArray[Any]) -> float:
    if one.dtype.kind not in "fiub" or one.shape != other.shape:
        return 0.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    sound = np.isfinite(a) & np.isfinite(b)
    return float(np.max(np.abs(a[sound] - b[sound]), initial=0.0))


def output_names(reference: Artifact, candidate: Artifact) -> dict[str, str]:
    """The candidate's name of each output: the same, or the one at the same place.

    Raises:
        EdgeKitError: they have not equally many.
    """
    ours = [spec.name for spec in reference.outputs]
    theirs = [spec.name for spec in candidate.outputs]
    if len(ours) != len(theirs):
        raise EdgeKitError(
            f"{reference.name} has {len(ours)} outputs ({', '.join(ours)}), {candidate.name} "
            f"{len(theirs)} ({', '.join(theirs)})"
        )
    if set(ours) == set(theirs):
        return {name: name for name in ours}
    return dict(zip(ours, theirs, strict=True))


def inputs_for(
    reference: Artifact,
    samples: Sequence[Sample],
    candidate: Artifact,
    transposes: Transposes | None = None,
) -> list[dict[str, NDArray[Any]]]:
    """The reference's samples under the candidate's names, axes and, for integers, types.

    Raises:
        EdgeKitError: the candidate takes other inputs.
    """
    fixed = candidate.provenance[-1].get("options", {}) if candidate.provenance else {}
    ours = [spec.name for spec in reference.inputs if spec.name not in fixed.get("values", {})]
    theirs = [spec.name for spec in candidate.inputs]
    if len(ours) != len(theirs):
        raise EdgeKitError(
            f"{reference.name} has {len(ours)} inputs ({', '.join(ours)}), {candidate.name} "
            f"{len(theirs)} ({', '.join(theirs)})"
        )
    names = (
        {n: n for n in ours} if set(ours) == set(theirs) else dict(zip(ours, theirs, strict=True))
    )
    dtypes = {spec.name: spec.dtype for spec in candidate.inputs}
    ranks = {spec.name: len(spec.shape) for spec in candidate.inputs}
    for spec in reference.inputs:
        if spec.name in names and len(spec.shape) != ranks[names[spec.name]]:
            theirs_are = "; ".join(map(str, candidate.inputs))
            raise EdgeKitError(
                f"{candidate.name} takes other inputs ({theirs_are}) than {reference.name} ({spec})"
            )
    turned = []
    for sample in samples:
        one = {}
        for name, array in sample.items():
            if name not in names:  # a constant of the candidate
                continue
            axes = (transposes or {}).get(name)
            placed = array if axes is None else np.ascontiguousarray(array.transpose(axes))
            wanted = dtypes[names[name]]
            if wanted != "string" and placed.dtype.kind in "iub":  # int64 may have become int32
                placed = placed.astype(wanted)
            one[names[name]] = placed
        turned.append(one)
    return turned
