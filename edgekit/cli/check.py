"""`edgekit check`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.cli.console import AnsweredError, TerminalObserver, print_json
from edgekit.cli.ledger import show_ledger
from edgekit.cli.source import SourceOptions
from edgekit.conversion import Given
from edgekit.conversion import check as run_check
from edgekit.data import open_dataset
from edgekit.errors import UsageError
from edgekit.reading import Reading

__all__ = ["check"]


def check(
    reference: str,
    candidate: str,
    /,
    *,
    data: str | None = None,
    source: SourceOptions | None = None,
    seed: int = 0,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Do two models compute the same? Both run on the same inputs; where they differ, the first
    tensor that does is looked for. Exit code 1 if they differ.

    Parameters
    ----------
    reference
        The model that is right, of any format.
    candidate
        The model to check, of any format.
    data
        Real samples (as for optimize); seeded noise otherwise.
    source
        How to read the reference.
    seed
        Of the noise.
    json
        One JSON object on stdout (schema edgekit.check/1).
    """
    if seed < 0:
        raise UsageError(f"--seed is {seed}; wanted 0 or more")
    reading = (source or SourceOptions()).reading()
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
