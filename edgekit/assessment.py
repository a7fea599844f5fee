"""`edgekit eval`: one model, of any format and on any engine, judged on samples with labels or
against another model."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import sandbox
from edgekit.artifact import FORMAT_NAMES, SOURCES, Artifact, TensorSpec, open_model
from edgekit.cache import Cache
from edgekit.conversion import Given, convert_with_proof
from edgekit.data import Dataset, open_dataset
from edgekit.errors import EdgeKitError, InputError, LimitError, UsageError
from edgekit.metrics import metric_named
from edgekit.observer import Diary, Observer
from edgekit.pipeline import Pipeline, read_pipeline
from edgekit.reading import Reading
from edgekit.subject import are_numbers
from edgekit_runtime.bundle import Bundle, is_bundle
from edgekit_runtime.engines import ENGINE_OF_FORMAT, ENGINES, check_engine
from edgekit_runtime.engines.accelerators import split_engine
from edgekit_runtime.manifest import Manifest

__all__ = ["EvalRequest", "assess_model"]

_SMALL = ("int8", "uint8", "int16", "uint16")
#: below, the parts or the whole say little
_FEW = 30
_PER_CLASS = 10
_DAY_S = 86400.0


@dataclass(frozen=True)
class EvalRequest:
    """What the user asked for. Without `metrics`, those that suit the labels are taken."""

    model: str
    data: str
    metrics: tuple[str, ...] = ()
    folds: int | None = None
    reference: str | None = None
    engine: str | None = None
    threads: int | None = None
    preprocess: Path | None = None
    seed: int = 0
    reading: Reading = field(default_factory=Reading)
    limits: sandbox.Limits | None = None


@dataclass(frozen=True)
class _Interface:
    """What data is laid out for."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantized: Mapping[str, Any] = field(default_factory=dict)

    def as_floats(self) -> tuple[TensorSpec, ...]:
        """Quantized inputs as the floats that they stand for."""
        scales = self.quantized.get("inputs") or [None] * len(self.inputs)
        return tuple(
            replace(spec, dtype="float32") if scale else spec
            for spec, scale in zip(self.inputs, scales, strict=True)
        )


def assess_model(
    request: EvalRequest, observer: Observer | None = None, cache: Cache | None = None
) -> dict[str, Any]:
    """Evaluate a model, or each variant of a bundle; returns the document `edgekit.eval/1`.

    Raises:
        UsageError: the request, the metric or the user's function cannot be used.
        InputError: data and model do not fit.
        EdgeKitError: a model cannot be read or run.
    """
    return _Assessment(request, Diary(observer or Observer()), cache or Cache()).go()


