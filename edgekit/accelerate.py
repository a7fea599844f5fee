"""Accelerators beside the CPU that an engine here reaches: which ones, what is compiled for them,
and where each operator of a model really went."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.artifact import Artifact
from edgekit.cache import Cache, content_key
from edgekit.convert import tool_versions
from edgekit.device import DeviceProfile
from edgekit.errors import EdgeKitError, ModelError, one_line
from edgekit.graph import read_graph, with_batch_one
from edgekit_runtime.engines.accelerators import accelerator_of, accelerators_of, split_engine
from edgekit_runtime.placement import Placement, by_macs

__all__ = [
    "DISTRIBUTIONS", "compile_for", "compiled_for", "engines_of", "macs_of", "origins_of",
    "placed", "run_compiler", "write_context",
]  # fmt: skip

#: what must be installed beside the engine itself
DISTRIBUTIONS = {"onnxruntime:qnn": ("onnxruntime", "onnxruntime-qnn")}
_QNN = "onnxruntime:qnn"
_RECIPE = 1


def engines_of(profile: DeviceProfile) -> dict[str, tuple[str, ...]]:
    """The profile's accelerators -> the names of engines that reach them (`litert:gpu`), best
    known first; empty for those that none does."""
    found = {}
    for name, one in profile.accelerators.items():
        known = accelerators_of(one.engine)
        by_provider = [key for key, row in known.items() if row.provider == one.provider]
        by_kind = [key for key in known if key == one.kind and one.provider is None]
        names = [f"{one.engine}:{key}" for key in by_provider[:1] or by_kind]
        if one.kind == "gpu" and "ncnn" in profile.engines and "ncnn:vulkan" not in names:
            names.append("ncnn:vulkan")
        found[name] = tuple(names)
    return found


def compiled_for(engine: str, target: str | None) -> bool:
    """Whether what the engine is given was compiled for one processor before."""
    if target is None or not split_engine(engine)[1]:
        return False
    return engine == _QNN or accelerator_of(engine).compile is not None


def compile_for(
    artifact: Artifact, engine: str, target: str, *, cache: Cache,
    limits: sandbox.Limits | None = None,
) -> Artifact:  # fmt: skip
    """The model, whose shapes are fixed, with what the accelerator takes of it compiled for one
    processor; `target` is the profile's `compiler_target`. For Qualcomm's NPU that is the number
    of the SoC in QNN: 57 is the SM8650.

    Raises:
        MissingExtraError: onnxruntime-qnn is not installed.
        ModelError: it refuses the model.
    """
    tools = tool_versions(DISTRIBUTIONS.get(engine, ()))
    plug_in = accelerator_of(engine).compile
    words = f"{plug_in.__module__}:{plug_in.__qualname__}" if plug_in else ""
    key = content_key(
        kind="accelerator", recipe=_RECIPE, source=artifact.sha256, engine=engine, target=target,
        tools=tools, plug_in=[words, _version_of(words)],
    )  # fmt: skip
    name = f"model{artifact.path.suffix}"

    def make(folder: Path) -> None:
        request = {"source": str(artifact.path), "target": str(folder / name)}
        function = "run_compiler" if plug_in else "write_context"
        more = {"engine": engine, "compiler_target": target} if plug_in else {"soc": target}
        sandbox.call(f"edgekit.accelerate:{function}", {**request, **more}, limits=limits,
                     what=f"compiling for {engine} ({target})")  # fmt: skip

    path = cache.folder(key, make) / name
    step = {"step": "compile", "engine": engine, "compiler_target": target, "tools": tools}
    return replace(
        artifact, files=(path,), sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        provenance=(*artifact.provenance, step),
    )  # fmt: skip


def _version_of(function: str) -> str:
    """The version of the distribution that a plug-in's function is of."""
    package = function.partition(":")[0].partition(".")[0]
    for name in metadata.packages_distributions().get(package, ()):
        return metadata.version(name)
    return ""


def run_compiler(source: str, target: str, engine: str, compiler_target: str) -> None:
    """A plug-in's compiler; runs in the child.

    Raises:
        ModelError: it wrote nothing.
    """
    compiler = accelerator_of(engine).compile
    assert compiler is not None  # noqa: S101
    compiler(source, target, compiler_target)
    if not Path(target).is_file():
        raise ModelError(f"the compiler of {engine} wrote nothing")


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
