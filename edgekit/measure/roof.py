"""How near a model comes to what its device can do: the share of the roof."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from edgekit.cache import Cache, content_key
from edgekit.device import Roofline
from edgekit.graph import Graph, Operator
from edgekit.measure.probe_models import probe_models
from edgekit.measure.roofline import (
    QUICK,
    bandwidth_here,
    measure_roofline,
    roof_share,
    run_local,
)

__all__ = ["roofline_here", "share_of_roof"]


def roofline_here(
    engines: Sequence[str],
    threads: int,
    conditions: dict[str, Any],
    cache: Cache,
    progress: Callable[[int, int], None] | None = None,
) -> Roofline:
    """The roofline of this machine for some engines, measured in seconds the first time.

    Raises:
        MissingExtraError: a library that writes the probe models is not installed.
        ChildError: the memory bandwidth cannot be measured.
    """
    versions = {name: conditions["engines"][name] for name in sorted(engines)}
    key = content_key(
        kind="roofline", recipe=1, cpu=conditions["cpu"], isa=conditions["isa"],
        cores=conditions["cores"], engines=versions, threads=threads,
    )  # fmt: skip

    def make(folder: Path) -> None:
        rate = float(bandwidth_here(threads=threads)["bytes_per_s"])
        counts = sorted({1, threads})
        with (
            tempfile.TemporaryDirectory() as work,
            run_local(sorted(engines), block_s=QUICK.block_s) as run,
        ):
            found = measure_roofline(
                lambda size: probe_models(Path(work) / str(size), sorted(engines), size=size),
                run, threads=counts, memory_bytes_per_s=rate, effort=QUICK, progress=progress,
            )  # fmt: skip
        (folder / "roofline.json").write_text(json.dumps(found.roofline.model_dump()))

    stored = json.loads((cache.folder(key, make) / "roofline.json").read_text())
    return Roofline.model_validate(stored)


def share_of_roof(
    graph: Graph,
    roofline: Roofline,
    *,
    engine: str,
    scheme_kind: str,
    threads: int,
    latency_ns: float,
) -> float | None:
    """The least time the arithmetic of a model takes at the device's roof, divided by its latency.

    Memory traffic is left out: what stays in caches between runs is not known, so this is the
    arithmetic roof alone. None where multiply-accumulates are not known, there are none, or the
    roofline has no figure for the engine, type and threads.
    """
    counts = [(one.macs, one) for one in graph.operators]
    if not graph.macs or any(macs is None for macs, _ in counts):
        return None
    dtype: Literal["float32", "int8"] = "float32"
    if scheme_kind in ("int8-static", "int8-dynamic"):
        dtype = "int8"
    work = [(macs or 0, 0, _kind(graph, one)) for macs, one in counts if macs]
    return roof_share(work, roofline, engine, dtype, threads, latency_ns)


def _kind(graph: Graph, operator: Operator) -> Literal["gemm", "depthwise"]:
    if operator.canonical != "Conv" or len(operator.inputs) < 2:
        return "gemm"
    if operator.type in ("DEPTHWISE_CONV_2D", "GroupConvolution"):
        return "depthwise"
    shape = graph.tensors[operator.inputs[1]].shape  # ONNX: (filters, channels per group, h, w)
    return "depthwise" if graph.format == "onnx" and shape and shape[1] == 1 else "gemm"
