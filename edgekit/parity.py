"""Do two models compute the same? The parity ledger, and where they part if they do not.

The same inputs go through both, each in its own engine or framework. The tolerance is the error
that rounding alone may make, from the arithmetic's precision and the number of roundings on the
way; whatever is larger is a fault of the conversion, and `edgekit.divergence` looks for its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Artifact
from edgekit.divergence import Divergence, error_between, matched, search, search_by_value
from edgekit.errors import EdgeKitError
from edgekit.execute import Sample, run_samples
from edgekit.graph import Graph, read_graph
from edgekit.sandbox import Limits
from edgekit.taps import TAPPERS, taps_of

__all__ = [
    "Comparison", "OutputParity", "Tolerance", "Transposes", "Trial", "compare", "explain",
    "tolerance_between",
]  # fmt: skip

#: input name -> the order of axes that turns an array for the reference into one for the candidate
Transposes = Mapping[str, Sequence[int]]

#: The error of a sum of n rounded terms stays below lambda sqrt(n) u with a probability of
#: 1 - 2 exp(-lambda^2 / 2), u being the unit roundoff: N. J. Higham, T. Mary, "A New Approach to
#: Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019). Two models are compared,
#: each with its own errors, and activations with a slope above 1 amplify: 16 leaves room for both.
_LAMBDA = 16.0
_UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
#: half a step of 255
_UNIT_ROUNDOFF_INT8 = 2.0**-9
_LAMBDA_INT8 = 4.0
#: roundings in a model that cannot be looked into: those of a network like ResNet-50
_USUAL_ROUNDINGS = 100_000
#: tensors of the same name, below which values are compared instead
_LEAST_COMMON = 3
_NO_NAMES = "where they part is not known: the two name their tensors differently"


@dataclass(frozen=True)
class Tolerance:
    """The greatest difference allowed, as a share of an output's greatest absolute value."""

    relative: float
    why: str


@dataclass(frozen=True)
class OutputParity:
    """One output of both models over all samples.

    `max_abs` is the greatest difference, `max_relative` that over the reference's greatest
    absolute value; `sqnr_db` the signal to noise ratio (None: no difference); `top1` the share of
    rows whose greatest value is at the same place (None: nothing to choose among).
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    max_relative: float
    cosine: float | None
    sqnr_db: float | None
    top1: float | None
    alarms: tuple[str, ...]
    passed: bool


@dataclass(frozen=True)
class Comparison:
    """Two models on the same inputs: a line of the ledger."""

    reference: str
    candidate: str
    samples: int
    tolerance: Tolerance
    outputs: tuple[OutputParity, ...]
    divergence: Divergence | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance and nothing is alarming."""
        return all(one.passed for one in self.outputs)

    @property
    def worst(self) -> OutputParity:
        """The output that differs most."""
        return max(self.outputs, key=lambda one: (not one.passed, one.max_relative))

    def to_json(self) -> dict[str, Any]:
        """For `--json` and provenance; infinite figures become None."""
        raw = asdict(self) | {"passed": self.passed}
        plain: dict[str, Any] = _finite(raw)
        return plain

    def reason(self) -> str:
        """What is wrong, in one line."""
        worst = self.worst
        text = f"{worst.name} is off by {worst.max_relative:.2g} of its greatest value"
        if worst.alarms:
            text = f"{worst.name}: {'; '.join(worst.alarms)}"
        text += f" (allowed {self.tolerance.relative:.2g})"
        if self.divergence is not None:
            text += f"; the first tensor that differs is {self.divergence.tensor!r}"
            text += f" of {self.divergence.node}"
        return text


