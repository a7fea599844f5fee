"""The main job: candidates -> build -> evaluate -> measure -> choose -> bundle and report.

Builds and evaluations are cached by content, so a killed run resumes and a second one only
measures. Ctrl-C or a spent budget ends the work early; what is known by then still gives a bundle.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import sandbox
from edgekit.accelerated import Order, judge_placement, not_on_it, why_simulated
from edgekit.cache import Cache, write_atomically
from edgekit.choose import Allowed, Choice, Entrant, over_budget, rank, samples_to_tell
from edgekit.control import AccuracyControl, SearchEndedError
from edgekit.device import Roofline
from edgekit.errors import (
    EdgeKitError,
    InterruptedRunError,
    ModelError,
    OutOfSpaceError,
)
from edgekit.evaluate import metric_named
from edgekit.experience import Experience, Outcome, operator_counts
from edgekit.firmware_plan import runs_firmware
from edgekit.measure.benchmark import Contender, Measurement, Rounds, measure
from edgekit.measure.report import report_html
from edgekit.measure.roof import roofline_here, share_of_roof
from edgekit.measure.site import HERE
from edgekit.observer import Diary, Observer
from edgekit.on_device import bundle_of, differs_there, measuring_inputs
from edgekit.outcome import Row, result_document
from edgekit.plan import Candidate
from edgekit.preparation import Request, prepare
from edgekit.profiles import load_profile
from edgekit.repairs import Repairs, forbidden

__all__ = ["Request", "Run", "optimize"]

#: shares of `--budget` by which building, repairing, then measuring must be over
_BUILD_SHARE, _REPAIR_SHARE, _MEASURE_SHARE = 0.4, 0.65, 0.85
#: of the time so far, what repairing again may take
_SECOND_SHARE = 0.25


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
    from edgekit.microcontroller import FirmwareRun

    firmware = request.profile is not None and runs_firmware(load_profile(request.profile))
    kind = FirmwareRun if firmware else Run
    with sandbox.until_interrupt() as cancel:
        return kind(request, observer or Observer(), cache or Cache(), cancel).go()


class Run:
    """One run of the job; `FirmwareRun` is one for devices on which nothing is measured."""

    def __init__(
        self, request: Request, observer: Observer, cache: Cache, cancel: threading.Event
    ) -> None:
        self.request, self.observer, self.cache, self.cancel = request, observer, cache, cancel
        self.allowed = Allowed(request.max_drop, request.max_slice_drop)
        self.started = time.monotonic()
        self.diary = Diary(observer)
        self.incomplete: list[str] = []
        self.roofline: Roofline | None = None
        self.backup: Row | None = None
        self.saved = False
        self.search = {"evaluations": 0, "screenings": 0, "samples": 0}

    def go(self) -> dict[str, Any]:
        self.job = job = prepare(self.request, self.diary, self.cache)
        operators = operator_counts(job.fit.graph) if job.fit else {}
        self.experience = Experience(self.cache.root, operators, job.conditions["isa"])
        rows = [Row(c) for c in self.job.plan]
        for row in rows:
            if row.candidate.skip:
                row.end("skipped", row.candidate.skip)
        with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
            self.work = Path(scratch)
            with self.diary.phase("build and evaluate"):
                self._build_all(rows)
            with self.diary.phase("repair what lost too much"):
                self._repair_all(rows)
            with self.diary.phase("measure"):
                self._measure_all(rows)
            with self.diary.phase("choose and confirm"):
                chosen, confirmation = self._choose(rows)
            with self.diary.phase("bundle and report"):
                return self._finish(rows, chosen, confirmation)

    # --- build and evaluate ---------------------------------------------------------------------

    def _build_all(self, rows: list[Row]) -> None:
        reference = rows[0]
        self._build(reference, None)
        if self.cancel.is_set() and not reference.evaluation:
            raise InterruptedRunError("stopped before the reference was evaluated: no result")
        if reference.status == "failed":
            raise ModelError(f"the reference cannot be evaluated: {reference.reason}")
        self._doubt(reference)
        if not self.cancel.is_set():
            self._quick_look([reference])
            self._save_best([reference])
        deadline = self._deadline(_BUILD_SHARE)
        todo = [row for row in rows[1:] if row.status == "planned"]
        if deadline is not None:  # what did well on networks like this comes before time is up
            todo.sort(key=lambda row: -self._promise(row.candidate))
        # Builds and evaluations are not timed, so they may share the machine.
        with ThreadPoolExecutor(max_workers=_jobs()) as pool:
            for future in [pool.submit(self._build, row, deadline) for row in todo]:
                future.result()
        if self.cancel.is_set():
            self.incomplete.append("stopped by the user")
        elif any(row.status == "skipped" and row.reason == _SPENT for row in rows):
            self.incomplete.append("the budget was spent before everything was tried")

    def _promise(self, candidate: Candidate) -> float:
        return self.experience.promise(candidate.engine, candidate.scheme.id)

    def _doubt(self, reference: Row) -> None:
        """Say so when the model as it came does not know the answers: then nothing can be lost."""
        labels, figure = self.job.data.labels, (reference.evaluation or {}).get("metric", 1.0)
        if labels is None or not metric_named(self.job.metric).counts:
            return
        chance = 1 / max(2, len(np.unique(labels)))
        if figure <= 1.2 * chance:
            self.diary.note(
                f"the model as it came reaches {self.job.metric} {figure:.4f}, no better than "
                f"chance ({chance:.4f}): are the labels in its order, and is it preprocessed as "
                "in training?"
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
            row.artifact = self.job.builder.artifact(candidate, limits, progress)
            row.build_s = time.monotonic() - start
            broken = forbidden(self.job, candidate, row.artifact)
            if broken:
                return row.end("dropped", broken)
            misplaced = judge_placement(self.job, self.request, row, limits, progress)
            row.evaluation = self.job.builder.evaluate(
                candidate, row.artifact, self.job.split.selection, limits, progress
            )
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
        reason = over_budget(row.evaluation, self.allowed)
        if reason:
            row.end("dropped", reason)
            row.lost = True
        if misplaced:
            row.end("dropped", misplaced)
            row.lost, reason = False, misplaced
        self.observer.row(
            candidate.id,
            f"{self.job.metric} {figure:.4f}" + (f", dropped: {reason}" if reason else ""),
        )
        return None

    # --- repair ---------------------------------------------------------------------------------

    def _repair_all(self, rows: list[Row]) -> None:
        if self.cancel.is_set() or not any(row.lost for row in rows):
            return
        lost = [row for row in rows if row.lost]
        if not self._search(rows, lost, self.allowed, self._deadline(_REPAIR_SHARE)):
            self.incomplete.append("the budget was spent before all that lost was repaired")
        if self.cancel.is_set() and not self.incomplete:
            self.incomplete.append("stopped by the user")

    def _search(
        self, rows: list[Row], lost: list[Row], allowed: Allowed, deadline: float | None
    ) -> bool:  # fmt: skip
        """Repair what lost too much; False where the time was not enough for all of it."""
        whole = True

        def limits() -> sandbox.Limits:
            left = 900.0 if deadline is None else deadline - time.monotonic()
            if left <= 0 or self.cancel.is_set():
                raise SearchEndedError
            return sandbox.Limits(timeout_s=min(900.0, left), cancel=self.cancel)

        def look(row: Row) -> None:
            misplaced = judge_placement(self.job, self.request, row, limits(), lambda *_: None)
            if misplaced:
                row.end("dropped", misplaced)
            self._quick_look([rows[0], row])
            self._save_best(rows)

        job = self.job
        control = AccuracyControl(
            job.builder, job.profile.quantization, allowed, limits,
            lambda text: self.observer.row("repair", text), experience=self.experience,
        )  # fmt: skip
        try:
            self._quick_look(rows)
            self._save_best(rows)
            Repairs(job, control, self.observer, self._cost, look).run(rows, lost)
        except SearchEndedError:
            whole = self.cancel.is_set()
        except EdgeKitError:
            if not self.cancel.is_set():
                raise
        for name, count in control.spent.items():
            self.search[name] += count
        return whole

    def _quick_look(self, rows: list[Row]) -> None:
        """About how long each takes, to know what is worth repairing; measured again later."""
        contenders = [
            Contender(
                row.candidate.id, row.artifact.path, self.job.threads, row.candidate.engine,
                serious=False, precision=row.candidate.precision,
            )
            for row in rows
            if row.artifact is not None and row.evaluation
        ]  # fmt: skip
        taken = measure(
            contenders, rows[0].candidate.id, inputs=measuring_inputs(self.job, self.work),
            rounds=Rounds(least=3, most=3, block_s=0.02), cancel=self.cancel,
            deadline=self._deadline(_REPAIR_SHARE), seed=self.request.seed, site=self.request.site,
        )  # fmt: skip
        base = taken[rows[0].candidate.id].medians_ns
        for row in rows:
            found = taken.get(row.candidate.id)
            if found is not None and found.rounds_ns and base:
                row.quick = float(np.median(found.medians_ns) / np.median(base))
                if (
                    row.simulated and row.artifact and rows[0].artifact
                ):  # the best there is to go by
                    row.quick = row.artifact.size_bytes / rows[0].artifact.size_bytes
                if not row.measurement or len(row.measurement.rounds_ns) <= len(found.rounds_ns):
                    row.measurement = found

    def _save_best(self, rows: list[Row]) -> None:
        """Write the best so far: whatever ends this run, a bundle within the budget is there."""
        able = [
            row for row in rows
            if row.status == "planned" and row.measurement and not row.candidate.reference_only
            if not row.simulated
        ]  # fmt: skip
        if able and not self.cancel.is_set():
            self._write_bundle(min(able, key=self._cost), ["the best so far of a search"])
            self.saved = True

    def _cost(self, row: Row) -> float:
        """What is to be least: latency as a quick look found it (of the reference's), or size."""
        if self.request.minimize == "size":
            return float(row.artifact.size_bytes) if row.artifact else float("inf")
        return row.quick

    # --- measure --------------------------------------------------------------------------------

    def _measure_all(self, rows: list[Row]) -> None:
        inputs = measuring_inputs(self.job, self.work)
        contenders = [
            Contender(
                row.candidate.id, row.artifact.path, self.job.threads, row.candidate.engine,
                serious=row.status == "planned", precision=row.candidate.precision,
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
            site=self.request.site,
        )
        if self.cancel.is_set():
            self.incomplete.append("measuring was stopped by the user")
        for row in rows:
            row.measurement = taken.get(row.candidate.id)
            if row.measurement is not None and row.measurement.failure:
                row.end("failed", f"measuring: {row.measurement.failure}")
        if rows[0].status == "failed":
            raise EdgeKitError(f"the reference cannot be measured: {rows[0].reason}")
        if not hurried:
            self._compare_with_roof(rows)

    def _compare_with_roof(self, rows: list[Row]) -> None:
        """The share of the device's roof each candidate reaches. It decides nothing, so whatever
        cannot be found out is left out."""
        job = self.job
        if job.fit is None or job.conditions["arch"] != job.profile.arch:
            return
        if self.request.site.simulated:  # a roof is of hardware
            return
        by_cpu = [row for row in rows if row.measurement and not row.candidate.accelerator]
        engines = {row.candidate.engine for row in by_cpu}
        self.roofline = job.profile.roofline
        with suppress(EdgeKitError):
            if self.request.site is not HERE and self.roofline is None:
                return
            self.roofline = self.roofline or roofline_here(
                sorted(engines), job.threads, job.conditions, self.cache,
                lambda done, total: self.observer.progress("measuring the roof", done, total),
            )  # fmt: skip
        for row in rows:
            latency = row.measurement.latency() if row.measurement else None
            apart = row.candidate.pruning or row.candidate.accelerator
            if self.roofline is not None and latency and not apart:
                row.roof_share = share_of_roof(
                    job.fit.graph, self.roofline, engine=row.candidate.engine,
                    scheme_kind=row.candidate.scheme.kind, threads=job.threads,
                    latency_ns=latency["p50"],
                )  # fmt: skip

    # --- choose and confirm ---------------------------------------------------------------------

    def _choose(
        self, rows: list[Row], tries: int = 0
    ) -> tuple[Row | None, dict[str, Any] | None]:  # fmt: skip
        """The chosen row, and what the untouched samples said; no row if nothing is left
        that the device can run."""
        by_id = {row.candidate.id: row for row in rows}
        eligible = not rows[0].candidate.reference_only
        choice = self._ranked(rows, eligible=eligible)
        for key, reason in choice.dropped.items():
            by_id[key].end("dropped", reason)
        first_try, failed = tries == 0, list[Row]()
        order = Order.of(self.job, self.request, rows, choice.order)
        chosen, confirmation, tries = self._first_confirmed(order.ids, by_id, tries, failed)
        if chosen is None and eligible and order.may_be_reference:
            chosen = rows[0]
        if first_try and failed and self._second_chance(failed, rows):
            return self._choose(rows, tries)
        self.backup, again, backups = None, list[Row](), order.backups if chosen else ()
        if chosen is not None and chosen.simulated:
            self.backup, *_ = self._first_confirmed(backups, by_id, tries, again)
        for row in rows:
            if row is chosen and row.simulated:
                row.end("chosen", why_simulated(row, self.request.allow_fallback))
            elif row is chosen:
                first = row.candidate.id in choice.order[:1]
                row.end("chosen", choice.why if first else self._why_next(row, rows[0]))
            elif row is self.backup:
                row.end("kept", "second in the bundle, for where the accelerator is not to be had")
            elif row.candidate.reference_only and row.status == "planned":
                row.end("kept", f"only compared with: {row.candidate.ruling or _NEEDS_FIXED}")
            elif row.status == "planned":
                row.end("kept", self._why_kept(row, chosen, rows[0]) if chosen else "")
        if chosen is None:
            profile, budget = self.job.profile.id, f"{self.request.max_drop:g}"
            self.diary.note(
                f"nothing that {profile} can run was tried to the end: no bundle was made"
                if self.incomplete
                else not_on_it(self.request, rows)
                or f"nothing is left that {profile} can run within the accuracy budget of "
                f"{budget}: no bundle was made"
            )
        return chosen, confirmation

    def _first_confirmed(
        self, order: Sequence[str], by_id: dict[str, Row], tries: int, failed: list[Row]
    ) -> tuple[Row | None, dict[str, Any] | None, int]:
        """The first that answers on the device as here, and is within the budget on the untouched
        samples; what is not goes to `failed`."""
        confirmation = None
        for key in order:
            row, tries = by_id[key], tries + 1
            if self.incomplete and "user" in self.incomplete[0]:
                return row, None, tries  # not confirmed, and said so
            other = self._differs_there(row)
            if other is not None:
                row.end("dropped", other)
                continue
            confirmation = self._confirm(row, tries)
            if confirmation is None or confirmation["reason"] is None:
                return row, confirmation, tries
            row.end("dropped", f"on the untouched samples: {confirmation['reason']}")
            self.diary.note(f"{key} was within the budget on the selection samples but not when "
                       "confirmed; the next best was taken")  # fmt: skip
            failed.append(row)
        return None, confirmation, tries

    def _ranked(self, rows: list[Row], *, eligible: bool) -> Choice:
        entrants = [
            Entrant(row.candidate.id, row.artifact.size_bytes, row.measurement)
            for row in rows
            if row.status == "planned" and row.artifact and row.measurement
            if not row.candidate.reference_only and not row.simulated
        ]
        base = Entrant(rows[0].candidate.id, self.job.source.size_bytes, _measured(rows[0]))
        return rank(entrants, base, self.request.minimize, eligible=eligible)

    def _why_next(self, row: Row, reference: Row) -> str:
        ratio = row.ratio_to(reference)
        if row is reference or ratio is None:
            return "what was better on the selection samples lost too much when it was confirmed"
        return (
            f"{ratio[0]:.2f}x the latency of fp32; the best of those that did not lose too much "
            "when they were confirmed"
        )

    def _why_kept(self, row: Row, chosen: Row, reference: Row) -> str:
        ratio, slower = row.ratio_to(chosen), row.ratio_to(reference)
        if ratio is None or slower is None:
            return ""
        low = slower[1]
        if low is not None and low > 1.0:
            return f"smaller, but {slower[0]:.2f}x the latency of fp32"
        return f"good, but {ratio[0]:.2f}x the latency of the chosen one"

    def _differs_there(self, row: Row) -> str | None:
        """Why the device does not answer as this machine does, if it does not."""
        if self.request.site is HERE:
            return None
        self._write_bundle(row, [], self.work / "finalist.edgekit")
        return differs_there(self.request.site, self.work / "finalist.edgekit", self.job.threads)

    def _second_chance(self, failed: list[Row], rows: list[Row]) -> bool:
        """Repair what was good on the samples that select and not on the others, to half the loss
        allowed; whether there is something new to choose from."""
        if self.cancel.is_set() or self.incomplete:
            return False
        before = len(rows)
        allowed = replace(self.allowed, drop=self.allowed.drop / 2)
        self.diary.note(
            f"what lost too much when it was confirmed is repaired to {allowed.drop:g}, half of "
            "what is allowed"
        )
        now = time.monotonic()
        ends = [now + _SECOND_SHARE * (now - self.started), self._deadline(_MEASURE_SHARE)]
        self._search(rows, failed, allowed, min(end for end in ends if end is not None))
        if not any(row.status == "planned" for row in rows[before:]):
            return False
        self._measure_all(rows)
        return True

    def _confirm(self, row: Row, tries: int) -> dict[str, Any] | None:
        """The candidate and the reference once on samples nothing was decided on."""
        end = self._deadline(1.0)
        timeout_s = 900.0 if end is None else max(5.0, end - time.monotonic())
        limits = sandbox.Limits(timeout_s=timeout_s, cancel=self.cancel)
        samples = self.job.split.confirmation
        try:
            before = self.job.builder.evaluate(
                self.job.plan[0], self.job.source, samples, limits,
                lambda done, total: self.observer.progress("confirming the reference", done, total),
            )  # fmt: skip
            after = before
            if row.candidate is not self.job.plan[0] and row.artifact is not None:
                after = self.job.builder.evaluate(
                    row.candidate, row.artifact, samples, limits,
                    lambda done, total: self.observer.progress("confirming", done, total),
                )  # fmt: skip
        except EdgeKitError as error:
            if not self.cancel.is_set() and (end is None or time.monotonic() < end):
                raise
            self.incomplete.append("the choice was not confirmed")
            self.diary.note(f"not confirmed: {error}")
            return None
        drop = after.get("drop", 0.0)
        reason = over_budget(after, self.allowed)
        return {
            "metric": after["metric"],
            "reference_metric": before["metric"],
            "drop": drop,
            "drop_interval": after.get("drop_interval"),
            "samples": after["samples"],
            "tries": tries,
            "reason": reason,
            "samples_to_tell": samples_to_tell(after, self.allowed),
        }

    # --- bundle and report ----------------------------------------------------------------------

    def _finish(
        self, rows: list[Row], chosen: Row | None, confirmation: dict[str, Any] | None
    ) -> dict[str, Any]:
        request = self.request
        report = request.out / "report.html"
        document = {
            **result_document(self.job, request, rows, chosen),
            "why": chosen.reason if chosen else self.diary.notes[-1],
            "confirmation": confirmation,
            "bundle": str(request.out / "model.edgekit") if chosen else None,
            "second": self.backup.candidate.id if self.backup else None,
            "report": str(report),
            "incomplete": bool(self.incomplete),
            "notes": [*self.diary.notes, *self.incomplete],
            "search": self.search,
            "roofline": self.roofline.model_dump() if self.roofline else None,
        }
        self._remember(rows)
        if chosen is not None:
            self._write_bundle(chosen, self.incomplete)
            document["bundle_bytes"] = (request.out / "model.edgekit").stat().st_size
        elif self.saved:
            (request.out / "model.edgekit").unlink(missing_ok=True)
        document["seconds"] = {**self.diary.seconds, "total": time.monotonic() - self.started}
        samples = {row.candidate.id: row.measurement.rounds_ns for row in rows if row.measurement}
        write_atomically(report, report_html(document).encode())
        write_atomically(
            request.out / "result.json",
            json.dumps({**document, "rounds_ns": samples}, indent=1).encode(),
        )
        with suppress(OSError):
            self.cache.trim()
        return document

    def _remember(self, rows: list[Row]) -> None:
        """What came of it, for runs on networks like this."""
        if self.incomplete:
            return
        self.experience.add(
            Outcome(
                row.candidate.engine, row.candidate.scheme.id,
                good=over_budget(row.evaluation, self.allowed) is None
                and (bool(row.repairs) or row.gains(rows[0], self.request.minimize)),
                repair=bool(row.repairs),
            )
            for row in rows[1:]
            if row.evaluation and not (row.candidate.scheme.keep or row.candidate.pruning)
        )  # fmt: skip

    def _write_bundle(self, chosen: Row, incomplete: list[str], path: Path | None = None) -> None:
        bundle_of(
            self.job, self.request, chosen, path or self.request.out / "model.edgekit",
            incomplete=incomplete, work=self.work,
            second=self.backup if chosen.simulated else None,
        )  # fmt: skip

    # --- small things ---------------------------------------------------------------------------

    def _deadline(self, share: float) -> float | None:
        budget = self.request.budget_s
        return None if budget is None else self.started + share * budget


def _measured(row: Row) -> Measurement:
    assert row.measurement is not None  # noqa: S101  (the reference is measured, or we stop)
    return row.measurement


_NEEDS_FIXED = "the device takes fixed shapes only"
_SPENT = "the budget was spent before it was done"
_STOPPED = "stopped by the user before it was done"


def _jobs() -> int:
    """How many builds and evaluations run at once: one per core, each with room for 4 GB."""
    import psutil

    room = int(psutil.virtual_memory().total // (4 << 30))
    return max(1, min(os.cpu_count() or 1, room))
