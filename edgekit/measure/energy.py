"""Energy meters: the plug-in point, and those that Linux brings.

A meter is one function, `joules() -> float`, that only grows. Adding one is a function here and a
line in `METERS`; a program may pass its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["METERS", "Meter", "hwmon", "idle_watts", "open_meter", "per_inference", "rapl"]

_POWERCAP = Path("/sys/class/powercap")
_HWMON = Path("/sys/class/hwmon")


@dataclass(frozen=True)
class Meter:
    """`joules` since some moment, of everything the meter sees, and what that is."""

    name: str
    joules: Callable[[], float]


def rapl(root: Path = _POWERCAP) -> Meter | str:
    """All processor packages by Intel's and AMD's running average power limit; or why not.

    The counters wrap at `max_energy_range_uj`; that is undone as long as it is read once in a
    round, which takes minutes at least.
    """
    packages = sorted(root.glob("intel-rapl:[0-9]")) + sorted(root.glob("intel-rapl:[0-9][0-9]"))
    if not packages:
        return "RAPL: this machine has no /sys/class/powercap/intel-rapl:*"
    counters = []
    for package in packages:
        try:
            int((package / "energy_uj").read_text())
            counters.append(
                _Counter(package / "energy_uj", int((package / "max_energy_range_uj").read_text()))
            )
        except PermissionError:
            return f"RAPL: {package / 'energy_uj'} may be read by root only"
        except (OSError, ValueError) as error:
            return f"RAPL: {package}: {error}"
    return Meter("rapl", lambda: sum(one.read() for one in counters) / 1e6)


class _Counter:
    """A counter that starts again at zero, as one that does not."""

    def __init__(self, path: Path, wrap: int) -> None:
        self._path, self._wrap, self._last, self._turns = path, wrap, 0, 0

    def read(self) -> int:
        now = int(self._path.read_text())
        if now < self._last:
            self._turns += 1
        self._last = now
        return now + self._turns * self._wrap


def hwmon(root: Path = _HWMON) -> Meter | str:
    """Energy counters of hardware monitors (`energy*_input`, microjoules: amd_energy, ina*); or
    why not. Of several the first monitor's are summed."""
    for folder in sorted(root.glob("hwmon*")):
        files = sorted(folder.glob("energy*_input"))
        try:
            if files and all(int(one.read_text()) >= 0 for one in files):
                return Meter(
                    f"hwmon:{(folder / 'name').read_text().strip()}",
                    lambda: sum(int(one.read_text()) for one in files) / 1e6,  # noqa: B023
                )
        except PermissionError:
            return f"hwmon: {files[0]} may be read by root only"
        except (OSError, ValueError):  # a sensor that is asleep
            continue
    return "hwmon: no monitor here counts energy"


METERS: dict[str, Callable[[], Meter | str]] = {"rapl": rapl, "hwmon": hwmon}


def open_meter() -> Meter | str:
    """The first meter that can be read here, or all the reasons why there is none."""
    reasons = []
    for find in METERS.values():
        found = find()
        if isinstance(found, Meter):
            return found
        reasons.append(found)
    return "; ".join(reasons)


def idle_watts(
    meter: Meter, seconds: float = 1.0, *, clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:  # fmt: skip
    """What the machine uses while nothing of ours runs."""
    start, before = clock(), meter.joules()
    sleep(seconds)
    return (meter.joules() - before) / max(clock() - start, 1e-9)


def per_inference(
    meter: Meter, *, idle_w: float, joules: float, seconds: float, runs: int
) -> dict[str, Any]:
    """`{meter, joules_per_inference, idle_watts, joules, seconds}`: above idle, never below 0."""
    above = max(0.0, joules - idle_w * seconds)
    return {
        "meter": meter.name, "joules_per_inference": above / runs if runs else None,
        "idle_watts": idle_w, "joules": joules, "seconds": seconds,
    }  # fmt: skip