@dataclass(frozen=True)
class Trial:
    """A model with the inputs it was given and what it made of them, sample by sample."""

    artifact: Artifact
    samples: Sequence[Sample]
    outputs: Sequence[Mapping[str, NDArray[Any]]]

    @classmethod
    def of(
        cls, artifact: Artifact, samples: Sequence[Sample], limits: Limits | None = None
    ) -> Trial:
        """Run it.

        Raises:
            EdgeKitError: it cannot be run on these inputs.
        """
        return cls(artifact, samples, run_samples(artifact, samples, limits=limits))

    def varies(self) -> bool:
        """Whether some output tells the samples apart."""
        first, *rest = self.outputs
        return not rest or any(
            one.shape != array.shape or not np.allclose(
                one.astype(np.float64), array.astype(np.float64), rtol=1e-4, atol=0, equal_nan=True
            )
            if array.dtype.kind in "fiub" else not np.array_equal(one, array)
            for name, array in first.items()
            for one in (other[name] for other in rest)
        )  # fmt: skip

    def repeated(
        self, other: Artifact, transposes: Transposes | None = None, limits: Limits | None = None
    ) -> Trial:
        """Another model on the same inputs, under its own names and axes.

        Raises:
            EdgeKitError: it takes other inputs, or cannot be run on these.
        """
        turned = _for_candidate(self.artifact, other, self.samples, transposes or {})
        return Trial.of(other, turned, limits)


def compare(reference: Trial, candidate: Trial, tolerance: Tolerance) -> Comparison:
    """The line of the ledger for two models that ran on the same inputs.

    Raises:
        EdgeKitError: they have not equally many outputs.
    """
    names = _output_names(reference.artifact, candidate.artifact)
    rows = tuple(
        _output(
            theirs, [one[ours] for one in reference.outputs],
            [one[theirs] for one in candidate.outputs], tolerance,
        )
        for ours, theirs in names.items()
    )  # fmt: skip
    return Comparison(
        reference.artifact.name, candidate.artifact.name, len(reference.samples), tolerance, rows
    )


def explain(
    line: Comparison, reference: Trial, candidate: Trial, limits: Limits | None = None
) -> Comparison:
    """The line with the first tensor that differs, or with why that is not known."""
    one, samples = reference.artifact, reference.samples
    names = _output_names(one, candidate.artifact)
    try:
        again = run_samples(one, samples[:1], limits=limits)[0]
        first = reference.outputs[0]
        if any(not _same(again[name], first[name], line.tolerance) for name in names):
            note = "the reference itself gives other outputs each time (random operators?)"
            return replace(line, note=note)
        where = _first_difference(line, reference, candidate, limits)
    except EdgeKitError as error:
        return replace(line, note=f"where they part is not known: {error}")
    if isinstance(where, str):
        return replace(line, note=where)
    return replace(line, divergence=where)


def tolerance_between(
    *artifacts: Artifact, shapes: Mapping[str, Sequence[int]] | None = None
) -> Tolerance:
    """What rounding may do to models that compute the same, from the longest and the coarsest of
    them. `shapes` are those of the inputs, for the lengths of sums."""
    roundings, dtype, quantized = 0, "float32", 0
    for artifact in artifacts:
        graph = _graph(artifact, shapes or {})
        if graph is None:
            continue
        kinds = {
            tensor.dtype
            for operator in graph.operators
            if not graph.folded(operator)
            for tensor in (graph.tensors[name] for name in operator.outputs if name)
        }
        dtype = next((one for one in ("bfloat16", "float16") if {one, dtype} <= {*kinds, one}
                      and one in kinds), dtype)  # fmt: skip
        roundings = max(roundings, _roundings(graph))
        quantized = max(quantized, _requantizing(graph))
    if quantized:
        limit = _LAMBDA_INT8 * math.sqrt(quantized) * _UNIT_ROUNDOFF_INT8
        return Tolerance(
            limit, f"{_LAMBDA_INT8:g} sqrt({quantized} quantizing operators) half a step of 8 bits"
        )
    assumed = "" if roundings else " (assumed)"
    count = roundings or _USUAL_ROUNDINGS
    limit = _LAMBDA * math.sqrt(count) * _UNIT_ROUNDOFF[dtype]
    return Tolerance(limit, f"{dtype}: {_LAMBDA:g} sqrt({count} roundings{assumed}) u")


