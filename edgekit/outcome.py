"""What became of each candidate, and the result document (`edgekit.optimize/1`) made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from edgekit.artifact import Artifact
from edgekit.choose import Aim
from edgekit.data import Dataset, Split
from edgekit.evaluate import metric_named
from edgekit.firmware.needs import OnDevice
from edgekit.measure.benchmark import Measurement
from edgekit.measure.statistics import ratio_interval
from edgekit.pipeline import Pipeline
from edgekit.plan import Candidate
from edgekit.preparation import Job, Request
from edgekit_runtime import __version__
from edgekit_runtime.placement import Placement
from edgekit_runtime.preprocess import Preprocess

__all__ = ["SCHEMA", "Row", "plan_document", "result_document"]

SCHEMA = "edgekit.optimize/1"


@dataclass
class Row:
    """What is known of one candidate so far. `evaluation` is what `evaluate` returned.

    status: planned, then chosen, kept, dropped, failed or skipped. `roof_share` is the least time
    the device's roof allows divided by the latency. `placed`: where it went on its accelerator,
    `macs` by operator.
    """

    candidate: Candidate
    status: str = "planned"
    reason: str = ""
    artifact: Artifact | None = None
    build_s: float = 0.0
    evaluation: dict[str, Any] = field(default_factory=dict)
    measurement: Measurement | None = None
    roof_share: float | None = None
    quick: float = float("inf")
    lost: bool = False
    repairs: str = ""
    firmware: OnDevice | None = None
    placed: Placement | None = None
    macs: dict[str, int] = field(default_factory=dict)
    blame: list[dict[str, Any]] = field(default_factory=list)

    @property
    def simulated(self) -> bool:
        """Whether an emulator stands in for its accelerator, so that its times mean nothing."""
        return bool(self.placed and self.placed.simulated)

    def end(self, status: str, reason: str) -> None:
        """Settle the candidate's fate."""
        self.status, self.reason = status, reason

    def ratio_to(self, other: Row) -> list[float | None] | None:
        """Latency ratio `[median, low, high]` (95 %); None where there is nothing to compare,
        null bounds where there were too few rounds for an interval."""
        if self.simulated != other.simulated:
            return None
        if not (self.measurement and self.measurement.rounds_ns and other.measurement):
            return None
        found = ratio_interval(self.measurement.medians_ns, other.measurement.medians_ns)
        return [value if isfinite(value) else None for value in found]

    def gains(self, reference: Row, aim: Aim) -> bool:
        """Whether it is smaller than the reference, or faster beyond doubt: whichever is wanted."""
        if aim == "size":
            return bool(
                self.artifact and reference.artifact
                and self.artifact.size_bytes < reference.artifact.size_bytes
            )  # fmt: skip
        ratio = self.ratio_to(reference)
        return ratio is not None and ratio[2] is not None and ratio[2] < 1


def _describe(row: Row, reference: Row) -> dict[str, Any]:
    """A candidate's entry in the document."""
    candidate, measured = row.candidate, row.measurement
    return {
        "engine_version": measured.engine_version if measured else None,
        **_planned(candidate),
        "threads": candidate.threads,
        "status": row.status,
        "reason": row.reason,
        "metric": row.evaluation.get("metric"),
        "metric_drop": row.evaluation.get("drop", 0.0 if row.evaluation else None),
        "metric_drop_interval": row.evaluation.get("drop_interval"),
        "samples": row.evaluation.get("samples"),
        "cosine": row.evaluation.get("cosine"),
        "slices": row.evaluation.get("slices"),
        "latency_ns": measured.latency() if measured else None,
        "latency_ratio": row.ratio_to(reference),
        "roof_share": row.roof_share,
        "first_run_ns": measured.first_run_ns if measured else None,
        "peak_rss_bytes": measured.peak_rss_bytes if measured else None,
        "placement": _placement(row),
        "size_bytes": row.artifact.size_bytes if row.artifact else None,
        "build_s": round(row.build_s, 3),
        "kept_float": list(candidate.scheme.keep),
        "blame": row.blame,
        "repairs": row.repairs or None,
        "firmware": row.firmware.to_json() if row.firmware else None,
    }


