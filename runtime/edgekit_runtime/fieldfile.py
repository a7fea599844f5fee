"""The file an application leaves of calls it measured (schema `edgekit.measure/1`)."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

from . import __version__
from .machine import machine_name, memory_bytes
from .timing import pack_ns

if TYPE_CHECKING:
    from .hooks import Measuring

__all__ = ["write"]


def write(path: Path, measured: Measuring, about: Dict[str, Any]) -> None:
    """All calls, packed (see `timing.pack_ns`), and the machine before and after.

    Raises:
        OSError: it cannot be written; no half of it is left under this name.
    """
    taken, memory = list(measured.samples), memory_bytes()
    document = {
        "schema": "edgekit.measure/1",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        **about,
        "samples_ns": pack_ns([sum(one) for one in taken]),
        "parts_ns": {
            name: pack_ns([one[i] for one in taken])
            for i, name in enumerate(("pre", "infer", "post"))
        },
        "summary": measured.summary(),
        "memory_bytes": memory,
        "peak_rss_bytes": memory["peak"],
        "conditions": {
            "arch": machine_name(),
            "kernel": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "edgekit": __version__,
            "before": measured.before._asdict() if measured.before else None,
            "after": measured.after._asdict() if measured.after else None,
        },
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
