"""What a machine says of itself, as a device profile.

One shell script (`facts.sh`) collects it, here or on a device that may have no Python; this module
reads its output. Every fact's source is the file or command it was read from.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from edgekit import sandbox
from edgekit.device import SCHEMA, DeviceProfile
from edgekit.errors import EdgeKitError, MissingToolError, TargetError
from edgekit_runtime.engines import ENGINES, engine_version
from edgekit_runtime.engines.accelerators import split_engine
from edgekit_runtime.machine import machine_name

__all__ = [
    "Facts", "facts_script", "probe_accelerator", "probe_engine", "profile_of", "read_facts",
    "this_machine",
]  # fmt: skip

_ARCHES = {
    "x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64",
    "armv7l": "armv7l", "armv8l": "armv7l",
}  # fmt: skip

#: Arm's part numbers: Linux, arch/arm64/include/asm/cputype.h
_ARM_PARTS = {
    0xC07: "Cortex-A7", 0xC08: "Cortex-A8", 0xC09: "Cortex-A9", 0xC0F: "Cortex-A15",
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57",
    0xD08: "Cortex-A72", 0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710",
    0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4B: "Cortex-A78C", 0xD4C: "Cortex-X1C",
    0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520",
    0xD81: "Cortex-A720", 0xD82: "Cortex-X4", 0xD84: "Neoverse-V3", 0xD85: "Cortex-X925",
    0xD87: "Cortex-A725", 0xD8E: "Neoverse-N3",
}  # fmt: skip
_ARM = 0x41  # the implementer whose part numbers these are


@dataclass(frozen=True)
class Facts:
    """What was read. None or empty where the machine does not say; `model` is the device's name.

    `processors` is how many this process may use; `cores` are all, as `(name, highest Hz)`.
    `packages` are versions by distribution name. `said` maps a profile's field to where it was
    read. `faults` says what could not be read and matters.
    """

    system: str = ""
    kernel: str | None = None
    arch: str = ""
    model: str | None = None
    soc: str | None = None
    cpu: str | None = None
    processors: int | None = None
    cores: tuple[tuple[str | None, int | None], ...] = ()
    features: tuple[str, ...] = ()
    ram_bytes: int | None = None
    limit_bytes: int | None = None
    storage_bytes: int | None = None
    release: str | None = None
    libc: str | None = None
    python: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    throttle_c: float | None = None
    devices: tuple[str, ...] = ()
    android: bool = False
    said: dict[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


def facts_script() -> str:
    """The shell script that collects the facts; its environment may name a PYTHON."""
    return (resources.files("edgekit") / "facts.sh").read_text(encoding="utf-8")


def read_facts(text: str) -> Facts:
    """Read the script's output.

    Raises:
        TargetError: it is not that: the target has no usable shell, or printed something else.
    """
    parts = _sections(text)
    if "uname" not in parts or "end" not in parts:
        words = (text.strip().splitlines() or ["nothing"])[-1][:120]
        raise TargetError(f"the target's shell did not run the probe; its last words: {words}")
    system, kernel, machine, bits = (*parts["uname"].split("\n"), "", "", "", "")[:4]
    arch = _ARCHES.get(machine.strip().lower(), machine.strip())
    if arch == "aarch64" and bits.strip() == "32":
        arch = "armv7l"  # a 32-bit system under a 64-bit kernel, as Raspberry Pi OS has it
    info = _cpuinfo(parts.get("/proc/cpuinfo", ""))
    properties = dict(re.findall(r"^\[([\w.-]+)\]: \[(.*)\]$", parts.get("getprop", ""), re.M))
    python, packages, libc, fault = _python(parts.get("python", ""))
    said: dict[str, str] = {}

    def note(name: str, value: Any, where: str) -> Any:
        if value:
            said[name] = where
        return value or None

    release = re.search(r'^PRETTY_NAME="?([^"\n]+)', parts.get("/etc/os-release", ""), re.M)
    android = bool(properties)
    model = properties.get("ro.product.model") or parts.get("/sys/firmware/devicetree/base/model")
    trips = re.findall(r"^(?:passive|hot) (\d+)$", parts.get("trips", ""), re.M)
    faults = [fault] if fault else []
    if not info:
        faults.append("/proc/cpuinfo cannot be read: the processor is not known")
    if "cpus" in parts and not parts["cpus"]:
        faults.append("/sys/devices/system/cpu is empty: clocks and clusters are not known")
    return Facts(
        system=system,
        kernel=note("system.kernel", kernel.strip(), "uname -r"),
        arch=arch,
        model=(model or "").strip("\0\n ") or None,
        soc=note("soc", _soc(properties), "getprop"),
        cpu=note("cpu.model", _cpu_name(info), "/proc/cpuinfo"),
        processors=note("cpu.cores", _number(parts.get("processors")), "nproc"),
        cores=note("cpu.clusters", _cores(info, parts.get("cpus", "")), "/proc/cpuinfo, cpufreq")
        or (),
        features=note("cpu.features", _features(info), "/proc/cpuinfo") or (),
        ram_bytes=note("memory.ram_bytes", _memory(parts), "/proc/meminfo MemTotal"),
        limit_bytes=note(
            "memory.model_bytes", _number(parts.get("/sys/fs/cgroup/memory.max")), "cgroup limit"
        ),
        storage_bytes=note("memory.storage_bytes", _storage(parts.get("disk", "")), "df"),
        release=properties.get("ro.build.version.release") or (release[1] if release else None),
        libc="bionic" if android else parts.get("libc") or libc or None,
        python=python,
        packages=packages,
        throttle_c=note("thermal.throttle_c", min(map(int, trips), default=0) / 1000, "thermal"),
        devices=tuple(parts.get("devices", "").split()),
        android=android,
        said=said,
        faults=tuple(faults),
    )


def profile_of(facts: Facts, *, profile_id: str, name: str, kind: str) -> dict[str, Any]:
    """The facts as the tables of a device profile; engines are those installed.

    Raises:
        TargetError: the architecture is none that profiles know.
    """
    if facts.arch not in set(_ARCHES.values()):
        raise TargetError(
            f"the target's architecture is {facts.arch or 'unknown'!r}; "
            f"known: {', '.join(sorted(set(_ARCHES.values())))}"
        )
    cpu = {
        "model": facts.cpu,
        "cores": facts.processors,
        "clusters": _clusters(facts),
        "features": sorted(facts.features) or None,
        "simd_bits": _simd_bits(facts),
    }
    engines = dict(_engines(facts.packages))
    # int8 matmul kernels for AVX2 and AVX512 without VNNI add pairs of products in int16
    # (vpmaddubsw), which saturates with 8-bit weights; Arm's widen and do not.
    saturates = facts.arch == "x86_64" and not {"avx512_vnni", "avx_vnni"} & set(facts.features)
    limit = facts.limit_bytes
    below = limit if limit and facts.ram_bytes and limit < facts.ram_bytes else None
    tables: dict[str, Any] = {
        "schema": SCHEMA,
        "id": profile_id,
        "name": name,
        "kind": kind,
        "soc": facts.soc,
        "arch": facts.arch,
        "cpu": _stated(cpu),
        "memory": _stated(
            {
                "ram_bytes": facts.ram_bytes,
                "storage_bytes": facts.storage_bytes,
                "model_bytes": below,
            }
        ),
        "engines": engines,
        "quantization": {"reduce_range": saturates},
        "defaults": {"threads": _default_threads(facts)},
        "system": _stated(
            {
                "name": "android" if facts.android else _system(facts.system),
                "release": facts.release,
                "kernel": facts.kernel,
                "libc": facts.libc,
                "python": facts.python,
            }
        ),
        "sources": [],
    }
    if facts.throttle_c:
        tables["thermal"] = {"throttle_c": facts.throttle_c}
    if facts.devices:
        tables["notes"] = f"drivers present, not probed: {', '.join(facts.devices)}"
    tables["sources"] = list(_sources(tables, facts))
    return _stated(tables)


@cache
def this_machine() -> DeviceProfile:
    """The profile of the machine this runs on; engines are all that EdgeKit knows: which of them
    work here is for `probe_engine` to say."""
    try:
        done = subprocess.run(
            ["sh", "-s"], input=facts_script().encode(), capture_output=True, timeout=30,
            check=False, env={**sandbox.child_environment(), "PYTHON": "false"},
        )  # fmt: skip
        facts = read_facts(done.stdout.decode(errors="replace"))
    except (OSError, subprocess.TimeoutExpired, EdgeKitError):
        facts = Facts(system=platform.system(), arch=machine_name())
    cpu = f" ({facts.cpu or facts.arch})"
    tables = profile_of(facts, profile_id="this-machine", name=f"this machine{cpu}", kind="generic")
    tables["engines"] = {name: _stated({"version": engine_version(name)}) for name in ENGINES}
    tables["sources"].append(
        {"fields": ["engines"], "kind": "probe", "title": "packages installed here; all engines "
         "EdgeKit knows are tried, those whose one-operator probe fails are skipped"}
    )  # fmt: skip
    return DeviceProfile.model_validate(tables)


def probe_engine(name: str) -> str | None:
    """None if the engine, or `ENGINE:ACCELERATOR`, compiled and ran a one-operator model in a child
    process, else why not.

    Being installed proves nothing; a package for another CPU imports and then crashes.
    """
    try:
        probe_accelerator(name)
    except EdgeKitError as error:
        return str(error)
    return None


def probe_accelerator(name: str) -> str:
    """Run a one-operator model in a child process; what stands in for the accelerator here, empty
    if nothing does.

    Raises:
        EdgeKitError: it does not run.
    """
    if engine_version(name) is None:
        install = ENGINES[split_engine(name)[0]].distributions[0]
        raise MissingToolError(f"not installed; pip install {install}")
    limits, arguments = sandbox.Limits(timeout_s=60), {"engine": name}
    return str(
        sandbox.call("edgekit_runtime.probe:stand_in", arguments, limits=limits,
                     what=f"probing {name}")
    )  # fmt: skip


# --- reading the sections -----------------------------------------------------------------------


def _sections(text: str) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.replace("\r", "").split("\n"):
        if line.startswith("@@ "):
            lines = found.setdefault(line[3:].split(" #")[0].strip(), [])
        else:
            lines.append(line)
    return {name: "\n".join(lines).strip("\n") for name, lines in found.items()}


def _cpuinfo(text: str) -> list[dict[str, str]]:
    """One dictionary per processor; what stands outside of them (32-bit Arm) is in all."""
    blocks: list[dict[str, str]] = []
    common: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        key, value = key.strip(), value.strip()
        if not colon:
            continue
        if key == "processor" and value.isdecimal():
            blocks.append({})
        (blocks[-1] if blocks else common).setdefault(key, value)
    return [{**common, **block} for block in blocks]


def _soc(properties: dict[str, str]) -> str:
    keys = ("ro.soc.manufacturer", "ro.soc.model")
    return " ".join(properties[key] for key in keys if properties.get(key))


def _cpu_name(info: list[dict[str, str]]) -> str | None:
    """The processor's name: as the kernel has it, else those of its cores."""
    for block in info:
        for key in ("model name", "cpu model"):
            if block.get(key):
                return block[key]
    names = [name for name in map(_core_name, info) if name]
    return ", ".join(dict.fromkeys(names)) or None


