"""The roof of a device: the most arithmetic and memory traffic that its engines reach there.

After Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009. The roof is measured, not computed from a datasheet: the
fastest block (by its median run) over all sizes and rounds counts. Whatever disturbs a
measurement makes it slower, never faster, so the best is the one nearest to what the machine can
do; an average would be a roof that models exceed in a quiet minute. On a shared host one block is
up to three times slower than the next: rounds go over all models in turn, in random order, so that
a bad minute hits all engines alike.

How a block is taken is passed in: `run_local` takes it here, and a remote target sends
`block_request` to `edgekit-runtime blocks` there.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgekit.deploy import Conversation, Transport, connect
from edgekit.device import ComputeRoof, Roofline
from edgekit.errors import (
    ChildError,
    EdgeKitError,
    EngineError,
    InterruptedRunError,
    TargetError,
    UsageError,
    by_name,
    one_line,
)
from edgekit.measure.probe_models import Dtype, Kind, ProbeModel
from edgekit.sandbox import child_environment
from edgekit_runtime.timing import percentile_ns

__all__ = [
    "FULL",
    "QUICK",
    "Effort",
    "ProbeFailure",
    "RooflineMeasurement",
    "Run",
    "bandwidth_here",
    "block_request",
    "block_samples",
    "measure_roofline",
    "roof_share",
    "run_local",
    "run_on",
]

#: takes one block of samples of a model with so many threads: nanoseconds
Run = Callable[[ProbeModel, int], list[int]]


_ENOUGH_NS = 2_000_000  # a hundred times what a call and waking up threads cost
_SAME = 0.95  # of the best: whatever is nearer counts as the same rate


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    `sizes` are tried, smallest first, until a run takes `enough_ns`. The smallest models have half
    a million operations: an emulated board gets no further. At 192 a depthwise convolution works on
    0.4 MB: most cores' own cache. Then come at most `rounds` more blocks of each, none begun after
    `time_s`: on a shared host slow seconds come in a row, and two blocks that agree prove little.
    `block_s` is for whoever makes the `run`.
    """

    sizes: tuple[int, ...]
    rounds: int
    time_s: float
    block_s: float
    enough_ns: int = _ENOUGH_NS


FULL = Effort((64, 192, 512, 1024), rounds=6, time_s=9, block_s=0.015)
QUICK = Effort((64, 320), rounds=2, time_s=3, block_s=0.008)


@dataclass(frozen=True, slots=True)
class ProbeFailure:
    """A probe model that did not run; bigger ones of its kind and dtype were not tried."""

    engine: str
    kind: Kind
    dtype: Dtype
    size: int
    threads: int
    reason: str


@dataclass(frozen=True, slots=True)
class RooflineMeasurement:
    """What was reached, and what did not run.

    `unconfirmed` are those of the roofline whose best block has no second one within 5 %: the
    machine was busy with something else, or time was up. The true roof may well be higher.
    """

    roofline: Roofline
    failures: tuple[ProbeFailure, ...]
    unconfirmed: tuple[ComputeRoof, ...]


