"""`edgekit unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from edgekit.cli.console import print_json, size, stdout
from edgekit.errors import UsageError
from edgekit.unpack import unpack as take_apart

__all__ = ["unpack"]


def unpack(
    bundle: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a bundle's plain model files, labels and a short how-to, for an app's project.

    Parameters
    ----------
    bundle
        A bundle (.edgekit); every file in it is verified.
    out
        A new folder: one folder per variant, labels.txt, processing.json, HOW-TO.md.
    json
        One JSON object on stdout (schema edgekit.unpack/1).
    """
    if not bundle.is_file():
        raise UsageError(f"no file {bundle}; wanted a bundle (.edgekit)")
    take_apart(bundle, out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    listed = [
        {"path": path.relative_to(out).as_posix(), "size_bytes": path.stat().st_size}
        for path in files
    ]
    if json:
        print_json({"schema": "edgekit.unpack/1", "folder": str(out), "files": listed})
        return
    for one in listed:
        stdout.print(
            f"{out}/{one['path']}  {size(one['size_bytes'])}", markup=False, soft_wrap=True
        )
