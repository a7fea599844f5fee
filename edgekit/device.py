"""DeviceProfile: the facts about a device that decide what is tried on it.

Profiles are TOML files in `edgekit_device_profiles`; every figure names its source. The profile
`this-machine` is probed live. Unknown facts are absent, never guessed.
"""

from __future__ import annotations

import os
import platform
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgekit import sandbox
from edgekit.errors import EdgeKitError, UsageError
from edgekit_runtime.engines import ENGINES, engine_version

__all__ = [
    "THIS_MACHINE",
    "Cpu",
    "DeviceProfile",
    "Quantization",
    "load_profile",
    "probe_engine",
    "profile_ids",
    "this_machine",
]

THIS_MACHINE = "this-machine"
SCHEMA = "edgekit.device/1"

Positive = Annotated[int, Field(gt=0)]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Cpu(_Facts):
    """`features` use Linux's names (`/proc/cpuinfo`): asimddp, avx2, avx512_vnni ..."""

    model: str | None = None
    cores: Positive | None = None
    features: list[str] | None = None


class Quantization(_Facts):
    """`reduce_range`: weights in 7 bits, since 8-bit pair sums saturate in int16 on this CPU."""

    reduce_range: bool = False
    per_channel: bool = True


class DeviceProfile(_Facts):
    """What is known of a device. `sources` says where each figure is from, by dotted name."""

    schema_: Literal["edgekit.device/1"] = Field(alias="schema")
    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    name: str
    arch: Literal["x86_64", "aarch64", "armv7l"]
    cpu: Cpu = Cpu()
    memory_bytes: Positive | None = None
    engines: list[str]
    threads: Positive
    quantization: Quantization = Quantization()
    sources: dict[str, str]


def profile_ids() -> list[str]:
    """The ids of all profiles, `this-machine` first."""
    files = resources.files("edgekit_device_profiles").iterdir()
    return [THIS_MACHINE, *sorted(f.name[:-5] for f in files if f.name.endswith(".toml"))]


def load_profile(profile_id: str) -> DeviceProfile:
    """A profile by id, or from a TOML file.

    Raises:
        UsageError: no such profile (the known ones are listed), or the file is not a valid one.
    """
    if profile_id == THIS_MACHINE:
        return this_machine()
    if profile_id.endswith(".toml"):
        try:
            text = Path(profile_id).read_text()
        except OSError as error:
            raise UsageError(f"cannot read {profile_id}: {error.strerror}") from None
    elif profile_id in profile_ids():
        file = resources.files("edgekit_device_profiles") / f"{profile_id}.toml"
        text = file.read_text()
    else:
        known = ", ".join(profile_ids())
        raise UsageError(f"no device profile {profile_id!r}; known: {known}, or a .toml file")
    try:
        return DeviceProfile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{profile_id} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the profile"
        raise UsageError(f"{profile_id}: {where}: {first['msg']}") from None


def this_machine() -> DeviceProfile:
    """The profile of the machine this runs on; engines are those whose one-op probe ran."""
    import psutil

    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    model, features = _cpuinfo()
    cores = _usable_cores()
    # int8 matmul kernels for AVX2 and AVX512 without VNNI add pairs of products in int16
    # (vpmaddubsw), which saturates with 8-bit weights; Arm's widen and do not.
    saturates = arch == "x86_64" and not {"avx512_vnni", "avx_vnni"} & set(features)
    return DeviceProfile.model_validate(
        {
            "schema": SCHEMA,
            "id": THIS_MACHINE,
            "name": f"this machine ({model or arch})",
            "arch": arch,
            "cpu": {"model": model, "cores": cores, "features": features or None},
            "memory_bytes": psutil.virtual_memory().total,
            "engines": list(ENGINES),
            "threads": min(cores, 4),
            "quantization": {"reduce_range": saturates},
            "sources": dict.fromkeys(("cpu.cores", "memory_bytes", "threads"), "probed"),
        }
    )


def probe_engine(name: str) -> str | None:
    """None if the engine compiled and ran a one-operator model in a child process, else why not.

    Being installed proves nothing; a package for another CPU imports and then crashes.
    """
    if engine_version(name) is None:
        return f"not installed; pip install {ENGINES[name].distributions[0]}"
    try:
        sandbox.call(
            "edgekit_runtime.probe:probe",
            {"engine": name},
            limits=sandbox.Limits(timeout_s=60),
            what=f"probing {name}",
        )
    except EdgeKitError as error:
        return str(error)
    return None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> tuple[str | None, list[str]]:
    model: str | None = None
    features: list[str] = []
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None, []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and model is None:
            model = value.strip()
        if key.strip() in ("flags", "Features") and not features:
            features = sorted(value.split())
    return model, features
