"""What the machine says of itself and of this process; None where it says nothing."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

__all__ = [
    "Reading",
    "cpu_name",
    "energy_joules",
    "free_memory_bytes",
    "machine_name",
    "memory_bytes",
    "peak_rss_bytes",
    "read_machine",
    "rss_bytes",
]

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class Reading(NamedTuple):
    """The machine at one moment; None where it does not say."""

    wall_ns: int
    cpu_ns: int
    rss_bytes: Optional[int]
    temperature_c: Optional[float]
    frequency_mhz: Optional[float]
    energy_j: Optional[float]


def read_machine(energy_j: Callable[[], Optional[float]]) -> Reading:
    """The process's time and memory, the hottest sensor, the mean frequency of the processors."""
    temperatures = _numbers("/sys/class/thermal", "thermal_zone*/temp")
    frequencies = _numbers("/sys/devices/system/cpu", "cpu[0-9]*/cpufreq/scaling_cur_freq")
    return Reading(
        time.perf_counter_ns(),
        time.process_time_ns(),
        rss_bytes(),
        max(temperatures) / 1000 if temperatures else None,
        sum(frequencies) / len(frequencies) / 1000 if frequencies else None,
        energy_j(),
    )


def energy_joules() -> Optional[float]:
    """What all processor packages have used so far by RAPL; None where it cannot be read (Linux
    lets only root read it). It wraps after hours: differences of short times are meant."""
    packages = _numbers("/sys/class/powercap", "intel-rapl:[0-9]*/energy_uj")
    return sum(packages) / 1e6 if packages else None


def rss_bytes() -> Optional[int]:
    """The process's resident memory."""
    return _status("VmRSS:")


def peak_rss_bytes() -> int:
    """The process's peak resident memory, 0 where the system does not say.

    From VmHWM on Linux: `getrusage` there starts a child at its parent's peak.
    """
    peak = _status("VmHWM:")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return 0
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(found if sys.platform == "darwin" else found * 1024)


def memory_bytes() -> Dict[str, Optional[int]]:
    """The process's memory: `rss`, its parts `anonymous` and `file` (mapped files: the kernel can
    drop them), `pss` (pages shared with others counted in parts) and `peak` resident."""
    rss, anonymous, mapped = _status("VmRSS:"), _status("RssAnon:"), _status("RssFile:")
    pss = _status("Pss:", "/proc/self/smaps_rollup")
    return {
        "rss": rss, "anonymous": anonymous, "file": mapped, "pss": pss, "peak": peak_rss_bytes(),
    }  # fmt: skip


def free_memory_bytes() -> Optional[int]:
    """What this process may still take: the machine's MemAvailable, or less where its control
    group (version 2) is limited."""
    found: List[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(one.split()[1]) * 1024 for one in lines if one.startswith("MemAvailable:")]
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        group = Path("/sys/fs/cgroup" + own)
        limit = int((group / "memory.max").read_text())  # or the word "max"
        found.append(limit - int((group / "memory.current").read_text()))
    return max(0, min(found)) if found else None


def machine_name() -> str:
    """The kind of processor as Linux calls it: `x86_64`, `aarch64`, `armv7l`."""
    found = platform.machine().lower()
    return _MACHINES.get(found, found)


def cpu_name(text: Optional[str] = None) -> Optional[str]:
    """The processor's name as the kernel has it, Arm's by number: `implementer 0x41 part 0xd08`.
    `text` is what /proc/cpuinfo holds, on another machine."""
    found: Dict[str, str] = {}
    if text is None:
        text = ""
        with contextlib.suppress(OSError):
            text = Path("/proc/cpuinfo").read_text(errors="replace")
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    if "CPU implementer" in found and "CPU part" in found:
        return f"implementer {found['CPU implementer']} part {found['CPU part']}"
    return found.get("model name") or found.get("cpu model") or None


def _status(key: str, path: str = "/proc/self/status") -> Optional[int]:
    with contextlib.suppress(OSError), Path(path).open() as status:
        for line in status:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def _numbers(folder: str, pattern: str) -> List[int]:
    found = []
    for path in Path(folder).glob(pattern):
        with contextlib.suppress(OSError, ValueError):  # a sensor that is asleep
            found.append(int(path.read_text()))
    return found
