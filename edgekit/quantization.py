"""One scheme on one model: checked before anything is built, quantized, read back, evaluated
against the float model, and accounted for operator by operator."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import FORMAT_NAMES, SOURCES, Artifact, open_model
from edgekit.builder import Builder
from edgekit.cache import Cache
from edgekit.choose import Allowed, exceeds
from edgekit.compress.account import OperatorAccount, account_of, noise_of
from edgekit.compress.calibration import calibration_request
from edgekit.compress.fix_shapes import fix_shapes, has_free_dimensions
from edgekit.compress.quantizers import Quantizer, fitted, quantizer_for, readable_as
from edgekit.compress.scheme import Scheme, broken_rule
from edgekit.control import REPAIRED, AccuracyControl, Tried, blame
from edgekit.conversion import Given, convert_with_proof
from edgekit.data import Dataset, Split, check_calibration, open_dataset, split_samples
from edgekit.device import DeviceProfile, Quantization
from edgekit.errors import EdgeKitError, ModelError, UsageError
from edgekit.evaluate import metric_named
from edgekit.facts import this_machine
from edgekit.graph import Graph, read_graph, with_batch_one
from edgekit.measure.conditions import conditions
from edgekit.noise import noise_sets
from edgekit.observer import Diary, Observer
from edgekit.pipeline import Pipeline, read_pipeline
from edgekit.plan import Candidate
from edgekit.precision import activation_types, broken_promise, quantized_already
from edgekit.profiles import load_profile
from edgekit.reading import Reading
from edgekit_runtime.engines import ENGINE_OF_FORMAT

__all__ = ["QuantizeRequest", "Quantized", "quantize_model", "target_of"]

#: samples that the noise on tensors is measured on
_NOISE_SAMPLES = 16
_MADE_UP = 64
#: engines of devices without an operating system that run a format, too
_ALSO_RUN = {"tflite": ("tflm", "ethos-u")}
#: a share of the metric whose loss is said aloud where no limit was given
_COLLAPSE = 0.1


@dataclass(frozen=True)
class QuantizeRequest:
    """What the user asked for. `keep` are operators that stay float, by the name of an output."""

    model: str
    scheme: Scheme
    target: str
    data: str | None = None
    calibration: str | None = None
    preprocess: Path | None = None
    profile: str | None = None
    metric: str | None = None
    max_drop: float | None = None
    keep: tuple[str, ...] = ()
    seed: int = 0
    reading: Reading = field(default_factory=Reading)
    limits: sandbox.Limits | None = None


@dataclass(frozen=True)
class Quantized:
    """The result. `before` is the float model in the same format; `evaluation` what both reach on
    samples that calibration has not seen; `reason` why it is not good enough, "" if it is;
    `search` what accuracy control spent."""

    artifact: Artifact
    before: Artifact
    scheme: Scheme
    tool: str
    operators: tuple[OperatorAccount, ...]
    evaluation: dict[str, Any]
    notes: tuple[str, ...]
    reason: str
    search: dict[str, int]

    @property
    def size_ratio(self) -> float:
        """Bytes of all its files over those of the float model."""
        return self.artifact.size_bytes / self.before.size_bytes


def target_of(source: str, out: Path | None, asked: str | None) -> str:
    """The format to write: what was asked for, what the file to write says, or the model's own;
    TFLite for Keras and TensorFlow, ONNX for other frameworks.

    Raises:
        UsageError: the file to write says another format than what was asked for.
    """
    by_suffix = {".onnx": "onnx", ".tflite": "tflite", ".xml": "openvino"}
    said = by_suffix.get(out.suffix.lower()) if out else None
    if asked and said and asked != said:
        raise UsageError(f"-o {out} is {FORMAT_NAMES[said]}, --to says {FORMAT_NAMES[asked]}")
    own = "tflite" if source in ("keras", "savedmodel") else "onnx" if source in SOURCES else source
    return asked or said or own


def quantize_model(
    request: QuantizeRequest, observer: Observer | None = None, cache: Cache | None = None
) -> Quantized:
    """Quantize a model under one scheme.

    Raises:
        UsageError: the scheme is impossible for the format, the tool or the device's profile; the
            data does not fit. Nothing was built.
        ModelError: the model is quantized already, or the quantizer refuses it.
        EdgeKitError: it cannot be converted, run or evaluated.
    """
    return _Job(request, Diary(observer or Observer()), cache or Cache()).go()


class _Job:
    def __init__(self, request: QuantizeRequest, diary: Diary, cache: Cache) -> None:
        self.request, self.diary, self.cache = request, diary, cache
        self.profile = load_profile(request.profile) if request.profile else None
        # Without a device, it is for this machine as far as that decides what comes out right here.
        here = Quantization(reduce_range=this_machine().quantization.reduce_range)
        self.rules = self.profile.quantization if self.profile else here
        self.sensitive: dict[str, str] = {}
        self.search: dict[str, int] = {}

    def go(self) -> Quantized:
        request = self.request
        quantizer_for(request.scheme, request.target, source="savedmodel")  # before any reading
        with self.diary.phase("read the model and the data"):
            came = self.came = open_model(request.model, reading=request.reading)
            quantizer = self._quantizer(came)
            pipeline = Pipeline()
            if request.preprocess:
                pipeline = read_pipeline(request.preprocess, came.inputs, came.outputs)
            if came.format not in SOURCES:
                self._refuse_quantized(came)
            data, split = self._data(came, pipeline)
        with self.diary.phase("convert"):
            before = self._float(came, data)
        graph = read_graph(before.path, shapes=with_batch_one(before.inputs))
        scheme = self._scheme(quantizer, graph)
        before = self._fixed(before, data, split)
        with self.diary.phase("quantize"):
            builder = self._builder(before, data, split)
            made = builder.artifact(
                replace(builder.reference, id=scheme.id, scheme=scheme),
                request.limits or sandbox.Limits(timeout_s=1800.0), self._progress("quantizing"),
            )  # fmt: skip
            self._keep_promises(made)
        self._tell_of_saturation(quantizer, scheme)
        with self.diary.phase("evaluate"):
            samples = np.sort(np.concatenate([split.selection, split.confirmation]))
            evaluation, reason = self._evaluate(before, made, data, split, samples)
        if self._may_repair(quantizer, scheme, evaluation):
            with self.diary.phase("repair what lost too much"):
                found = self._repaired(before, data, split, scheme, evaluation["drop"])
            if found is not None and found.artifact is not None:
                made, scheme = found.artifact, found.candidate.scheme
                self._keep_promises(made)
                evaluation, reason = self._evaluate(before, made, data, split, split.confirmation)
        with self.diary.phase("account"):
            operators = self._account(before, made, scheme, quantizer, split)
        if request.max_drop is None and evaluation["drop"] > _COLLAPSE * abs(
            evaluation["reference"]
        ):
            self.diary.note(
                f"THIS MODEL IS MUCH WORSE: {evaluation['name']} {evaluation['reference']:.4f} -> "
                f"{evaluation['metric']:.4f}; --max-drop 0.01 finds what must stay float, or "
                "refuses it"
            )
        for step in made.provenance[-1:]:
            for note in step.get("notes", ()):
                self.diary.note(note)
        return Quantized(
            made, before, scheme, quantizer.tool, tuple(operators), evaluation,
            tuple(self.diary.notes), reason, self.search,
        )  # fmt: skip

    # --- before anything is built ---------------------------------------------------------------

    def _quantizer(self, came: Artifact) -> Quantizer:
        request = self.request
        wanted = replace(request.scheme, keep=request.keep or request.scheme.keep)
        quantizer = quantizer_for(wanted, request.target, source=readable_as(came.format))
        missing = quantizer.missing()
        if missing:
            raise UsageError(missing)
        if self.profile is not None:
            scheme = fitted(wanted, quantizer, self.rules)
            engine = ENGINE_OF_FORMAT[request.target]
            able = {engine, *_ALSO_RUN.get(request.target, ())}
            if not able & set(self.profile.engines):
                others = ", ".join(self.profile.engines) or "none"
                raise UsageError(
                    f"{self.profile.id} has no {engine}, which runs {FORMAT_NAMES[request.target]};"
                    f" its engines: {others}"
                )
            # What the operators that stay float compute in is known when the model is read.
            self._refuse_broken(scheme, self.profile, frozenset())
            foreign = scheme.options - quantizer.kinds[scheme.kind]
            if foreign:
                raise UsageError(
                    f"{self.profile.id} asks for {', '.join(sorted(foreign))}, which "
                    f"{quantizer.tool} cannot do with {scheme.kind} of "
                    f"{FORMAT_NAMES[request.target]}"
                )
        return quantizer

    def _refuse_broken(
        self, scheme: Scheme, profile: DeviceProfile, activations: frozenset[str]
    ) -> None:
        broken = broken_rule(scheme, self.rules, activations)
        if broken:
            source = profile.source_of(broken[0])
            title = source.title if source else "no source"
            raise UsageError(
                f"{scheme} may not run on {profile.id}: {broken[1]} ({broken[0]}; {title})"
            )

    def _scheme(self, quantizer: Quantizer, graph: Graph) -> Scheme:
        """The scheme, completed with what rules and the model ask for."""
        request = self.request
        wanted = self.rules.float_operators
        ruled = [
            one.outputs[0] for one in graph.operators
            if one.outputs and (one.canonical in wanted or one.type in wanted)
        ]  # fmt: skip
        keep = dict.fromkeys([*request.scheme.keep, *request.keep, *ruled])
        outputs = {name for one in graph.operators for name in one.outputs}
        unknown = [name for name in request.keep if name not in outputs]
        if unknown:
            raise UsageError(
                f"--keep-float {unknown[0]}: no operator of the model makes a tensor of that name; "
                "edgekit inspect MODEL --json lists them"
            )
        self.ruled = frozenset(ruled)
        scheme = fitted(replace(request.scheme, keep=tuple(keep)), quantizer, self.rules)
        if self.profile is not None:
            self._refuse_broken(scheme, self.profile, activation_types(graph))
        if keep and "keep" not in quantizer.kinds[scheme.kind]:
            raise UsageError(f"{quantizer.tool} cannot keep operators float with {scheme.kind}")
        return scheme

    def _refuse_quantized(self, artifact: Artifact) -> None:
        graph = read_graph(artifact.path, shapes=with_batch_one(artifact.inputs))
        found = quantized_already(graph)
        if found:
            raise ModelError(
                f"{artifact.name} is quantized already: {found}; give the float model it was made "
                "from"
            )

    def _data(self, came: Artifact, pipeline: Pipeline) -> tuple[Dataset, Split]:
        request = self.request
        if request.data is None:
            return self._made_up(came)
        data = open_dataset(request.data, came.inputs, self.cache, pipeline)
        for note in data.notes:
            self.diary.note(note)
        if data.labels is None and request.max_drop is not None and request.metric is None:
            self.diary.note(
                f"no array 'labels' in {request.data}: answers are compared with those of the "
                f"float model, and --max-drop {request.max_drop:g} is in cosine"
            )
        calibration = None
        if request.calibration:
            calibration = open_dataset(request.calibration, came.inputs, self.cache, pipeline)
        split = split_samples(data, calibration, seed=request.seed)
        if split.note:
            self.diary.note(split.note)
        if request.scheme.needs_data:
            known = data.labels if calibration is not None else None
            labels = pipeline.labels or ()
            for note in check_calibration(
                split.calibration_data, split.calibration, labels, known=known
            ):
                self.diary.note(note)
        return data, split

    def _made_up(self, came: Artifact) -> tuple[Dataset, Split]:
        """Seeded noise for calibration and comparison, where there is no data."""
        if self.request.calibration:
            raise UsageError("--calibration without --data: give --data to compare the result on")
        sizes: dict[str, int] = {}
        text, samples = next(noise_sets(came.inputs, sizes, count=_MADE_UP, seed=self.request.seed))
        first = {name: array.shape for name, array in samples[0].items()}
        alike = [
            one for one in samples if {name: array.shape for name, array in one.items()} == first
        ]
        if any(array.dtype.kind in "US" for array in alike[0].values()):
            raise UsageError(f"{came.name} takes texts: give samples with --data")
        with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
            path = Path(work) / "noise.npz"
            ranks = {spec.name: len(spec.shape) for spec in came.inputs}
            stacked = {
                name: np.concatenate([one[name] for one in alike])
                if ranks[name] and first[name][0] == 1
                else np.stack([one[name] for one in alike])
                for name in first
            }
            np.savez(path, allow_pickle=False, **stacked)
            data = open_dataset(str(path), came.inputs, self.cache)
        self.diary.note(
            f"NO DATA: ranges come from {text}, and so does what is said of accuracy. On real "
            "inputs the model may be much worse: give samples with --data"
        )
        return replace(data, source=text), split_samples(data, None, seed=self.request.seed)

    # --- the work -------------------------------------------------------------------------------

    def _float(self, came: Artifact, data: Dataset) -> Artifact:
        """The float model in the format wanted, proven to compute what came."""
        target = self.request.target
        if came.format == target:
            return came
        found = convert_with_proof(
            came, target, cache=self.cache, given=Given.of(data, came.inputs),
            limits=self.request.limits, observer=self.diary.observer,
        )  # fmt: skip
        if not found.passed:
            line = next(line for line in found.ledger if not line.passed)
            raise ModelError(
                f"as {FORMAT_NAMES[target]} it computes something else, before anything is "
                f"quantized: {line.reason()}"
            )
        self._refuse_quantized(found.artifact)
        return found.artifact

    def _fixed(self, before: Artifact, data: Dataset, split: Split) -> Artifact:
        profile = self.profile
        facts = profile.engines.get(ENGINE_OF_FORMAT[before.format]) if profile else None
        if facts is None or not facts.static_shapes or not has_free_dimensions(before):
            return before
        sample = data.sample(int(split.selection[0]), before.inputs)
        shapes = {name: array.shape for name, array in sample.items()}
        return fix_shapes(before, shapes, cache=self.cache, limits=self.request.limits)

    def _keep_promises(self, made: Artifact) -> None:
        graph = read_graph(made.path, shapes=with_batch_one(made.inputs))
        broken = broken_promise(graph, self.rules) if self.profile else None
        if broken and self.profile:
            raise ModelError(f"made, but not for {self.profile.id}: {broken}")

    def _tell_of_saturation(self, quantizer: Quantizer, scheme: Scheme) -> None:
        if scheme.kind not in ("int8-static", "int8-dynamic") or not quantizer.saturates:
            return
        overflows = "this machine's CPU adds pairs of 8-bit products in 16 bits, which can overflow"
        if self.profile is None and scheme.reduce_range and not self.request.scheme.reduce_range:
            self.diary.note(
                f"weights are in 7 bits, because {overflows}; for a device that does not: --for"
            )
        elif not scheme.reduce_range and this_machine().quantization.reduce_range:
            self.diary.note(
                f"{overflows}: with 8-bit weights, what is found here may be worse than on the "
                "device"
            )

    def _builder(self, before: Artifact, data: Dataset, split: Split) -> Builder:
        metric = self.request.metric or ("top1" if data.labels is not None else "cosine")
        metric_named(metric)
        engine = ENGINE_OF_FORMAT[before.format]
        reference = Candidate("float", engine, before.format, Scheme("fp32"), 1)
        isa = conditions()["isa"]
        return Builder(before, data, split, metric, isa, self.cache, reference, came=self.came)

    def _evaluate(
        self, before: Artifact, made: Artifact, data: Dataset, split: Split,
        samples: NDArray[np.int64],
    ) -> tuple[dict[str, Any], str]:  # fmt: skip
        request, builder = self.request, self._builder(before, data, split)
        reference, metric = builder.reference, builder.metric
        limits = request.limits or sandbox.Limits(timeout_s=900.0)
        was = builder.evaluate(reference, before, samples, limits, self._progress("float model"))
        candidate = replace(reference, id="quantized")
        found = builder.evaluate(candidate, made, samples, limits, self._progress("quantized"))
        found |= {"name": metric, "reference": was["metric"]}
        found["least_cosine"] = found.pop("cosine")
        broken = found["broken"]
        if broken:
            return found, f"NaN or Inf in the outputs of {broken} of {found['samples']} samples"
        if request.max_drop is not None and exceeds(found["drop"], request.max_drop):
            return found, f"it loses {found['drop']:.4f} {metric}, {request.max_drop:g} is allowed"
        return found, ""

    def _may_repair(self, quantizer: Quantizer, scheme: Scheme, evaluation: dict[str, Any]) -> bool:
        allowed = self.request.max_drop
        return (
            allowed is not None
            and exceeds(evaluation["drop"], allowed)
            and scheme.kind in REPAIRED
            and "keep" in quantizer.kinds[scheme.kind]
        )

    def _repaired(
        self, before: Artifact, data: Dataset, split: Split, scheme: Scheme, drop: float
    ) -> Tried | None:  # fmt: skip
        """The model with other options of the quantizer, unless some were asked for, or with as few
        operators in float as keep it within --max-drop on one half of the samples; the other half
        confirms it."""
        limits = self.request.limits or sandbox.Limits(timeout_s=900.0)
        builder = self._builder(before, data, split)
        control = AccuracyControl(
            builder,
            self.rules,
            Allowed(self.request.max_drop or 0.0),
            lambda: limits,
            self.diary.note,
        )
        self.search = control.spent
        candidate = replace(builder.reference, id=scheme.id, scheme=scheme)
        ranking = control.sensitivity(candidate)
        guilty = blame(ranking)
        for one in guilty:
            for name in one["outputs"]:
                self.sensitive[name] = (
                    f"quantized alone, it leaves {one['sqnr_db']:.0f} dB of the outputs"
                )
        found = None
        plain = self.request.scheme == Scheme(self.request.scheme.kind)
        tries = control.repair(candidate, drop) if plain else control.keep_float(candidate)
        for tried in tries:
            found = tried if tried.within else found
        if found is None and guilty:
            names = ", ".join(one["outputs"][-1] for one in guilty)
            self.diary.note(f"most of the noise comes from {names}")
        return found

    def _account(
        self, before: Artifact, made: Artifact, scheme: Scheme, quantizer: Quantizer, split: Split
    ) -> list[OperatorAccount]:
        noise: dict[str, float] = {}
        picked: NDArray[np.int64] = split.calibration[:_NOISE_SAMPLES]
        with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
            asked = calibration_request(split.calibration_data, picked, before.inputs, Path(work))
            try:
                noise = noise_of(before, made, asked, limits=self.request.limits)
            except EdgeKitError as error:
                self.diary.note(f"the noise of tensors inside is not known: {error}")
        name = self.profile.id if self.profile else ""
        kept = set(scheme.keep) - {*self.request.keep, *self.request.scheme.keep}
        reasons = {name: self.sensitive.get(name, "sensitive") for name in kept}
        reasons |= dict.fromkeys(self.ruled, f"a rule of {name} (quantization.float_operators)")
        return account_of(made, scheme, quantizer.tool, noise=noise, reasons=reasons)

    def _progress(self, what: str) -> Any:
        def progress(done: int, total: int) -> None:
            self.diary.observer.progress(what, done, total)

        return progress
