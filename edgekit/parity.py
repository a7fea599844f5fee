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
from edgekit.trial import Trial, output_names

__all__ = [
    "LAMBDA",
    "Comparison", "OutputParity", "Tolerance", "compare", "explain", "tolerance_between",
]  # fmt: skip

#: The factor of both limits. The error of a sum of n rounded terms stays below lambda sqrt(n) u
#: with a probability of 1 - 2 exp(-lambda^2 / 2), u being the unit roundoff: N. J. Higham, T. Mary,
#: "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019). Two
#: models are compared, each with its own errors, and activations with a slope above 1 amplify: 16
#: leaves room for both.
LAMBDA = 16.0
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
#: of an output's greatest value: a model may be off by more and still be right, but not proven so
_MOST_ALLOWED = 0.05
#: tensors of the same name, below which values are compared instead
_LEAST_COMMON = 3
_NO_NAMES = "where they part is not known: the two name their tensors differently"


@dataclass(frozen=True)
class Tolerance:
    """The greatest difference allowed, as a share of an output's greatest absolute value."""

    relative: float
    why: str
    quantized: bool = False


@dataclass(frozen=True)
class OutputParity:
    """One output of both models over all samples.

    `max_abs` is the greatest difference, `max_relative` that over the reference's greatest
    absolute value, `allowed` its limit; `sensitivity` is the reference's (see `Trial`); `sqnr_db`
    the signal to noise ratio (None: no difference); `top1` the share of rows whose greatest value
    is at the same place (None: nothing to choose among).
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    max_relative: float
    allowed: float
    sensitivity: float
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
    def unproven(self) -> bool:
        """Whether nothing is off, but the inputs could not have shown it."""
        failing = [one for one in self.outputs if not one.passed]
        return bool(failing) and all(
            one.max_relative <= one.allowed and all("prove nothing" in a for a in one.alarms)
            for one in failing
        )

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
        text += f" (allowed {worst.allowed:.2g})"
        if self.divergence is not None:
            text += f"; the first tensor that differs is {self.divergence.tensor!r}"
            text += f" of {self.divergence.node}"
        return text


def compare(reference: Trial, candidate: Trial, tolerance: Tolerance) -> Comparison:
    """The line of the ledger for two models that ran on the same inputs. An output to which the
    reference is sensitive may be off by more than the tolerance: by what that explains.

    Raises:
        EdgeKitError: they have not equally many outputs.
    """
    names = output_names(reference.artifact, candidate.artifact)
    rows = tuple(
        _output(
            theirs, [one[ours] for one in reference.outputs],
            [one[theirs] for one in candidate.outputs], tolerance,
            reference.sensitivity.get(ours, 0.0),
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
    names = output_names(one, candidate.artifact)
    try:
        again = run_samples(one, samples[:1], limits=limits)[0]
        first = reference.outputs[0]
        if any(not _same(again[name], first[name], line.tolerance.relative) for name in names):
            note = "the reference itself gives other outputs each time (random operators?)"
            return replace(line, note=note)
        if line.unproven:
            return replace(line, note="nothing is off on these inputs: give others (--data)")
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
            limit,
            f"{_LAMBDA_INT8:g} sqrt({quantized} quantizing operators) half a step of 8 bits",
            quantized=True,
        )
    assumed = "" if roundings else " (assumed)"
    count = roundings or _USUAL_ROUNDINGS
    limit = LAMBDA * math.sqrt(count) * _UNIT_ROUNDOFF[dtype]
    return Tolerance(limit, f"{dtype}: {LAMBDA:g} sqrt({count} roundings{assumed}) u")


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
    """Operators that round to 8 bits: those with quantized outputs, and TFLite's that have 8-bit
    weights and float outputs, which round their inputs as they run."""
    count = 0
    for operator in graph.operators:
        if graph.folded(operator):
            continue
        made = [graph.tensors[name] for name in operator.outputs if name]
        read = [graph.tensors[name] for name in operator.inputs if name]
        weights = any(one.constant and one.quantized and "int" in (one.dtype or "") for one in read)
        hybrid = graph.format == "tflite" and weights and operator.type != "DEQUANTIZE"
        count += hybrid or any(one.quantized for one in made)
    return count


# --- outputs ------------------------------------------------------------------------------------


def _output(
    name: str,
    expected: Sequence[NDArray[Any]],
    found: Sequence[NDArray[Any]],
    tolerance: Tolerance,
    sensitivity: float,
) -> OutputParity:
    pairs = list(zip(expected, found, strict=True))
    alarms = _alarms(pairs)
    shape = tuple(expected[0].shape)
    limit = min(max(tolerance.relative, LAMBDA * sensitivity), _MOST_ALLOWED)
    if LAMBDA * sensitivity > _MOST_ALLOWED:
        moved = f"{sensitivity:.2g} of its greatest value"
        alarms = (*alarms, f"these inputs prove nothing: one rounding of them moves it by {moved}")
    row = OutputParity(
        name, shape, math.inf, math.inf, limit, sensitivity, None, None, None, alarms, False
    )
    if any(one.shape != other.shape or _kind(one) != _kind(other) for one, other in pairs):
        return row
    if expected[0].dtype.kind not in "fiub":
        same = all(np.array_equal(one.astype(str), other.astype(str)) for one, other in pairs)
        off = 0.0 if same else math.inf
        return replace(row, max_abs=off, max_relative=off, allowed=0.0, passed=same and not alarms)
    one = np.concatenate([array.ravel() for array, _ in pairs]).astype(np.float64)
    other = np.concatenate([array.ravel() for _, array in pairs]).astype(np.float64)
    sound = np.isfinite(one) & np.isfinite(other)
    one, other = one[sound], other[sound]
    error = float(np.max(np.abs(one - other), initial=0.0))
    scale = float(np.max(np.abs(one), initial=0.0)) or 1.0
    noise, signal = float(np.sum((one - other) ** 2)), float(np.sum(one**2))
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    narrow = expected[0].dtype.itemsize == 1 and expected[0].dtype.kind in "iu"
    if expected[0].dtype.kind in "iub" and not (tolerance.quantized and narrow):
        limit = 0.0  # counts, labels, places
    return replace(
        row,
        max_abs=error,
        max_relative=error / scale,
        allowed=limit,
        cosine=float(one @ other) / norms if norms else (1.0 if not noise else 0.0),
        sqnr_db=10 * math.log10(signal / noise) if noise and signal else None,
        top1=_top1(pairs),
        passed=error <= limit * scale and not alarms,
    )


def _kind(array: NDArray[Any]) -> str:
    names = {"f": "float", "i": "integer", "u": "integer", "b": "bool"}
    return names.get(array.dtype.kind, "text")


def _alarms(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for one, other in pairs:
        if one.shape != other.shape:
            found[f"shape {list(one.shape)} became {list(other.shape)}"] = None
            continue
        if _kind(one) != _kind(other):
            found[f"{_kind(one)} became {_kind(other)}"] = None
            continue
        if one.dtype.kind == "f" and np.any(np.isinf(one) & np.isinf(other) & (one != other)):
            found["Inf of the other sign"] = None
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
    if all(one.dtype.kind == "f" and not np.any(np.isfinite(one)) for one, _ in pairs):
        found["these inputs prove nothing: the reference itself gives no finite value"] = None
    return tuple(found)


def _top1(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> float | None:
    """The share of equal places of the greatest value along the last axis."""
    if pairs[0][0].ndim == 0 or pairs[0][0].shape[-1] < 2:
        return None
    equal = [np.argmax(one, -1) == np.argmax(other, -1) for one, other in pairs]
    return float(np.mean(np.concatenate([one.ravel() for one in equal])))


def _same(one: NDArray[Any], other: NDArray[Any], allowed: float) -> bool:
    if one.dtype.kind not in "fiub":
        return bool(np.array_equal(one, other))
    return error_between(one, other) <= allowed


def _worst_sample(reference: Trial, candidate: Trial) -> int:
    names = output_names(reference.artifact, candidate.artifact)
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
            return (
                f"where they part is not known: one cannot look into {artifact.name}; convert it "
                "to ONNX first and check against that"
            )
    common = matched(ours_taps, theirs_taps)
    output = next(
        ours for ours, theirs in output_names(one, other).items() if theirs == line.worst.name
    )
    if any(tap.name == output for tap in ours_taps):
        common[output] = line.worst.name
    if len(common) < _LEAST_COMMON:
        mine = [tap.name for tap in ours_taps if tap.comparable]
        theirs = [tap.name for tap in theirs_taps if tap.comparable]
        where = search_by_value(
            ours_taps, output, _tapped(one, sample, mine, limits),
            _tapped(other, turned, theirs, limits), line.worst.allowed,
        )  # fmt: skip
        return where or _NO_NAMES

    def values_of(wanted: Sequence[str]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        with ThreadPoolExecutor(2) as pool:
            mine = pool.submit(_tapped, one, sample, wanted, limits)
            theirs = _tapped(other, turned, [common[name] for name in wanted], limits)
            values = mine.result()
        return {name: (values[name], theirs[common[name]]) for name in wanted}

    where = search(ours_taps, common, output, values_of, line.worst.allowed)
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