def _placement(row: Row) -> dict[str, Any] | None:
    """Where it ran; of what is for an accelerator also of what the shares are, and what is not
    there."""
    found, measured = row.placed, row.measurement
    if found is None:
        return measured.placement if measured else None
    return {
        "shares": found.shares, "delegate": found.delegate, "precision": found.precision,
        "of": found.of, "simulated": found.simulated, "accelerator": row.candidate.accelerator,
        "left": [list(one) for one in found.nodes if one[0] == "CPU"],
    }  # fmt: skip


def result_document(
    job: Job, request: Request, rows: list[Row], chosen: Row | None
) -> dict[str, Any]:
    """What was asked for and what became of every candidate; the run adds how it ended."""
    described = [_describe(row, rows[0]) for row in rows]
    return {
        "schema": SCHEMA,
        "model": _model_facts(str(request.model), job.source),
        "profile": {"id": job.profile.id, "name": job.profile.name},
        "target": request.site.target,
        "device": request.site.name,
        "label": request.site.label,
        "metric": job.metric,
        "higher_is_better": metric_named(job.metric).higher_is_better,
        "max_drop": request.max_drop,
        "max_slice_drop": request.max_slice_drop,
        "minimize": request.minimize,
        "threads": job.threads,
        "seed": request.seed,
        "budget_s": request.budget_s,
        "data": _data_facts(job.data, job.split, job.pipeline),
        "reference": described[0],
        "candidates": described,
        "chosen": chosen.candidate.id if chosen else None,
        "command": request.command,
        "edgekit": __version__,
        "conditions": job.conditions,
    }


def plan_document(job: Job, notes: list[str]) -> dict[str, Any]:
    """What would be tried, and what the profile rules out (`edgekit.plan/1`)."""
    return {
        "schema": "edgekit.plan/1",
        "profile": {"id": job.profile.id, "name": job.profile.name},
        "threads": job.threads,
        "metric": job.metric,
        "notes": notes,
        "candidates": [_planned(one) for one in job.plan],
    }


def _planned(candidate: Candidate) -> dict[str, Any]:
    ruling = candidate.ruling
    return {
        "id": candidate.id,
        "engine": candidate.target or candidate.engine,
        "format": candidate.format,
        "scheme": str(candidate.scheme),
        "pruning": candidate.pruning.id if candidate.pruning else None,
        "fixed_shapes": candidate.fixed_shapes,
        "accelerator": candidate.accelerator or None,
        "reference_only": candidate.reference_only,
        "skip": candidate.skip,
        "rule": {"field": ruling.field, "why": ruling.why, "source": ruling.source}
        if ruling
        else None,
    }


def _model_facts(path: str, source: Artifact) -> dict[str, Any]:
    """The model as it came."""
    return {
        "path": path,
        "sha256": source.sha256,
        "format": source.format,
        "size_bytes": source.size_bytes,
        "inputs": [str(spec) for spec in source.inputs],
        "outputs": [str(spec) for spec in source.outputs],
    }


def _data_facts(data: Dataset, split: Split, pipeline: Pipeline) -> dict[str, Any]:
    """The data, what was made of raw samples, and how it was parted."""
    steps = {n: str(Preprocess(one.source, one.steps)) for n, one in pipeline.preprocess.items()}
    return {
        "source": data.source,
        "steps": steps,
        "sha256": data.sha256,
        "samples": data.count,
        "calibration": len(split.calibration),
        "calibration_source": split.calibration_data.source,
        "calibration_sha256": split.calibration_data.sha256,
        "selection": len(split.selection),
        "confirmation": len(split.confirmation),
    }
