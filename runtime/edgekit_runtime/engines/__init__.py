"""Engines, one file each, found by name.

An engine is one function and two classes: `load(files, options) -> Loaded`, `Loaded.bind(shapes)
-> Binding`. Adding one touches three files: the module, `ENGINES` below, the contract test.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from ..errors import (
    ClosedError,
    EdgeKitError,
    EngineError,
    EngineMissingError,
    EngineTooOldError,
    ModelError,
    UsageError,
    one_line,
)
from ..manifest import TensorSpec
from ..placement import Placement
from .accelerators import accelerator_of, split_engine

__all__ = [
    "ENGINES",
    "ENGINE_OF_FORMAT",
    "Binding",
    "EngineEntry",
    "Loaded",
    "Options",
    "Shapes",
    "check_engine",
    "engine_version",
    "import_engine",
    "load_engine",
    "numpy_dtype",
    "refuse_external_data",
]

Shapes = Tuple[Tuple[int, ...], ...]


class EngineEntry(NamedTuple):
    """Where an engine lives: our module, the modules that provide it (the first one installed is
    taken) with the names pip knows them by, and the formats it loads."""

    module: str
    packages: Tuple[str, ...]
    distributions: Tuple[str, ...]
    formats: Tuple[str, ...]


ENGINES: Dict[str, EngineEntry] = {
    "onnxruntime": EngineEntry("onnxruntime", ("onnxruntime",), ("onnxruntime",), ("onnx",)),
    "openvino": EngineEntry("openvino", ("openvino",), ("openvino",), ("openvino", "onnx")),
    "litert": EngineEntry(
        "litert", ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"),
        ("ai-edge-litert", "tflite-runtime"), ("tflite",),
    ),
    "ncnn": EngineEntry("ncnn", ("ncnn",), ("ncnn",), ("ncnn",)),
}  # fmt: skip
ENGINE_OF_FORMAT = {
    "onnx": "onnxruntime", "openvino": "openvino", "tflite": "litert", "ncnn": "ncnn",
}  # fmt: skip


#: what `Options.precision` may say, and what OpenVINO calls it
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MAX_THREADS = 1024  # onnxruntime 1.31 kills the process when asked for 5000


@dataclass(frozen=True)
class Options:
    """How to load: threads for a call, calls that are to run side by side (`streams`), the
    precision floats are to be computed in, and the engine's accelerator (`vulkan`), if any.

    Raises:
        UsageError: a value no engine knows.
    """

    threads: int = 1
    precision: str = "float32"
    streams: int = 1
    accelerator: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.threads, int) or not 1 <= self.threads <= MAX_THREADS:
            raise UsageError(f"{self.threads} threads asked for; wanted 1 to {MAX_THREADS}")
        if not 1 <= self.streams <= MAX_THREADS:
            raise UsageError(f"{self.streams} streams asked for; wanted 1 to {MAX_THREADS}")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise UsageError(f"no float precision {self.precision!r}; known: {known}")


class Binding(ABC):
    """Buffers for one set of input shapes, independent of every other binding.

    `inputs` are buffers the engine reads: they stay the same arrays for the binding's life. The
    caller fills them, calls `invoke`, and reads `outputs`, which are valid until the next one.
    A Binding is used by one thread at a time; two bindings may run in two threads.
    """

    inputs: Tuple[np.ndarray, ...]
    outputs: Tuple[np.ndarray, ...]
    #: Runs once. An attribute, not a method: the engine's own call with its arguments bound, so
    #: that nothing of ours is between the caller and the engine. Raises what the engine raises.
    invoke: Callable[[], Any]
    #: whether `outputs` are the same arrays after every `invoke`
    fixed_outputs = False
    #: whether every `invoke` makes new output arrays, so that nobody need copy them
    fresh_outputs = False

    def retry(self, error: Exception) -> None:
        """Called when `invoke` raised: run in another way, or raise `error` again."""
        raise error

    def reset(self) -> None:  # noqa: B027  (most models keep no state inside the engine)
        """Forget the state that the model keeps inside the engine."""

    def close(self) -> None:
        """Refuse to run from now on, and let go of what only the engine needs."""
        self.invoke = _refuse


def _refuse() -> None:
    raise ClosedError("the session is closed; load the model again")


class Loaded(ABC):
    """A model inside an engine."""

    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    version: str
    #: whether the model keeps state inside the engine, a set for each binding
    stateful = False
    #: for how many shapes a lane keeps buffers
    max_bindings = 4
    #: the input shapes that are most likely to come, where they are known
    usual_shapes: Optional[Shapes] = None

    @abstractmethod
    def bind(self, shapes: Shapes) -> Binding:
        """Buffers for these input shapes, in the order of `inputs`."""

    @abstractmethod
    def placement(self, *, operators: bool = True) -> Placement:
        """What the engine says it did with the model; `operators=False` where counting them is
        not for free, and only the shares are wanted."""

    def retire(self) -> None:  # noqa: B027
        """Bindings are about to be closed, and this after them."""

    def close(self) -> None:  # noqa: B027  (most engines free by reference count)
        """Free what reference counting does not."""


def check_engine(name: str) -> None:
    """Refuse a name that is neither an engine's nor `ENGINE:ACCELERATOR`.

    Raises:
        UsageError: it is not.
    """
    engine, accelerator = split_engine(name)
    if engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}; known: {', '.join(ENGINES)}")
    if accelerator:
        accelerator_of(name)


def engine_version(name: str) -> Optional[str]:
    """The installed version of an engine, or None. Does not import it."""
    from importlib import metadata

    for distribution in ENGINES[split_engine(name)[0]].distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return None


def import_engine(name: str) -> Any:
    """Import the engine's package, the first one that is installed; returns the module.

    Raises:
        EngineMissingError: the engine is not installed, or there is none of that name.
        EngineError: it is installed but cannot be imported.
    """
    name = split_engine(name)[0]
    if name not in ENGINES:
        raise EngineMissingError(f"no engine {name!r}; known: {', '.join(ENGINES)}")
    for package in ENGINES[name].packages:
        module = _import(package)
        if module is not None:
            return module
    install = ENGINES[name].distributions[0]
    raise EngineMissingError(f"the engine {name!r} is not installed; pip install {install}")


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]:
            return None
        # A broken installation is not a missing one.
        raise EngineError(f"{package} is installed but broken: {one_line(error)}") from error


def load_engine(name: str, files: Mapping[str, bytes], options: Options) -> Loaded:
    """Load a model, given as bytes by file name, into the engine; `ENGINE:ACCELERATOR` has it run
    on what `accelerators.all_names` lists.

    Raises:
        EngineMissingError: the engine is not installed, or does not reach the accelerator.
        EngineTooOldError: the model needs a newer version of the engine.
        ModelError: the engine refused the model.
        EngineError: the engine is installed but cannot be imported.
        UsageError: the engine cannot compute in the precision asked for.
    """
    import_engine(name)
    engine, accelerator = split_engine(name)
    module = ENGINES[engine].module
    load: Optional[Callable[[Mapping[str, bytes], Options], Loaded]] = None
    if accelerator:
        try:
            load = accelerator_of(name).load
        except UsageError as error:
            raise EngineMissingError(str(error)) from None
        options = replace(options, accelerator=accelerator)
        module += "_gpu" if name == "litert:gpu" else ""
    if load is None and options.precision not in _PRECISIONS_OF.get(name, ("float32",)):
        raise UsageError(f"{name} computes floats in float32; {options.precision} was asked for")
    load = load or importlib.import_module("." + module, __name__).load
    try:
        return load(files, options)
    except EdgeKitError:
        raise
    except Exception as error:
        raise _explained(name, error) from error


#: what engines compute floats in, where there is a choice
_PRECISIONS_OF = {
    "openvino": tuple(PRECISIONS), "openvino:gpu": ("float32", "float16"),
    "openvino:npu": ("float32", "float16"), "ncnn:vulkan": ("float32", "float16"),
    "litert:gpu": ("float32", "float16"),
}  # fmt: skip
#: how engines say that a model is of a later version than they know
_TOO_NEW = (
    r"(?i)(opset|ir.?version|domain_version).*(support|guarantee|max)|unsupported (model IR|opset)"
    r"|Didn't find op for builtin opcode|version of this (op|builtin)"
)


def _explained(name: str, error: Exception) -> EdgeKitError:
    text = one_line(error)
    if re.search(_TOO_NEW, text):
        return EngineTooOldError(
            f"the model needs a newer {split_engine(name)[0]} than the {engine_version(name)} "
            f"installed: {text}"
        )
    return ModelError(f"{name} cannot load the model: {text}")


def refuse_external_data(onnx: bytes) -> None:
    """Refuse an ONNX file that keeps weights in other files: they were not verified, and an
    engine given bytes looks for them in the working folder.

    Raises:
        ModelError: a tensor names a file.
    """
    # TensorProto.external_data (field 13) holds {key: "location", value: path}.
    if re.search(rb"\x6a[\x00-\xff]{1,2}\x0a\x08location\x12", onnx):
        raise ModelError(
            "the ONNX model keeps weights in another file; save it as one file: "
            "onnx.save(onnx.load(path), new_path)"
        )


def numpy_dtype(name: str) -> Any:
    """numpy's dtype for a spec's dtype name; `string` has none and stays an object array."""
    return np.dtype(object) if name == "string" else np.dtype(name)
