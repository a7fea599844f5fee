"""Accuracy control: what lost too much is repaired with few evaluations, in steps one can follow.

First the quantizer's own options, since one of them is often the cure and costs no speed. Then the
operators that the noise comes from stay float, the worst first: how many, is found by bisection.
Each build is screened on a part of the samples before all are spent on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import Artifact
from edgekit.builder import Builder
from edgekit.choose import Allowed, over_budget
from edgekit.compress.quantize import quantize
from edgekit.compress.quantizers import fitted, quantizer_for
from edgekit.compress.scheme import Scheme, broken_rule
from edgekit.compress.sensitivity import Ranking, aligned, sensitivities
from edgekit.device import Quantization
from edgekit.errors import EdgeKitError, UsageError
from edgekit.experience import Experience
from edgekit.graph import read_graph, with_batch_one
from edgekit.plan import Candidate

__all__ = ["REPAIRED", "AccuracyControl", "SearchEndedError", "Tried", "blame"]

#: samples to screen on: enough that a collapse cannot hide, few enough to be cheap
_SCREENED = 128
#: shares of the noise that are left when the worst operators are float, tried one after the other
_NOISE_LEFT = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
#: with more in float there is not much left to be fast or small
_MOST_FLOAT = 0.7
#: what may cure a format's int8-static without costing speed, most promising first
_OPTIONS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "onnx": ({"recovery": ("learned-rounding", "bias-correction")},),
    "openvino": (
        {"transformer": True},
        {"recovery": ("learned-rounding",)},
    ),
    "tflite": (
        {"ranges": "percentile"},
        {"ranges": "percentile", "recovery": ("learned-rounding", "bias-correction")},
        {"ranges": "mse"},
    ),
}
#: kinds of schemes that are
REPAIRED = ("int8-static", "int16x8", "int8-dynamic", "int8-weights")
#: operators named for a loss, at most, and how much noisier than the best of the rest they are
_NAMED = 5


class SearchEndedError(Exception):
    """Raised by `limits` when there is no more time: what was found until then stays."""


@dataclass(frozen=True)
class Tried:
    """One build: `evaluation` on all samples, or on some (`screened`) if that was enough.
    `within`: the accuracy budget."""

    candidate: Candidate
    artifact: Artifact | None
    evaluation: Mapping[str, Any]
    screened: bool
    within: bool
    reason: str

    @property
    def drop(self) -> float:
        """What it lost; infinite where nothing came of it."""
        return float(self.evaluation.get("drop", float("inf")))


class AccuracyControl:
    """Repairs candidates that lost too much. `limits` gives those of the next child, or raises
    SearchEndedError; `known` are the ids of candidates that were tried before; `experience`
    says which options to try first."""

    def __init__(
        self, builder: Builder, rules: Quantization, allowed: Allowed,
        limits: Callable[[], sandbox.Limits], tell: Callable[[str], None],
        *, experience: Experience | None = None,
    ) -> None:  # fmt: skip
        self.builder, self.rules, self.allowed = builder, rules, allowed
        #: evaluations on all selection samples, and on some; samples that went through in them
        self.spent = {"evaluations": 0, "screenings": 0, "samples": 0}
        self.known: set[str] = set()
        self._limits, self._tell, self._experience = limits, tell, experience
        self._noise_left = _NOISE_LEFT[0]
        self._ranked: dict[tuple[Any, ...], Ranking | None] = {}

    # --- one family -----------------------------------------------------------------------------

    def repair(self, candidate: Candidate, drop: float) -> Iterator[Tried]:
        """Everything tried on a candidate that lost `drop`, in order; the last one within the
        budget, if there is any, has the most operators quantized."""
        best, least = candidate, drop
        for option in self._promising(list(self._options(candidate))):
            tried = self._try(option)
            yield tried
            if tried.within:
                return
            if tried.drop < least:
                best, least = option, tried.drop
        yield from self.keep_float(best)

    def _options(self, candidate: Candidate) -> Iterator[Candidate]:
        for change in _OPTIONS.get(candidate.format, ()):
            scheme = replace(candidate.scheme, activations="", **change)
            if scheme.transformer and candidate.scheme.operators != "all":
                continue
            try:
                quantizer = quantizer_for(scheme, candidate.format)
                made = fitted(scheme, quantizer, self.rules)
                quantizer_for(made, candidate.format)
            except UsageError:
                continue  # the profile's rules and this option exclude each other
            known = made == candidate.scheme or quantizer.missing()
            if known or broken_rule(made, self.rules, frozenset(["float32"])):
                continue
            name = f"{candidate.family}{made.id}"
            if name not in self.known:
                self.known.add(name)
                yield replace(candidate, id=name, scheme=made)

    def _promising(self, options: list[Candidate]) -> list[Candidate]:
        """What cured networks like this one comes first; else the order given."""
        known = self._experience
        if known is None:
            return options
        sure = [known.promise(one.engine, one.scheme.id, repair=True) for one in options]
        order = sorted(range(len(options)), key=lambda i: -sure[i])
        if order[:1] != [0] and order:
            first = options[order[0]]
            good, tried = known.tally(first.engine, first.scheme.id, repair=True)
            self._tell(
                f"{first.id}: tried first, it won back enough in {good} of {tried} runs on "
                "networks like this"
                if good
                else f"{first.id}: tried first, what stands before it did not help in networks "
                "like this"
            )
        return [options[i] for i in order]

    def keep_float(self, candidate: Candidate) -> Iterator[Tried]:
        """Everything tried by leaving more or fewer of the worst operators in float."""
        try:
            scheme = replace(candidate.scheme, keep=("any",))
            quantizer_for(scheme, candidate.format, source="savedmodel")
        except UsageError as error:
            self._tell(f"{candidate.id}: no operator can stay float: {error}")
            return
        ranking = self.sensitivity(candidate)
        if ranking is None or not ranking.groups:
            self._tell(f"{candidate.id}: which operators are sensitive is not known; given up")
            return
        counts = self._counts(ranking)
        low, high, found = 0, len(ranking.groups) + 1, False
        while counts and counts[0] < high:
            count = counts.pop(0)
            if count <= low:
                continue
            tried = self._with_float(candidate, ranking, count)
            yield tried
            if tried.within:
                high, found = count, True
            else:
                low = count
        while found and high - low > max(1, len(ranking.groups) // 20):
            middle = (low + high) // 2
            tried = self._with_float(candidate, ranking, middle)
            yield tried
            low, high = (low, middle) if tried.within else (middle, high)
        if found:
            self._noise_left = ranking.left(high)
        elif low:
            self._tell(
                f"{candidate.id}: over the budget with {low} of {len(ranking.groups)} operators in "
                "float; given up"
            )

    def _counts(self, ranking: Ranking) -> list[int]:
        """How many stay float, in the order tried. What was enough for one engine comes first."""
        most = max(1, int(_MOST_FLOAT * len(ranking.groups)))
        shares = sorted({self._noise_left, *_NOISE_LEFT}, reverse=True)
        shares = shares[shares.index(self._noise_left) :]
        counts = [
            next((k for k in range(1, most) if ranking.left(k) <= share), most)
            for share in shares
        ]  # fmt: skip
        return list(dict.fromkeys([*counts, most]))

    def _with_float(self, candidate: Candidate, ranking: Ranking, count: int) -> Tried:
        try:
            keep = self._called(candidate, ranking, count)
        except EdgeKitError as error:
            return Tried(candidate, None, {}, screened=False, within=False, reason=str(error))
        scheme = replace(candidate.scheme, keep=keep)
        return self._try(replace(candidate, id=f"{candidate.id}+{count}-float", scheme=scheme))

    # --- which operators ------------------------------------------------------------------------

    def sensitivity(self, candidate: Candidate) -> Ranking | None:
        """The operators by the noise that they alone bring to the outputs; None where that cannot
        be found out."""
        scheme = candidate.scheme
        key = (
            _stored_only(scheme), scheme.operators, scheme.reduce_range, candidate.fixed_shapes,
            candidate.pruning,
        )  # fmt: skip
        if key not in self._ranked:
            try:
                self._ranked[key] = self._rank(candidate)
            except EdgeKitError as error:
                self._tell(f"sensitive operators are not known: {error}")
                self._ranked[key] = None
        return self._ranked[key]

    def _rank(self, candidate: Candidate) -> Ranking:
        model, split = self._as_onnx(candidate), self.builder.split
        wanted = candidate.scheme
        kind = "int8-weights" if _stored_only(wanted) else "int8-static"
        scheme = Scheme(kind, wanted.operators, wanted.per_channel, wanted.reduce_range)
        rules = self.rules.model_copy(update={"reduce_range": False, "activations": None})
        scheme = fitted(scheme, quantizer_for(scheme, "onnx"), rules)
        made = quantize(
            model, scheme, split.calibration_data, split.calibration, cache=self.builder.cache,
            limits=self._limits(),
        )  # fmt: skip
        return sensitivities(
            model, made, split.calibration_data, split.calibration, cache=self.builder.cache,
            limits=self._limits(),
        )  # fmt: skip

    def _as_onnx(self, candidate: Candidate) -> Artifact:
        return self.builder.onnx(candidate, self._limits(), _silent)

    def _called(self, candidate: Candidate, ranking: Ranking, count: int) -> tuple[str, ...]:
        """Operators in the words of the candidate's format."""
        names = [name for one in ranking.groups[:count] for name in one.outputs]
        if candidate.format == "onnx":
            return tuple(names)
        plain = replace(candidate, scheme=Scheme("fp32"))
        theirs = self.builder.artifact(plain, self._limits(), _silent)
        ours = read_graph(ranking.model, shapes=with_batch_one(self._as_onnx(candidate).inputs))
        return aligned(names, ours, read_graph(theirs.path, shapes=with_batch_one(theirs.inputs)))

    # --- one build ------------------------------------------------------------------------------

    def _try(self, candidate: Candidate) -> Tried:
        samples = self.builder.split.selection
        few = _some(samples)
        try:
            artifact = self.builder.artifact(candidate, self._limits(), _silent)
            if len(few) < len(samples):
                found = self._evaluate(candidate, artifact, few)
                span = found.get("drop_interval")
                self.spent["screenings"] += 1
                if span and span[0] > self.allowed.drop:
                    return self._told(Tried(
                        candidate, artifact, found, screened=True, within=False,
                        reason=f"loses {found['drop']:.4f} (at least {span[0]:.4f}) on "
                        f"{len(few)} samples, more than the {self.allowed.drop:g} allowed",
                    ))  # fmt: skip
            found = self._evaluate(candidate, artifact, samples)
        except EdgeKitError as error:
            cancel = self._limits().cancel
            if cancel is not None and cancel.is_set():
                raise
            return self._told(
                Tried(candidate, None, {}, screened=False, within=False, reason=str(error))
            )
        self.spent["evaluations"] += 1
        reason = over_budget(found, self.allowed)
        return self._told(
            Tried(candidate, artifact, found, screened=False, within=not reason,
                  reason=reason or "")
        )  # fmt: skip

    def _evaluate(
        self, candidate: Candidate, artifact: Artifact, samples: NDArray[np.int64]
    ) -> dict[str, Any]:
        builder = self.builder
        self.spent["samples"] += len(samples)
        builder.evaluate(builder.reference, builder.source, samples, self._limits(), _silent)
        return builder.evaluate(candidate, artifact, samples, self._limits(), _silent)

    def _told(self, tried: Tried) -> Tried:
        told = f"drop {tried.drop:.4f}" if tried.evaluation else "failed"
        self._tell(f"{tried.candidate.id}: {tried.reason or f'{told}, within the budget'}")
        return tried


def blame(ranking: Ranking | None) -> list[dict[str, Any]]:
    """The operators that most of the noise comes from: those within 20 dB of the worst."""
    groups = ranking.groups if ranking else ()
    return [
        {"outputs": list(one.outputs), "types": list(one.types), "sqnr_db": round(one.sqnr_db, 1)}
        for one in groups[:_NAMED]
        if one.noise > 0 and one.noise >= 0.01 * groups[0].noise
    ]


def _stored_only(scheme: Scheme) -> bool:
    """Whether the noise is that of the weights alone."""
    return scheme.kind == "int8-weights"


def _some(samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those to screen on: all, where screening would save less than half."""
    if len(samples) < 2 * _SCREENED:
        return samples
    return np.sort(np.random.default_rng(0).permutation(samples)[:_SCREENED])


def _silent(done: int, total: int) -> None:
    del done, total
