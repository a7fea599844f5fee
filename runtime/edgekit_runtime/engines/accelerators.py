"""What engines reach beside the CPU, by name: `onnxruntime:qnn`, `litert:gpu`, `ncnn:vulkan`.

Others plug in: an installed distribution's entry point in the group `edgekit.accelerators`, whose
name is `ENGINE.ACCELERATOR` (`litert.edgetpu`) and whose object is an `Accelerator`.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

from ..errors import EngineError, UsageError, one_line

__all__ = [
    "ACCELERATORS", "GROUP", "VERIFIED", "Accelerator", "accelerator_of", "accelerators_of",
    "all_names", "split_engine",
]  # fmt: skip

GROUP = "edgekit.accelerators"


class Accelerator(NamedTuple):
    """`device` is what placements call it (`GPU`, `NPU`), `provider` what the engine (and a device
    profile) calls it, and `options` what its provider is told.

    What plugs in brings functions. `load(files, options)` loads a model of the engine's format,
    given as bytes by file name, and returns an `edgekit_runtime.engines.Loaded`. `probe()` runs one
    operator there, returns a version, and raises an EdgeKitError if that does not work; without it
    the engine's usual one is taken. `compile(source, target, compiler_target)` is for the host:
    from the file `source` it writes the file `target` for a profile's `compiler_target`.
    """

    device: str
    provider: str
    options: Tuple[Tuple[str, str], ...] = ()
    load: Optional[Callable[..., Any]] = None
    probe: Optional[Callable[[], str]] = None
    compile: Optional[Callable[[str, str, str], None]] = None


ACCELERATORS: Dict[str, Dict[str, Accelerator]] = {
    "onnxruntime": {
        "qnn": Accelerator("NPU", "QNNExecutionProvider"),
        "cuda": Accelerator("GPU", "CUDAExecutionProvider"),
        "tensorrt": Accelerator("GPU", "TensorrtExecutionProvider"),
        "openvino-gpu": Accelerator("GPU", "OpenVINOExecutionProvider", (("device_type", "GPU"),)),
        "openvino-npu": Accelerator("NPU", "OpenVINOExecutionProvider", (("device_type", "NPU"),)),
        "coreml": Accelerator("NPU", "CoreMLExecutionProvider"),
        "directml": Accelerator("GPU", "DmlExecutionProvider"),
        "migraphx": Accelerator("GPU", "MIGraphXExecutionProvider"),
        "nnapi": Accelerator("NPU", "NnapiExecutionProvider"),
        "vitisai": Accelerator("NPU", "VitisAIExecutionProvider"),
    },
    "openvino": {"gpu": Accelerator("GPU", "GPU"), "npu": Accelerator("NPU", "NPU")},
    "litert": {"gpu": Accelerator("GPU", "WebGPU")},
    "ncnn": {"vulkan": Accelerator("GPU", "Vulkan")},
}  # fmt: skip
#: those that the project's own tests run; all others are taken from their engines' documentation
VERIFIED = ("onnxruntime:qnn", "litert:gpu", "ncnn:vulkan")


def split_engine(name: str) -> Tuple[str, str]:
    """`ncnn:vulkan` -> (`ncnn`, `vulkan`); the second is empty for the CPU."""
    engine, _, accelerator = name.partition(":")
    return engine, accelerator


def accelerators_of(engine: str) -> Dict[str, Accelerator]:
    """All that an engine reaches, by name, with those that plug in. Of what cannot be imported only
    the name is known: using it says why."""
    found = dict(ACCELERATORS.get(engine, {}))
    for name, entry in _plugged_in():
        base, key = split_engine(name)
        if base == engine and key not in found:
            try:
                found[key] = _loaded(entry)
            except EngineError:
                found[key] = Accelerator("unknown", key)
    return found


def accelerator_of(name: str) -> Accelerator:
    """What `ENGINE:ACCELERATOR` names.

    Raises:
        UsageError: the engine has no accelerator of that name.
        EngineError: what plugs in cannot be imported, or is no `Accelerator`.
    """
    engine, key = split_engine(name)
    if key in ACCELERATORS.get(engine, {}):
        return ACCELERATORS[engine][key]
    for plugged, entry in _plugged_in():
        if plugged == name:
            return _loaded(entry)
    listed = ", ".join(all_names(engine)) or "none"
    raise UsageError(f"{engine} has no accelerator {key!r}; known: {listed}")


def all_names(engine: str = "") -> Tuple[str, ...]:
    """`ENGINE:ACCELERATOR` of one engine, or of all; nothing is imported."""
    known = [f"{base}:{key}" for base, row in ACCELERATORS.items() for key in row]
    known += [name for name, _ in _plugged_in()]
    return tuple(one for one in dict.fromkeys(known) if engine in ("", split_engine(one)[0]))


def _plugged_in() -> Iterator[Tuple[str, Any]]:
    from importlib import metadata

    every: Any = metadata.entry_points()  # until Python 3.9, a dictionary by group
    for entry in every.select(group=GROUP) if hasattr(every, "select") else every.get(GROUP, ()):
        yield entry.name.replace(".", ":", 1), entry


def _loaded(entry: Any) -> Accelerator:
    try:
        found = entry.load()
    except Exception as error:
        raise EngineError(
            f"the plug-in {entry.value} cannot be imported: {one_line(error)}"
        ) from error
    if not isinstance(found, Accelerator):
        raise EngineError(f"the plug-in {entry.value} is {type(found).__name__}, no Accelerator")
    return found
