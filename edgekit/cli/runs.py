"""`edgekit runs`."""

from __future__ import annotations

import csv
import io
import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgekit.cache import write_atomically
from edgekit.cli.console import print_json, seconds, stdout
from edgekit.errors import UsageError
from edgekit.measure.store import Store
from edgekit_runtime.timing import unpack_ns

__all__ = ["app", "export", "list_", "show"]

app = App(
    name="runs", help="List, show and export the runs in the result store.", help_format="plaintext"
)


@app.command(name="list")
def list_(
    *,
    model: str | None = None,
    limit: int = 20,
    store: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """The newest runs, failures included.

    Parameters
    ----------
    model
        Only those whose model's path contains this.
    limit
        How many.
    store
        The folder of the result store; ~/.local/share/edgekit otherwise.
    json
        One JSON object on stdout (schema edgekit.runs/1).
    """
    if limit < 1:
        raise UsageError(f"--limit is {limit}; wanted at least 1")
    with Store(store) as opened:
        runs, path = opened.list(model=model, limit=limit), opened.path
    if json:
        print_json(
            {"schema": "edgekit.runs/1", "store": str(path), "runs": [vars(r) for r in runs]}
        )
        return
    if not runs:
        stdout.print(f"no runs in {path}", markup=False, soft_wrap=True)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "when (UTC)", "kind", "model", "engine", "p50", "status"):
        table.add_column(name, justify="right" if name in ("run", "p50") else "left")
    for one in runs:
        said = one.status + (f": {one.note}" if one.note else "")
        table.add_row(
            str(one.id), one.created[:19].replace("T", " "), one.kind,
            escape(Path(one.model).name), one.engine or "", seconds(one.p50_ns), escape(said),
        )  # fmt: skip
    stdout.print(table)


@app.command
def show(number: int, /, *, store: Path | None = None) -> None:
    """Print a run's whole document as JSON.

    Parameters
    ----------
    number
        The run, as edgekit runs list has it.
    store
        The folder of the result store; ~/.local/share/edgekit otherwise.
    """
    with Store(store) as opened:
        print_json(opened.document(number))


@app.command
def export(
    number: int,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    format_: Annotated[Literal["json", "csv"] | None, Parameter(name="--format")] = None,
    store: Path | None = None,
) -> None:
    """Write a run as a file: JSON as it was kept, or its samples as CSV (number, nanoseconds).

    Parameters
    ----------
    number
        The run, as edgekit runs list has it.
    out
        The file.
    format_
        json or csv; from the file's name otherwise.
    store
        The folder of the result store; ~/.local/share/edgekit otherwise.
    """
    wanted = format_ or out.suffix.removeprefix(".")
    if wanted not in ("json", "csv"):
        raise UsageError(f"-o {out}: wanted a name that ends in .json or .csv, or --format")
    if not out.parent.is_dir():
        raise UsageError(f"-o {out}: no folder {out.parent}")
    with Store(store) as opened:
        document = opened.document(number)
    text = json_module.dumps(document) if wanted == "json" else _csv(document, number)
    write_atomically(out, text.encode())
    print(out, file=sys.stderr)


def _csv(document: dict[str, Any], number: int) -> str:
    series = {
        key.removesuffix("_ns").removesuffix("_samples"): unpack_ns(document[key])
        for key in ("samples_ns", "base_samples_ns", "new_samples_ns") if document.get(key)
    }  # fmt: skip
    if not series:
        raise UsageError(f"run {number} has no samples; export it as .json")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["series", "number", "ns"])
    for name, samples in series.items():
        writer.writerows([name, i, ns] for i, ns in enumerate(samples))
    return text.getvalue()
