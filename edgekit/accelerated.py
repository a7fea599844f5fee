"""The placement contract in the main job: what an accelerator was to run, and does; and the choice
among what is for accelerators that only an emulator stands in for here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgekit.accelerate import origins_of, placed
from edgekit.artifact import Artifact
from edgekit.builder import Progress
from edgekit.errors import UsageError
from edgekit.outcome import Row
from edgekit.preparation import Job, Request
from edgekit.sandbox import Limits
from edgekit_runtime.engines.accelerators import accelerator_of
from edgekit_runtime.placement import Placement, shortfall

__all__ = ["Order", "contract_of", "judge_placement", "not_on_it", "why_simulated"]

#: kinds of accelerators, those made for networks first
_ORDER = ("npu", "tpu", "dsp", "gpu")


def contract_of(row: Row) -> dict[str, float] | None:
    """What a candidate's bundle promises: all of it on the accelerator it is for."""
    candidate = row.candidate
    return {accelerator_of(candidate.engine).device: 1.0} if candidate.accelerator else None


def judge_placement(
    job: Job, request: Request, row: Row, limits: Limits, progress: Progress
) -> str | None:  # fmt: skip
    """Load a built candidate on its accelerator and note where it really went; why it breaks the
    contract, None if it holds it or may break it (`--allow-fallback`).

    Raises:
        EdgeKitError: the engine does not load it.
    """
    contract = contract_of(row)
    if contract is None or row.artifact is None:
        return None
    candidate = row.candidate
    row.macs = job.builder.macs(candidate, limits, progress)
    row.placed = placed(
        row.artifact, candidate.engine, row.macs, precision=candidate.precision, limits=limits
    )
    why = shortfall(contract, _in_source_terms(row.placed, job.source))
    if why and not request.allow_fallback:
        return f"{why}; --allow-fallback takes it as it is, the rest on the CPU"
    return None


def _in_source_terms(found: Placement, source: Artifact) -> Placement:
    """The nodes beside the modules of the network that they are of, where that is known."""
    if len(found.shares) == 1:
        return found
    origins = origins_of(source)
    nodes = tuple(
        (device, kind, f"{name} (in {origins[name]})" if name in origins else name)
        for device, kind, name in found.nodes
    )
    return replace(found, nodes=nodes)


@dataclass(frozen=True)
class Order:
    """What may be chosen, best first, and what may stand second in the bundle where its times
    mean nothing; `may_be_reference`: the model as it came, where nothing else is left."""

    ids: tuple[str, ...]
    backups: tuple[str, ...]
    may_be_reference: bool

    @staticmethod
    def of(job: Job, request: Request, rows: Sequence[Row], ranked: Sequence[str]) -> Order:
        """`ranked` are those that were measured. An accelerator that was asked for by name goes
        before all others, and without them unless `--allow-fallback` says so."""
        ahead = tuple(row.candidate.id for row in _simulated(job, rows))
        asked = request.accelerator not in (None, "none")
        on_it = {row.candidate.id for row in rows if row.candidate.accelerator}
        real = tuple(key for key in ranked if key in on_it)
        cpu = tuple(key for key in ranked if key not in on_it)
        if not asked:
            return Order((*ahead, *ranked), cpu, may_be_reference=True)
        if not request.allow_fallback:
            return Order((*ahead, *real), (), may_be_reference=False)
        return Order((*ahead, *real, *cpu), cpu, may_be_reference=True)


def not_on_it(request: Request, rows: Sequence[Row]) -> str:
    """Why nothing runs on the accelerator that was asked for by name; empty if none was."""
    if request.accelerator in (None, "none"):
        return ""
    tried = [row for row in rows if row.candidate.accelerator]
    why = "; ".join(f"{row.candidate.id}: {row.reason}" for row in tried if row.reason)
    return f"{request.accelerator} was asked for and not used: {why or 'nothing was tried'}"


def _simulated(job: Job, rows: Sequence[Row]) -> list[Row]:
    """The candidates on accelerators whose times here mean nothing, best first: an NPU before a
    GPU, then what keeps its contract, then the smaller, then what computes in float16."""
    kinds = {name: one.kind for name, one in job.profile.accelerators.items()}

    def place(row: Row) -> tuple[int, float, int, bool]:
        assert row.artifact is not None and row.placed is not None  # noqa: S101
        share = row.placed.shares.get(accelerator_of(row.candidate.engine).device, 0.0)
        kind = _ORDER.index(kinds[row.candidate.accelerator])
        return kind, -share, row.artifact.size_bytes, row.placed.precision != "float16"

    able = [
        row for row in rows
        if row.status == "planned" and row.candidate.accelerator and row.artifact
        and row.placed is not None and row.placed.simulated
    ]  # fmt: skip
    return sorted(able, key=place)


def why_simulated(row: Row, allowed: bool) -> str:
    """Why such a candidate was chosen."""
    if row.placed is None:
        raise UsageError(f"{row.candidate.id} was never loaded on its accelerator")
    device = accelerator_of(row.candidate.engine).device
    share = 100 * row.placed.shares.get(device, 0.0)
    rest = "; the rest falls back to the CPU, as allowed" if allowed and share < 100 else ""
    return (
        f"{share:.4g} % of the {row.placed.of} on {row.candidate.accelerator}, within the accuracy "
        f"budget on {row.placed.simulated}{rest}; chosen by the profile, not by time: nothing here "
        "measures it"
    )
