"""Interleaved measuring: one worker process per contender, blocks of samples in turn.

Every round asks each contender, in random order, for one block. What disturbs the machine for a
while disturbs all of them, and a contender is judged by its ratio to the reference round by
round, not by absolute times.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError, TargetError
from edgekit.measure.site import HERE, Site
from edgekit.measure.statistics import median_interval, ratio_interval
from edgekit.measure.worker import Contender
from edgekit_runtime.timing import percentile_ns, summary

__all__ = ["Contender", "Measurement", "Rounds", "measure"]


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
    label: str = "measured"

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
        return summary(self.samples_ns, label=self.label) if self.rounds_ns else None


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

    def simulated(self) -> Rounds:
        """For time that repeats, of an emulator that takes long for it."""
        return replace(self, most=self.least, block_s=min(self.block_s, 0.01), warm_up_blocks=1)


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
    site: Site = HERE,
) -> dict[str, Measurement]:
    """Measure all contenders, interleaved; one that fails gets a Measurement that says so.

    `deadline` (monotonic seconds) or `cancel` end it after the current round, but not before the
    least number of rounds: fewer give no interval, and choosing by chance is no choice.

    Raises:
        TargetError: the link to the site is lost.
    """
    if site.simulated:
        rounds = rounds.simulated()

    def spent() -> bool:
        late = deadline is not None and time.monotonic() > deadline
        return late or (cancel is not None and cancel.is_set())

    taken = {one.id: Measurement(label=site.label) for one in contenders}
    rng = random.Random(seed)  # noqa: S311  (order of measuring, no secret)
    with ExitStack() as stack:
        stack.enter_context(site.session())
        site.bring(contenders, inputs)
        cpus = site.processors(max((one.threads for one in contenders), default=1))
        workers = {}
        for one in contenders:
            # One after the other: starting them together would be a load of our own making.
            with _failures_into(taken[one.id]):
                worker = stack.enter_context(site.worker(one, inputs, cpus=cpus))
                taken[one.id].first_run_ns = worker.hello["first_run_ns"]
                taken[one.id].engine_version = worker.hello["engine_version"]
                taken[one.id].placement = worker.hello["placement"]
                if worker.hello["placement"].get("simulated"):
                    taken[one.id].label = "simulated"
                workers[one.id] = worker
                for _ in range(rounds.warm_up_blocks):
                    worker.take(rounds.block_s, most=rounds.most_per_block)
        active = {one.id for one in contenders if one.id in workers}
        for number in range(rounds.most):
            order = sorted(active)
            rng.shuffle(order)
            for key in order:
                with _failures_into(taken[key]):
                    block = workers[key].take(rounds.block_s, most=rounds.most_per_block)
                    taken[key].rounds_ns.append(block.samples_ns)
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


class _failures_into:  # noqa: N801  (used like contextlib's functions)
    """Turns a contender's error into its row; everything else goes on."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if isinstance(error, EdgeKitError) and not isinstance(error, TargetError):
            self._measurement.failure = str(error)
            self._measurement.failure_code = error.exit_code
            return True
        return False
