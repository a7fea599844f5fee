"""A process that measures one model: `python -m edgekit_runtime worker`, asked for blocks.

It is frozen (SIGSTOP) while it is not its turn: engines' threads spin for up to 100 ms after a run,
which would be measured in the next contender.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgekit.errors import ChildError, by_name
from edgekit.sandbox import child_environment
from edgekit_runtime.timing import percentile_ns

__all__ = ["Block", "Contender", "Worker", "command", "fastest", "processors"]


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
    launcher: tuple[str, ...] = ()
    variant: str | None = None  # of a bundle; None: the first that runs

    @property
    def launched(self) -> tuple[str, ...]:
        """The command that takes the runtime's verbs; this interpreter's by default."""
        return self.launcher or (sys.executable, "-P", "-m", "edgekit_runtime")


@dataclass(frozen=True)
class Block:
    """Samples taken in a row, and the processor time (all threads) they took, in nanoseconds."""

    samples_ns: list[int]
    cpu_ns: int


_TIMED = ("bench", "worker")  # the verbs that take a precision


def command(verb: str, contender: Contender) -> list[str]:
    """What starts the runtime's verb for this contender."""
    line = [*contender.launched, verb, str(contender.path)]
    if contender.threads:
        line += ["--threads", str(contender.threads)]
    if contender.engine:
        line += ["--engine", contender.engine]
    if contender.variant:
        line += ["--variant", contender.variant]
    return [*line, *(["--precision", contender.precision] if verb in _TIMED else [])]


class Worker:
    """A measuring process, as a context. `hello` is what it said of itself once it was ready.

    `cpus`: the processors it may run on; contenders on the same ones share what disturbs them.
    `intent`: "throughput" loads it for calls side by side.

    Its process group is its own, in our session: should we be killed while it is frozen, the system
    ends it, as it does with every stopped group that is orphaned (POSIX, _Exit: Consequences).
    """

    def __init__(
        self, contender: Contender, inputs: Path | None, *, timeout_s: float = 120,
        cpus: Sequence[int] | None = None, intent: str = "latency",
    ) -> None:  # fmt: skip
        self._contender, self._timeout_s, self._cpus = contender, timeout_s, cpus
        self._command = command("worker", contender)
        if intent != "latency":
            self._command += ["--intent", intent]
        if inputs is not None:
            self._command += ["--input", str(inputs)]
        self._estimate_ns = 0
        self.peak_rss_bytes = 0
        self.hello: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        self._log: IO[bytes] = tempfile.TemporaryFile()
        with _only_on(self._cpus):  # a child inherits the processors of the thread that starts it
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                env=child_environment(), process_group=0,
            )  # fmt: skip
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._begin(self._answer(self._timeout_s))
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

    def _begin(self, hello: dict[str, Any]) -> None:
        self.hello = hello
        self._estimate_ns = max(1, hello["first_run_ns"])

    @property
    def pid(self) -> int:
        """The process's id; it is alive until the context ends."""
        return self._process.pid

    @property
    def estimate_ns(self) -> int:
        """The median of the last block, or the first run."""
        return self._estimate_ns

    def take(self, block_s: float, *, most: int = 400) -> Block:
        """As many runs as fit the time, at least one, at most `most`.

        Two untimed runs come first, since others have used the caches meanwhile; none where one
        run takes longer than a block.

        Raises:
            ChildError: the process died, or did not answer in time.
        """
        fits = int(block_s * 1e9 / self._estimate_ns)
        count, untimed = max(1, min(most, fits)), 2 if fits >= 1 else 0
        answer = self._ask({"cmd": "sample", "count": count, "untimed": untimed}, block_s)
        samples = [int(ns) for ns in answer["samples"]]
        self._estimate_ns = max(1, percentile_ns(samples, 50))
        return Block(samples, int(answer.get("cpu_ns", 0)))

    def throughput(self, seconds: float, *, batch: int = 1) -> dict[str, int]:
        """Calls done in this time, as many at once as the session has streams: `{runs, wall_ns,
        cpu_ns}`; each call has `batch` samples.

        Raises:
            EdgeKitError: the model does not take the batch, or the process died.
        """
        answer = self._ask({"cmd": "throughput", "seconds": seconds, "batch": batch}, seconds)
        return {key: int(answer[key]) for key in ("runs", "wall_ns", "cpu_ns")}

    def _ask(self, request: dict[str, Any], expected_s: float) -> dict[str, Any]:
        answer = self._exchange(request, self._timeout_s + 20 * expected_s)
        self.peak_rss_bytes = int(answer["peak_rss_bytes"])
        return answer

    def _exchange(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None  # noqa: S101  (for the type checker)
        self._freeze(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it died: reading says how
        answer = self._answer(timeout_s)
        self._freeze(signal.SIGSTOP)
        return answer

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


@contextmanager
def _only_on(cpus: Sequence[int] | None) -> Iterator[None]:
    """This thread on these processors for a while."""
    if cpus is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def processors(threads: int, turn: int = 0) -> list[int] | None:
    """As many of the fastest processors as threads, others at every turn; None where all of them
    are needed, or pinning is not to be had.

    Contenders on the same processors share what disturbs them (decision record 8).
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    return fastest({one: _capacity(one) for one in os.sched_getaffinity(0)}, threads, turn)


def fastest(capacities: Mapping[int, int], threads: int, turn: int = 0) -> list[int] | None:
    """The same of any machine, whose processors have these capacities."""
    most = max(capacities.values(), default=0)
    ours = sorted(number for number, capacity in capacities.items() if capacity == most)
    if threads >= len(ours):
        return None
    first = (turn * threads) % len(ours)
    return [ours[(first + i) % len(ours)] for i in range(threads)]


def _capacity(processor: int) -> int:
    """How fast it is beside the others, as Linux says; 0 where it does not."""
    folder = Path(f"/sys/devices/system/cpu/cpu{processor}")
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        with suppress(OSError, ValueError):
            return int((folder / name).read_text())
    return 0
