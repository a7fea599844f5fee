"""What a job that measures on a device asks of it, and the bundle that says where figures are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.accelerated import contract_of
from edgekit.artifact import TensorSpec
from edgekit.bundle import VariantSource, latency_limits, write_bundle
from edgekit.measure.site import Site
from edgekit.measure.worker import Contender
from edgekit.observer import Observer
from edgekit.outcome import Row
from edgekit.preparation import Job, Request
from edgekit_runtime import __version__

__all__ = ["bundle_of", "differs_there", "golden_at", "measuring_inputs"]

_MEASURE_SAMPLES = 32


def differs_there(site: Site, bundle: Path, threads: int) -> str | None:
    """Why the bundle's golden inputs do not give its golden outputs, which this machine computed,
    on the device; None if they do, within their tolerance.

    Raises:
        TargetError: the link is lost.
        EdgeKitError: it does not run there.
    """
    bad = [row for row in golden_at(site, bundle, threads) if not row["ok"]]
    if not bad:
        return None
    note = bad[0]["note"] or f"off by {bad[0]['worst']:.3g} times what is allowed"
    return f"on the device, golden output {bad[0]['output']!r}: {note}"


def golden_at(
    site: Site, bundle: Path, threads: int, observer: Observer | None = None
) -> list[dict[str, Any]]:
    """What became of each golden output at the site: `edgekit_runtime.golden.GoldenResult`. What
    ran in place of the first variant is said to the observer.

    Raises:
        TargetError: the link is lost.
        EdgeKitError: the bundle does not run there.
    """
    with site.session():
        done = site.call("check", Contender(bundle.name, bundle, threads))
    if done.code == 1 and done.out.strip():  # they differ, and it says which
        done = replace(done, code=0)
    rows: list[dict[str, Any]] = done.document(bundle.name)["outputs"]
    if observer is not None and done.warning:
        observer.note(done.warning)
    return rows


def measuring_inputs(job: Job, folder: Path) -> Path:
    """Real samples to measure with, as a file there: speed may depend on what is in them."""
    step = max(1, len(job.split.selection) // _MEASURE_SAMPLES)
    picked = job.split.selection[::step][:_MEASURE_SAMPLES]
    samples = [job.data.sample(int(number), job.source.inputs) for number in picked]
    path = folder / "inputs.npz"
    stacked = {name: np.stack([one[name] for one in samples]) for name in samples[0]}
    np.savez(path, allow_pickle=False, **stacked)
    return path


def bundle_of(
    job: Job, request: Request, row: Row, path: Path, *, incomplete: list[str], work: Path,
    second: Row | None = None,
) -> None:  # fmt: skip
    """Write a bundle of a candidate that was measured, and of a second one for where the first
    does not run; its figures say where they are from."""
    assert row.artifact is not None  # noqa: S101  (only built ones are chosen)
    site = request.site
    write_bundle(
        path,
        tuple(_variant(job, request, one) for one in (row, second) if one is not None),
        name=request.model.stem,
        inputs=_with_facts(job, row),
        outputs=row.artifact.outputs if row.candidate.fixed_shapes else job.source.outputs,
        pipeline=job.pipeline,
        profile=job.profile.id,
        provenance={
            "edgekit": __version__,
            "command": request.command,
            "model_sha256": job.source.sha256,
            "data_sha256": job.data.sha256,
            "steps": list(row.artifact.provenance),
            "latency": {
                "label": "simulated" if row.simulated else site.label, "where": site.target,
                "device": site.name,
            },
            "incomplete": incomplete,
        },
        work=work,
    )  # fmt: skip


def _variant(job: Job, request: Request, row: Row) -> VariantSource:
    assert row.artifact is not None and row.measurement is not None  # noqa: S101
    candidate, measured = row.candidate, row.measurement
    latency, contract = measured.latency(), contract_of(row)
    expected: dict[str, Any] = {
        "latency_ns": latency,
        **latency_limits(latency or {}, job.conditions),
        "metric": {job.metric: row.evaluation["metric"]},
        "conditions": job.conditions,
    }
    if contract is None or row.placed is None:
        return VariantSource(
            candidate.id, candidate.engine, row.artifact, str(candidate.scheme), job.threads,
            measured.placement["precision"], measured.placement["shares"], expected,
            measured.peak_rss_bytes or None,
        )  # fmt: skip
    expected["placement"] = {
        "shares": row.placed.shares, "of": row.placed.of, "simulated": row.placed.simulated or None,
        "left": [list(one) for one in row.placed.nodes if one[0] == "CPU"],
    }  # fmt: skip
    whole = all(row.placed.shares.get(key, 0.0) >= share for key, share in contract.items())
    return VariantSource(
        candidate.id, candidate.engine, row.artifact, str(candidate.scheme), job.threads,
        candidate.precision, contract, expected,
        # an emulator's memory is not a device's
        None if row.simulated else measured.peak_rss_bytes or None,
        macs=row.macs, on_misplacement="refuse" if whole else "warn",
    )  # fmt: skip


def _with_facts(job: Job, row: Row) -> tuple[TensorSpec, ...]:
    sample = job.data.sample(int(job.split.selection[0]), job.source.inputs)
    fixed, ranges = row.candidate.fixed_shapes, job.data.ranges
    return tuple(
        replace(
            s, range=ranges.get(s.name), example=sample[s.name].shape,
            shape=sample[s.name].shape if fixed else s.shape,
        )
        for s in job.source.inputs
    )  # fmt: skip
