"""One model pruned: by a given amount, or by as much as a limit on the loss allows."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import FORMAT_NAMES, Artifact, open_model
from edgekit.builder import Builder
from edgekit.cache import Cache
from edgekit.compress.prune import Pruning, prune
from edgekit.compress.scheme import Scheme
from edgekit.conversion import Given, convert_with_proof
from edgekit.data import Dataset, Split, open_dataset, split_samples
from edgekit.errors import ModelError, UsageError
from edgekit.evaluate import metric_named
from edgekit.graph import read_graph, with_batch_one
from edgekit.measure.benchmark import Contender, measure
from edgekit.measure.conditions import conditions
from edgekit.measure.statistics import ratio_interval
from edgekit.noise import noise_sets
from edgekit.observer import Diary, Observer
from edgekit.pipeline import Pipeline, read_pipeline
from edgekit.plan import Candidate
from edgekit.precision import quantized_already
from edgekit.profiles import load_profile
from edgekit.reading import Reading

__all__ = ["PruneRequest", "Pruned", "Step", "prune_model"]

_MADE_UP = 64
_FLOAT_BITS = 32
#: the amounts a search ends between, and how often it halves what is left between them
_LEAST, _MOST, _HALVINGS = 0.1, 0.9, 5
#: shares of an amount that stand for the way to it
_WAY = (0.25, 0.5, 0.75)
#: how far an amount may be missed, since channels are whole
_SHORT = 0.01


@dataclass(frozen=True)
class PruneRequest:
    """What the user asked for; without `amount`, as much goes as `max_drop` allows. `way`: also
    what smaller amounts on the way to it cost and save, for a plot."""

    model: str
    pruning: Pruning
    amount: float | None = None
    max_drop: float | None = None
    data: str | None = None
    calibration: str | None = None
    preprocess: Path | None = None
    profile: str | None = None
    metric: str | None = None
    way: bool = False
    seed: int = 0
    reading: Reading = field(default_factory=Reading)
    limits: sandbox.Limits | None = None


@dataclass(frozen=True)
class Step:
    """An amount that was tried: what was reached, what it costs on the samples that select (those
    that nothing was learned from, if the amount was given), and, where that was measured, the
    latency over that of the model as it came, with its 95 % interval."""

    amount: float
    reached: float
    metric: float
    drop: float
    latency_ratio: tuple[float, float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Pruned:
    """The result. `facts` are those of `edgekit.compress.prune_onnx.prune_onnx`; `evaluation` what
    both models reach on samples that nothing was learned from; `reason` why it is not what was
    asked for, "" if it is; `usable`: within the loss allowed, if not as small as wanted."""

    artifact: Artifact
    before: Artifact
    pruning: Pruning
    facts: dict[str, Any]
    evaluation: dict[str, Any]
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    reason: str
    usable: bool


def prune_model(
    request: PruneRequest, observer: Observer | None = None, cache: Cache | None = None
) -> Pruned:
    """Prune a model.

    Raises:
        UsageError: no data for a method that learns from it, or amounts that make no sense.
        ModelError: the model is quantized, or nothing of it can go.
        EdgeKitError: it cannot be converted, run or evaluated.
    """
    return _Job(request, Diary(observer or Observer()), cache or Cache()).go()


class _Job:
    def __init__(self, request: PruneRequest, diary: Diary, cache: Cache) -> None:
        self.request, self.diary, self.cache = request, diary, cache
        self.steps: list[Step] = []
        self.tried: list[Artifact] = []  # of the steps
        self.pruning = request.pruning
        profile = load_profile(request.profile) if request.profile else None
        if profile is not None and self.pruning.method == "channels":
            bits = profile.cpu.simd_bits if profile.cpu else None
            if bits and self.pruning.multiple == 1:
                self.pruning = replace(self.pruning, multiple=max(1, bits // _FLOAT_BITS))
                diary.note(
                    f"what is left of channels is a multiple of {self.pruning.multiple}, as many "
                    f"as {profile.id} computes at once ({bits}-bit vectors)"
                )
            elif not bits:
                diary.note(f"{profile.id} says nothing of cpu.simd_bits: any number of channels")

    def go(self) -> Pruned:
        request = self.request
        if request.data is None and self.pruning.needs_data:
            raise UsageError(f"{self.pruning.learns} learns from samples: give --data, or "
                             f"{self.pruning.blind}")  # fmt: skip
        if request.data is None and request.max_drop is not None:
            raise UsageError("--max-drop without --data: give samples to see the loss on")
        with self.diary.phase("read the model and the data"):
            came = open_model(request.model, reading=request.reading)
            pipeline = Pipeline()
            if request.preprocess:
                pipeline = read_pipeline(request.preprocess, came.inputs, came.outputs)
            self._refuse_quantized(came)
            data, split = self._data(came, pipeline)
        with self.diary.phase("convert"):
            before = self._onnx(came, data)
        builder = self._builder(before, data, split)
        with self.diary.phase("prune"):
            if request.amount is not None:
                if request.way:
                    self._walk(builder, request.amount)
                made, facts = self._made(builder, request.amount)
                pruning = replace(self.pruning, amount=request.amount)
            else:
                made, facts, pruning = self._search(builder)
        with self.diary.phase("evaluate"):
            evaluation = self._evaluated(builder, made, self._untouched(split))
        if self.pruning.method == "channels":
            with self.diary.phase("measure"):
                facts = {**facts, "latency": self._latency(builder, made)}
        self._tell(facts)
        reason, usable = self._judged(facts, evaluation, pruning)
        return Pruned(
            made, before, pruning, facts, evaluation, tuple(self.steps), tuple(self.diary.notes),
            reason, usable,
        )  # fmt: skip

    # --- what goes in ---------------------------------------------------------------------------

    def _refuse_quantized(self, artifact: Artifact) -> None:
        if artifact.format not in FORMAT_NAMES or artifact.format not in _READABLE:
            return
        graph = read_graph(artifact.path, shapes=with_batch_one(artifact.inputs))
        found = quantized_already(graph)
        if found:
            raise ModelError(
                f"{artifact.name} is quantized: {found}; prune the float model it was made from, "
                "and quantize then"
            )

    def _data(self, came: Artifact, pipeline: Pipeline) -> tuple[Dataset, Split]:
        request = self.request
        if request.data is None:
            return self._made_up(came)
        data = open_dataset(request.data, came.inputs, self.cache, pipeline)
        calibration = None
        if request.calibration:
            calibration = open_dataset(request.calibration, came.inputs, self.cache, pipeline)
        split = split_samples(data, calibration, seed=request.seed)
        for note in (*data.notes, *filter(None, [split.note])):
            self.diary.note(note)
        if calibration is not None:
            # Weights are fitted to these: all there are, where ranges need few.
            known = set(data.hashes.tolist())
            clean = [i for i, one in enumerate(calibration.hashes.tolist()) if one not in known]
            split = replace(split, calibration=np.array(clean, np.int64))
        if data.labels is None and request.metric is None:
            self.diary.note(
                f"no array 'labels' in {request.data}: answers are compared with those of the "
                "model as it came, in cosine"
            )
        return data, split

    def _made_up(self, came: Artifact) -> tuple[Dataset, Split]:
        """Seeded noise, for shapes alone."""
        text, samples = next(noise_sets(came.inputs, {}, count=_MADE_UP, seed=self.request.seed))
        first = {name: array.shape for name, array in samples[0].items()}
        alike = [o for o in samples if {n: a.shape for n, a in o.items()} == first]
        ranks = {spec.name: len(spec.shape) for spec in came.inputs}
        with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
            path = Path(work) / "noise.npz"
            stacked = {
                name: np.concatenate([one[name] for one in alike])
                if ranks[name] and first[name][0] == 1
                else np.stack([one[name] for one in alike])
                for name in first
            }
            np.savez(path, allow_pickle=False, **stacked)
            data = open_dataset(str(path), came.inputs, self.cache)
        self.diary.note(
            f"NO DATA: what is said of accuracy comes from {text}; give samples with --data"
        )
        return replace(data, source=text), split_samples(data, None, seed=self.request.seed)

    def _onnx(self, came: Artifact, data: Dataset) -> Artifact:
        if came.format == "onnx":
            return came
        found = convert_with_proof(
            came, "onnx", cache=self.cache, given=Given.of(data, came.inputs),
            limits=self.request.limits, observer=self.diary.observer,
        )  # fmt: skip
        if not found.passed:
            line = next(line for line in found.ledger if not line.passed)
            raise ModelError(
                f"as ONNX it computes something else, before anything is pruned: {line.reason()}"
            )
        self._refuse_quantized(found.artifact)
        return found.artifact

    def _builder(self, before: Artifact, data: Dataset, split: Split) -> Builder:
        metric = self.request.metric or ("top1" if data.labels is not None else "cosine")
        metric_named(metric)
        reference = Candidate("float", "onnxruntime", "onnx", Scheme("fp32"), 1)
        return Builder(before, data, split, metric, conditions()["isa"], self.cache, reference)

    # --- what comes out -------------------------------------------------------------------------

    def _made(self, builder: Builder, amount: float) -> tuple[Artifact, dict[str, Any]]:
        split = builder.split

        def progress(done: int, total: int) -> None:
            self.diary.observer.progress(f"pruning {100 * amount:g} %", done, total)

        return prune(
            builder.source, replace(self.pruning, amount=amount), split.calibration_data,
            split.calibration, cache=self.cache, isa=builder.isa, limits=self.request.limits,
            progress=progress,
        )  # fmt: skip

    def _search(self, builder: Builder) -> tuple[Artifact, dict[str, Any], Pruning]:
        """As much as may go, by halving; every step stays in the cache for whoever comes again.

        Raises:
            ModelError: even the least loses too much.
        """
        allowed = self.request.max_drop or 0.0
        low, high = _LEAST, _MOST
        best: tuple[Artifact, dict[str, Any], Pruning] | None = None
        amount = (low + high) / 2
        for _ in range(_HALVINGS):
            made, facts, found = self._step(builder, round(amount, 3), builder.split.selection)
            if found["drop"] <= allowed and not found["broken"]:
                best = (made, facts, replace(self.pruning, amount=round(amount, 3)))
                low = amount
                if facts["reached"] < amount - _SHORT:
                    break  # there is no more to take
            else:
                high = amount
            amount = (low + high) / 2
        if best is None:
            made, facts, _ = self._step(builder, _LEAST, builder.split.selection)
            best = (made, facts, replace(self.pruning, amount=_LEAST))
        return best

    def _walk(self, builder: Builder, amount: float) -> None:
        """Smaller amounts, evenly up to the one asked for."""
        if self.pruning.method == "n-m":
            return
        samples = self._untouched(builder.split)
        for share in _WAY:
            self._step(builder, round(share * amount, 3), samples)

    def _step(
        self, builder: Builder, amount: float, samples: NDArray[np.int64]
    ) -> tuple[Artifact, dict[str, Any], dict[str, Any]]:
        made, facts = self._made(builder, amount)
        found = self._evaluated(builder, made, samples)
        self.steps.append(Step(amount, facts["reached"], found["metric"], found["drop"]))
        self.tried.append(made)
        return made, facts, found

    def _untouched(self, split: Split) -> NDArray[np.int64]:
        """Samples that nothing was chosen by."""
        if self.request.amount is None:
            return split.confirmation
        return np.sort(np.concatenate([split.selection, split.confirmation]))

    def _evaluated(
        self, builder: Builder, made: Artifact, samples: NDArray[np.int64]
    ) -> dict[str, Any]:
        limits = self.request.limits or sandbox.Limits(timeout_s=900.0)

        def progress(done: int, total: int) -> None:
            self.diary.observer.progress("evaluating", done, total)

        was = builder.evaluate(builder.reference, builder.source, samples, limits, progress)
        candidate = replace(builder.reference, id="pruned")
        found = builder.evaluate(candidate, made, samples, limits, progress)
        return {**found, "name": builder.metric, "reference": was["metric"]}

    def _latency(self, builder: Builder, made: Artifact) -> dict[str, Any]:
        """Both models in ONNX Runtime, one thread, in turn, and those of the steps with them if
        there is to be a plot: `{before, after, ratio}`, the ratio with its 95 % interval; {} where
        one cannot be measured."""
        with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
            first = builder.data.sample(int(builder.split.selection[0]), builder.source.inputs)
            inputs = Path(work) / "inputs.npz"
            np.savez(inputs, allow_pickle=False, **{name: one[None] for name, one in first.items()})
            named = {"before": builder.source, "after": made}
            if self.request.way:
                named |= {f"step {number}": one for number, one in enumerate(self.tried)}
            contenders = [
                Contender(name, one.path, 1, "onnxruntime") for name, one in named.items()
            ]
            taken = measure(contenders, "before", inputs=inputs, seed=self.request.seed)
        faults = [one.failure for one in taken.values() if one.failure]
        if faults:
            self.diary.note(f"not measured: {faults[0]}")
            return {}
        base = taken["before"].medians_ns
        ratio = ratio_interval(taken["after"].medians_ns, base)
        self.steps = [
            replace(one, latency_ratio=ratio_interval(taken[f"step {number}"].medians_ns, base))
            if f"step {number}" in taken else one
            for number, one in enumerate(self.steps)
        ]  # fmt: skip
        return {
            "before": taken["before"].latency(), "after": taken["after"].latency(),
            "ratio": list(ratio), "engine": "onnxruntime", "threads": 1,
        }  # fmt: skip

    def _tell(self, facts: dict[str, Any]) -> None:
        if self.pruning.method != "channels":
            self.diary.note(
                "ONNX stores and ONNX Runtime computes zeros like any number: it is not faster; "
                "only the compressed download shrinks"
            )

    def _judged(
        self, facts: dict[str, Any], evaluation: dict[str, Any], pruning: Pruning
    ) -> tuple[str, bool]:
        allowed = self.request.max_drop
        if evaluation["broken"]:
            return f"NaN or Inf in the outputs of {evaluation['broken']} samples", False
        if allowed is not None and not evaluation["drop"] <= allowed:
            return (
                f"it loses {evaluation['drop']:.4f} {evaluation['name']}, {allowed:g} is allowed",
                False,
            )
        wanted = self.request.amount
        if pruning.method == "channels" and wanted and facts["reached"] < wanted - _SHORT:
            return (
                f"only {100 * facts['reached']:.1f} % of the {_WHOLE[pruning.minimize]} could go, "
                f"{100 * wanted:g} % were wanted; the best there is was kept",
                True,
            )
        return "", True


_WHOLE = {"macs": "MACs", "latency": "layers' latency"}
#: formats whose graph can be read without a framework
_READABLE = ("onnx", "tflite", "openvino")
