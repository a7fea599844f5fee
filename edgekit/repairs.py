"""Which of the candidates that lost too much are worth repairing, in which order, and when to stop.

A candidate is repaired while it could still win. How fast it is after a repair is not known before;
what became of another of the same engine that lost no more says about how much a repair costs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf

from edgekit.artifact import Artifact
from edgekit.control import REPAIRED, AccuracyControl, SearchEndedError, blame
from edgekit.errors import ModelError
from edgekit.fit import judge
from edgekit.graph import read_graph, with_batch_one
from edgekit.observer import Observer
from edgekit.outcome import Row
from edgekit.plan import Candidate
from edgekit.precision import broken_promise
from edgekit.preparation import Job

__all__ = ["Repairs", "forbidden"]

#: what is not faster than this share of the best is not repaired
_WORTH_REPAIRING = 0.97
#: a loss is no smaller than another from this share of it on
_AS_BAD = 0.8


def forbidden(job: Job, candidate: Candidate, artifact: Artifact) -> str | None:
    """What was made and the device's profile forbids, asked for or not: the quantizer's and
    converter's work is read back and judged like a model that comes from outside."""
    if candidate.reference_only or job.fit is None:
        return None
    if candidate.accelerator:  # its own compiler judges it, and the placement shows what it took
        return None
    if artifact.format == "ncnn":  # its operators are pnnx's choice, and not read here
        return None
    profile = job.profile
    try:
        graph = read_graph(artifact.path, shapes=with_batch_one(artifact.inputs))
    except ModelError as error:
        return f"made, but it cannot be read back: {error}"
    fit = judge(graph, profile)
    broken = broken_promise(graph, profile.quantization)
    for _, words in fit.too_big(fit.needs[0]):
        broken = broken or words
    for place in fit.places:
        if place.id == (candidate.target or candidate.engine) and place.kind == "cpu":
            for reason in fit.reasons(place, "no"):
                broken = broken or f"{place.id}: {reason}"
    return f"made, but not for {profile.id}: {broken}" if broken else None


@dataclass
class Repairs:
    """`cost`: what is to be least, of a row that was looked at (latency over the reference's, or
    bytes); `look`: measures a repaired row briefly and saves the best so far."""

    job: Job
    control: AccuracyControl
    observer: Observer
    cost: Callable[[Row], float]
    look: Callable[[Row], None]
    #: by engine: the row repaired, and how many times its cost it had then
    _dearer: dict[str, list[tuple[Row, float]]] = field(default_factory=dict)

    def run(self, rows: list[Row], lost: list[Row]) -> None:
        """Win back what those lost, where they could win then; a row for all that is tried."""
        able = [row for row in lost if row.candidate.scheme.kind in REPAIRED]
        self.control.known = {row.candidate.id for row in rows}
        unrepaired = []
        for row in sorted(able, key=self.cost):
            best = self._rival(row, rows)
            hopeless = self._pruned_too_far(row, rows)
            if hopeless:
                row.reason += f"; not repaired: {hopeless}"
                self.observer.row(row.candidate.id, row.reason)
                continue
            worst, why = self._expected(row)
            if best is not None and worst >= _WORTH_REPAIRING * self.cost(best):
                row.reason += f"; not repaired: {why} it would not beat {best.candidate.id}"
                self.observer.row(row.candidate.id, row.reason)
                unrepaired.append(row)
                continue
            found = self._repair(row, rows)
            cost = self.cost(row)
            if found is not None and 0 < cost < inf:
                dearer = self.cost(found) / cost
                self._dearer.setdefault(row.candidate.engine, []).append((row, dearer))
        with suppress(SearchEndedError):
            for row in unrepaired:  # nothing collapses without a word on where that comes from
                self._name_operators(row)

    def _rival(self, row: Row, rows: list[Row]) -> Row | None:
        """What it has to beat; a time that means nothing is compared with its like alone."""
        accelerator = row.candidate.accelerator
        rivals = [
            one for one in rows
            if one.status == "planned" and (
                one.candidate.accelerator == accelerator if row.simulated else not one.simulated
            )
        ]  # fmt: skip
        return min(rivals, key=self.cost, default=None)

    def _pruned_too_far(self, row: Row, rows: list[Row]) -> str:
        """Why nothing that is done to operators helps: the pruned model itself loses too much."""
        for one in rows:
            same = row.candidate.pruning and one.candidate.pruning == row.candidate.pruning
            if same and one.candidate.scheme.kind == "fp32" and one.evaluation:
                drop = float(one.evaluation.get("drop", 0.0))
                if drop > self.control.allowed.drop:
                    return f"pruned so far it loses {drop:.4f} in float ({one.candidate.id})"
        return ""

    def _expected(self, row: Row) -> tuple[float, str]:
        """About what it costs once it is repaired."""
        cost, why = self.cost(row), "even so"
        for other, dearer in self._dearer.get(row.candidate.engine, ()):
            same = other.candidate.scheme.kind == row.candidate.scheme.kind
            if same and row.evaluation["drop"] >= _AS_BAD * other.evaluation["drop"]:
                cost = max(cost, cost * dearer)
                why = f"it lost as much as {other.candidate.id}, and repaired as that"
        return cost, why

    def _repair(self, row: Row, rows: list[Row]) -> Row | None:
        self._name_operators(row)
        found: Row | None = None
        for tried in self.control.repair(row.candidate, row.evaluation["drop"]):
            one = Row(
                tried.candidate, artifact=tried.artifact, evaluation=dict(tried.evaluation),
                repairs=row.candidate.id,
            )  # fmt: skip
            rows.append(one)
            broken = None
            if tried.artifact is not None:
                broken = forbidden(self.job, tried.candidate, tried.artifact)
            if broken or not tried.within:
                one.end("dropped" if tried.evaluation else "failed", broken or tried.reason)
            else:
                found = one
        if found is not None:
            self.look(found)
        return found

    def _name_operators(self, row: Row) -> None:
        row.blame = blame(self.control.sensitivity(row.candidate))
        if row.blame:
            names = ", ".join(one["outputs"][-1] for one in row.blame)
            row.reason += f"; most of the noise comes from {names}"
            self.observer.row(row.candidate.id, row.reason)
