"""DeviceProfile: the facts about a device that decide what is tried on it.

Profiles are TOML files, one device each (`edgekit_device_profiles`, or the user's own). Unknown
facts are absent, never guessed, and every figure names its source: `[[sources]]` entries say which
fields they are for and what the source states, and the figure must be found in those words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgekit.figures import figure_is_in, figures, unit_of

__all__ = [
    "SCHEMA",
    "Accelerator",
    "Cluster",
    "ComputeRoof",
    "Count",
    "Cpu",
    "Defaults",
    "DeviceProfile",
    "EngineFacts",
    "Facts",
    "Memory",
    "Name",
    "Power",
    "Quantization",
    "Roofline",
    "Source",
    "System",
    "Thermal",
    "Version",
]

SCHEMA = "edgekit.device/1"

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
Version = Annotated[str, Field(pattern=r"^\d+(\.\d+)*([.a-z0-9+-]*)$")]
Dtype = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "int4", "bool",
]  # fmt: skip
Activation = Literal["float32", "float16", "bfloat16", "int16", "uint16", "int8", "uint8"]
Weight = Literal["float32", "float16", "bfloat16", "int8", "uint8", "int4"]
Arch = Literal["x86_64", "aarch64", "armv7l", "armv6-m", "armv7e-m", "armv8.1-m", "xtensa", "riscv"]


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Cluster(Facts):
    """Cores of one kind. `max_hz` is the highest clock the maker states."""

    core: str
    count: Count
    max_hz: Count | None = None


class Cpu(Facts):
    """`features` use Linux's names (`/proc/cpuinfo`): asimddp, avx2, avx512_vnni ...

    `simd_bits` is the width of one vector register: channel counts that fill it run best.
    """

    model: str | None = None
    cores: Count | None = None
    clusters: dict[Name, Cluster] | None = None
    features: list[str] | None = None
    simd_bits: Count | None = None


class Memory(Facts):
    """`ram_bytes` where there is one figure, `ram_sold_bytes` where boards differ by what was
    bought. `sram_bytes` is all of it on chip, `sram_bank_bytes` its largest part in one piece,
    which an arena must fit. `model_bytes` is what a model may take at most, all included."""

    ram_bytes: Count | None = None
    ram_sold_bytes: list[Count] | None = None
    sram_bytes: Count | None = None
    sram_bank_bytes: Count | None = None
    flash_bytes: Count | None = None
    storage_bytes: Count | None = None
    model_bytes: Count | None = None


class System(Facts):
    """The software a device comes with, or was probed with."""

    name: Literal["linux", "android", "windows", "bare-metal", "freertos", "zephyr"]
    release: str | None = None
    kernel: str | None = None
    libc: str | None = None
    python: Version | None = None


class EngineFacts(Facts):
    """What is known of an engine on this device.

    `minimum` is the oldest version that will do, `version` the one installed, of which
    `distribution` where several provide the engine (litert: `tflite-runtime`). `opset` is the
    highest ONNX opset it takes, `operator_versions` the highest version per TFLite operator: both
    only where this device differs from the engine's own table (`edgekit.operators`).
    `static_shapes`: it takes no free dimensions.
    """

    minimum: Version | None = None
    version: Version | None = None
    distribution: str | None = None
    opset: Count | None = None
    operator_versions: dict[str, Count] | None = None
    static_shapes: bool = False


class Accelerator(Facts):
    """Something beside the CPU that can run operators, reached through an engine.

    The operators it takes are in `operator_table` (see `edgekit.operators`), or listed here:
    `operators` in the names of `operator_format`; `compiler_target` is what its compiler calls it
    (`ethos-u55-128`). Neither where no list is published. `dtypes`
    are those of activations. `sram_bytes` is its own working memory, `memory_bytes` the most a
    model may use there. Rates count two operations per multiply-accumulate, as the maker states
    them (peak, not sustained).
    """

    kind: Literal["npu", "gpu", "dsp", "tpu"]
    model: str | None = None
    engine: str
    provider: str | None = None
    compiler_target: Name | None = None
    operator_table: Name | None = None
    operator_format: Literal["onnx", "tflite"] | None = None
    operators: list[str] | None = None
    dtypes: list[Activation] | None = None
    weight_dtypes: list[Weight] | None = None
    per_channel: bool | None = None
    static_shapes: bool = False
    layouts: list[Literal["NHWC", "NCHW"]] | None = None
    most_dimensions: Count | None = None
    sram_bytes: Count | None = None
    memory_bytes: Count | None = None
    int8_ops_per_s: Rate | None = None
    float16_ops_per_s: Rate | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.operators is None) is not (self.operator_format is None):
            raise ValueError("operators and operator_format come together")
        if self.operators is not None and self.operator_table is not None:
            raise ValueError("operators are given twice: here and by operator_table")
        return self


class Quantization(Facts):
    """Which quantization schemes are legal here.

    `per_channel`: a scale per output channel of the weights is allowed. `activations` and
    `weights` are the types allowed (None: any). `symmetric`: activations must have zero point 0.
    `reduce_range`: weights in 7 bits, since 8-bit pair sums saturate in int16 on this CPU.
    `float_operators`: operators that must stay float, by ONNX's names (Softmax) or the format's.
    """

    per_channel: bool = True
    symmetric: bool = False
    reduce_range: bool = False
    activations: list[Activation] | None = None
    weights: list[Weight] | None = None
    float_operators: list[str] = []

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("activations", "weights"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} is empty, so that nothing may run; leave it out for any")
        return self


class Defaults(Facts):
    """What EdgeKit uses unless told otherwise: threads, and the cores they are kept on."""

    threads: Count | None = None
    affinity: list[Annotated[int, Field(ge=0)]] | None = None


class Thermal(Facts):
    """`throttle_c` is where the maker says clocks are lowered, degrees Celsius."""

    throttle_c: Rate | None = None
    notes: str | None = None


class Power(Facts):
    """Watts as the maker states them."""

    typical_w: Rate | None = None
    most_w: Rate | None = None
    notes: str | None = None


class ComputeRoof(Facts):
    """A rate that was reached here; two operations per multiply-accumulate."""

    engine: str
    kind: Literal["gemm", "depthwise"]
    dtype: Literal["float32", "float16", "int8"]
    threads: Count
    ops_per_s: Rate


class Roofline(Facts):
    """The device's roof as measured: what no model can exceed there (Williams et al., 2009)."""

    memory_bytes_per_s: Rate | None = None
    threads: Count
    compute: list[ComputeRoof] = []


