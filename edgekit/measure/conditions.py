"""The conditions a measurement was taken in; a number without them is hearsay."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekit_runtime import __version__
from edgekit_runtime.engines import ENGINES, engine_version

__all__ = ["Moment", "conditions", "moment", "unfit", "wait_until_fit"]

_CPU = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_THERMAL = Path("/sys/class/thermal")
_POWER = Path("/sys/class/power_supply")
#: the Raspberry Pi's firmware: bits 0 to 3 are now, 16 to 19 since boot
_RASPBERRY = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
_RASPBERRY_NOW = {
    0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit",
}  # fmt: skip
#: of all processors, by others: above, every figure is that of a busy machine
_MOST_BUSY = 0.4


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
        "cooling": _cooling(),
        "throttled": _throttled(),
        "memory_pressure": _pressure(),
        "battery": _battery(),
        "clock": time.get_clock_info("perf_counter").implementation,
        "clock_resolution_ns": round(time.get_clock_info("perf_counter").resolution * 1e9, 3),
        "clock_source": _read(
            Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        ),
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


# --- the machine while it is measured -------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """The machine at one moment. `busy` is the share of all processors' time that was used
    (0..1), stolen time included; the rest is None where the machine does not say."""

    at: str
    busy: float | None
    frequency_khz: int | None
    temperature_mc: int | None
    cooling: dict[str, int]
    throttled: list[str]
    memory_free_bytes: int
    memory_pressure: float | None
    battery: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


def moment(*, watch_s: float = 0.0) -> Moment:
    """The machine now; `busy` over the next `watch_s` seconds, None for 0."""
    import psutil

    busy = None
    if watch_s > 0:
        before = psutil.cpu_times()
        time.sleep(watch_s)
        after = psutil.cpu_times()
        spent = [b - a for a, b in zip(before, after, strict=True)]
        named = dict(zip(after._fields, spent, strict=True))
        total = sum(spent) - named.get("guest", 0.0) - named.get("guest_nice", 0.0)
        idle = named["idle"] + named.get("iowait", 0.0)
        busy = round(1 - idle / total, 3) if total > 0 else None
    frequencies = [
        _number(one)
        for one in sorted(_CPU.parent.parent.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    ]
    known = [one for one in frequencies if one is not None]
    return Moment(
        datetime.now(UTC).isoformat(timespec="seconds"), busy,
        sum(known) // len(known) if known else None, _temperature(), _cooling(), _throttled(),
        int(psutil.virtual_memory().available), _pressure(), _battery(),
    )  # fmt: skip


def unfit(now: Moment) -> list[str]:
    """Why this machine should not be measured now; nothing if it may."""
    reasons = []
    if now.busy is not None and now.busy > _MOST_BUSY:
        reasons.append(f"others use {100 * now.busy:.0f} % of its processors")
    reasons += [f"the firmware says: {one}" for one in now.throttled]
    if now.cooling:
        names = ", ".join(f"{name} at step {step}" for name, step in now.cooling.items())
        reasons.append(f"it is being cooled by slowing down ({names})")
    if now.memory_pressure is not None and now.memory_pressure > 10:
        reasons.append(f"programs wait for memory {now.memory_pressure:.0f} % of the time")
    battery = now.battery
    if battery and battery["discharging"] and (battery["percent"] or 100) < 20:
        reasons.append(f"the battery is at {battery['percent']} %, where savers set in")
    return reasons


def wait_until_fit(patience_s: float, *, watch_s: float = 1.0) -> tuple[Moment, list[str]]:
    """The first moment at which the machine may be measured; after `patience_s` the last one, with
    the reasons against it."""
    end = time.monotonic() + patience_s
    while True:
        now = moment(watch_s=watch_s)
        reasons = unfit(now)
        if not reasons or time.monotonic() >= end:
            return now, reasons


def _cooling() -> dict[str, int]:
    """Cooling devices that slow a processor down, and are at it (fans are none)."""
    found: dict[str, int] = {}
    for device in sorted(_THERMAL.glob("cooling_device*")):
        kind, state = _read(device / "type") or "", _number(device / "cur_state")
        slows = "cpufreq" in kind.lower() or "processor" in kind.lower() or "gpu" in kind.lower()
        if slows and state:
            found[kind] = max(state, found.get(kind, 0))
    return found


def _throttled() -> list[str]:
    text = _read(_RASPBERRY)
    try:
        bits = int(text, 16) if text else 0
    except ValueError:
        return []
    return [what for bit, what in _RASPBERRY_NOW.items() if bits >> bit & 1]


def _pressure() -> float | None:
    """Share of the last ten seconds in which some program waited for memory, in per cent."""
    for word in (_read(Path("/proc/pressure/memory")) or "").split():
        if word.startswith("avg10="):
            return float(word.removeprefix("avg10="))
    return None


def _battery() -> dict[str, Any] | None:
    for one in sorted(_POWER.glob("*")):
        if (_read(one / "type") or "") == "Battery" and (_read(one / "scope") or "") != "Device":
            return {
                "percent": _number(one / "capacity"),
                "discharging": _read(one / "status") == "Discharging",
            }
    return None
