"""Compiles an int8 TFLite model for an Arm Ethos-U with vela, and reads what vela says of it.

Everything vela says is estimated by its model of the NPU. Its cycles and latency are of what runs
on the NPU alone: operators left on the CPU count nothing.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.cache import write_atomically
from edgekit.errors import ModelError, UsageError, require
from edgekit.graph.model import Graph, graph_from_json
from edgekit.graph.tflite import read
from edgekit.tflite_file import read_tflite

__all__ = ["ACCELERATORS", "Compiled", "Placed", "compile_here", "compile_model"]

_EXTRA = "ethos-u"
#: what `vela --accelerator-config` takes
ACCELERATORS = (
    "ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256",
    "ethos-u65-512", "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024",
    "ethos-u85-2048",
)  # fmt: skip
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Placed:
    """Where vela put one operator of the model. `name` is the first part of its output tensor's
    name, `type` TFLite's; `reason` are vela's words for what stays on the CPU. `macs` is None where
    they are not known."""

    name: str
    type: str
    on_npu: bool
    macs: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """What vela estimates. `cycles` and `latency_ns` (at `clock_hz`) are of the NPU's part alone;
    `flash_bytes` is what it puts into flash or DRAM: weights and commands."""

    version: str
    accelerator: str
    system_config: str
    memory_mode: str
    clock_hz: int
    cycles: int
    latency_ns: int
    sram_bytes: int
    flash_bytes: int
    macs: int
    npu_macs: int
    operators: tuple[Placed, ...]

    @property
    def share(self) -> float:
        """The share of multiply-accumulates on the NPU. Of operators, where there are none or those
        of one on the CPU are not known."""
        if self.macs and all(one.macs is not None for one in self.on_cpu):
            return self.npu_macs / self.macs
        return sum(one.on_npu for one in self.operators) / max(1, len(self.operators))

    @property
    def on_cpu(self) -> tuple[Placed, ...]:
        """What vela left on the CPU."""
        return tuple(one for one in self.operators if not one.on_npu)


def compile_model(
    model: Path, accelerator: str, out: Path, *, limits: sandbox.Limits
) -> Compiled:  # fmt: skip
    """Write `model`, a TFLite file of fixed shapes, compiled for `accelerator` ("ethos-u55-128").

    Raises:
        UsageError: vela knows no such accelerator.
        ModelError: vela refuses the model.
        MissingExtraError: ethos-u-vela is not installed.
        ChildError: vela crashed or ran over `limits`.
    """
    if accelerator not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise UsageError(f"no Ethos-U {accelerator!r}; vela compiles for {known}")
    said = sandbox.call(
        "edgekit.firmware.vela:compile_here",
        {"model": str(model), "accelerator": accelerator, "out": str(out)},
        limits=limits,
        what=f"compiling {model.name} with vela",
    )
    placed = tuple(Placed(**one) for one in said.pop("operators"))
    return Compiled(**said, operators=placed)


def compile_here(model: str, accelerator: str, out: str) -> dict[str, Any]:
    """What `compile_model` has done in a child process."""
    require("ethosu.vela", extra=_EXTRA)
    content = Path(model).read_bytes()
    if content[4:8] != b"TFL3":
        raise ModelError(
            f"{model}: not a TFLite model: bytes 4..8 are {content[4:8]!r}, wanted b'TFL3'"
        )
    with tempfile.TemporaryDirectory(prefix="edgekit-") as name:
        folder = Path(name)
        source = folder / "model.tflite"  # vela names its files after it
        source.write_bytes(content)
        words = _run_vela(source, accelerator, folder)
        summary = _only_row(folder)
        compiled = folder / "model_vela.tflite"
        made = compiled.read_bytes()
        operators = _placed(source, compiled, _reasons(words))
        write_atomically(Path(out), made)
    counts = [one["macs"] or 0 for one in operators]
    return {
        "version": metadata.version("ethos-u-vela"),
        "accelerator": accelerator,
        "system_config": summary["system_config"],
        "memory_mode": summary["memory_mode"],
        "clock_hz": round(float(summary["core_clock"])),
        "cycles": round(float(summary["cycles_total"])),
        "latency_ns": round(float(summary["inference_time"]) * 1e9),
        "sram_bytes": round(float(summary["sram_memory_used"]) * _KIB),
        "flash_bytes": round(sum(_KIB * float(summary[f"{one}_memory_used"]) for one in _STORES)),
        "macs": sum(counts),
        "npu_macs": sum(n for n, one in zip(counts, operators, strict=True) if one["on_npu"]),
        "operators": operators,
    }


_STORES = ("dram", "on_chip_flash", "off_chip_flash")


def _run_vela(source: Path, accelerator: str, folder: Path) -> str:
    """What vela prints; it is a program of its own, whose crash is told apart from ours."""
    command = [
        sys.executable, "-P", "-m", "ethosu.vela", str(source), "--output-dir", str(folder),
        "--accelerator-config", accelerator,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, cwd=folder,
        stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    words = done.stdout + done.stderr
    if done.returncode or not (folder / "model_vela.tflite").is_file():
        last = [line for line in words.splitlines() if line.strip()][-1:]
        why = last[0].strip()[:300] if last else f"it ended with code {done.returncode}"
        raise ModelError(f"vela cannot compile the model: {why}")
    return words


def _only_row(folder: Path) -> dict[str, str]:
    found = sorted(folder.glob("*_summary_*.csv"))
    if len(found) != 1:
        raise ModelError(f"vela wrote {len(found)} summaries; wanted one")
    with found[0].open(newline="") as file:
        return next(csv.DictReader(file))


_COMPLAINT = re.compile(
    r"^Warning \(supported operators\) operator: (?P<kind>\S+), ofm: '(?P<name>.*)'\n"
    r"Reason: (?P<reason>(?:.+\n?)+)",
    re.MULTILINE,
)


def _reasons(words: str) -> dict[str, str]:
    """Name of the output tensor -> why vela does not take the operator, its lines joined."""
    found: dict[str, str] = {}
    for one in _COMPLAINT.finditer(words):
        lines = [line.strip() for line in one["reason"].splitlines()]
        lines = [line for line in lines if not line.startswith("Warning (")]
        text = re.sub(r"\(([^();]+);[^()]*\)", r"(\1)", "; ".join(lines).replace(":; ", ": "))
        # vela takes an operator and its fused activation apart: CONV_2D is then "NAME_act"
        found.setdefault(one["name"].removesuffix("_act"), text)
    return found


def _placed(source: Path, compiled: Path, reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every operator of the source's main graph. What stays on the CPU is in the compiled model as
    it was, beside the NPU's own operators, and gives the same tensor."""
    graph = graph_from_json(read(str(source), {}))
    left = _on_cpu(compiled)
    found: list[dict[str, Any]] = []
    for place, (kind, output) in enumerate(_operators(source)):
        on_cpu = (kind, output) in left
        left.pop((kind, output), None)
        found.append(
            {
                "name": output.partition(";")[0],
                "type": kind,
                "on_npu": not on_cpu,
                "macs": _macs(graph, f"{kind}#{place}"),
                "reason": reasons.get(output, _UNNAMED) if on_cpu else "",
            }
        )
    for kind, output in left:  # vela's own, or renamed: better one too many than one too few
        name, why = output.partition(";")[0], reasons.get(output, "made by vela")
        found.append({"name": name, "type": kind, "on_npu": False, "macs": None, "reason": why})
    return found


