"""Everything before the work: what was asked for, read and checked, and the plan."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.accelerate import engines_of
from edgekit.artifact import FORMAT_NAMES, SOURCES, Artifact, open_model
from edgekit.builder import Builder
from edgekit.cache import Cache, check_space
from edgekit.choose import Aim
from edgekit.compress.fix_shapes import has_free_dimensions
from edgekit.compress.prune import Pruning
from edgekit.conversion import Given, convert_with_proof
from edgekit.data import Dataset, Split, open_dataset, split_samples
from edgekit.device import DeviceProfile
from edgekit.errors import (
    EdgeKitError,
    LimitError,
    MissingExtraError,
    MissingToolError,
    ModelError,
    UsageError,
)
from edgekit.evaluate import metric_named
from edgekit.facts import probe_engine
from edgekit.firmware_plan import ETHOS_U, firmware_plan, runs_firmware
from edgekit.fit import Fit, judge
from edgekit.graph import read_graph, with_batch_one
from edgekit.measure.conditions import conditions
from edgekit.measure.site import HERE, Site
from edgekit.observer import Diary, Observer
from edgekit.pipeline import Pipeline, read_pipeline
from edgekit.plan import (
    Candidate,
    engine_rulings,
    make_plan,
    source_ruling,
    with_accelerators,
    with_pruned,
    without_bf16,
)
from edgekit.precision import quantized_already
from edgekit.profiles import THIS_MACHINE, load_profile, profiles_of
from edgekit.reading import Reading
from edgekit_runtime.engines import ENGINE_OF_FORMAT, ENGINES
from edgekit_runtime.engines.accelerators import VERIFIED

__all__ = ["Job", "Request", "prepare"]

_LEAST_FREE_BYTES = 16 << 20
_NOT_THERE = "with --on the device's CPU is measured; leave it out to try accelerators"


@dataclass(frozen=True)
class Request:
    """What the user asked for. `max_drop` is in the metric's units, `budget_s` wall clock;
    `prune`: shares of the MACs that candidates are tried without; `accelerator`: the profile's name
    of the one to use, `none` for the CPU; None leaves the choice open. `dry_run`: only the plan is
    wanted, so nothing needs to be written."""

    model: Path
    profile: str | None
    data: str
    out: Path
    calibration: str | None = None
    metric: str | None = None
    max_drop: float = 0.01
    slice_by: str | None = None
    max_slice_drop: float | None = None
    minimize: Aim = "latency"
    site: Site = HERE
    allow_fallback: bool = False
    accelerator: str | None = None
    budget_s: float | None = None
    threads: int | None = None
    seed: int = 0
    command: str = ""
    preprocess: Path | None = None
    dry_run: bool = False
    prune: tuple[float, ...] = ()
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True)
class Job:
    """A request that was read and checked. `source` is the model that the others are compared
    with: as it came, or what it became where no engine loads what came. `fit` is None where the
    model's operators could not be read."""

    profile: DeviceProfile
    threads: int
    source: Artifact
    fit: Fit | None
    pipeline: Pipeline
    data: Dataset
    split: Split
    metric: str
    plan: tuple[Candidate, ...]
    conditions: dict[str, Any]
    builder: Builder


def prepare(request: Request, diary: Diary, cache: Cache) -> Job:
    """Read and check what was asked for, and plan; nothing is built, nothing written.

    Raises:
        UsageError: something in the request cannot be used.
        LimitError: the device cannot run the model, or its profile allows no candidate.
        EdgeKitError: the reference's engine cannot be used here.
    """
    return _Preparation(request, diary, cache).go()


class _Quiet(Observer):
    """Passes on what the user should know of a conversion, not its every step."""

    def __init__(self, diary: Diary) -> None:
        self._diary = diary

    def note(self, text: str) -> None:
        self._diary.note(text)


def _no_accelerator(profile: DeviceProfile, wanted: str, known: Iterable[str]) -> UsageError:
    listed = ", ".join(known) or "none"
    return UsageError(f"{profile.id} has no accelerator {wanted!r}; it has {listed}")


def _firmware_with(profile: DeviceProfile, wanted: str | None) -> DeviceProfile:
    """A microcontroller's profile with the one accelerator that was asked for by name, or without
    any; other profiles as they are.

    Raises:
        UsageError: it has none of that name, or without them nothing runs on it.
    """
    if wanted is None or not runs_firmware(profile):
        return profile
    known = {name: one for name, one in profile.accelerators.items() if one.engine == ETHOS_U}
    if wanted != "none":
        if wanted not in known:
            raise _no_accelerator(profile, wanted, known)
        return profile.model_copy(update={"accelerators": {wanted: known[wanted]}})
    engines = {name: one for name, one in profile.engines.items() if name != ETHOS_U}
    if not engines:
        raise UsageError(f"--accelerator none: {profile.id} runs models on {', '.join(known)} only")
    return profile.model_copy(update={"accelerators": {}, "engines": engines})


