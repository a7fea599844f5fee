"""The runtime as files, and as one, for devices on which nothing is to be installed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import edgekit_runtime

__all__ = ["runtime_archive", "runtime_files"]

_MAIN = """import sys
try:
    import numpy
except ImportError:
    print("edgekit-runtime: needs numpy and an engine: pip install numpy onnxruntime; "
          "edgekit deploy --provision brings them", file=sys.stderr)
    sys.exit(3)
from edgekit_runtime.__main__ import main
sys.exit(main())
"""


#: sent to devices by the host, from its own copy; nothing there imports them
_SENT = ("edgekit_runtime/installer.py", "edgekit_runtime/workbench.py")


def runtime_files() -> dict[str, bytes]:
    """The package's files and a `__main__.py`, by their path."""
    folder = Path(edgekit_runtime.__file__).parent
    files = {"__main__.py": _MAIN.encode()}
    for path in sorted(folder.rglob("*.py")):
        files[f"{folder.name}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    return files


def runtime_archive() -> bytes:
    """The zipped package with a `__main__`, without what only a host sends: the same sources give
    the same bytes."""
    out = io.BytesIO()
    out.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as packed:
        for name, data in runtime_files().items():
            if name in _SENT:
                continue
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            packed.writestr(entry, data)
    return out.getvalue()
