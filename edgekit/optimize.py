"""The main job: candidates -> build -> evaluate -> measure -> choose -> bundle and report.

Builds and evaluations are cached by content, so a killed run resumes and a second one only
measures. Ctrl-C or a spent budget ends the work early; what is known by then still gives a bundle.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import Artifact, TensorSpec, open_model
from edgekit.bundle import VariantSource, write_bundle
from edgekit.cache import Cache, Key, check_space, content_key, write_atomically
from edgekit.choose import Aim, Choice, Entrant, over_budget, rank
from edgekit.compress.quantize import quantize
from edgekit.convert import convert, tool_versions
from edgekit.data import open_dataset, split_samples
from edgekit.device import load_profile, probe_engine
from edgekit.errors import (
    EdgeKitError,
    InterruptedRunError,
    ModelError,
    OutOfSpaceError,
    UsageError,
)
from edgekit.evaluate import METRICS, metric_named
from edgekit.measure.benchmark import Contender, Rounds, measure
from edgekit.measure.conditions import conditions
from edgekit.measure.report import report_html
from edgekit.observer import Observer
from edgekit.outcome import SCHEMA, Row, data_facts, describe, model_facts
from edgekit.pipeline import Pipeline, read_pipeline
from edgekit.plan import Candidate, make_plan
from edgekit_runtime import __version__

__all__ = ["Request", "optimize"]

#: shares of `--budget` by which building, then measuring must be over
_BUILD_SHARE, _MEASURE_SHARE = 0.6, 0.85
_MEASURE_SAMPLES = 32
_LEAST_FREE_BYTES = 16 << 20


@dataclass(frozen=True)
class Request:
    """What the user asked for. `max_drop` is in the metric's units, `budget_s` wall clock."""

    model: Path
    profile: str
    data: str
    out: Path
    calibration: str | None = None
    metric: str | None = None
    max_drop: float = 0.01
    minimize: Aim = "latency"
    target: str = "local"
    budget_s: float | None = None
    threads: int | None = None
    seed: int = 0
    command: str = ""
    preprocess: Path | None = None


def optimize(
    request: Request, observer: Observer | None = None, cache: Cache | None = None
) -> dict[str, Any]:
    """Run the whole job; returns the result document (`edgekit.optimize/1`).

    Writes `model.edgekit`, `report.html` and `result.json` (with raw samples) into `request.out`.

    Raises:
        UsageError: something in the request cannot be used; nothing was written.
        EdgeKitError: the reference model itself cannot be loaded or evaluated.
        InterruptedRunError: stopped before the reference was evaluated.
    """
    with sandbox.until_interrupt() as cancel:
        return _Run(request, observer or Observer(), cache or Cache(), cancel).go()