def _graph(artifact: Artifact, shapes: Mapping[str, Sequence[int]]) -> Graph | None:
    if artifact.path.suffix not in TAPPERS:
        return None
    known = {spec.name: shapes[spec.name] for spec in artifact.inputs if spec.name in shapes}
    for wanted in (known, {}):
        try:
            return read_graph(artifact.path, shapes=wanted)
        except EdgeKitError:
            continue
    return None


def _roundings(graph: Graph) -> int:
    """Roundings one after another: the terms of each operator's sums, over all operators."""
    total = 0
    for operator in graph.operators:
        if graph.folded(operator):
            continue
        sizes = [_count(graph, name) for name in operator.outputs if name]
        elements = max([1, *(size for size in sizes if size)])
        total += 1 + (operator.macs or 0) // elements
    return total


def _count(graph: Graph, name: str) -> int | None:
    shape = graph.tensors[name].shape
    if shape is None or any(isinstance(dim, str) for dim in shape):
        return None
    return math.prod(int(dim) for dim in shape)


def _requantizing(graph: Graph) -> int:
    return sum(
        any(graph.tensors[name].quantized for name in operator.outputs if name)
        and not graph.folded(operator)
        for operator in graph.operators
    )


# --- outputs ------------------------------------------------------------------------------------


def _output_names(reference: Artifact, candidate: Artifact) -> dict[str, str]:
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


def _for_candidate(
    reference: Artifact, candidate: Artifact, samples: Sequence[Sample], transposes: Transposes
) -> list[dict[str, NDArray[Any]]]:
    """The samples under the candidate's names, axes and, for integers, types."""
    ours = [spec.name for spec in reference.inputs]
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
        if len(spec.shape) != ranks[names[spec.name]]:
            theirs_are = "; ".join(map(str, candidate.inputs))
            raise EdgeKitError(
                f"{candidate.name} takes other inputs ({theirs_are}) than {reference.name} ({spec})"
            )
    turned = []
    for sample in samples:
        one = {}
        for name, array in sample.items():
            axes = transposes.get(name)
            placed = array if axes is None else np.ascontiguousarray(array.transpose(axes))
            wanted = dtypes[names[name]]
            if wanted != "string" and placed.dtype.kind in "iub":  # int64 may have become int32
                placed = placed.astype(wanted)
            one[names[name]] = placed
        turned.append(one)
    return turned


def _output(
    name: str,
    expected: Sequence[NDArray[Any]],
    found: Sequence[NDArray[Any]],
    tolerance: Tolerance,
) -> OutputParity:
    pairs = list(zip(expected, found, strict=True))
    alarms = _alarms(pairs)
    shape = tuple(expected[0].shape)
    if any(one.shape != other.shape for one, other in pairs):
        return OutputParity(name, shape, math.inf, math.inf, None, None, None, alarms, False)
    if expected[0].dtype.kind not in "fiub":
        same = all(np.array_equal(one.astype(str), other.astype(str)) for one, other in pairs)
        off = 0.0 if same else math.inf
        return OutputParity(name, shape, off, off, None, None, None, alarms, same and not alarms)
    one = np.concatenate([array.ravel() for array, _ in pairs]).astype(np.float64)
    other = np.concatenate([array.ravel() for _, array in pairs]).astype(np.float64)
    sound = np.isfinite(one) & np.isfinite(other)
    one, other = one[sound], other[sound]
    error = float(np.max(np.abs(one - other), initial=0.0))
    scale = float(np.max(np.abs(one), initial=0.0)) or 1.0
    noise, signal = float(np.sum((one - other) ** 2)), float(np.sum(one**2))
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    exact = expected[0].dtype.kind in "iub" and found[0].dtype.kind in "iub"
    limit = 0.0 if exact else tolerance.relative * scale
    return OutputParity(
        name, shape, error, error / scale,
        float(one @ other) / norms if norms else (1.0 if not noise else 0.0),
        10 * math.log10(signal / noise) if noise and signal else None,
        _top1(pairs), alarms, error <= limit and not alarms,
    )  # fmt: skip