def _macs(graph: Graph, path: str) -> int | None:
    """Of an operator and of all that is in the subgraphs it calls."""
    own = [o.macs for o in graph.operators if o.path == path or o.path.startswith(f"{path}/")]
    known = [count for count in own if count is not None]
    return sum(known) if len(known) == len(own) else None


_UNNAMED = "vela gives no reason"


def _on_cpu(compiled: Path) -> dict[tuple[str, str], None]:
    return {one: None for one in _operators(compiled) if one[0] != "ethos-u"}


def _operators(path: Path) -> Iterator[tuple[str, str]]:
    """`(type, name of the first output)` of each operator of the main graph."""
    schema = require("ai_edge_litert.schema_py_generated", extra=_EXTRA)
    names = {v: n for n, v in vars(schema.BuiltinOperator).items() if n[0] != "_"}
    model = read_tflite(path.read_bytes(), extra=_EXTRA)
    graph = model.subgraphs[0]
    for one in graph.operators or ():
        code = model.operatorCodes[one.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        kind = names.get(number, f"BUILTIN_{number}")
        if kind == "CUSTOM" and code.customCode:
            kind = code.customCode.decode(errors="replace")
        tensor = graph.tensors[one.outputs[0]].name
        yield kind, tensor.decode(errors="replace") if tensor else ""
