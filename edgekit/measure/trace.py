"""Per-operator time, from each engine's own profiler, in one schema (`edgekit.trace/1`).

Profiling engines are asked in a child process. LiteRT's Python wheel has no way to reach its
profiler, and ncnn's is compiled without one: for these the trace is refused with that reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import sandbox
from edgekit.errors import MissingToolError, ModelError
from edgekit.measure.worker import Contender
from edgekit_runtime.bundle import Bundle, is_bundle

__all__ = ["COLLECTORS", "Step", "Trace", "chrome_events", "trace"]

#: module:function of each engine that has a profiler we can read
COLLECTORS = {
    "onnxruntime": "edgekit.measure.trace_onnxruntime:collect",
    "openvino": "edgekit.measure.trace_openvino:collect",
}
_UNREACHABLE = {
    "litert": "LiteRT's Python wheel does not give access to its profiler",
    "ncnn": "ncnn's wheel is built without its profiler (NCNN_BENCHMARK)",
}


@dataclass(frozen=True)
class Step:
    """One operator as the engine ran it.

    `type` is the engine's name for it, `inputs` and `outputs` are names of what flows between
    steps. `shapes` and `dtypes` are of its outputs. `start_ns` counts from the beginning of a run,
    `duration_ns` is that of a typical run. `macs` are multiply-accumulates, `bytes` what is read
    and written, None where not known.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    device: str
    start_ns: int
    duration_ns: int
    macs: int | None = None
    bytes: int | None = None

    @property
    def ops_per_s(self) -> float | None:
        """Two operations per multiply-accumulate."""
        if not self.macs or self.duration_ns <= 0:
            return None
        return 2 * self.macs / self.duration_ns * 1e9

    def to_json(self) -> dict[str, Any]:
        """All fields, and `gop_per_s`."""
        rate = self.ops_per_s
        return {**asdict(self), "gop_per_s": round(rate / 1e9, 3) if rate else None}


@dataclass(frozen=True)
class Trace:
    """Steps in the order they ran; `latency_ns` is the median of runs without the profiler, taken
    in turn with those with it. `covered` is the median of the steps' sum in a run over the latency
    of the run before it, without profiler. `starts` says where the starts come from: `measured`,
    or `order` (the profiler has none: one after the other)."""

    engine: str
    engine_version: str
    threads: int
    steps: tuple[Step, ...]
    latency_ns: int
    runs: int
    starts: str
    covered: float

    @property
    def sum_ns(self) -> int:
        """The steps' times added up."""
        return sum(one.duration_ns for one in self.steps)

    def to_json(self) -> dict[str, Any]:
        """`edgekit.trace/1` without what the command adds."""
        return {
            "engine": self.engine, "engine_version": self.engine_version, "threads": self.threads,
            "runs": self.runs, "starts": self.starts, "label": "measured",
            "latency_p50_ns": self.latency_ns, "sum_ns": self.sum_ns,
            "covered": self.covered,
            "steps": [one.to_json() for one in self.steps],
        }  # fmt: skip


def trace(contender: Contender, *, inputs: Path | None = None, runs: int = 50) -> Trace:
    """Profile `runs` runs of a model or of a bundle's first variant.

    Raises:
        MissingToolError: the engine has no profiler that can be reached.
        EdgeKitError: the model cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
        path, engine = _plain(contender, Path(scratch))
        if engine not in COLLECTORS:
            why = _UNREACHABLE.get(engine, f"{engine} has no profiler")
            raise MissingToolError(
                f"{why}; for per-operator times trace it with --engine "
                f"{' or '.join(COLLECTORS)}, from a format that these load"
            )
        found = sandbox.call(
            COLLECTORS[engine],
            {"model": str(path), "threads": contender.threads, "precision": contender.precision,
             "inputs": str(inputs) if inputs else None, "runs": runs},
            what=f"tracing {contender.id}",
        )  # fmt: skip
    steps = tuple(_step(raw) for raw in found["steps"])
    if not steps:
        raise ModelError(f"{contender.id}: the profiler of {engine} saw no operator run")
    plain = np.array(found["plain_ns"], np.float64)
    covered = round(float(np.median(np.array(found["sums_ns"]) / np.maximum(plain, 1))), 4)
    return Trace(
        engine, found["version"], contender.threads, steps, int(np.median(plain)), runs,
        found["starts"], covered,
    )  # fmt: skip


def _step(raw: dict[str, Any]) -> Step:
    shapes = tuple(tuple(shape) for shape in raw["shapes"])
    return Step(**{
        **raw, "inputs": tuple(raw["inputs"]), "outputs": tuple(raw["outputs"]), "shapes": shapes,
        "dtypes": tuple(raw["dtypes"]),
    })  # fmt: skip


def _plain(contender: Contender, scratch: Path) -> tuple[Path, str]:
    """The model's file and its engine; a bundle's variant is unpacked, verified."""
    if not is_bundle(contender.path):
        return contender.path, contender.engine or ""
    with Bundle(contender.path) as bundle:
        variant = bundle.manifest.variant()
        paths = []
        for name in variant.files:
            target = scratch / Path(name).name
            target.write_bytes(bundle.read(name))
            paths.append(target)
    main = next((one for one in paths if one.suffix != ".bin"), paths[0])
    return main, variant.engine


def chrome_events(found: Trace, *, title: str) -> dict[str, Any]:
    """The run as Chrome's trace event format (JSON object form), which Perfetto opens: one complete
    event ("ph": "X", microseconds) per step, a thread per device."""
    devices = sorted({one.device for one in found.steps})
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 0, "name": "process_name",
         "args": {"name": f"{title} ({found.engine} {found.engine_version})"}},
        *({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": device}}
          for number, device in enumerate(devices, 1)),
    ]  # fmt: skip
    for one in found.steps:
        rate = one.ops_per_s
        events.append(
            {"ph": "X", "pid": 1, "tid": devices.index(one.device) + 1, "cat": one.type,
             "name": one.name, "ts": one.start_ns / 1e3, "dur": one.duration_ns / 1e3,
             "args": {"type": one.type, "shapes": _text(one.shapes),
                      "dtypes": ", ".join(one.dtypes), "macs": one.macs, "bytes": one.bytes,
                      "gop_per_s": rate / 1e9 if rate else None}}
        )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _text(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)