def _core_name(block: dict[str, str]) -> str | None:
    with suppress(KeyError, ValueError):
        if int(block["CPU implementer"], 16) == _ARM:
            part = int(block["CPU part"], 16)
            return f"Arm {_ARM_PARTS[part]}" if part in _ARM_PARTS else f"Arm part {part:#x}"
        return f"implementer {block['CPU implementer']} part {block['CPU part']}"
    return None


def _cores(info: list[dict[str, str]], cpus: str) -> tuple[tuple[str | None, int | None], ...]:
    clocks = {}
    for line in cpus.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0].isdecimal():
            clocks[int(words[0])] = _number(words[1])
    found = []
    for number, block in enumerate(info):
        khz = clocks.get(int(block.get("processor", number)))
        name = _core_name(block) or block.get("model name")
        found.append((name, khz * 1000 if khz else None))
    return tuple(found)


def _features(info: list[dict[str, str]]) -> tuple[str, ...]:
    """What every processor has: a thread may be moved to any of them."""
    sets = [set((b.get("flags") or b.get("Features") or "").split()) for b in info]
    return tuple(sorted(set.intersection(*sets))) if sets else ()


def _memory(parts: dict[str, str]) -> int | None:
    total = re.search(r"^MemTotal:\s+(\d+) kB", parts.get("/proc/meminfo", ""), re.M)
    return int(total[1]) * 1024 if total else None


