"""Interleaved measuring: one worker process per contender, blocks of samples in turn.

Every round asks each contender, in random order, for one block. What disturbs the machine for a
while disturbs all of them, and a contender is judged by its ratio to the reference round by
round, not by absolute times. Workers are frozen (SIGSTOP) while it is not their turn: engines'
threads spin for up to 100 ms after a run, which would be measured in the next contender.
"""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from edgekit.errors import ChildError, EdgeKitError, by_name
from edgekit.measure.statistics import median_interval, ratio_interval
from edgekit.sandbox import child_environment
from edgekit_runtime.timing import percentile_ns, summary

__all__ = ["Contender", "Measurement", "Rounds", "cold_starts", "measure"]


@dataclass(frozen=True)
class Contender:
    """What to measure: a model file or bundle and how to load it.

    `serious` contenders are measured until it is clear whether they can win; the others only
    for the least number of rounds, to be shown.
    """

    id: str
    path: Path
    threads: int
    engine: str | None = None
    precision: str = "float32"
    serious: bool = True


@dataclass
class Measurement:
    """Raw nanoseconds by round, and what the worker said of itself. `failure` if it failed."""

    rounds_ns: list[list[int]] = field(default_factory=list)
    first_run_ns: int = 0
    peak_rss_bytes: int = 0
    engine_version: str = ""
    placement: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    failure_code: int = 3

    @property
    def samples_ns(self) -> list[int]:
        """All samples in the order taken."""
        return [ns for block in self.rounds_ns for ns in block]

    @property
    def medians_ns(self) -> list[float]:
        """The median of each round."""
        return [float(percentile_ns(block, 50)) for block in self.rounds_ns]

    def latency(self) -> dict[str, Any] | None:
        """`{p50, p90, min, samples, label}`, or None without samples."""
        return summary(self.samples_ns) if self.rounds_ns else None


@dataclass(frozen=True)
class Rounds:
    """When to stop: rounds for everybody, for serious contenders, and the time for a block.

    Six rounds are the fewest for which an interval of the median exists at 95 %.
    """

    least: int = 6
    most: int = 24
    block_s: float = 0.08
    warm_up_blocks: int = 1
    most_per_block: int = 400
    enough: float = 0.01  # half-width of the ratio's interval at which more rounds change nothing
    settled: float = 0.05  # the same for the winner against the reference, which decides nothing


