"""The conditions a measurement was taken in; a number without them is hearsay."""

from __future__ import annotations

import fnmatch
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from glob import glob
from pathlib import Path
from typing import Any

from edgekit.device import DeviceProfile
from edgekit_runtime import __version__
from edgekit_runtime.engines import ENGINES, engine_version
from edgekit_runtime.machine import cpu_name

__all__ = [
    "Moment", "Read", "conditions", "conditions_there", "moment", "read_here", "unfit",
    "wait_until_fit",
]  # fmt: skip

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

#: small files of a machine by path: those that match and can be read
Read = Callable[[Sequence[str]], Mapping[str, str]]


def read_here(patterns: Sequence[str]) -> dict[str, str]:
    """Files of this machine."""
    found = {}
    for path in (path for one in patterns for path in sorted(glob(one))):  # noqa: PTH207
        try:
            found[path] = Path(path).read_text(errors="replace")
        except OSError:
            continue
    return found


def _watched() -> list[str]:
    """What changes while a machine is measured."""
    return [
        f"{_CPU.parent.parent}/cpu[0-9]*/cpufreq/scaling_cur_freq",
        f"{_THERMAL}/thermal_zone*/temp", f"{_THERMAL}/cooling_device*/type",
        f"{_THERMAL}/cooling_device*/cur_state",
        str(_RASPBERRY), "/proc/pressure/memory", f"{_POWER}/*/type", f"{_POWER}/*/scope",
        f"{_POWER}/*/capacity", f"{_POWER}/*/status", "/proc/meminfo", "/proc/stat",
    ]  # fmt: skip


def conditions() -> dict[str, Any]:
    """What is known of this machine now. Unknown facts are None. No host or user names."""
    import psutil

    from edgekit.facts import this_machine

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = _conditions(this_machine(), read_here)
    return found | {
        "target": "local",
        "memory_free_bytes": psutil.virtual_memory().available,
        "swap_used_bytes": psutil.swap_memory().used,
        "load_1min": load,
        "clock": time.get_clock_info("perf_counter").implementation,
        "clock_resolution_ns": round(time.get_clock_info("perf_counter").resolution * 1e9, 3),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "platform": sys.platform,
        "engines": {name: engine_version(name) for name in ENGINES},
    }


def conditions_there(profile: DeviceProfile, read: Read, *, target: str) -> dict[str, Any]:
    """The same of another machine, whose facts are in `profile`; `target` is the kind of it. Also
    `device`, what it is called, and `cpu_id`, as `edgekit_runtime.machine.cpu_name` there."""
    files = read(["/proc/loadavg", "/proc/meminfo", "/proc/cpuinfo"])
    memory = _meminfo(files)
    total, free = memory.get("SwapTotal"), memory.get("SwapFree")
    system = profile.system
    kernel = system.kernel if system else None
    return _conditions(profile, read) | {
        "target": target,
        "device": profile.name,
        "cpu_id": cpu_name(files.get("/proc/cpuinfo", "")),
        "memory_free_bytes": memory.get("MemAvailable"),
        "swap_used_bytes": total - free if total is not None and free is not None else None,
        "load_1min": _float(files.get("/proc/loadavg")),
        "clock": None,
        "clock_resolution_ns": None,
        "kernel": f"Linux {kernel}" if kernel else None,
        "python": system.python if system else None,
        "platform": "linux",
        "engines": {name: facts.version for name, facts in profile.engines.items()},
    }


def _conditions(profile: DeviceProfile, read: Read) -> dict[str, Any]:
    source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    files = read([f"{_CPU}/*", source, *_watched()])
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": profile.cpu.model,
        "arch": profile.arch,
        "cores": profile.cpu.cores,
        "isa": _isa(profile.cpu.features or []),
        "memory_bytes": profile.memory.ram_bytes,
        "governor": _text(files, f"{_CPU}/scaling_governor"),
        "frequency_khz": _number(files, f"{_CPU}/scaling_cur_freq"),
        "temperature_mc": _temperature(files),
        "cooling": _cooling(files),
        "throttled": _throttled(files),
        "memory_pressure": _pressure(files),
        "battery": _battery(files),
        "clock_source": _text(files, source),
        "edgekit": __version__,
    }


def _isa(features: list[str]) -> list[str]:
    """The features that decide which int8 and float kernels run."""
    telling = ("avx", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8",
               "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2")  # fmt: skip
    return [f for f in telling if f in features]


def _text(files: Mapping[str, str], path: Path | str) -> str | None:
    return files.get(str(path), "").strip() or None


def _number(files: Mapping[str, str], path: Path | str) -> int | None:
    text = _text(files, path)
    return int(text) if text and text.lstrip("-").isdigit() else None