def _storage(df: str) -> int | None:
    """The size of the file system in bytes; long device names wrap the line."""
    numbers = re.findall(r"\s(\d+)\s+\d+\s+\d+\s+\d+%", df)
    return int(numbers[-1]) * 1024 if numbers else None


_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*[.a-z0-9+-]*$", re.ASCII)


def _python(text: str) -> tuple[str | None, dict[str, str], str | None, str | None]:
    """Version, packages, libc, and what is wrong."""
    with suppress(ValueError, IndexError, KeyError, TypeError):
        said = json.loads(text.splitlines()[-1])
        packages = {n: v for n, v in said["packages"].items() if v and _VERSION.match(v)}
        python = str(said["python"]) if _VERSION.match(str(said["python"])) else None
        return python, packages, said["libc"] or None, None
    words = (text.splitlines() or [""])[-1][:120]
    return None, {}, None, f"no usable Python{f': {words}' if words else ''}"


def _number(text: str | None) -> int | None:
    first = (text or "").strip().partition("\n")[0]
    return int(first) if first.isdecimal() else None


# --- making the profile -------------------------------------------------------------------------


def _stated(table: dict[str, Any]) -> dict[str, Any]:
    kept = ("engines",)  # a profile without any says so
    return {k: v for k, v in table.items() if v is not None and (v != {} or k in kept)}