class Source(Facts):
    """Where figures come from.

    `fields` are dotted names; a name covers all that is below it. `says` is what the source
    states, with its own figures and units. kind `choice` is a decision of this profile's author,
    whose reason `says` gives.
    """

    fields: Annotated[list[str], Field(min_length=1)]
    kind: Literal["datasheet", "documentation", "header", "probe", "choice"]
    title: str
    says: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _is_checkable(self) -> Self:
        if self.kind != "probe" and not self.says:
            raise ValueError("says is missing: what the source states, with its figures")
        return self


class DeviceProfile(Facts):
    """What is known of a device."""

    schema_: Literal["edgekit.device/1"] = Field(alias="schema")
    id: Name
    name: Line
    kind: Literal["board", "module", "phone", "microcontroller", "pc", "server", "generic"]
    soc: str | None = None
    arch: Arch
    notes: str | None = None
    cpu: Cpu = Cpu()
    memory: Memory = Memory()
    system: System | None = None
    engines: dict[Name, EngineFacts]
    accelerators: dict[Name, Accelerator] = {}
    quantization: Quantization = Quantization()
    defaults: Defaults = Defaults()
    thermal: Thermal = Thermal()
    power: Power = Power()
    roofline: Roofline | None = None
    sources: list[Source]

    @property
    def threads(self) -> int:
        """The threads engines get unless the user says otherwise."""
        return self.defaults.threads or 1

    def source_of(self, field: str) -> Source | None:
        """The source of a field by its dotted name: the entry with the longest name that covers
        it."""
        best: tuple[int, Source] | None = None
        for source in self.sources:
            for name in source.fields:
                covers = field == name or field.startswith(f"{name}.")
                if covers and (best is None or len(name) > best[0]):
                    best = (len(name), source)
        return best[1] if best else None

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Every stated fact that needs a source, as `(dotted name, value)`; lists whole."""
        stated = self.model_dump(by_alias=True, exclude_unset=True)
        for key in ("schema", "id", "name", "kind", "arch", "notes", "sources"):
            stated.pop(key, None)
        if not self.engines:
            stated.pop("engines")
        yield from _leaves("", stated)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for fault in (*self._contradictions(), *self._unsourced()):
            raise ValueError(fault)
        return self

    def _contradictions(self) -> Iterator[str]:
        cpu, memory = self.cpu, self.memory
        if cpu.clusters and cpu.cores:
            together = sum(one.count for one in cpu.clusters.values())
            if together != cpu.cores:
                yield f"cpu.clusters have {together} cores together, cpu.cores says {cpu.cores}"
        if cpu.cores and self.threads > cpu.cores:
            yield f"defaults.threads is {self.threads}, cpu.cores only {cpu.cores}"
        yield from self._odd_affinity()
        foreign = _FOREIGN.get(self.arch, frozenset()) & set(cpu.features or [])
        if foreign:
            yield f"cpu.features: {sorted(foreign)[0]} does not exist on {self.arch}"
        for part, whole in (("model_bytes", "ram_bytes"), ("sram_bank_bytes", "sram_bytes")):
            some, most = getattr(memory, part), getattr(memory, whole)
            if some and most and some > most:
                yield f"memory.{part} is {some}, memory.{whole} only {most}"
        for name, engine in self.engines.items():
            if engine.minimum and engine.version and _older(engine.version, engine.minimum):
                yield (
                    f"engines.{name}.version is {engine.version}, older than its minimum "
                    f"{engine.minimum}"
                )
        for name, one in self.accelerators.items():
            if one.engine not in self.engines:
                yield f"accelerators.{name}.engine is {one.engine}, which engines does not list"
        rules = self.quantization
        if rules.weights and set(rules.weights).isdisjoint(_WEIGHTS_FOR(rules.activations)):
            yield (
                f"quantization: weights {', '.join(rules.weights)} go with none of the "
                f"activations {', '.join(rules.activations or [])}"
            )

    def _odd_affinity(self) -> Iterator[str]:
        affinity, cores = self.defaults.affinity or [], self.cpu.cores
        outside = [core for core in affinity if cores and core >= cores]
        if outside:
            yield f"defaults.affinity names core {outside[0]}, cpu.cores is {cores}"
        if len(set(affinity)) < len(affinity):
            yield "defaults.affinity names a core twice"

    def _unsourced(self) -> Iterator[str]:
        stated = dict(self.facts())
        for source in self.sources:
            for name in source.fields:
                if not any(f == name or f.startswith(f"{name}.") for f in stated):
                    yield f"sources: {name} is not stated in this profile ({source.title})"
        for name, value in stated.items():
            origin = self.source_of(name)
            if origin is None:
                yield f"{name} has no source; add it to the fields of one under [[sources]]"
            elif origin.kind not in ("probe", "choice"):
                for figure in figures(name, value):
                    if not figure_is_in(figure, origin.says or "", unit=unit_of(name)):
                        yield (
                            f"{name}: {figure} is not in what its source says "
                            f"({origin.title}: {origin.says!r})"
                        )


_X86 = frozenset(
    ("sse", "sse2", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "avx512f", "avx512_vnni")
)
_ARM = frozenset(("asimd", "asimddp", "asimdhp", "i8mm", "sve", "sve2", "neon", "fphp", "vfpv4"))
#: features that show that a profile mixes two architectures up
_FOREIGN = {"x86_64": _ARM, "aarch64": _X86, "armv7l": _X86}


def _WEIGHTS_FOR(activations: list[Activation] | None) -> set[str]:  # noqa: N802
    """Weight types that can go with these activation types."""
    floats = {"float32", "float16", "bfloat16"}
    if activations is None or floats & set(activations):
        return {*floats, "int8", "uint8", "int4"}
    return {"int8", "uint8", "int4"}


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    elif value is not None and value != [] and not prefix.endswith(".notes"):
        yield prefix, value


def _older(one: str, other: str) -> bool:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    return numbers(one) < numbers(other)