def measure(
    contenders: Sequence[Contender],
    reference: str,
    *,
    inputs: Path | None,
    rounds: Rounds = Rounds(),
    deadline: float | None = None,
    cancel: threading.Event | None = None,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Measure all contenders, interleaved; one that fails gets a Measurement that says so.

    `deadline` (monotonic seconds) or `cancel` end it after the current round, but not before the
    least number of rounds: fewer give no interval, and choosing by chance is no choice.
    """

    def spent() -> bool:
        late = deadline is not None and time.monotonic() > deadline
        return late or (cancel is not None and cancel.is_set())

    taken = {one.id: Measurement() for one in contenders}
    rng = random.Random(seed)  # noqa: S311  (order of measuring, no secret)
    with ExitStack() as stack:
        workers = {}
        for one in contenders:
            # One after the other: starting them together would be a load of our own making.
            with _failures_into(taken[one.id]):
                worker = stack.enter_context(_Worker(one, inputs))
                taken[one.id].first_run_ns = worker.hello["first_run_ns"]
                taken[one.id].engine_version = worker.hello["engine_version"]
                taken[one.id].placement = worker.hello["placement"]
                workers[one.id] = worker
                for _ in range(rounds.warm_up_blocks):
                    worker.block(rounds)
        active = {one.id for one in contenders if one.id in workers}
        for number in range(rounds.most):
            order = sorted(active)
            rng.shuffle(order)
            for key in order:
                with _failures_into(taken[key]):
                    taken[key].rounds_ns.append(workers[key].block(rounds))
                    taken[key].peak_rss_bytes = workers[key].peak_rss_bytes
            if progress is not None:
                progress(number + 1, rounds.most)
            active = {key for key in active if taken[key].failure is None}
            if number + 1 >= rounds.least:
                active = _still_open(contenders, taken, active, reference, rounds)
            if not active or (number + 1 >= rounds.least and spent()):
                break
    return taken


def _still_open(
    contenders: Sequence[Contender],
    taken: dict[str, Measurement],
    active: set[str],
    reference: str,
    rounds: Rounds,
) -> set[str]:
    """Who needs more rounds: serious contenders that may be fastest, and the reference."""
    serious = [one.id for one in contenders if one.serious and one.id in active]
    if reference not in active or not serious:
        return set()
    best = min(serious, key=lambda key: median_interval(taken[key].medians_ns)[0])
    still = set()
    _, low, high = ratio_interval(taken[best].medians_ns, taken[reference].medians_ns)
    if high - low > 2 * rounds.settled:
        still.add(best)  # what people will quote should not be a guess
    for key in serious:
        if key == best:
            continue
        _, low, high = ratio_interval(taken[key].medians_ns, taken[best].medians_ns)
        if low <= 1.0 and high - low > 2 * rounds.enough:
            still.add(key)
    return still | {best, reference} if still else set()


def cold_starts(contender: Contender, *, times: int = 3) -> list[dict[str, int]]:
    """Import, load and first run, each time in a fresh process (nanoseconds, peak RSS).

    Raises:
        EdgeKitError: the model does not load.
    """
    found = []
    for _ in range(times):
        start = time.perf_counter_ns()
        done = subprocess.run(
            [sys.executable, "-P", "-c", _COLD, *_command("bench", contender)[4:], "--cold"],
            capture_output=True, env=child_environment(), timeout=600, check=False,
        )  # fmt: skip
        wall_ns = time.perf_counter_ns() - start
        if done.returncode != 0:
            _raise_from(done.stderr.decode(errors="replace"), done.returncode, contender.id)
        phases: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        phases.pop("schema")
        found.append({**phases, "process_ns": wall_ns})
    return found


#: the clock starts before anything is imported
_COLD = (
    "import time; started_ns = time.perf_counter_ns(); import sys;"
    "from edgekit_runtime.__main__ import main; sys.exit(main(started_ns=started_ns))"
)


def _command(verb: str, contender: Contender) -> list[str]:
    command = [sys.executable, "-P", "-m", "edgekit_runtime", verb, str(contender.path)]
    if contender.threads:
        command += ["--threads", str(contender.threads)]
    if contender.engine:
        command += ["--engine", contender.engine]
    return [*command, "--precision", contender.precision]


def _raise_from(log: str, code: int, what: str) -> None:
    lines = [line for line in log.splitlines() if line.strip()]
    last = lines[-1].removeprefix("edgekit-runtime: ") if lines else f"ended with code {code}"
    kind = {1: "LimitError", 2: "ModelError", 3: "EngineError"}.get(code, "ChildError")
    raise by_name(kind, last if code in (1, 2, 3) else f"{what}: {last}")


class _failures_into:  # noqa: N801  (used like contextlib's functions)
    """Turns a contender's error into its row; everything else goes on."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if isinstance(error, EdgeKitError):
            self._measurement.failure = str(error)
            self._measurement.failure_code = error.exit_code
            return True
        return False


class _Worker:
    """A measuring process: `python -m edgekit_runtime worker`."""

    def __init__(
        self, contender: Contender, inputs: Path | None, *, timeout_s: float = 120
    ) -> None:
        self._contender, self._timeout_s = contender, timeout_s
        self._command = _command("worker", contender)
        if inputs is not None:
            self._command += ["--input", str(inputs)]
        self._estimate_ns = 0
        self.peak_rss_bytes = 0
        self.hello: dict[str, Any] = {}

    def __enter__(self) -> _Worker:
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env=child_environment(), start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.hello = self._answer(self._timeout_s)
            self._estimate_ns = max(1, self.hello["first_run_ns"])
        except BaseException:
            self.__exit__()
            raise
        self._freeze(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def block(self, rounds: Rounds) -> list[int]:
        """Nanoseconds of as many runs as fit the round's time, at least one.

        Two untimed runs come first, since others have used the caches meanwhile; none where one
        run takes longer than a block.
        """
        fits = int(rounds.block_s * 1e9 / self._estimate_ns)
        request = {
            "cmd": "sample",
            "count": max(1, min(rounds.most_per_block, fits)),
            "untimed": 2 if fits >= 1 else 0,
        }
        assert self._process.stdin is not None  # noqa: S101  (for the type checker)
        self._freeze(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it died: reading says how
        answer = self._answer(self._timeout_s + 20 * rounds.block_s)
        self._freeze(signal.SIGSTOP)
        self.peak_rss_bytes = int(answer["peak_rss_bytes"])
        samples = [int(ns) for ns in answer["samples"]]
        self._estimate_ns = max(1, percentile_ns(samples, 50))
        return samples

    def _freeze(self, how: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, how)

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101  (for the type checker)
        with suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise ChildError(
                f"{self._contender.id}: no answer within {timeout_s:.0f} s, stopped"
            ) from None
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            words = self._log.read().decode(errors="replace").strip().splitlines()
            said = f" ({words[-1][:200]})" if words else ""
            raise ChildError(f"{self._contender.id}: the engine's process ended, {code}{said}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = "ModelError" if answer["exit_code"] == 2 else "ChildError"
            raise by_name(kind, answer["error"])
        return answer