def _engines(packages: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    for engine, entry in ENGINES.items():
        for distribution in entry.distributions:
            if distribution in packages:
                usual = distribution == entry.distributions[0]
                named = {} if usual else {"distribution": distribution}
                yield engine, {"version": packages[distribution], **named}
                break


def _clusters(facts: Facts) -> dict[str, Any] | None:
    """Cores of one kind together, fastest first; None if not all are known or may be used."""
    if not facts.cores or len(facts.cores) != facts.processors:
        return None
    counts: dict[tuple[str | None, int | None], int] = {}
    for core in facts.cores:
        counts[core] = counts.get(core, 0) + 1
    order = sorted(counts, key=lambda core: -(core[1] or 0))
    names = ["all"] if len(order) == 1 else [f"cluster-{n}" for n in range(len(order))]
    return {
        name: _stated({"core": core or "unknown", "count": counts[core, hz], "max_hz": hz})
        for name, (core, hz) in zip(names, order, strict=True)
    }


def _simd_bits(facts: Facts) -> int | None:
    """From the features; SVE's width is not among them, its lower half is Advanced SIMD's."""
    widths = {"avx512f": 512, "avx": 256, "sse2": 128, "asimd": 128, "neon": 128}
    return next((bits for name, bits in widths.items() if name in facts.features), None)


def _default_threads(facts: Facts) -> int:
    """As many as there are fast cores, at most 4: small models gain nothing from more."""
    if not facts.processors:
        return 1
    fastest = max((hz or 0 for _, hz in facts.cores), default=0)
    fast = sum((hz or 0) >= 0.8 * fastest for _, hz in facts.cores) or facts.processors
    return max(1, min(4, fast, facts.processors))


def _system(name: str) -> str:
    return {"Linux": "linux", "Windows": "windows"}.get(name, "linux")


def _sources(tables: dict[str, Any], facts: Facts) -> Iterator[dict[str, Any]]:
    by_place: dict[str, list[str]] = {}
    for name, place in facts.said.items():
        table, _, key = name.partition(".")
        stated = tables.get(table)
        if stated is not None and (not key or key in stated):
            by_place.setdefault(place, []).append(name)
    for place, names in by_place.items():
        yield {"fields": names, "kind": "probe", "title": f"read on the device: {place}"}
    if tables["engines"]:
        yield {"fields": ["engines"], "kind": "probe", "title": "packages installed on the device"}
    others = [f"system.{key}" for key in tables["system"] if f"system.{key}" not in facts.said]
    yield {"fields": others, "kind": "probe", "title": "read on the device: os-release, Python"}
    if "simd_bits" in tables["cpu"]:
        yield {"fields": ["cpu.simd_bits"], "kind": "probe", "title": "from cpu.features"}
    yield {
        "fields": ["quantization.reduce_range"], "kind": "documentation",
        "title": "ONNX Runtime, Quantize ONNX Models",
        "says": "on x86-64 without VNNI, 8-bit weights can saturate: use reduce_range",
    }  # fmt: skip
    yield {
        "fields": ["defaults.threads"], "kind": "choice", "title": "EdgeKit",
        "says": "one per fast core, at most 4",
    }  # fmt: skip