def _float(text: str | None) -> float | None:
    try:
        return float((text or "").split()[0])
    except (ValueError, IndexError):
        return None


def _numbers(files: Mapping[str, str], pattern: str) -> list[int]:
    found = [_number(files, path) for path in fnmatch.filter(files, pattern)]
    return [one for one in found if one is not None]


def _temperature(files: Mapping[str, str]) -> int | None:
    """The hottest thermal zone in thousandths of a degree Celsius."""
    return max(_numbers(files, f"{_THERMAL}/thermal_zone*/temp"), default=None)


def _meminfo(files: Mapping[str, str]) -> dict[str, int]:
    """Of /proc/meminfo, in bytes."""
    found = {}
    for line in files.get("/proc/meminfo", "").splitlines():
        key, _, rest = line.partition(":")
        if rest.split()[:1] and rest.split()[0].isdigit():
            found[key] = int(rest.split()[0]) * 1024
    return found


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
    memory_free_bytes: int | None
    memory_pressure: float | None
    battery: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


def moment(*, watch_s: float = 0.0, read: Read | None = None) -> Moment:
    """The machine now, this one without `read`; `busy` over the next `watch_s` seconds, None for
    0."""
    busy = None
    if watch_s > 0:
        before = _times(read)
        time.sleep(watch_s)
        busy = _busy(before, _times(read))
    files = (read or read_here)(_watched())
    known = _numbers(files, f"{_CPU.parent.parent}/cpu[0-9]*/cpufreq/scaling_cur_freq")
    free = _meminfo(files).get("MemAvailable")
    if read is None:
        import psutil

        free = int(psutil.virtual_memory().available)
    return Moment(
        datetime.now(UTC).isoformat(timespec="seconds"), busy,
        sum(known) // len(known) if known else None, _temperature(files), _cooling(files),
        _throttled(files), free, _pressure(files), _battery(files),
    )  # fmt: skip


def _times(read: Read | None) -> dict[str, float]:
    """What the processors have done so far, in any unit; names as in proc(5)."""
    if read is None:
        import psutil

        found: dict[str, float] = psutil.cpu_times()._asdict()
        return found
    words = read(["/proc/stat"]).get("/proc/stat", "").partition("\n")[0].split()[1:]
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest",
             "guest_nice")  # fmt: skip
    return {name: float(word) for name, word in zip(names, words, strict=False)}


def _busy(before: dict[str, float], after: dict[str, float]) -> float | None:
    spent = {name: after[name] - value for name, value in before.items() if name in after}
    total = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    return round(1 - idle / total, 3) if total > 0 else None


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


def wait_until_fit(
    patience_s: float, *, watch_s: float = 1.0, read: Read | None = None
) -> tuple[Moment, list[str]]:
    """The first moment at which the machine may be measured; after `patience_s` the last one, with
    the reasons against it."""
    end = time.monotonic() + patience_s
    while True:
        now = moment(watch_s=watch_s, read=read)
        reasons = unfit(now)
        if not reasons or time.monotonic() >= end:
            return now, reasons


def _cooling(files: Mapping[str, str]) -> dict[str, int]:
    """Cooling devices that slow a processor down, and are at it (fans are none)."""
    found: dict[str, int] = {}
    for path in fnmatch.filter(files, f"{_THERMAL}/cooling_device*/type"):
        kind, state = _text(files, path) or "", _number(files, Path(path).with_name("cur_state"))
        slows = "cpufreq" in kind.lower() or "processor" in kind.lower() or "gpu" in kind.lower()
        if slows and state:
            found[kind] = max(state, found.get(kind, 0))
    return found


def _throttled(files: Mapping[str, str]) -> list[str]:
    text = _text(files, _RASPBERRY)
    try:
        bits = int(text, 16) if text else 0
    except ValueError:
        return []
    return [what for bit, what in _RASPBERRY_NOW.items() if bits >> bit & 1]


def _pressure(files: Mapping[str, str]) -> float | None:
    """Share of the last ten seconds in which some program waited for memory, in per cent."""
    for word in (_text(files, "/proc/pressure/memory") or "").split():
        if word.startswith("avg10="):
            return float(word.removeprefix("avg10="))
    return None


def _battery(files: Mapping[str, str]) -> dict[str, Any] | None:
    for path in fnmatch.filter(files, f"{_POWER}/*/type"):
        one = Path(path).parent
        if _text(files, path) == "Battery" and _text(files, one / "scope") != "Device":
            return {
                "percent": _number(files, one / "capacity"),
                "discharging": _text(files, one / "status") == "Discharging",
            }
    return None
