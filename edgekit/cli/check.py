"""`edgekit check`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.cli.console import AnsweredError, TerminalObserver, print_json, stdout
from edgekit.cli.contender import contender, engine_of
from edgekit.cli.ledger import show_ledger
from edgekit.cli.source import SourceOptions
from edgekit.cli.target import TargetOptions
from edgekit.conversion import Given
from edgekit.conversion import check as run_check
from edgekit.data import open_dataset
from edgekit.errors import UsageError
from edgekit.measure.target import open_site
from edgekit.on_device import golden_at
from edgekit.pack import pack
from edgekit.reading import Reading
from edgekit_runtime.bundle import is_bundle

__all__ = ["check"]


def check(
    reference: str,
    candidate: str | None = None,
    /,
    *,
    data: str | None = None,
    source: SourceOptions | None = None,
    seed: int = 0,
    target: TargetOptions | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Do two models compute the same? Both run on the same inputs; where they differ, the first
    tensor that does is looked for. A bundle alone: does it compute its golden outputs? With --on:
    does one model or bundle compute on a device what it computes here? Exit code 1 if they differ.

    Parameters
    ----------
    reference
        The model that is right, of any format; or the bundle.
    candidate
        The model to check, of any format; none for a bundle or with --on.
    data
        Real samples (as for optimize); seeded noise otherwise.
    source
        How to read the reference.
    seed
        Of the noise.
    target
        How to reach the target.
    json
        One JSON object on stdout (schema edgekit.check/1).
    """
    if seed < 0:
        raise UsageError(f"--seed is {seed}; wanted 0 or more")
    where = target or TargetOptions()
    alone = Path(reference).is_file() and is_bundle(Path(reference))
    if (candidate is None) is (where.on == "local" and not alone):
        raise UsageError(
            "wanted two models, or one and the target it is checked on: edgekit check MODEL --on "
            "ssh://user@host, or a bundle: edgekit check out/model.edgekit"
        )
    reading = (source or SourceOptions()).reading()
    if candidate is None:
        return _check_there(reference, reading, where, as_json=json)
    with TerminalObserver() as observer:
        observer.phase("[1/2] read both models")
        ours = open_model(reference, reading=reading)
        theirs = open_model(candidate, reading=Reading(trust_source=reading.trust_source))
        found = open_dataset(data, ours.inputs, Cache()) if data else None
        observer.phase("[2/2] run both")
        inputs, line = run_check(ours, theirs, given=Given.of(found, ours.inputs), seed=seed)
    if json:
        print_json({"schema": "edgekit.check/1", "inputs": inputs, **line.to_json()})
    else:
        show_ledger([line], [f"{ours.format} / {theirs.format}"], inputs)
    if not line.passed:
        raise AnsweredError(
            f"{candidate} does not compute what {reference} does: {line.reason()}", 1
        )
    return None


def _check_there(model: str, reading: Reading, where: TargetOptions, *, as_json: bool) -> None:
    with TerminalObserver() as observer, tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
        site = open_site(where.target(), observer)
        one = contender(model, engine=None, threads=None, reading=reading, observer=observer,
                        machine=site.profile)  # fmt: skip
        bundle = one.path
        if one.engine is not None:
            observer.phase("computing its outputs here")
            bundle = Path(scratch) / "model.edgekit"
            pack(one, bundle)
        site.need([engine_of(one, site)], observer)
        observer.phase("computing its golden outputs")
        rows = golden_at(site, bundle, one.threads, observer)
    ok = all(row["ok"] for row in rows)
    if as_json:
        print_json(
            {"schema": "edgekit.check/1", "model": model, "target": site.target,
             "device": site.name, "ok": ok, "outputs": rows}
        )  # fmt: skip
    else:
        for row in rows:
            verdict = "ok" if row["ok"] else f"DIFFERS {row['note']}".strip()
            stdout.print(
                f"{row['output']}: {verdict} (largest difference {row['max_abs']:.3g}, "
                f"{100 * row['worst']:.3g} % of what is allowed, {row['samples']} samples)",
                markup=False, soft_wrap=True,
            )  # fmt: skip
    if not ok:
        what = "its golden outputs" if where.on == "local" else "what it computes here"
        raise AnsweredError(f"{model} does not compute {what} on {site.name}", 1)
