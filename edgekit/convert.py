"""The table of format edges, and the shortest path through it.

Each edge is a function in `edgekit_converters`, named by a string and run in a child process:
`(source, target, options) -> note`. Adding one touches three files: the module, the table line,
the contract test's parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.artifact import FORMAT_NAMES, Artifact, format_files, open_model
from edgekit.cache import Cache, content_key
from edgekit.errors import ModelError

__all__ = ["EDGES", "SUFFIX", "Edge", "convert", "missing_extra", "path_between", "tool_versions"]

SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "tflite": ".tflite"}


@dataclass(frozen=True)
class Edge:
    """One conversion: who does it, what it needs installed, and from which extra."""

    source: str
    target: str
    function: str
    modules: tuple[str, ...]
    extra: str
    distributions: tuple[str, ...]


EDGES = (
    Edge(
        "onnx", "openvino", "edgekit_converters.openvino:from_onnx",
        ("openvino",), "openvino", ("openvino",),
    ),
    Edge(
        "onnx", "tflite", "edgekit_converters.onnx2tf:from_onnx",
        ("onnx2tf", "tensorflow", "ai_edge_litert"), "tflite-convert",
        ("onnx2tf", "tensorflow-cpu", "ai-edge-litert"),
    ),
)  # fmt: skip


def path_between(source: str, target: str) -> tuple[Edge, ...] | None:
    """The fewest edges from one format to another; empty if they are the same, None if none."""
    paths: list[tuple[str, tuple[Edge, ...]]] = [(source, ())]
    seen = {source}
    while paths:
        here, path = paths.pop(0)
        if here == target:
            return path
        for edge in EDGES:
            if edge.source == here and edge.target not in seen:
                seen.add(edge.target)
                paths.append((edge.target, (*path, edge)))
    return None


def missing_extra(edge: Edge) -> str | None:
    """The first library the edge needs that is not installed, or None."""
    return next((m for m in edge.modules if util.find_spec(m) is None), None)


def tool_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by distribution name; `absent` for those that are not."""
    from importlib import metadata

    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def convert(
    artifact: Artifact,
    target: str,
    *,
    cache: Cache,
    limits: sandbox.Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """The artifact in another format, by the shortest path; from the cache if made before.

    Raises:
        ModelError: there is no path, or a converter refused the model.
        ChildError: a converter crashed or went over its limits.
    """
    path = path_between(artifact.format, target)
    if path is None:
        raise ModelError(
            f"no way from {FORMAT_NAMES[artifact.format]} to {FORMAT_NAMES[target]} yet"
        )
    for edge in path:
        artifact = _along(edge, artifact, cache, limits, progress)
    return artifact


def _along(
    edge: Edge,
    artifact: Artifact,
    cache: Cache,
    limits: sandbox.Limits | None,
    progress: Callable[[int, int], None] | None,
) -> Artifact:
    versions = tool_versions(edge.distributions)
    key = content_key(kind="edge", edge=edge.function, source=artifact.sha256, tools=versions)
    name = f"model{SUFFIX[edge.target]}"

    def make(folder: Path) -> None:
        request: dict[str, Any] = {
            "source": [str(p) for p in artifact.files],
            "target": str(folder / name),
        }
        sandbox.call(
            edge.function, request, limits=limits, progress=progress,
            what=f"converting to {FORMAT_NAMES[edge.target]} ({edge.distributions[0]})",
        )  # fmt: skip
        missing = [f for f in format_files(folder / name, edge.target) if not f.exists()]
        if missing:
            raise ModelError(f"{edge.distributions[0]} wrote no {missing[0].name}")

    folder = cache.folder(key, make)
    step = {"step": "convert", "to": edge.target, "tools": versions, "from": artifact.sha256}
    called = f"the converted {FORMAT_NAMES[edge.target]} model"
    return open_model(folder / name, provenance=(*artifact.provenance, step), called=called)
