"""`edgekit runtime-zip`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import edgekit_runtime
from edgekit.cache import write_atomically
from edgekit.cli.console import print_json, size, stdout
from edgekit.deploy.runtime_archive import runtime_archive
from edgekit.errors import UsageError

__all__ = ["runtime_zip"]


def runtime_zip(
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the runtime as one file that any Python 3.9 to 3.13 with numpy and an engine runs.

    `python3 runtime.pyz run model.edgekit --input x.npz` on the device; or, from Python, put the
    file on `sys.path` and import edgekit_runtime.

    Parameters
    ----------
    out
        The file to write, usually runtime.pyz.
    json
        One JSON object on stdout (schema edgekit.runtime-zip/1).
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder; wanted a file name such as {out / 'runtime.pyz'}")
    data = runtime_archive()
    write_atomically(out, data)
    out.chmod(0o755)
    if json:
        document = {
            "path": str(out),
            "size_bytes": len(data),
            "version": edgekit_runtime.__version__,
        }
        print_json({"schema": "edgekit.runtime-zip/1", **document})
    else:
        stdout.print(
            f"{out}  {size(len(data))}, edgekit-runtime {edgekit_runtime.__version__}: "
            "needs Python 3.9 or newer, numpy and an engine", markup=False, soft_wrap=True,
        )  # fmt: skip
