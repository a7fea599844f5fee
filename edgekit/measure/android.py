"""What Android says of a phone while it is measured, and the engines that the native runner has."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from edgekit.deploy.capsule import engine_version, litert_version
from edgekit.deploy.phone import RUNNER_ENGINES

__all__ = ["android_state", "with_runner"]

_SCREEN = {"Awake": "on", "Asleep": "off", "Dozing": "off"}


def android_state(say: Callable[[str], str]) -> dict[str, Any]:
    """`battery`, `battery_temperature_c`, `thermal_status` (0: none, 3: severe, 6: shutdown, as
    Android's PowerManager counts) and `screen`; None where the device does not tell. `say` is what
    prints what `dumpsys SERVICE` does."""
    battery, thermal, power = say("battery"), say("thermalservice"), say("power")
    level, scale = _number(battery, "level"), _number(battery, "scale")
    tenths = _number(battery, "temperature")
    charged = re.search(r"(AC|USB|Wireless|Dock) powered: true", battery)
    awake = re.search(r"mWakefulness=(\w+)", power)
    known = level is not None and scale
    return {
        "battery": {"percent": round(100 * level / scale), "discharging": charged is None}
        if level is not None and known and scale else None,
        "battery_temperature_c": None if tenths is None else tenths / 10,
        "thermal_status": _number(thermal, "Thermal Status"),
        "screen": _SCREEN.get(awake[1]) if awake else None,
    }  # fmt: skip


def with_runner(tables: dict[str, Any], names: Sequence[str] = RUNNER_ENGINES) -> dict[str, Any]:
    """The tables of a profile with these engines of the native runner in place of others."""
    versions = {"onnxruntime": engine_version(), "litert": litert_version()}
    engines = {name: {"version": versions[name]} for name in names}
    brought = {
        "fields": ["engines"], "kind": "probe",
        "title": "the native runner's, which is brought over adb; processor only",
    }  # fmt: skip
    listed = [one for one in tables["sources"] if one["fields"] != ["engines"]]
    return {
        **tables, "engines": engines,
        "sources": [*listed, brought],
    }  # fmt: skip


def _number(text: str, name: str) -> int | None:
    found = re.search(rf"^\s*{name}: (-?\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None
