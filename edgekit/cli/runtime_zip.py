"""`edgekit runtime-zip`."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import edgekit_runtime
from edgekit.cache import write_atomically
from edgekit.cli.console import print_json, size, stdout
from edgekit.errors import UsageError

__all__ = ["archive", "runtime_zip"]

_MAIN = """import sys
try:
    import numpy
except ImportError:
    print("edgekit-runtime: needs numpy and an engine: pip install numpy onnxruntime",
          file=sys.stderr)
    sys.exit(3)
from edgekit_runtime.__main__ import main
sys.exit(main())
"""


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
    data = archive()
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


def archive() -> bytes:
    """The zipped package with a `__main__`: the same sources give the same bytes."""
    folder = Path(edgekit_runtime.__file__).parent
    files = {"__main__.py": _MAIN.encode()}
    for path in sorted(folder.rglob("*.py")):
        files[f"{folder.name}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    out = io.BytesIO()
    out.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            packed.writestr(entry, data)
    return out.getvalue()
