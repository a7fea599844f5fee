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
    files = {
        path.relative_to(out).as_posix(): path.stat().st_size
        for path in sorted(out.rglob("*")) if path.is_file()
    }  # fmt: skip
    if json:
        listed = [{"path": path, "size_bytes": number} for path, number in files.items()]
        print_json({"schema": "edgekit.unpack/1", "folder": str(out), "files": listed})
        return
    for path, number in files.items():
        stdout.print(f"{out}/{path}  {size(number)}", markup=False, soft_wrap=True)
