"""`edgekit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from edgekit.cache import write_atomically
from edgekit.cli.console import stdout
from edgekit.errors import UsageError
from edgekit.measure.record import checked_schema, read_document
from edgekit.measure.report import report_html
from edgekit.measure.report_runs import runs_html
from edgekit.measure.store import Store

__all__ = ["report"]


def report(
    *runs: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("report.html"),
    store: Path | None = None,
) -> None:
    """Write results as one HTML page that works offline: distributions, soaks, operators.

    Parameters
    ----------
    runs
        Result files (.json of bench, compare, trace, session.measure() or optimize), or numbers of
        runs in the store; several of them on one page.
    out
        The page.
    store
        The folder of the result store; ~/.local/share/edgekit otherwise.
    """
    if not runs:
        raise UsageError("no runs given; edgekit runs list shows those in the store")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"-o {out}: cannot write there; wanted a file in a folder that exists")
    found = [_document(one, store) for one in runs]
    kinds = [checked_schema(document, where) for where, document in found]
    if "edgekit.optimize" in kinds:
        if len(found) > 1:
            raise UsageError("the result of edgekit optimize has a page of its own: give it alone")
        html = report_html(found[0][1])
    else:
        html = runs_html(found)
    write_atomically(out, html.encode())
    stdout.print(str(out), markup=False, soft_wrap=True)


def _document(run: str, store: Path | None) -> tuple[str, dict[str, Any]]:
    if run.isdigit() and not Path(run).exists():
        with Store(store) as opened:
            return f"run {run}", opened.document(int(run))
    document: dict[str, Any] = read_document(Path(run))
    return run, document
