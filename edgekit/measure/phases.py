"""The phases of `edgekit bench`, each of which may fail without taking the others along."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import EdgeKitError, TargetError, UsageError
from edgekit.measure.benchmark import Rounds, measure
from edgekit.measure.conditions import Moment
from edgekit.measure.energy import Meter, idle_watts, open_meter, per_inference
from edgekit.measure.record import sound
from edgekit.measure.series import latency_summary, warm_up, width
from edgekit.measure.site import HERE, Site
from edgekit.measure.soak import soak
from edgekit.measure.statistics import median_interval, ratio_interval
from edgekit.measure.worker import Contender, Worker
from edgekit.observer import Observer
from edgekit_runtime.timing import pack_ns

__all__ = ["INTENTS", "STOPPED", "Bench", "Phases", "run_phases"]

INTENTS = ("latency", "throughput", "balanced")
#: the failure of what Ctrl-C ended
STOPPED = "stopped"
_BATCHES = (1, 2, 4, 8)
_THROUGHPUT_S = 1.0
#: kept of a run; at a microsecond each, these are taken in a tenth of a second
_MOST_SAMPLES = 200_000
#: a median of fewer is not shown as settled
_LEAST_SAMPLES = 50


@dataclass(frozen=True)
class Bench:
    """What is asked. `threads` are swept if there is more than one number; `intent` chooses
    threads (and streams) by measuring; `enough` is the half-width of the median's interval, as a
    share, at which the warm phase ends before its budget."""

    contender: Contender
    cores: int
    inputs: Path | None = None
    cold: int = 5
    budget_s: float = 10.0
    enough: float = 0.01
    soak_s: float = 0.0
    threads: tuple[int, ...] = ()
    intent: str | None = None
    throughput: bool = False
    site: Site = HERE


@dataclass
class Phases:
    """What was found; `phases` has a row for each phase: name, status (done, partial, failed),
    seconds and failure. Keys of `found` are those of `edgekit.bench/1`."""

    found: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    failure_code: int = 3

    @property
    def status(self) -> str:
        """`done`, `partial` (some phases failed) or `failed` (none worked)."""
        states = [one["status"] for one in self.phases]
        if all(one == "done" for one in states):
            return "done"
        return "partial" if any(one != "failed" for one in states) else "failed"


def run_phases(
    bench: Bench, observer: Observer, *, meter: Callable[[], Meter | str] = open_meter
) -> Phases:
    """Run all phases that were asked for; Ctrl-C ends them and keeps what there is."""
    job = _Job(bench, observer, meter)
    steps: list[tuple[str, Callable[[], None]]] = [("cold start", job.cold)]
    if bench.throughput or bench.intent in ("throughput", "balanced"):
        steps.append(("throughput", job.throughput))
    if len(bench.threads) > 1 or bench.intent == "latency":
        steps.append(("threads", job.sweep))
    steps.append(("warm latency", job.warm))
    if bench.soak_s:
        steps.append(("soak", job.soak))
    for number, (name, step) in enumerate(steps, 1):
        observer.phase(f"[{number}/{len(steps)}] {name}")
        with job.phase(name):
            step()
        if job.stopped:
            break
    return job.out


class _Job:
    def __init__(self, bench: Bench, observer: Observer, meter: Callable[[], Meter | str]) -> None:
        self.bench, self.observer, self._meter = bench, observer, meter
        self.contender = bench.contender
        self.out, self.stopped = Phases(), False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        row: dict[str, Any] = {"name": name, "status": "done", "failure": None}
        self.out.phases.append(row)
        start = time.monotonic()
        try:
            yield
        except EdgeKitError as error:
            row |= {"status": "failed", "failure": str(error)}
            self.out.failure_code = error.exit_code
            self.stopped = isinstance(error, TargetError)  # nothing more comes from there
            self.observer.note(f"{name}: {error}")
        except KeyboardInterrupt as stop:
            self._partial(stop)
        row["seconds"] = round(time.monotonic() - start, 3)

    def _partial(self, failure: EdgeKitError | KeyboardInterrupt) -> None:
        """What was measured before it is kept."""
        if isinstance(failure, KeyboardInterrupt):
            self.out.phases[-1] |= {"status": "partial", "failure": STOPPED}
            self.stopped = True
            return
        self.out.phases[-1] |= {"status": "partial", "failure": str(failure)}
        self.observer.note(f"{self.out.phases[-1]['name']}: ended early: {failure}")
        if isinstance(failure, TargetError):  # nothing more comes from there
            self.stopped, self.out.failure_code = True, failure.exit_code

    def cold(self) -> None:
        found: list[dict[str, Any]] = []
        self.out.found["cold"] = found
        for done in range(self.bench.cold):
            found.append(self.bench.site.cold_start(self.contender))
            self.observer.progress("fresh processes", done + 1, self.bench.cold)

    def sweep(self) -> None:
        counts = self.bench.threads
        if len(counts) < 2:
            counts = tuple(sorted({1, *(n for n in (2, 4, 8) if n < self.bench.cores),
                                   self.bench.cores}))  # fmt: skip
        contenders = [
            replace(self.contender, id=f"{count} threads", threads=count) for count in counts
        ]
        first = contenders[0].id
        taken = measure(
            contenders, first, inputs=self.bench.inputs, rounds=Rounds(least=10, most=10),
            progress=lambda done, total: self.observer.progress("rounds", done, total),
            site=self.bench.site,
        )  # fmt: skip
        rows = []
        for one in contenders:
            found = taken[one.id]
            ratio = None
            if not found.failure and not taken[first].failure:
                ratio = list(ratio_interval(found.medians_ns, taken[first].medians_ns))
            rows.append(
                {"threads": one.threads, "latency_ns": found.latency(), "failure": found.failure,
                 "ratio_to_first": ratio}
            )  # fmt: skip
        self.out.found["threads_sweep"] = rows
        if self.bench.intent in ("throughput", "balanced"):
            return
        alive = [one for one in contenders if not taken[one.id].failure]
        if not alive:
            raise _failed(rows)
        best = min(alive, key=lambda one: median_interval(taken[one.id].medians_ns)[0])
        if self.bench.intent == "latency" or best.threads not in self.bench.threads[:1]:
            self.out.notes.append(f"warm latency is measured with {best.threads} threads: fastest")
        self.contender = replace(self.contender, threads=best.threads)

    def throughput(self) -> None:
        cores = self.bench.cores
        rows: list[dict[str, Any]] = []
        self.out.found["throughput"] = rows
        splits = sorted({cores // count for count in range(1, cores + 1)}, reverse=True)
        for done, threads in enumerate(splits):
            one = replace(self.contender, threads=threads)
            intent = "latency" if threads == cores else "throughput"
            try:
                with self.bench.site.worker(one, self.bench.inputs, intent=intent) as worker:
                    rows += self._batches(worker, threads)
            except TargetError:
                raise
            except EdgeKitError as error:
                rows.append({"streams": None, "threads": threads, "batch": None,
                             "per_second": None, "failure": str(error)})  # fmt: skip
            self.observer.progress("threads x streams", done + 1, len(splits))
        alive = [row for row in rows if row["per_second"]]
        if not alive:
            raise _failed(rows)
        if self.bench.intent in ("throughput", "balanced"):
            best = self._chosen([row for row in alive if row["batch"] == 1])
            best["chosen"] = True
            self.contender = replace(self.contender, threads=best["threads"])
            self.out.notes.append(
                f"for {self.bench.intent}: {best['streams']} streams of {best['threads']} threads"
            )

    def _batches(self, worker: Worker, threads: int) -> list[dict[str, Any]]:
        rows = []
        for batch in _BATCHES:
            streams = worker.hello["streams"]
            row: dict[str, Any] = {
                "streams": streams, "threads": threads, "batch": batch, "failure": None,
                "per_second": None,
            }  # fmt: skip
            try:
                done = worker.throughput(_THROUGHPUT_S, batch=batch)
            except EdgeKitError as error:
                rows.append(row | {"failure": str(error)})
                break  # larger ones do not fit either
            rate = done["runs"] * batch / done["wall_ns"] * 1e9
            # Little's law: calls under way over calls a second
            waits = streams * done["wall_ns"] / max(done["runs"], 1)
            rows.append(
                row | {"per_second": rate, "call_ns": int(waits),
                       "cpu_ns_per_inference": done["cpu_ns"] / max(done["runs"] * batch, 1)}
            )  # fmt: skip
        return rows

    def _chosen(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The most per second; for `balanced`, of those whose calls take at most 1.5 times as long
        as the quickest's."""
        if self.bench.intent == "balanced":
            quickest = min(row["call_ns"] for row in rows)
            rows = [row for row in rows if row["call_ns"] <= 1.5 * quickest]
        return max(rows, key=lambda row: float(row["per_second"]))

    def warm(self) -> None:
        bench, found = self.bench, self.out.found
        meter = self._meter() if bench.site is HERE else f"no meter of {bench.site.name} is read"
        idle = idle_watts(meter) if isinstance(meter, Meter) else 0.0
        samples: list[int] = []
        joules = busy_s = 0.0
        cpu_ns = 0
        stopped, looked, checked = "budget", 0.0, 0.0
        with bench.site.worker(self.contender, bench.inputs) as worker:
            hello = worker.hello
            found |= {key: hello[key] for key in ("variant", "engine_version", "placement")}
            if hello["passed_over"]:
                self.out.notes.append(
                    f"runs variant {hello['variant']}; not {hello['passed_over']}"
                )
            found["threads"], found["streams"] = self.contender.threads, hello["streams"]
            start = time.monotonic()
            while (passed := time.monotonic() - start) < bench.budget_s or not samples:
                try:
                    if passed - looked >= 1:
                        looked = passed
                        self.out.moments.append(bench.site.moment())
                        self.observer.progress("runs", int(passed * 10), int(bench.budget_s * 10))
                    before = time.monotonic(), meter.joules() if isinstance(meter, Meter) else 0.0
                    block = worker.take(0.1, most=20_000)
                except (EdgeKitError, KeyboardInterrupt) as error:
                    if not samples:
                        raise
                    self._partial(error)
                    stopped = "failure" if isinstance(error, EdgeKitError) else STOPPED
                    break
                if isinstance(meter, Meter):
                    joules += meter.joules() - before[1]
                busy_s += time.monotonic() - before[0]
                samples += block.samples_ns
                cpu_ns += block.cpu_ns
                if passed - checked >= 0.5 and passed >= 1:
                    checked = passed
                    if _settled(samples, bench.enough):
                        stopped = "narrow"
                        break
                if len(samples) >= _MOST_SAMPLES:
                    stopped = "samples"
                    break
            found["peak_rss_bytes"] = worker.peak_rss_bytes
        self._summarise(samples, stopped)
        found["cpu_ns_per_run"] = cpu_ns / len(samples)
        found["energy"] = {"joules_per_inference": None, "reason": meter}
        if isinstance(meter, Meter):
            found["energy"] = per_inference(
                meter, idle_w=idle, joules=joules, seconds=busy_s, runs=len(samples)
            )

    def _summarise(self, samples: list[int], stopped: str) -> None:
        kept, notes = sound(samples)
        self.out.notes += notes
        found = self.out.found
        found["samples_ns"], found["stopped"] = pack_ns(samples), stopped
        if not kept:
            raise UsageError(
                "every run took 0 ns by this machine's clock: it is too coarse for this model"
            )
        cut = min(warm_up(kept), len(kept) - 1)
        found["warm_up_samples"] = cut if len(kept) == len(samples) else None
        emulated = (found["placement"] or {}).get("simulated")
        label = "simulated" if emulated else self.bench.site.label
        if emulated:
            self.out.notes.append(
                f"{emulated} stands in for the accelerator: these times say nothing of a device's"
            )
        found["latency_ns"] = latency_summary(kept[cut:], label=label)
        found["median_half_width"] = _number(width(kept[cut:]))

    def soak(self) -> None:
        with self.bench.site.worker(self.contender, self.bench.inputs) as worker:
            result = soak(
                lambda window_s: worker.take(window_s, most=1_000_000).samples_ns,
                self.bench.soak_s,
                look=self.bench.site.moment,
                progress=lambda done, total: self.observer.progress("soak (s)", done, total),
            )
        self.out.found["soak"] = result.to_json()
        if result.error is not None:
            self._partial(result.error)


def _failed(rows: list[dict[str, Any]]) -> EdgeKitError:
    return EdgeKitError(str(rows[-1]["failure"]))


def _settled(samples: list[int], enough: float) -> bool:
    kept, _ = sound(samples)
    if len(kept) < _LEAST_SAMPLES:
        return False
    recent = kept[warm_up(kept) :]
    # a hundredth of very many is decided as well by every tenth of them
    step = max(1, len(recent) // 20_000)
    return width(np.asarray(recent)[::step].tolist()) <= enough


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
