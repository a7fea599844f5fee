"""Artifact: a model file on disk, what goes in and out, and what made it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module, util
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.cache import file_sha256
from edgekit.errors import ModelError, UsageError, one_line
from edgekit.formats import detect
from edgekit.reading import Reading
from edgekit_runtime.loading import load
from edgekit_runtime.manifest import TensorSpec

__all__ = [
    "FORMAT_NAMES",
    "SOURCES",
    "Artifact",
    "TensorSpec",
    "artifact_of",
    "open_model",
    "read_model",
    "read_specs",
    "spec_from_json",
]

FORMAT_NAMES = {
    "onnx": "ONNX", "openvino": "OpenVINO IR", "tflite": "TFLite", "ncnn": "ncnn",
    "keras": "Keras", "savedmodel": "SavedModel", "torch": "PyTorch",
    "torch-export": "PyTorch export", "torchscript": "TorchScript", "sklearn": "scikit-learn",
    "coreml": "Core ML",
}  # fmt: skip

#: formats that no engine of the runtime loads, and the converter module that reads and runs them
SOURCES = {
    "keras": "edgekit_converters.keras:{}",
    "savedmodel": "edgekit_converters.savedmodel:{}",
    "torch": "edgekit_converters.torch:{}_factory",
    "torch-export": "edgekit_converters.torch:{}",
    "torchscript": "edgekit_converters.torchscript:{}",
    "sklearn": "edgekit_converters.sklearn:{}",
    "coreml": "edgekit_converters.coreml:{}",
}


@dataclass(frozen=True)
class Artifact:
    """A model in one format. Steps return new ones; files are never changed in place.

    `files` are all it consists of, the main one first (an IR is `.xml` and `.bin`). `sha256` is
    over their contents in that order. `provenance` lists the steps that made it, oldest first.
    `location` is what to call it by where that is no file: a SavedModel's folder,
    `module.py:factory`. `facts` are what its framework says of it.
    """

    format: str
    files: tuple[Path, ...]
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provenance: tuple[dict[str, Any], ...] = field(default=())
    location: str = ""
    reading: Reading = field(default_factory=Reading)
    facts: Mapping[str, Any] = field(default_factory=dict)
    called: str = ""

    @property
    def path(self) -> Path:
        """The main file."""
        return self.files[0]

    @property
    def arguments(self) -> tuple[str, ...]:
        """What converters are given for it."""
        return (self.location,) if self.location else tuple(map(str, self.files))

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.called or self.location or str(self.path)

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.files)


def open_model(
    source: Path | str,
    *,
    reading: Reading | None = None,
    provenance: tuple[dict[str, Any], ...] = (),
    called: str = "",
) -> Artifact:
    """Read a model's specs in a child process: by loading it into its format's engine, or into the
    framework it comes from.

    `source` is a file, a SavedModel's folder or `module.py:factory`. `called` is what errors call
    it instead, for models that EdgeKit made.

    Raises:
        ModelError: it is missing, empty, damaged, or of a format that is not read.
        UsageError: reading it would run code, and `reading` does not allow that; or it does not
            say what `reading` must.
        MissingToolError: the format's engine or framework is not installed.
    """
    reading = reading or Reading()
    name = called or str(source)
    specs = sandbox.call(
        "edgekit.artifact:read_model",
        {"source": str(source), "options": reading.of_source().to_json(), "called": name},
        limits=sandbox.Limits(timeout_s=300),
        what=f"reading {name}",
    )
    return artifact_of(source, specs, reading=reading, provenance=provenance, called=called)


def artifact_of(
    source: Path | str,
    specs: Mapping[str, Any],
    *,
    reading: Reading,
    provenance: tuple[dict[str, Any], ...] = (),
    called: str = "",
) -> Artifact:
    """The artifact whose `specs` `read_model` has found.

    Raises:
        ModelError: its files are not there any more.
        UsageError: `reading` names an input that there is not.
    """
    found = detect(str(source))
    if found.format not in SOURCES:
        for option in ("signature", "weights"):
            if getattr(reading, option):
                raise UsageError(f"--{option} is not for {FORMAT_NAMES[found.format]} models")
    names = [one["name"] for one in specs["inputs"]]
    for name in reading.inputs:
        if found.format not in SOURCES and name not in names:
            raise UsageError(f"no input {name!r}; inputs: {', '.join(map(repr, names))}")
    files = found.files + ((reading.weights,) if reading.weights else ())
    files += tuple(Path(one) for one in specs.get("files", ()))
    return Artifact(
        found.format,
        files,
        file_sha256(*files),
        tuple(spec_from_json(one) for one in specs["inputs"]),
        tuple(spec_from_json(one) for one in specs["outputs"]),
        provenance,
        found.source[0] if found.folder or found.function else "",
        reading,
        specs.get("facts", {}),
        called,
    )


def read_model(source: str, options: dict[str, Any], called: str) -> dict[str, Any]:
    """Runs in the child: the inputs and outputs of a model of any format, and what its framework
    says of it."""
    found = detect(source)
    if found.format not in SOURCES:
        return read_specs(source, called)
    module, _, name = SOURCES[found.format].format("describe").partition(":")
    try:
        specs: dict[str, Any] = getattr(import_module(module), name)(found.source, options)
    except (IndexError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ModelError(f"{called} is damaged or not understood: {one_line(error)}") from error
    return specs


def read_specs(path: str, called: str) -> dict[str, Any]:
    """Runs in the child: the inputs and outputs of a model its engine can load."""
    try:
        with load(path) as session:
            return {
                "inputs": [dataclasses.asdict(spec) for spec in session.inputs],
                "outputs": [dataclasses.asdict(spec) for spec in session.outputs],
                "files": _external_files(path),
            }
    except ModelError as error:
        raise ModelError(f"{called}: {str(error).removeprefix(f'{path}: ')}") from None


def spec_from_json(raw: dict[str, Any]) -> TensorSpec:
    """A TensorSpec from `dataclasses.asdict` that went through JSON."""
    span = raw.get("range")
    return TensorSpec(
        raw["name"],
        raw["dtype"],
        tuple(raw["shape"]),
        raw.get("layout"),
        (span[0], span[1]) if span else None,
    )


def _external_files(path: str) -> list[str]:
    """Further files that an ONNX model's weights are in."""
    if not path.lower().endswith(".onnx") or util.find_spec("onnx") is None:
        return []
    external = import_module("edgekit_converters.onnx").external_files(Path(path))
    return [str(one) for one in external]
