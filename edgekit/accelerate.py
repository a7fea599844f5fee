"""Accelerators beside the CPU that an engine here reaches: which ones, what is compiled for them,
and where each operator of a model really went."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.artifact import Artifact
from edgekit.cache import Cache, content_key
from edgekit.convert import tool_versions
from edgekit.device import DeviceProfile
from edgekit.errors import EdgeKitError, ModelError, one_line
from edgekit.graph import read_graph, with_batch_one
from edgekit_runtime.engines.accelerators import ACCELERATORS, accelerator_of
from edgekit_runtime.placement import Placement, by_macs

__all__ = [
    "DISTRIBUTIONS", "compile_context", "compiled_for", "engines_of", "macs_of", "origins_of",
    "placed", "write_context",
]  # fmt: skip

#: what must be installed beside the engine itself
DISTRIBUTIONS = {"onnxruntime:qnn": ("onnxruntime-qnn",)}
_QNN = "onnxruntime:qnn"


def engines_of(profile: DeviceProfile) -> dict[str, tuple[str, ...]]:
    """The profile's accelerators -> the names of engines that reach them (`litert:gpu`), best
    known first; empty for those that none does."""
    found = {}
    for name, one in profile.accelerators.items():
        known = ACCELERATORS.get(one.engine, {})
        by_provider = [key for key, row in known.items() if row.provider == one.provider]
        by_kind = [key for key in known if key == one.kind and one.provider is None]
        names = [f"{one.engine}:{key}" for key in by_provider[:1] or by_kind]
        if one.kind == "gpu" and "ncnn" in profile.engines and "ncnn:vulkan" not in names:
            names.append("ncnn:vulkan")
        found[name] = tuple(names)
    return found


def compiled_for(engine: str, target: str | None) -> bool:
    """Whether what the engine is given was compiled for one processor before."""
    return engine == _QNN and target is not None


def compile_context(
    artifact: Artifact, target: str, *, cache: Cache, limits: sandbox.Limits | None = None
) -> Artifact:
    """The ONNX model, whose shapes are fixed, with what Qualcomm's NPU takes of it compiled for
    one of their processors (`target` is its number in QNN: 57 is the SM8650).

    Raises:
        MissingExtraError: onnxruntime-qnn is not installed.
        ModelError: it refuses the model.
    """
    tools = tool_versions(("onnxruntime", "onnxruntime-qnn"))
    key = content_key(kind="qnn-context", source=artifact.sha256, target=target, tools=tools)

    def make(folder: Path) -> None:
        request = {"source": str(artifact.path), "target": str(folder / "model.onnx"),
                   "soc": target}  # fmt: skip
        sandbox.call("edgekit.accelerate:write_context", request, limits=limits,
                     what=f"compiling for Qualcomm's NPU (SoC {target})")  # fmt: skip

    path = cache.folder(key, make) / "model.onnx"
    step = {"step": "qnn-context", "soc_model": target, "tools": tools}
    return replace(
        artifact, files=(path,), sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        provenance=(*artifact.provenance, step),
    )  # fmt: skip


def write_context(source: str, target: str, soc: str) -> None:
    """Runs in the child.

    Raises:
        ModelError: the provider refuses the model, or takes nothing of it.
    """
    import onnxruntime

    from edgekit_runtime.engines.onnxruntime import qnn_devices

    devices, told = qnn_devices()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    for key, value in (("enable", "1"), ("embed_mode", "1"), ("file_path", target)):
        settings.add_session_config_entry(f"ep.context_{key}", value)
    settings.add_provider_for_devices(devices, {**told, "soc_model": soc})
    try:
        onnxruntime.InferenceSession(source, settings)
    except Exception as error:
        raise ModelError(f"QNN refuses the model: {one_line(error)}") from None
    if not Path(target).is_file():
        raise ModelError("QNN takes nothing of the model: no operator was compiled")


def macs_of(artifact: Artifact) -> dict[str, int]:
    """Multiply-accumulates by operator, one sample at a time; empty where some are not known, or
    the format's operators are not read."""
    if artifact.format == "ncnn":
        return {}
    try:
        graph = read_graph(artifact.path, shapes=with_batch_one(artifact.inputs))
    except EdgeKitError:
        return {}
    counts = {one.name: one.macs for one in graph.operators if one.macs != 0}
    return {} if None in counts.values() else {name: count or 0 for name, count in counts.items()}


def origins_of(source: Artifact) -> dict[str, str]:
    """The modules of the network that operators were exported from, by operator, where the model
    says; in a bundle's other forms they keep their names."""
    if source.format != "onnx":
        return {}
    operators = read_graph(source.path, shapes=with_batch_one(source.inputs)).operators
    return {one.name: one.origin for one in operators if one.origin}


def placed(
    artifact: Artifact, engine: str, macs: dict[str, int], *, precision: str = "float32",
    limits: sandbox.Limits | None = None,
) -> Placement:  # fmt: skip
    """Where the engine puts the model, loaded in a child process; by multiply-accumulates where
    they are known.

    Raises:
        EdgeKitError: the engine does not load it there.
    """
    request: dict[str, Any] = {
        "path": str(artifact.path), "engine": engine, "precision": precision
    }  # fmt: skip
    raw = sandbox.call(
        "edgekit.accelerate:_placement", request, limits=limits,
        what=f"loading {artifact.name} on {accelerator_of(engine).device}",
    )  # fmt: skip
    nodes = tuple((device, kind, name) for device, kind, name in raw.pop("nodes"))
    return by_macs(Placement(**raw, nodes=nodes), macs)


def _placement(path: str, engine: str, precision: str) -> dict[str, Any]:
    from edgekit_runtime.loading import load

    with load(Path(path), engine=engine, precision=precision) as session:
        found: dict[str, Any] = json.loads(json.dumps(asdict(session.placement)))
        return found