def measure_roofline(
    models: Callable[[int], Sequence[ProbeModel]],
    run: Run,
    *,
    threads: Sequence[int],
    memory_bytes_per_s: float | None = None,
    effort: Effort = FULL,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> RooflineMeasurement:
    """Measure every model of `models(size)` with each number of threads.

    Sizes grow until one run takes long enough to be measured well, for each engine, kind, dtype and
    number of threads by itself. A model that fails is no longer run, with any number of threads;
    the reason is returned. `progress(done, total)` counts passes over all models.

        with run_local(engines, block_s=QUICK.block_s) as run:
            found = measure_roofline(
                lambda n: probe_models(folder, engines, size=n), run, threads=(1, 4), effort=QUICK
            )

    Raises:
        TargetError: the device cannot be reached any more.
        InterruptedRunError: stopped by the user.
        UsageError: no number of threads, or one below 1.
    """
    if not threads or min(threads) < 1:
        raise UsageError(f"threads are {[*threads]}; wanted at least one number, each at least 1")
    begin = time.monotonic()
    survey = _Survey(run, random.Random(seed), effort.enough_ns)  # noqa: S311  (no secret)
    passes = len(effort.sizes) + effort.rounds

    def report(done: int) -> None:
        if progress is not None:
            progress(done, passes)

    for number, size in enumerate(effort.sizes):
        wanted = survey.growing()
        if number == 0 or wanted:
            every = [(model, count) for model in models(size) for count in threads]
            survey.visit([o for o in every if number == 0 or (_probe(o[0]), o[1]) in wanted])
        report(number + 1)
    for number in range(effort.rounds):
        if time.monotonic() - begin > effort.time_s:
            break
        survey.visit(survey.again(biggest=number % 2 == 1))
        report(len(effort.sizes) + number + 1)
    report(passes)
    return survey.result(memory_bytes_per_s, max(threads))


_Probe = tuple[str, Kind, Dtype]


def _probe(model: ProbeModel) -> _Probe:
    """What sizes of the same model have in common."""
    return model.engine, model.kind, model.dtype


class _Series:
    """What is known of one probe with one number of threads: rates by model, in operations per
    second, one for each block."""

    def __init__(self) -> None:
        self.rates: dict[ProbeModel, list[float]] = {}
        self.fastest_ns = 0  # run of the last block

    def add(self, model: ProbeModel, samples: list[int]) -> None:
        rate = model.ops * 1e9 / max(1, percentile_ns(samples, 50))
        self.rates.setdefault(model, []).append(rate)
        self.fastest_ns = min(samples)

    @property
    def best(self) -> float:
        """The fastest block of all."""
        return max(map(max, self.rates.values()))

    @property
    def fastest(self) -> ProbeModel:
        """The model that was fastest."""
        return max(self.rates, key=lambda model: max(self.rates[model]))

    @property
    def biggest(self) -> ProbeModel:
        """The model that took longest."""
        return max(self.rates, key=lambda model: model.size)

    @property
    def confirmed(self) -> bool:
        """Whether the best has a second block of the same model near it."""
        return sum(rate >= _SAME * self.best for rate in self.rates[self.fastest]) > 1


class _Survey:
    """What is known so far, by probe and number of threads."""

    def __init__(self, run: Run, rng: random.Random, enough_ns: int) -> None:
        self._run, self._rng, self._enough_ns = run, rng, enough_ns
        self._series: dict[tuple[_Probe, int], _Series] = {}
        self._failures: dict[_Probe, ProbeFailure] = {}

    def visit(self, tasks: list[tuple[ProbeModel, int]]) -> None:
        """One block of each that has not failed, in random order."""
        self._rng.shuffle(tasks)
        for model, threads in tasks:
            probe = _probe(model)
            if probe in self._failures:
                continue
            try:
                samples = self._run(model, threads)
            except (TargetError, InterruptedRunError):
                raise  # neither says anything about the model
            except EdgeKitError as error:
                self._failures[probe] = ProbeFailure(*probe, model.size, threads, str(error))
                continue
            self._series.setdefault((probe, threads), _Series()).add(model, samples)

    def growing(self) -> set[tuple[_Probe, int]]:
        """Those that want a bigger size: even the fastest run of the last was too short; or would
        have been at the rate reached with as many threads or fewer. On a busy machine threads wait
        for each other a thousand times longer than a small model takes, and it would look like a
        big one."""
        found = set()
        for (probe, threads), one in self._series.items():
            rate = max(s.best for (p, n), s in self._series.items() if p == probe and n <= threads)
            usual_ns = min(one.fastest_ns, 2 * one.biggest.ops * 1e9 / rate)
            if probe not in self._failures and usual_ns < self._enough_ns:
                found.add((probe, threads))
        return found

    def again(self, *, biggest: bool) -> list[tuple[ProbeModel, int]]:
        """The fastest model of each; or, of those whose best block stands alone, the biggest, which
        may be the fastest and was disturbed."""
        return [
            (one.biggest if biggest and not one.confirmed else one.fastest, threads)
            for (probe, threads), one in self._series.items()
            if probe not in self._failures
        ]

    def result(self, memory_bytes_per_s: float | None, threads: int) -> RooflineMeasurement:
        """The roofline of what was reached."""
        found, alone = [], []
        for ((engine, kind, dtype), count), one in sorted(self._series.items()):
            roof = ComputeRoof(
                engine=engine, kind=kind, dtype=dtype, threads=count, ops_per_s=one.best
            )
            found.append(roof)
            if not one.confirmed:
                alone.append(roof)
        roofline = Roofline(memory_bytes_per_s=memory_bytes_per_s, threads=threads, compute=found)
        return RooflineMeasurement(roofline, tuple(self._failures.values()), tuple(alone))


# --- taking a block -------------------------------------------------------------------------------


def block_request(
    model: ProbeModel, threads: int, *, path: str | None = None, block_s: float = FULL.block_s
) -> str:
    """The line that asks `edgekit-runtime blocks` for one block; `path` is the file's on the
    device, if it was pushed there. Many lines may be sent at once: Python and the engine then
    start once for all."""
    return json.dumps(
        {
            "model": str(model.path) if path is None else path,
            "engine": model.engine,
            "threads": threads,
            "precision": model.precision,
            "block_ns": round(block_s * 1e9),
        }
    )


def block_samples(model: ProbeModel, line: str | bytes) -> list[int]:
    """The nanoseconds in a line that `edgekit-runtime blocks` answered.

    Raises:
        EngineError: the engine computed in another precision than it was asked for.
        EdgeKitError: what the runtime says went wrong.
        ChildError: the line is no answer.
    """
    try:
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise by_name(answer["kind"], answer["error"])
        found, samples = answer["precision"], [int(ns) for ns in answer["samples"]]
    except (ValueError, KeyError, TypeError):
        raise ChildError(f"{model.engine}: no answer to read: {line[:200]!r}") from None
    if model.precision not in ("float32", found):
        raise EngineError(
            f"{model.engine} computes in {found} on this device; {model.precision} was asked for"
        )
    return samples


@contextmanager
def run_on(
    transport: Transport,
    command: Sequence[str],
    *,
    place: Callable[[ProbeModel], str],
    engines: Sequence[str] = (),
    block_s: float = FULL.block_s,
    timeout_s: float = 60,
) -> Iterator[Run]:
    """Takes blocks on a target: `command` is its `edgekit-runtime blocks`, `place` brings a model
    there and says its path. One process per engine; those of `engines` are started at once and
    side by side, others when they are needed.

    Not one process per model, as `measure` has: starting Python and an engine takes up to half a
    second, and there are 30 combinations of model and threads in several sizes. Each block loads
    its model and closes it again, which ends the engine's threads.
    """
    talks: dict[str, Conversation] = {}

    def run(model: ProbeModel, threads: int) -> list[int]:
        request = block_request(model, threads, path=place(model), block_s=block_s)
        if model.engine not in talks:
            talks[model.engine] = transport.converse(command)
        try:
            line = talks[model.engine].ask(request, timeout_s=timeout_s)
        except TargetError as error:
            # It is dead, or does not answer: a finding about the model, and a new process for
            # the next one. That a connection is gone shows when that is started.
            talks.pop(model.engine).close()
            raise ChildError(f"{model.engine}: {one_line(error)}") from None
        return block_samples(model, line)

    try:
        for engine in engines:
            talks[engine] = transport.converse(command)
        yield run
    finally:
        for talk in talks.values():
            talk.close()


@contextmanager
def run_local(
    engines: Sequence[str] = (), *, block_s: float = FULL.block_s, timeout_s: float = 60
) -> Iterator[Run]:
    """Takes blocks on this machine."""
    command = [sys.executable, "-P", "-m", "edgekit_runtime", "blocks"]
    with (
        connect("local") as here,
        run_on(
            here, command, place=lambda model: str(model.path), engines=engines,
            block_s=block_s, timeout_s=timeout_s,
        ) as run,
    ):  # fmt: skip
        yield run


def bandwidth_here(*, threads: int) -> dict[str, Any]:
    """`{bytes_per_s, cache_bytes, ...}` of this machine; see `edgekit_runtime.bandwidth`.

    Raises:
        ChildError: there is no memory for it, say.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "edgekit_runtime",
        "bandwidth",
        "--threads",
        str(threads),
    ]
    done = subprocess.run(
        command, capture_output=True, env=child_environment(), timeout=120, check=False
    )
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise ChildError(f"memory bandwidth: {words[-1] if words else 'no answer'}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- using it -------------------------------------------------------------------------------------


def roof_share(  # noqa: PLR0917  (who asks has them in this order)
    graph_ops: Sequence[tuple[int, int] | tuple[int, int, Kind]],
    roofline: Roofline,
    engine: str,
    dtype: Dtype,
    threads: int,
    latency_ns: float,
    *,
    cache_bytes: int | None = None,
) -> float | None:
    """The least time the roof allows for a model divided by the time it took: 1 is the roof.

    `graph_ops` has for each operator its multiply-accumulates and the bytes it cannot do without:
    its own weights, and the model's inputs and outputs if it reads or writes those. **Not**
    activations between operators: they may never leave the caches, and counting them would make
    the least time longer than it is. A third element `"depthwise"` compares that operator with the
    depthwise roof; others, and those not marked, are compared with `gemm`, the highest.

    The least time is `max(sum c, sum max(c, m) - cache / bandwidth)`, with c = 2 * macs / peak and
    m = bytes / bandwidth of each operator: operators run one after the other, each takes the longer
    of its arithmetic and its memory traffic (Williams, Waterman and Patterson 2009). When a model
    runs again and again, as in a measurement, what fits the caches (`cache_bytes`: the size of the
    largest) is still there from the last run, and so many bytes need not be moved; which operators
    profit is unknown, so the time for all of them is taken off. Where the size of the caches or the
    bandwidth is not known, only arithmetic counts.

    So this is a lower bound of the latency as far as the roof is one. The answer is not cut off at
    1. More has reasons: fewer multiplications than counted (Winograd's convolutions: a 3x3 one of
    ncnn or OpenVINO needs as little as a quarter; skipped zeros), operators that did not run in
    `dtype` but in a faster one, or a roof measured in a bad minute.

    Returns:
        None where the roofline has no figure for this engine, dtype and number of threads.

    Raises:
        UsageError: the latency is not positive.

    Example: 1e9 multiply-accumulates in 40 ms where 100e9 operations a second are possible:

        >>> roof = ComputeRoof(
        ...     engine="ncnn", kind="gemm", dtype="float32", threads=1, ops_per_s=100e9
        ... )
        >>> roofline = Roofline(threads=1, compute=[roof])
        >>> roof_share([(10**9, 0)], roofline, "ncnn", "float32", 1, 40e6)
        0.5
    """
    if not latency_ns > 0:
        raise UsageError(f"latency_ns is {latency_ns}; wanted more than 0")
    wanted = (engine, dtype, threads)
    peaks = {
        roof.kind: roof.ops_per_s
        for roof in roofline.compute
        if (roof.engine, roof.dtype, roof.threads) == wanted
    }
    bandwidth = roofline.memory_bytes_per_s
    compute_s = traffic_s = 0.0
    for macs, bytes_moved, *marked in graph_ops:
        peak = peaks.get(marked[0] if marked else "gemm")
        if peak is None:
            return None
        own_s = 2 * macs / peak
        compute_s += own_s
        traffic_s += own_s if bandwidth is None else max(own_s, bytes_moved / bandwidth)
    if "gemm" not in peaks:
        return None
    least_s = compute_s
    if bandwidth is not None and cache_bytes is not None:
        least_s = max(compute_s, traffic_s - cache_bytes / bandwidth)
    return least_s * 1e9 / latency_ns