class _Assessment:
    def __init__(self, request: EvalRequest, diary: Diary, cache: Cache) -> None:
        self.request, self.diary, self.cache = request, diary, cache
        self.limits = request.limits or sandbox.Limits(timeout_s=_DAY_S)
        self.base: Path | None = None
        #: scales of arrays that hold the quantized numbers themselves
        self.stored: Sequence[tuple[float, int] | None] = ()

    def go(self) -> dict[str, Any]:
        request = self.request
        self._check()
        path = Path(request.model)
        bundled = path.is_file() and is_bundle(path)
        with self.diary.phase("read the model and the data"):
            if bundled:
                came, manifest, ours = None, *self._bundle(path)
            else:
                came = open_model(request.model, reading=request.reading)
                manifest, ours = None, self._interface(came)
            other = self._reference()
            pipeline = self._pipeline(came, manifest, ours)
            names = _class_names(came, pipeline)
            known = pipeline if are_numbers(names) else replace(pipeline, labels=names or None)
            data, arrays = self._data(ours, other, known)
        self._tell_about(data)
        with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
            metrics = self._metrics(names)
            if other is not None:
                with self.diary.phase("run the reference"):
                    self.base = Path(scratch)
                    found = self._refer(other, self._subject(other, arrays), data, metrics)
                    metrics = [one["name"] for one in found["metrics"]]
            results = []
            with self.diary.phase("run the model"):
                if manifest is None and came is not None:
                    subject, where = self._placed(came, ours, arrays, data)
                    results.append({**where, **self._judged(subject, data, metrics)})
                elif manifest is not None:
                    results += self._variants(manifest, arrays, data, metrics)
        for one in results:
            self._tell_of(one)
        return {
            "schema": "edgekit.eval/1",
            "model": request.model,
            "data": request.data,
            "samples": data.count,
            "reference": request.reference,
            "seed": request.seed,
            "folds": request.folds,
            "class_names": list(names) or None,
            "results": results,
            "notes": list(self.diary.notes),
        }

    # --- what goes in ---------------------------------------------------------------------------

    def _check(self) -> None:
        request = self.request
        if request.folds is not None and request.folds < 2:
            raise UsageError(f"--folds is {request.folds}; wanted at least 2")
        if request.threads is not None and request.threads < 1:
            raise UsageError(f"--threads is {request.threads}; wanted at least 1")
        if request.seed < 0:
            raise UsageError(f"--seed is {request.seed}; wanted 0 or more")
        if request.engine is not None:
            check_engine(request.engine)
        for name in request.metrics:
            if "-class-" in name and ".py:" not in name:
                continue  # a class's name is known when the model is read
            if metric_named(name).needs_reference and request.reference is None:
                raise UsageError(f"--metric {name} compares with a model: give one as --reference")

    def _bundle(self, path: Path) -> tuple[Manifest, _Interface]:
        if self.request.engine is not None:
            raise UsageError("--engine is for models; a bundle's variants name theirs")
        with Bundle(path) as opened:
            opened.verify()
            manifest = opened.manifest
        return manifest, _Interface(self.request.model, manifest.inputs, manifest.outputs)

    def _interface(self, artifact: Artifact) -> _Interface:
        small = any(one.dtype in _SMALL for one in (*artifact.inputs, *artifact.outputs))
        quantized = {}
        if artifact.format == "tflite" and small:
            quantized = sandbox.call(
                "edgekit.subject:quantization_of", {"path": str(artifact.path)},
                what=f"reading {artifact.name}",
            )  # fmt: skip
        return _Interface(artifact.name, artifact.inputs, artifact.outputs, quantized)

    def _reference(self) -> Artifact | None:
        if self.request.reference is None:
            return None
        if is_bundle(self.request.reference):
            raise UsageError("--reference is a model, not a bundle")
        trust = Reading(trust_source=self.request.reading.trust_source)
        return open_model(self.request.reference, reading=trust)

    def _pipeline(
        self, came: Artifact | None, manifest: Manifest | None, ours: _Interface
    ) -> Pipeline:
        if self.request.preprocess:
            return read_pipeline(self.request.preprocess, ours.as_floats(), ours.outputs)
        if manifest is None:
            return Pipeline()
        return Pipeline(manifest.preprocess, manifest.postprocess, manifest.labels, manifest.states)

    def _data(
        self, ours: _Interface, other: Artifact | None, pipeline: Pipeline
    ) -> tuple[Dataset, tuple[str, ...]]:
        """Samples, and the array for each input: named like the model's inputs or, if that is
        what the data has, like the reference's."""
        ways = [ours.as_floats()]
        if ours.quantized:
            ways.append(ours.inputs)
        if other is not None and len(other.inputs) == len(ours.inputs):
            ways.append(self._interface(other).as_floats())
        error: InputError | None = None
        for specs in ways:
            try:
                data = open_dataset(self.request.data, specs, self.cache, pipeline)
            except InputError as found:
                error = error or found
                continue
            if ours.quantized and specs is ours.inputs:
                self.stored = ours.quantized["inputs"]
            self._tell_of_scales(ours, specs)
            return data, tuple(spec.name for spec in specs)
        assert error is not None  # noqa: S101  (for the type checker)
        raise error

    def _tell_of_scales(self, ours: _Interface, specs: Sequence[TensorSpec]) -> None:
        scales = ours.quantized.get("inputs", ())
        for spec, scale, taken in zip(ours.inputs, scales, specs, strict=False):
            if scale and taken.dtype.startswith("float"):
                self.diary.note(
                    f"{spec.name} is {spec.dtype}: samples are quantized with the file's own scale "
                    f"{scale[0]:.6g} and zero point {scale[1]}"
                )
        for spec, scale in zip(ours.outputs, ours.quantized.get("outputs", ()), strict=False):
            if scale:
                self.diary.note(
                    f"{spec.name} is {spec.dtype}: dequantized with the file's own scale "
                    f"{scale[0]:.6g} and zero point {scale[1]}"
                )

    def _metrics(self, names: Sequence[str]) -> list[str]:
        """Names of classes in metrics become their numbers."""
        found = []
        for name in dict.fromkeys(self.request.metrics):
            what, middle, which = name.partition("-class-")
            if middle and ".py:" not in name and which in names:
                name = f"{what}-class-{names.index(which)}"  # noqa: PLW2901
            metric_named(name)
            found.append(name)
        return found

    def _tell_about(self, data: Dataset) -> None:
        for note in data.notes:
            self.diary.note(note)
        copies = data.count - len(np.unique(data.hashes))
        if copies:
            self.diary.note(
                f"{copies} of {data.count} samples are copies of others: the intervals take them "
                "for samples of their own and are too narrow"
            )
        if data.count < _FEW:
            self.diary.note(f"only {data.count} samples: the figures say little")
        folds = self.request.folds
        if folds is not None and folds > data.count:
            raise UsageError(f"--folds is {folds}; {data.source} has {data.count} samples")

    # --- running it -----------------------------------------------------------------------------

    def _subject(self, artifact: Artifact, arrays: Sequence[str], **options: Any) -> dict[str, Any]:
        interface = self._interface(artifact)
        if len(artifact.inputs) != len(arrays):
            raise InputError(
                f"{artifact.name} has the inputs {', '.join(s.name for s in artifact.inputs)}, the "
                f"data is laid out for {', '.join(arrays)}"
            )
        own = [spec.name for spec in artifact.inputs]
        names = own if set(own) == set(arrays) else list(arrays)
        classes = artifact.facts.get("classes", ())
        return {
            "source": list(artifact.arguments), "format": artifact.format,
            "reading": artifact.reading.of_source().to_json(), "options": options,
            "inputs": [dataclasses.asdict(one) for one in artifact.inputs], "names": names,
            "quantized": dict(interface.quantized), "stored": list(self.stored),
            "classes": list(classes),
        }  # fmt: skip

    def _placed(
        self, came: Artifact, ours: _Interface, arrays: Sequence[str], data: Dataset
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model where it is to run, and what to say of that."""
        request = self.request
        if request.engine is None and came.format in SOURCES:
            if request.threads is not None:
                raise UsageError(
                    f"--threads is for engines; {FORMAT_NAMES[came.format]} runs in its own "
                    "framework (say with --engine which to convert it for)"
                )
            where = {"format": came.format, "engine": None, "framework": came.facts["framework"]}
            return self._subject(came, arrays), where
        engine = request.engine or ENGINE_OF_FORMAT[came.format]
        fixed = bool(came.reading.inputs)
        artifact = came
        if came.format not in ENGINES[split_engine(engine)[0]].formats or fixed:
            artifact = self._converted(came, engine, ours, arrays, data)
        options: dict[str, Any] = {"engine": engine}
        if request.threads is not None:
            options["threads"] = request.threads
        where = {"format": artifact.format, "engine": engine, "framework": None}
        return self._subject(artifact, arrays, **options), where

    def _converted(
        self, came: Artifact, engine: str, ours: _Interface, arrays: Sequence[str], data: Dataset
    ) -> Artifact:
        formats = ENGINES[split_engine(engine)[0]].formats
        target = came.format if came.format in formats else formats[0]
        fits = tuple(arrays) == tuple(one.name for one in ours.inputs) and not ours.quantized
        found = convert_with_proof(
            came, target, cache=self.cache, given=Given.of(data, came.inputs) if fits else None,
            limits=self.limits, observer=_Quiet(self.diary),
        )  # fmt: skip
        if not found.passed:
            reason = next(line for line in found.ledger if not line.passed).reason()
            raise LimitError(f"as {FORMAT_NAMES[target]} it computes something else: {reason}")
        self.diary.note(
            f"{came.name} was converted to {FORMAT_NAMES[target]} for {engine}, and computes the "
            f"same on {found.inputs}"
        )
        return found.artifact

    def _variants(
        self, manifest: Manifest, arrays: Sequence[str], data: Dataset, metrics: list[str]
    ) -> list[dict[str, Any]]:
        results, errors = [], []
        for one in manifest.variants:
            options: dict[str, Any] = {"variant": one.id}
            if self.request.threads is not None:
                options["threads"] = self.request.threads
            subject = {
                "source": [self.request.model], "format": "bundle", "reading": {},
                "options": options,
                "inputs": [dataclasses.asdict(spec) for spec in manifest.inputs],
                "names": list(arrays), "quantized": {}, "stored": [], "classes": [],
            }  # fmt: skip
            where = {
                "format": one.format, "engine": one.engine, "framework": None, "variant": one.id,
                "scheme": one.scheme,
            }  # fmt: skip
            try:
                results.append({**where, **self._judged(subject, data, metrics)})
            except UsageError:
                raise
            except EdgeKitError as error:
                errors.append(error)
                self.diary.note(f"variant {one.id} does not run here: {error}")
        if not results:
            raise errors[0]
        return results

    def _refer(
        self, artifact: Artifact, subject: dict[str, Any], data: Dataset, metrics: list[str]
    ) -> dict[str, Any]:
        """Run the reference; what it makes of the samples stays in its folder."""
        for spec, name in zip(artifact.inputs, subject["names"], strict=True):
            array = data.arrays[name]
            row = (1, *array.shape[1:]) if array.ndim == len(spec.shape) else array.shape[1:]
            if not spec.accepts(row):
                raise InputError(
                    f"the reference {artifact.name} takes {spec}, the samples of {name!r} are "
                    f"{list(row)}"
                )
        return self._called(subject, data, metrics, keep=self.base)

    def _judged(self, subject: dict[str, Any], data: Dataset, metrics: list[str]) -> dict[str, Any]:
        return self._called(subject, data, metrics, keep=None)

    def _called(
        self, subject: dict[str, Any], data: Dataset, metrics: list[str], *, keep: Path | None
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
            found: dict[str, Any] = sandbox.call(
                "edgekit.evaluate:assess",
                {
                    "model": subject,
                    "data": {
                        "folder": str(data.folder), "sha256": data.sha256, "source": data.source,
                    },
                    "metrics": metrics, "folder": str(keep or scratch), "keep": keep is not None,
                    "reference": str(self.base) if self.base and keep is None else None,
                    "seed": self.request.seed,
                    "folds": self.request.folds if keep is None else None,
                },
                limits=self.limits, what=f"running {subject['source'][0]}",
                progress=lambda done, total: self.diary.observer.progress("samples", done, total),
            )  # fmt: skip
        return found

    def _tell_of(self, result: dict[str, Any]) -> None:
        rare = [one for one in result.get("classes", ()) if 0 < one["samples"] < _PER_CLASS]
        several = any("-" in m["name"] or m["name"] in ("f1", "precision", "recall", "auc")
                      for m in result["metrics"])  # fmt: skip
        if rare and several and len(result["classes"]) > 1:
            self.diary.note(
                f"{len(rare)} of {len(result['classes'])} classes have fewer than {_PER_CLASS} "
                "samples: figures averaged over classes hang on these, and their intervals are "
                "too narrow"
            )
        for one in result["metrics"]:
            if one["undefined"]:
                self.diary.note(f"{one['name']} is not defined here: {one['undefined']}")


class _Quiet(Observer):
    """Passes on what the user should know of a conversion, not its every step."""

    def __init__(self, diary: Diary) -> None:
        self._diary = diary

    def note(self, text: str) -> None:
        self._diary.note(text)


def _class_names(came: Artifact | None, pipeline: Pipeline) -> tuple[str, ...]:
    """The names of the classes, in the order of the scores: said by the user or the bundle, else
    what scikit-learn was trained with."""
    if pipeline.labels:
        return pipeline.labels
    return tuple(came.facts.get("classes", ())) if came is not None else ()
