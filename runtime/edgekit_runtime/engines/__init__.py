"""Engines, one file each, found by name.

An engine is one function and two classes: `load(files, options) -> Loaded`, `Loaded.bind(shapes)
-> Binding`. Adding one touches three files: the module, `ENGINES` below, the contract test.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from ..errors import EngineError, EngineMissingError, ModelError, UsageError, one_line
from ..manifest import TensorSpec
from ..placement import Placement

__all__ = [
    "ENGINES",
    "ENGINE_OF_FORMAT",
    "Binding",
    "Loaded",
    "Options",
    "Shapes",
    "engine_version",
    "import_engine",
    "load_engine",
    "numpy_dtype",
    "refuse_external_data",
]

Shapes = Tuple[Tuple[int, ...], ...]

#: engine name -> (module here, package to import, `pip install` name, formats it loads)
ENGINES: Dict[str, Tuple[str, str, str, Tuple[str, ...]]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime", "onnxruntime", ("onnx",)),
    "openvino": ("openvino", "openvino", "openvino", ("openvino", "onnx")),
    "litert": ("litert", "ai_edge_litert", "ai-edge-litert", ("tflite",)),
}
ENGINE_OF_FORMAT = {"onnx": "onnxruntime", "openvino": "openvino", "tflite": "litert"}


#: what `Options.precision` may say, and what OpenVINO calls it
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MAX_THREADS = 1024  # onnxruntime 1.31 kills the process when asked for 5000


@dataclass(frozen=True)
class Options:
    """How to load: the number of threads, and the precision floats are to be computed in.

    Raises:
        UsageError: a value no engine knows.
    """

    threads: int = 1
    precision: str = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MAX_THREADS:
            raise UsageError(f"{self.threads} threads asked for; wanted 1 to {MAX_THREADS}")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise UsageError(f"no float precision {self.precision!r}; known: {known}")


class Binding(ABC):
    """Buffers for one set of input shapes.

    `inputs` are buffers the engine reads; the caller fills them, calls `invoke`, and reads
    `outputs`, which are valid until the next `invoke`. `outputs` may be empty before the first.
    """

    inputs: Tuple[np.ndarray, ...]
    outputs: Tuple[np.ndarray, ...]
    #: whether every `invoke` makes new output arrays, so that nobody need copy them
    fresh_outputs = False

    @abstractmethod
    def invoke(self) -> None:
        """Run once. Raises what the engine raises; the session translates it."""


class Loaded(ABC):
    """A model inside an engine."""

    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    version: str
    #: how many bindings may live at once (LiteRT has one set of tensors)
    max_bindings = 4

    @abstractmethod
    def bind(self, shapes: Shapes) -> Binding:
        """Buffers for these input shapes, in the order of `inputs`."""

    @abstractmethod
    def placement(self) -> Placement:
        """What the engine says it did with the model."""

    def close(self) -> None:  # noqa: B027  (most engines free by reference count)
        """Free what reference counting does not."""


def engine_version(name: str) -> Optional[str]:
    """The installed version of an engine, or None. Does not import it."""
    from importlib import metadata

    try:
        return metadata.version(ENGINES[name][2])
    except metadata.PackageNotFoundError:
        return None


def import_engine(name: str) -> str:
    """Import the engine's package; returns the name of the module here that drives it.

    Raises:
        EngineMissingError: the engine is not installed, or there is none of that name.
        EngineError: it is installed but cannot be imported.
    """
    if name not in ENGINES:
        raise EngineMissingError(f"no engine {name!r}; known: {', '.join(ENGINES)}")
    module_name, package, distribution, _ = ENGINES[name]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # a broken installation is not a missing one
            raise EngineError(f"{package} is installed but broken: {one_line(error)}") from error
        raise EngineMissingError(
            f"the engine {name!r} is not installed; pip install {distribution}"
        ) from None
    except ImportError as error:
        raise EngineError(f"{package} is installed but broken: {one_line(error)}") from error
    return module_name


def load_engine(name: str, files: Mapping[str, bytes], options: Options) -> Loaded:
    """Load a model, given as bytes by file name, into the engine.

    Raises:
        EngineMissingError: the engine is not installed.
        ModelError: the engine refused the model.
        EngineError: the engine is installed but cannot be imported.
        UsageError: the engine cannot compute in the precision asked for.
    """
    module_name = import_engine(name)
    if options.precision != "float32" and name != "openvino":
        raise UsageError(f"{name} computes floats in float32; {options.precision} was asked for")
    load: Callable[[Mapping[str, bytes], Options], Loaded]
    load = importlib.import_module("." + module_name, __name__).load
    try:
        return load(files, options)
    except (EngineError, ModelError):
        raise
    except Exception as error:
        raise ModelError(f"{name} cannot load the model: {one_line(error)}") from error


def refuse_external_data(onnx: bytes) -> None:
    """Refuse an ONNX file that keeps weights in other files: they were not verified, and an
    engine given bytes looks for them in the working folder.

    Raises:
        ModelError: a tensor names a file.
    """
    # TensorProto.external_data holds {key: "location", value: path}: field 1, 8 bytes; field 2.
    if b"\x0a\x08location\x12" in onnx:
        raise ModelError(
            "the ONNX model keeps weights in another file; save it as one file: "
            "onnx.save(onnx.load(path), new_path)"
        )


def numpy_dtype(name: str) -> Any:
    """numpy's dtype for a spec's dtype name; `string` has none and stays an object array."""
    return np.dtype(object) if name == "string" else np.dtype(name)
