"""What a model needs on a microcontroller: memory, and what an Ethos-U's compiler says of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.firmware.ports import Port, Ports, integer_ports
from edgekit.firmware.slim import slimmed
from edgekit.firmware.tflm import interpret
from edgekit.firmware.vela import Compiled, compile_model
from edgekit.sandbox import Limits

__all__ = ["OnDevice", "needs_of"]

#: what TensorFlow Lite Micro keeps in the arena of a compiled model beside what vela plans: a node
#: and some tensors take under half of it
_RECORDS_BYTES = 8 << 10


@dataclass(frozen=True)
class OnDevice:
    """What a candidate needs there. `arena_bytes` is the working memory; `where_from` names what
    says so. `latency_ns` is None where nothing estimates it. `share` of the multiply-accumulates
    is on the accelerator; `left` are the operators that are not: name, type, why."""

    model: Path
    ports: Ports
    arena_bytes: int
    flash_bytes: int
    where_from: str
    operators: tuple[str, ...]
    compiled: Compiled | None = None
    accelerator: str = ""

    @property
    def latency_ns(self) -> int | None:
        return round(self.compiled.latency_ns) if self.compiled else None

    @property
    def share(self) -> float:
        return self.compiled.share if self.compiled else 0.0

    @property
    def left(self) -> tuple[tuple[str, str, str], ...]:
        if self.compiled is None:
            return ()
        return tuple(
            (one.name, one.type, one.reason) for one in self.compiled.operators if not one.on_npu
        )

    @property
    def placement(self) -> dict[str, float]:
        """Shares of the multiply-accumulates."""
        if self.compiled is None:
            return {"CPU": 1.0}
        return {self.accelerator: self.share} | ({"CPU": 1 - self.share} if self.share < 1 else {})

    def latency(self) -> dict[str, Any] | None:
        """As a measured one is given, but with one figure, and whose it is."""
        made = self.compiled
        if made is None:
            return None
        label = f"estimated (vela {made.version})"
        return {"p50": self.latency_ns, "label": label, "cycles": made.cycles}

    def to_json(self) -> dict[str, Any]:
        made = self.compiled
        return {
            "arena_bytes": self.arena_bytes, "flash_bytes": self.flash_bytes,
            "memory_from": self.where_from, "operators": list(self.operators),
            "accelerator": self.accelerator or None, "macs_on_accelerator": self.share,
            "left_to_cpu": [
                {"name": name, "type": kind, "reason": why} for name, kind, why in self.left
            ],
            "estimate": None if made is None else {
                "tool": f"vela {made.version}", "cycles": made.cycles,
                "clock_hz": made.clock_hz, "system": made.system_config,
                "memory_mode": made.memory_mode, "latency_ns": self.latency_ns,
            },
            "inputs": _ports_json(self.ports.inputs), "outputs": _ports_json(self.ports.outputs),
        }  # fmt: skip


def needs_of(
    content: bytes, work: Path, *, limits: Limits, accelerator: str = "", compiler_target: str = ""
) -> OnDevice:
    """Compile and interpret a TFLite model, whose inputs and outputs become integers first.

    `compiler_target` (`ethos-u55-128`) is the accelerator's; without, it is TensorFlow Lite
    Micro's alone. Files go to `work`.

    Raises:
        ModelError: the interpreter lacks an operator, or a shape is free.
        MissingExtraError: the interpreter or the compiler is not installed.
    """
    integers, ports = integer_ports(content)
    folder = work / f"{hashlib.sha256(integers).hexdigest()[:16]}-{compiler_target or 'tflm'}"
    folder.mkdir(exist_ok=True)
    model, made = folder / "named.tflite", folder / "model.tflite"
    model.write_bytes(integers)
    zeros = {name: np.zeros(one.shape, one.dtype) for name, one in ports.inputs.items()}
    tried = interpret(model, [zeros], limits=limits)
    if not compiler_target:
        made.write_bytes(slimmed(integers))
        return OnDevice(
            made, ports, tried.arena_bytes, made.stat().st_size,
            "TensorFlow Lite Micro's interpreter, 64-bit", tried.operators,
        )  # fmt: skip
    compiled = compile_model(model, compiler_target, made, limits=limits)
    # what is left to the CPU keeps its records, which are no more than those of the whole model
    records = _RECORDS_BYTES + (tried.tail_bytes if compiled.on_cpu else 0)
    return OnDevice(
        made, ports, compiled.sram_bytes + records, made.stat().st_size,
        f"vela {compiled.version}, and {records / 1024:.0f} KiB for the interpreter's records",
        tuple(dict.fromkeys(one.type for one in compiled.operators if not one.on_npu)),
        compiled, accelerator,
    )  # fmt: skip


def _ports_json(ports: Mapping[str, Port]) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": one.dtype, "shape": list(one.shape), "scale": one.scale,
         "zero_point": one.zero_point}
        for name, one in ports.items()
    ]  # fmt: skip