@dataclass
class _Preparation:
    request: Request
    diary: Diary
    cache: Cache

    def go(self) -> Job:
        request = self.request
        if not request.max_drop >= 0:
            raise UsageError(f"--max-drop is {request.max_drop}; wanted 0 or more")
        if request.max_slice_drop is not None and not (
            request.max_slice_drop >= 0 and request.slice_by
        ):
            raise UsageError(
                f"--max-slice-drop is {request.max_slice_drop:g}; wanted 0 or more, and with "
                "--slice-by the array of the data that says which slice a sample is of"
            )
        site = request.site
        profile = _firmware_with(self._profile(), request.accelerator)
        if site is not HERE and site.profile.arch != profile.arch:
            raise UsageError(
                f"{profile.id} is {profile.arch}, {site.name} is {site.profile.arch}; name the "
                "profile of the device that --on reaches"
            )
        threads = request.threads or profile.threads
        if not request.dry_run:
            _check_writable(request.out)
        check_space(self.cache.root, least_bytes=_LEAST_FREE_BYTES)
        with self.diary.phase("read the model and the data"):
            came = open_model(request.model, reading=request.reading)
            pipeline = Pipeline()
            if request.preprocess:
                pipeline = read_pipeline(request.preprocess, came.inputs, came.outputs)
            data = open_dataset(request.data, came.inputs, self.cache, pipeline)
            source = self._loadable(came, data)
            fit = self._judged(source, profile)
            calibration = None
            if request.calibration:
                calibration = open_dataset(request.calibration, source.inputs, self.cache, pipeline)
            split = split_samples(data, calibration, seed=request.seed)
        metric = request.metric or ("top1" if data.labels is not None else "cosine")
        metric_named(metric)
        if request.slice_by:
            data.array(request.slice_by)
        self._tell_about(data, split)
        plan = self._plan(came, source, profile, fit, threads)
        if request.prune:
            plan = with_pruned(plan, self._prunings(profile), source.format)
        here = conditions()
        found = here if site is HERE else self._meet(site, plan)
        firmware = runs_firmware(profile)
        if found["arch"] != profile.arch and not firmware:
            self.diary.note(
                f"measured on this machine ({found['arch']}), not on {profile.name} "
                f"({profile.arch}): the choice holds there only if the ranking carries over"
            )
        if threads > (found["cores"] or threads):
            self.diary.note(
                f"{threads} threads on the {found['cores']} processors here: times are not those "
                f"of a device that has {threads}"
            )
        if not firmware:
            self._tell_about_accelerators(profile, plan)
        if plan[0].reference_only:
            why = plan[0].ruling or f"{profile.id} takes fixed shapes only"
            self.diary.note(f"{plan[0].id} is only what the others are compared with: {why}")
        self.diary.observer.plan(plan, profile)
        builder = Builder(
            source, data, split, metric, here["isa"], self.cache, plan[0], came, request.slice_by
        )
        return Job(
            profile, threads, source, fit, pipeline, data, split, metric, plan, found, builder,
        )  # fmt: skip

    def _loadable(self, came: Artifact, data: Dataset) -> Artifact:
        """The model as it came if an engine loads it; else what it becomes, proven to compute the
        same on the user's own samples."""
        if came.format not in SOURCES and not came.reading.to_json().keys() - {"trust_source"}:
            return came
        faults = []
        targets = ("onnx", "tflite") if came.format in SOURCES else (came.format,)
        for target in targets:
            try:
                found = convert_with_proof(
                    came,
                    target,
                    cache=self.cache,
                    given=Given.of(data, came.inputs),
                    observer=_Quiet(self.diary),
                )
            except EdgeKitError as error:
                if isinstance(error, UsageError) and not isinstance(error, ModelError):
                    raise
                faults.append(error)
                continue
            if found.passed:
                worst = max(found.ledger, key=lambda line: line.worst.max_relative).worst
                self.diary.note(
                    f"{came.name} was converted to {FORMAT_NAMES[target]}, which is what the "
                    f"others are compared with: on {found.inputs} it is off by "
                    f"{worst.max_relative:.1g} of {worst.name}'s greatest value"
                )
                return found.artifact
            line = next(line for line in found.ledger if not line.passed)
            faults.append(
                LimitError(
                    f"as {FORMAT_NAMES[target]}, it computes something else: {line.reason()}"
                )
            )
        raise type(faults[0])("; ".join(dict.fromkeys(map(str, faults))))

    def _profile(self) -> DeviceProfile:
        """The one named; without a name that of the device that is reached: a known one of its
        model, else what it says of itself."""
        request = self.request
        if request.profile is not None:
            return load_profile(request.profile)
        if not self._there:
            raise UsageError(
                "no device is named: --for NAME (edgekit devices list; this-machine is the one "
                "here), or --on TARGET, which measures there"
            )
        known = set(profiles_of(request.site.profile.name)) - {THIS_MACHINE}
        found = load_profile(min(known)) if known else request.site.profile
        self.diary.note(f"for {found.name} ({found.id if known else 'as it was read'})")
        return found

    def _judged(self, source: Artifact, profile: DeviceProfile) -> Fit | None:
        """The model's fit, judged before any work; None if its operators cannot be read here."""
        model = self.request.model
        try:
            fit = judge(read_graph(source.path, shapes=with_batch_one(source.inputs)), profile)
        except MissingExtraError as error:
            self.diary.note(f"not checked whether the model fits {profile.id}: {error}")
            return None
        if fit.hopeless:
            raise LimitError(
                f"{model} does not fit {profile.id}: {'; '.join(fit.hopeless)}. "
                f"edgekit inspect {model} --for {profile.id} shows all"
            )
        return fit

    def _plan(
        self,
        came: Artifact,
        source: Artifact,
        profile: DeviceProfile,
        fit: Fit | None,
        threads: int,
    ) -> tuple[Candidate, ...]:
        with self.diary.phase("probe the engines"), ThreadPoolExecutor() as pool:
            wanted = [*profile.engines, ENGINE_OF_FORMAT[source.format]]
            wanted += ["litert"] if runs_firmware(profile) else []
            engines = [name for name in dict.fromkeys(wanted) if name in ENGINES]
            faults = dict(zip(engines, pool.map(probe_engine, engines), strict=True))
        faults = {name: why or self.request.site.fault_of(name) for name, why in faults.items()}
        if runs_firmware(profile):
            return self._firmware_plan(came, source, profile, fit, faults)
        plan = make_plan(
            source.format, profile, threads=threads, engine_faults=faults,
            free_dimensions=has_free_dimensions(source),
            source_activations=fit.activations if fit else frozenset(["float32"]),
            engine_rulings=engine_rulings(fit) if fit else None,
            source_ruling=source_ruling(fit) if fit else None,
            source_quantized=quantized_already(fit.graph) if fit else None, came=came.format,
        )  # fmt: skip
        plan = without_bf16(plan, self.request.site.profile) if self._there else plan
        if plan[0].skip:
            raise EdgeKitError(f"the reference cannot be run: {plan[0].skip}")
        plan = self._with_accelerators(plan, came, source, profile, fit)
        rulings = [c.ruling for c in plan if c.ruling is not None]
        if all(c.ruling is not None or c.reference_only for c in plan):
            if {ruling.field for ruling in rulings} == {"engines"}:
                made = ", ".join(dict.fromkeys(c.engine for c in plan))
                raise LimitError(
                    f"{profile.id} runs models with {', '.join(profile.engines) or 'no engine'}; "
                    f"this version makes bundles of this model for {made}. edgekit inspect "
                    f"{self.request.model} --for {profile.id} judges whether it fits"
                )
            rules = "; ".join(dict.fromkeys(map(str, rulings)))
            raise LimitError(f"nothing may run on {profile.id}: {rules}")
        return plan

    def _with_accelerators(
        self, plan: tuple[Candidate, ...], came: Artifact, source: Artifact,
        profile: DeviceProfile, fit: Fit | None,
    ) -> tuple[Candidate, ...]:  # fmt: skip
        """The plan with what is tried on accelerators, each of which ran one operator here.

        Raises:
            UsageError: the profile has no accelerator of the name asked for.
            MissingToolError: nothing here reaches the one asked for.
        """
        wanted = self.request.accelerator
        known = engines_of(profile)
        if wanted == "none" or not (known or wanted):
            return plan
        if wanted is not None and wanted not in known:
            raise _no_accelerator(profile, wanted, known)
        asked = [name for one, names in known.items() for name in names if wanted in (None, one)]
        engines = list(dict.fromkeys(asked))
        faults: dict[str, str | None] = dict.fromkeys(engines, _NOT_THERE)
        if not self._there:
            with self.diary.phase("probe the accelerators"), ThreadPoolExecutor() as pool:
                faults = dict(zip(engines, pool.map(probe_engine, engines), strict=True))
        plan = with_accelerators(
            plan, profile, faults=faults, source_format=source.format, came=came.format,
            free_dimensions=has_free_dimensions(source), wanted=wanted,
            source_quantized=quantized_already(fit.graph) if fit else None,
        )  # fmt: skip
        tried = [one for one in plan if one.accelerator]
        if wanted and all(one.skip for one in tried) and not self.request.allow_fallback:
            why = "; ".join(dict.fromkeys(str(one.skip) for one in tried))
            why = why or "this version has no engine for it"
            raise MissingToolError(
                f"{wanted} was asked for and cannot be used here: {why}; --allow-fallback goes on "
                "with the CPU"
            )
        return plan

    def _tell_about_accelerators(
        self, profile: DeviceProfile, plan: tuple[Candidate, ...]
    ) -> None:  # fmt: skip
        for name, one in profile.accelerators.items():
            kind = "" if name == one.kind else f"{one.kind} "
            called = f"the {kind}{name} ({one.model or one.engine})"
            tried = [c for c in plan if c.accelerator == name]
            if self.request.accelerator not in (None, name):
                self.diary.note(f"{called} is left out, as asked")
            elif not tried:
                self.diary.note(
                    f"{called} is not used: nothing here compiles or runs models for it; edgekit "
                    f"inspect {self.request.model} --for {profile.id} says what it would run"
                )
            elif all(c.skip for c in tried):
                why = "; ".join(dict.fromkeys(str(c.skip) for c in tried))
                self.diary.note(f"{called} is not used: {why}")
            for engine in dict.fromkeys(c.engine for c in tried if not c.skip):
                if engine not in VERIFIED:
                    self.diary.note(f"{engine} is not verified: no test of EdgeKit itself runs it")

    def _firmware_plan(
        self, came: Artifact, source: Artifact, profile: DeviceProfile, fit: Fit | None,
        faults: dict[str, str | None],
    ) -> tuple[Candidate, ...]:  # fmt: skip
        if self._there:
            raise UsageError(
                f"{profile.id} runs firmware: nothing is measured on it, leave --on out"
            )
        plan = firmware_plan(
            source.format, profile, engine_faults=faults, came=came.format,
            source_quantized=quantized_already(fit.graph) if fit else None,
        )  # fmt: skip
        if all(one.skip for one in plan[1:]):
            reasons = "; ".join(dict.fromkeys(str(one.skip) for one in plan[1:]))
            raise MissingToolError(f"nothing can be tried for {profile.id}: {reasons}")
        return plan

    @property
    def _there(self) -> bool:
        return self.request.site is not HERE

    def _meet(self, site: Site, plan: tuple[Candidate, ...]) -> dict[str, Any]:
        """Have the engines of the plan on the device; its conditions."""
        if self.request.dry_run:
            return {**conditions(), "arch": site.profile.arch, "cpu": site.profile.cpu.model,
                    "cores": site.profile.cpu.cores}  # fmt: skip
        with self.diary.phase("meet the device"):
            site.need([one.engine for one in plan if not one.skip], self.diary.observer)
            with site.session():
                found = site.conditions()
        if site.simulated:
            self.diary.note(
                f"latencies are {site.label}: {site.name} is emulated, and its ranking is that of "
                "what its processor has to do, not of caches and clocks"
            )
        return found

    def _prunings(self, profile: DeviceProfile) -> list[Pruning]:
        bits = profile.cpu.simd_bits if profile.cpu else None
        multiple = max(1, (bits or 0) // 32)
        return [
            Pruning("channels", amount, multiple=multiple)
            for amount in dict.fromkeys(self.request.prune)
        ]

    def _tell_about(self, data: Dataset, split: Split) -> None:
        request = self.request
        if split.note:
            self.diary.note(split.note)
        if request.metric is None and data.labels is None:
            self.diary.note(
                f"no labels in {request.data}: outputs are compared with those of the model as it "
                f"came, and --max-drop {request.max_drop:g} is in cosine"
            )
        for note in data.notes if data.unused != (request.slice_by,) else ():
            self.diary.note(note)
        if len(split.selection) < 100:
            self.diary.note(
                f"only {len(split.selection)} samples to select on: differences of one point "
                "cannot be told from chance"
            )


def _check_writable(folder: Path) -> None:
    """Fail before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise UsageError(f"cannot write to {folder}: {error.strerror}") from None
    check_space(folder, least_bytes=_LEAST_FREE_BYTES)