def _alarms(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for one, other in pairs:
        if one.shape != other.shape:
            found[f"shape {list(one.shape)} became {list(other.shape)}"] = None
            continue
        if one.dtype.kind != "f" or other.dtype.kind != "f" or not one.size:
            continue
        for test, what in ((np.isnan, "NaN"), (np.isinf, "Inf")):
            if np.any(test(other) & ~test(one)):
                found[f"{what} where the reference has none"] = None
            elif np.any(test(one) & ~test(other)):
                found[f"no {what} where the reference has it"] = None
        if not np.any(other) and np.any(one):
            found["all zero, unlike the reference"] = None
        elif one.size > 1 and np.ptp(other) == 0 and np.ptp(one) > 0:
            found["one value everywhere, unlike the reference"] = None
    return tuple(found)


def _top1(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> float | None:
    """The share of equal places of the greatest value along the last axis."""
    if pairs[0][0].ndim == 0 or pairs[0][0].shape[-1] < 2:
        return None
    equal = [np.argmax(one, -1) == np.argmax(other, -1) for one, other in pairs]
    return float(np.mean(np.concatenate([one.ravel() for one in equal])))


def _same(one: NDArray[Any], other: NDArray[Any], tolerance: Tolerance) -> bool:
    if one.dtype.kind not in "fiub":
        return bool(np.array_equal(one, other))
    return error_between(one, other) <= tolerance.relative


def _worst_sample(reference: Trial, candidate: Trial) -> int:
    names = _output_names(reference.artifact, candidate.artifact)
    errors = []
    for one, other in zip(reference.outputs, candidate.outputs, strict=True):
        numeric = [(a, b) for a, b in names.items() if one[a].dtype.kind in "fiub"]
        errors.append(max((error_between(one[a], other[b]) for a, b in numeric), default=0.0))
    return int(np.argmax(errors))


# --- the first difference -----------------------------------------------------------------------


def _first_difference(
    line: Comparison, reference: Trial, candidate: Trial, limits: Limits | None
) -> Divergence | str:
    """Where they part, or why that cannot be found."""
    number = _worst_sample(reference, candidate)
    one, other = reference.artifact, candidate.artifact
    sample, turned = reference.samples[number], candidate.samples[number]
    ours_taps = taps_of(one, _shapes(sample))
    theirs_taps = taps_of(other, _shapes(turned))
    for artifact, found in ((one, ours_taps), (other, theirs_taps)):
        if not found:
            return f"where they part is not known: one cannot look into {artifact.name}"
    common = matched(ours_taps, theirs_taps)
    output = next(
        ours for ours, theirs in _output_names(one, other).items() if theirs == line.worst.name
    )
    if any(tap.name == output for tap in ours_taps):
        common[output] = line.worst.name
    if len(common) < _LEAST_COMMON:
        mine = [tap.name for tap in ours_taps if tap.comparable]
        theirs = [tap.name for tap in theirs_taps if tap.comparable]
        where = search_by_value(
            ours_taps, output, _tapped(one, sample, mine, limits),
            _tapped(other, turned, theirs, limits), line.tolerance.relative,
        )  # fmt: skip
        return where or _NO_NAMES

    def values_of(wanted: Sequence[str]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        with ThreadPoolExecutor(2) as pool:
            mine = pool.submit(_tapped, one, sample, wanted, limits)
            theirs = _tapped(other, turned, [common[name] for name in wanted], limits)
            values = mine.result()
        return {name: (values[name], theirs[common[name]]) for name in wanted}

    where = search(ours_taps, common, output, values_of, line.tolerance.relative)
    return where or _NO_NAMES


def _shapes(sample: Sample) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in sample.items() if array.ndim}


def _tapped(
    artifact: Artifact, sample: Sample, names: Sequence[str], limits: Limits | None
) -> dict[str, NDArray[Any]]:
    outputs = {spec.name for spec in artifact.outputs}
    taps = [name for name in dict.fromkeys(names) if name not in outputs]
    return run_samples(artifact, [sample], taps=taps, limits=limits)[0]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
