"""The conditions a measurement was taken in; a number without them is hearsay."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekit_runtime import __version__
from edgekit_runtime.engines import ENGINES, engine_version

__all__ = ["conditions"]

_CPU = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_THERMAL = Path("/sys/class/thermal")


def conditions() -> dict[str, Any]:
    """What is known of this machine now. Unknown facts are None. No host or user names."""
    import psutil

    from edgekit.facts import this_machine

    profile = this_machine()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": "local",
        "cpu": profile.cpu.model,
        "arch": profile.arch,
        "cores": profile.cpu.cores,
        "isa": _isa(profile.cpu.features or []),
        "memory_bytes": profile.memory.ram_bytes,
        "memory_free_bytes": psutil.virtual_memory().available,
        "swap_used_bytes": psutil.swap_memory().used,
        "load_1min": load,
        "governor": _read(_CPU / "scaling_governor"),
        "frequency_khz": _number(_CPU / "scaling_cur_freq"),
        "temperature_mc": _temperature(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "platform": sys.platform,
        "edgekit": __version__,
        "engines": {name: engine_version(name) for name in ENGINES},
    }


def _isa(features: list[str]) -> list[str]:
    """The features that decide which int8 and float kernels run."""
    telling = ("avx", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8",
               "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2")  # fmt: skip
    return [f for f in telling if f in features]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and text.lstrip("-").isdigit() else None


def _temperature() -> int | None:
    """The hottest thermal zone in thousandths of a degree Celsius."""
    found = [_number(zone / "temp") for zone in sorted(_THERMAL.glob("thermal_zone*"))]
    known = [value for value in found if value is not None]
    return max(known) if known else None