class _Run:
    def __init__(
        self, request: Request, observer: Observer, cache: Cache, cancel: threading.Event
    ) -> None:
        self.request, self.observer, self.cache, self.cancel = request, observer, cache, cancel
        self.started = time.monotonic()
        self.notes: list[str] = []
        self.incomplete: list[str] = []
        self.seconds: dict[str, float] = {}
        self._formats: dict[str, Artifact | EdgeKitError] = {}
        self._locks: dict[str, threading.Lock] = {}

    def go(self) -> dict[str, Any]:
        self._prepare()
        rows = [Row(c) for c in self.plan]
        for row in rows:
            if row.candidate.skip:
                row.end("skipped", row.candidate.skip)
        with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
            self.work = Path(scratch)
            with self._phase("build and evaluate"):
                self._build_all(rows)
            with self._phase("measure"):
                self._measure_all(rows)
            with self._phase("choose and confirm"):
                choice, chosen, confirmation = self._choose(rows)
            with self._phase("bundle and report"):
                return self._finish(rows, choice, chosen, confirmation)

    # --- before anything is built ---------------------------------------------------------------

    def _prepare(self) -> None:
        request = self.request
        if request.target != "local":
            raise UsageError(f"the target {request.target!r} is not known; this version has: local")
        if not request.max_drop >= 0:
            raise UsageError(f"--max-drop is {request.max_drop}; wanted 0 or more")
        self.profile = load_profile(request.profile)
        self.threads = request.threads or self.profile.threads
        _check_writable(request.out)
        check_space(self.cache.root, least_bytes=_LEAST_FREE_BYTES)
        with self._phase("read the model and the data"):
            self.source = open_model(request.model)
            self.pipeline = Pipeline()
            if request.preprocess:
                self.pipeline = read_pipeline(
                    request.preprocess, self.source.inputs, self.source.outputs
                )
            self.data = open_dataset(request.data, self.source.inputs, self.cache, self.pipeline)
            calibration = (
                open_dataset(request.calibration, self.source.inputs, self.cache, self.pipeline)
                if request.calibration
                else None
            )
            self.split = split_samples(self.data, calibration, seed=request.seed)
        if self.split.note:
            self._note(self.split.note)
        self.metric = request.metric or ("top1" if self.data.labels is not None else "cosine")
        metric_named(self.metric)
        if request.metric is None and self.data.labels is None:
            self._note(
                f"no labels in {request.data}: outputs are compared with those of the model as it "
                f"came, and --max-drop {request.max_drop:g} is in cosine"
            )
        if self.data.unused:
            self._note(f"arrays of {request.data} not used: {', '.join(self.data.unused)}")
        if len(self.split.selection) < 100:
            self._note(
                f"only {len(self.split.selection)} samples to select on: differences of one point "
                "cannot be told from chance"
            )
        with self._phase("probe the engines"), ThreadPoolExecutor() as pool:
            engines = list(dict.fromkeys([*self.profile.engines, _native(self.source.format)]))
            faults = dict(zip(engines, pool.map(probe_engine, engines), strict=True))
        self.plan = make_plan(
            self.source.format, self.profile, threads=self.threads, engine_faults=faults
        )
        if self.plan[0].skip:
            raise EdgeKitError(f"the reference cannot be run: {self.plan[0].skip}")
        self.conditions = conditions()
        if self.conditions["arch"] != self.profile.arch:
            self._note(
                f"measured on this machine ({self.conditions['arch']}), not on a "
                f"{self.profile.name} ({self.profile.arch}): the choice holds there only if the "
                "ranking carries over"
            )
        self.observer.plan(self.plan, self.profile)

    # --- build and evaluate ---------------------------------------------------------------------

    def _build_all(self, rows: list[Row]) -> None:
        reference = rows[0]
        self._build(reference, None)
        if self.cancel.is_set() and not reference.evaluation:
            raise InterruptedRunError("stopped before the reference was evaluated: no result")
        if reference.status == "failed":
            raise ModelError(f"the reference cannot be evaluated: {reference.reason}")
        self._doubt(reference)
        deadline = self._deadline(_BUILD_SHARE)
        todo = [row for row in rows[1:] if row.status == "planned"]
        # Builds and evaluations are not timed, so they may share the machine.
        with ThreadPoolExecutor(max_workers=_jobs()) as pool:
            for future in [pool.submit(self._build, row, deadline) for row in todo]:
                future.result()
        if self.cancel.is_set():
            self.incomplete.append("stopped by the user")
        elif any(row.status == "skipped" and row.reason == _SPENT for row in rows):
            self.incomplete.append("the budget was spent before everything was tried")

    def _doubt(self, reference: Row) -> None:
        """Say so when the model as it came does not know the answers: then nothing can be lost."""
        labels, figure = self.data.labels, (reference.evaluation or {}).get("metric", 1.0)
        if labels is None or not metric_named(self.metric).counts:
            return
        chance = 1 / max(2, len(np.unique(labels)))
        if figure <= 1.2 * chance:
            self._note(
                f"the model as it came reaches {self.metric} {figure:.4f}, no better than chance "
                f"({chance:.4f}): are the labels in its order, and is it preprocessed as in "
                "training?"
            )

    def _build(self, row: Row, deadline: float | None) -> None:
        """Build and evaluate one candidate; its failure is its row, a full disk is ours."""
        candidate = row.candidate
        timeout_s = 900.0 if deadline is None else deadline - time.monotonic()
        if timeout_s <= 0 or self.cancel.is_set():
            return row.end("skipped", _STOPPED if self.cancel.is_set() else _SPENT)
        limits = sandbox.Limits(timeout_s=min(900.0, timeout_s), cancel=self.cancel)
        start = time.monotonic()

        def progress(done: int, total: int) -> None:
            self.observer.progress(candidate.id, done, total)

        try:
            row.artifact = self._artifact(candidate, limits, progress)
            row.build_s = time.monotonic() - start
            row.evaluation = self._evaluate(row, self.split.selection, limits, progress)
        except OutOfSpaceError:
            raise
        except EdgeKitError as error:
            if self.cancel.is_set():
                row.end("skipped", _STOPPED)
            elif deadline is not None and time.monotonic() > deadline:
                row.end("skipped", _SPENT)
            else:
                row.end("failed", str(error))
            self.observer.row(candidate.id, f"{row.status}: {row.reason}")
            return None
        figure = row.evaluation["metric"]
        reason = over_budget(
            row.evaluation.get("drop", 0.0), self.request.max_drop, row.evaluation["broken"],
            row.evaluation["samples"],
        )  # fmt: skip
        if reason:
            row.end("dropped", reason)
        self.observer.row(
            candidate.id, f"{self.metric} {figure:.4f}" + (f", dropped: {reason}" if reason else "")
        )
        return None

    def _artifact(
        self, candidate: Candidate, limits: sandbox.Limits, progress: Callable[[int, int], None]
    ) -> Artifact:
        artifact = self._converted(candidate.format, limits, progress)
        if candidate.scheme.kind == "fp32":
            return artifact
        return quantize(
            artifact, candidate.scheme, self.split.calibration_data, self.split.calibration,
            cache=self.cache, limits=limits, progress=progress,
        )  # fmt: skip

    def _converted(
        self, fmt: str, limits: sandbox.Limits, progress: Callable[[int, int], None]
    ) -> Artifact:
        """The source in a format: made once for all candidates, as is its failure."""
        with self._locks.setdefault(fmt, threading.Lock()):
            if fmt not in self._formats:
                try:
                    self._formats[fmt] = convert(
                        self.source, fmt, cache=self.cache, limits=limits, progress=progress
                    )
                except EdgeKitError as error:
                    self._formats[fmt] = error
        found = self._formats[fmt]
        if isinstance(found, EdgeKitError):
            raise found
        return found

    def _evaluate(
        self,
        row: Row,
        samples: NDArray[np.int64],
        limits: sandbox.Limits,
        progress: Callable[[int, int], None],
    ) -> dict[str, Any]:
        """The metric on these samples, paired with the reference's; by content."""
        assert row.artifact is not None  # noqa: S101  (built before)
        is_reference = row.candidate is self.plan[0]
        base = None if is_reference else self._evaluation_key(self.source, self.plan[0], samples)
        key = self._evaluation_key(row.artifact, row.candidate, samples)

        def make(folder: Path) -> None:
            np.save(folder / "samples.npy", samples)
            result = sandbox.call(
                "edgekit.evaluate:evaluate",
                {
                    "model": str(row.artifact.path if row.artifact else ""),
                    "options": {"engine": row.candidate.engine},
                    "data": {
                        "folder": str(self.data.folder),
                        "sha256": self.data.sha256,
                        "source": self.data.source,
                    },
                    "indices": str(folder / "samples.npy"),
                    "metric": self.metric,
                    "folder": str(folder),
                    "reference": str(self.cache.get(base)) if base else None,
                },
                limits=limits,
                progress=progress,
                what=f"evaluating {row.candidate.id}",
            )
            (folder / "result.json").write_text(json.dumps(result))

        folder = self.cache.folder(key, make)
        loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return loaded

    def _evaluation_key(
        self, artifact: Artifact, candidate: Candidate, samples: NDArray[np.int64]
    ) -> Key:
        engine = {"litert": "ai-edge-litert"}.get(candidate.engine, candidate.engine)
        metric: Any = self.metric
        if metric not in METRICS:  # the user's function: what it says, not what it is called
            metric = [metric, Path(metric.rpartition(":")[0]).read_text()]
        return content_key(
            kind="evaluate", recipe=2, model=artifact.sha256, data=self.data.sha256,
            samples=samples.tolist(), metric=metric, engine=tool_versions((engine,)),
            # int8 results depend on the CPU's instructions, and the drop on the reference
            isa=self.conditions["isa"], reference=self.source.sha256,
        )  # fmt: skip

    # --- measure --------------------------------------------------------------------------------

    def _measure_all(self, rows: list[Row]) -> None:
        inputs = self._measuring_inputs()
        contenders = [
            Contender(
                row.candidate.id, row.artifact.path, self.threads, row.candidate.engine,
                serious=row.status == "planned",
            )
            for row in rows
            if row.artifact is not None and row.evaluation
        ]  # fmt: skip
        hurried = self.cancel.is_set()
        if hurried:  # the user waits: only what may be chosen, and briefly
            contenders = [one for one in contenders if one.serious]
            self.cancel.clear()
        taken = measure(
            contenders,
            rows[0].candidate.id,
            inputs=inputs,
            rounds=Rounds(most=6, block_s=0.04) if hurried else Rounds(),
            deadline=self._deadline(_MEASURE_SHARE),
            cancel=self.cancel,
            progress=lambda done, total: self.observer.progress("measuring", done, total),
            seed=self.request.seed,
        )
        if self.cancel.is_set():
            self.incomplete.append("measuring was stopped by the user")
        for row in rows:
            row.measurement = taken.get(row.candidate.id)
            if row.measurement is not None and row.measurement.failure:
                row.end("failed", f"measuring: {row.measurement.failure}")
        if rows[0].status == "failed":
            raise EdgeKitError(f"the reference cannot be measured: {rows[0].reason}")

    def _measuring_inputs(self) -> Path:
        """Real samples to measure with: speed may depend on what is in them."""
        picked = self.split.selection[:: max(1, len(self.split.selection) // _MEASURE_SAMPLES)]
        samples = [self.data.sample(int(i), self.source.inputs) for i in picked[:_MEASURE_SAMPLES]]
        path = self.work / "inputs.npz"
        stacked = {name: np.stack([one[name] for one in samples]) for name in samples[0]}
        np.savez(path, allow_pickle=False, **stacked)
        return path

    # --- choose and confirm ---------------------------------------------------------------------

    def _choose(self, rows: list[Row]) -> tuple[Choice, Row, dict[str, Any] | None]:
        by_id = {row.candidate.id: row for row in rows}
        entrants = [
            Entrant(row.candidate.id, row.artifact.size_bytes, row.measurement)
            for row in rows
            if row.status == "planned" and row.artifact and row.measurement
        ]
        choice = rank(entrants, entrants[0], self.request.minimize)
        for key, reason in choice.dropped.items():
            by_id[key].end("dropped", reason)
        chosen, confirmation = rows[0], None
        for tries, key in enumerate(choice.order, start=1):
            chosen = by_id[key]
            if self.incomplete and "user" in self.incomplete[0]:
                break  # not confirmed, and said so
            confirmation = self._confirm(chosen, tries)
            if confirmation is None or confirmation["reason"] is None:
                break
            chosen.end("dropped", f"on the untouched samples: {confirmation['reason']}")
            self._note(f"{key} was within the budget on the selection samples but not when "
                       "confirmed; the next best was taken")  # fmt: skip
        for row in rows:
            if row is chosen:
                row.end("chosen", choice.why if row.candidate.id == choice.order[0] else "")
            elif row.status == "planned":
                row.end("kept", _why_kept(row, chosen, rows[0]))
        return choice, chosen, confirmation

    def _confirm(self, row: Row, tries: int) -> dict[str, Any] | None:
        """The candidate and the reference once on samples nothing was decided on."""
        end = self._deadline(1.0)
        timeout_s = 900.0 if end is None else max(5.0, end - time.monotonic())
        limits = sandbox.Limits(timeout_s=timeout_s, cancel=self.cancel)
        reference = Row(self.plan[0], artifact=self.source)
        samples = self.split.confirmation
        try:
            before = self._evaluate(
                reference, samples, limits,
                lambda done, total: self.observer.progress("confirming the reference", done, total),
            )  # fmt: skip
            after = before
            if row.candidate is not self.plan[0]:
                after = self._evaluate(
                    row, samples, limits,
                    lambda done, total: self.observer.progress("confirming", done, total),
                )  # fmt: skip
        except EdgeKitError as error:
            if not self.cancel.is_set() and (end is None or time.monotonic() < end):
                raise
            self.incomplete.append("the choice was not confirmed")
            self._note(f"not confirmed: {error}")
            return None
        drop = after.get("drop", 0.0)
        reason = over_budget(drop, self.request.max_drop, after["broken"], after["samples"])
        return {
            "metric": after["metric"],
            "reference_metric": before["metric"],
            "drop": drop,
            "drop_interval": after.get("drop_interval"),
            "samples": after["samples"],
            "tries": tries,
            "reason": reason,
        }

    # --- bundle and report ----------------------------------------------------------------------

    def _finish(
        self, rows: list[Row], choice: Choice, chosen: Row, confirmation: dict[str, Any] | None
    ) -> dict[str, Any]:
        request = self.request
        assert chosen.artifact is not None  # noqa: S101  (only built ones are chosen)
        assert chosen.measurement is not None  # noqa: S101
        bundle, report = request.out / "model.edgekit", request.out / "report.html"
        placement = chosen.measurement.placement
        document = self._document(rows, chosen, confirmation)
        write_bundle(
            bundle,
            (
                VariantSource(
                    chosen.candidate.id, chosen.candidate.engine, chosen.artifact,
                    str(chosen.candidate.scheme), self.threads, placement["precision"],
                    placement["shares"],
                    {
                        "latency_ns": chosen.measurement.latency(),
                        "metric": {self.metric: chosen.evaluation["metric"]},
                        "conditions": self.conditions,
                    },
                    chosen.measurement.peak_rss_bytes or None,
                ),
            ),
            name=request.model.stem,
            inputs=self._with_facts(),
            outputs=self.source.outputs,
            pipeline=self.pipeline,
            profile=self.profile.id,
            provenance={
                "edgekit": __version__,
                "command": request.command,
                "model_sha256": self.source.sha256,
                "data_sha256": self.data.sha256,
                "steps": list(chosen.artifact.provenance),
                "incomplete": self.incomplete,
            },
            work=self.work,
        )  # fmt: skip
        document["seconds"] = {**self.seconds, "total": time.monotonic() - self.started}
        samples = {row.candidate.id: row.measurement.rounds_ns for row in rows if row.measurement}
        write_atomically(report, report_html(document).encode())
        write_atomically(
            request.out / "result.json",
            json.dumps({**document, "rounds_ns": samples}, indent=1).encode(),
        )
        with suppress(OSError):
            self.cache.trim()
        return document

    def _with_facts(self) -> tuple[TensorSpec, ...]:
        sample = self.data.sample(int(self.split.selection[0]), self.source.inputs)
        ranges = self.data.ranges
        return tuple(
            replace(s, range=ranges.get(s.name), example=sample[s.name].shape)
            for s in self.source.inputs
        )

    def _document(
        self, rows: list[Row], chosen: Row, confirmation: dict[str, Any] | None
    ) -> dict[str, Any]:
        request = self.request
        described = [describe(row, rows[0]) for row in rows]
        return {
            "schema": SCHEMA,
            "model": model_facts(str(request.model), self.source),
            "profile": {"id": self.profile.id, "name": self.profile.name},
            "target": request.target,
            "metric": self.metric,
            "higher_is_better": metric_named(self.metric).higher_is_better,
            "max_drop": request.max_drop,
            "minimize": request.minimize,
            "threads": self.threads,
            "seed": request.seed,
            "budget_s": request.budget_s,
            "data": data_facts(self.data, self.split, self.pipeline),
            "reference": described[0],
            "candidates": described,
            "chosen": chosen.candidate.id,
            "why": chosen.reason,
            "confirmation": confirmation,
            "bundle": str(request.out / "model.edgekit"),
            "report": str(request.out / "report.html"),
            "incomplete": bool(self.incomplete),
            "notes": [*self.notes, *self.incomplete],
            "command": request.command,
            "edgekit": __version__,
            "conditions": self.conditions,
        }

    # --- small things ---------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.observer.phase(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - start, 3)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.observer.note(text)

    def _deadline(self, share: float) -> float | None:
        budget = self.request.budget_s
        return None if budget is None else self.started + share * budget


def _why_kept(row: Row, chosen: Row, reference: Row) -> str:
    ratio, slower = row.ratio_to(chosen), row.ratio_to(reference)
    if ratio is None or slower is None:
        return ""
    low = slower[1]
    if low is not None and low > 1.0:
        return f"smaller, but {slower[0]:.2f}x the latency of fp32"
    return f"good, but {ratio[0]:.2f}x the latency of the chosen one"


_SPENT = "the budget was spent before it was done"
_STOPPED = "stopped by the user before it was done"


def _jobs() -> int:
    """How many builds and evaluations run at once: one per core, each with room for 4 GB."""
    import psutil

    room = int(psutil.virtual_memory().total // (4 << 30))
    return max(1, min(os.cpu_count() or 1, room))


def _native(fmt: str) -> str:
    from edgekit_runtime.engines import ENGINE_OF_FORMAT

    return ENGINE_OF_FORMAT[fmt]


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
