"""Artifact: a model file on disk, what goes in and out, and what made it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.cache import file_sha256
from edgekit.errors import ModelError
from edgekit_runtime.loading import load
from edgekit_runtime.manifest import TensorSpec
from edgekit_runtime.source import format_of

__all__ = [
    "FORMAT_NAMES",
    "Artifact",
    "TensorSpec",
    "format_files",
    "open_model",
    "read_specs",
    "spec_from_json",
]

FORMAT_NAMES = {"onnx": "ONNX", "openvino": "OpenVINO IR", "tflite": "TFLite"}

#: what people bring that this version does not read yet, and what to do about it
_NOT_YET = {
    ".keras": "a Keras model: export it with model.export(..., format='onnx')",
    ".h5": "a Keras model: export it with model.export(..., format='onnx')",
    ".hdf5": "a Keras model: export it with model.export(..., format='onnx')",
    ".pt2": "a PyTorch export: use torch.onnx.export",
    ".pt": "a PyTorch file: use torch.onnx.export",
    ".pth": "PyTorch weights: build the model and use torch.onnx.export",
    ".jit": "TorchScript: use torch.onnx.export",
    ".joblib": "a scikit-learn estimator: convert it with skl2onnx",
    ".pkl": "a pickle, which would run code when read: convert it to ONNX where it was made",
    ".prototxt": "a Caffe model: convert it to ONNX first",
    ".caffemodel": "a Caffe model: convert it to ONNX first",
}


@dataclass(frozen=True)
class Artifact:
    """A model in one format. Steps return new ones; files are never changed in place.

    `files` are all it consists of, the main one first (an IR is `.xml` and `.bin`). `sha256` is
    over their contents in that order. `provenance` lists the steps that made it, oldest first.
    """

    format: str
    files: tuple[Path, ...]
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provenance: tuple[dict[str, Any], ...] = field(default=())

    @property
    def path(self) -> Path:
        """The main file."""
        return self.files[0]

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.files)


def format_files(path: Path, fmt: str) -> tuple[Path, ...]:
    """All files of a model whose main file is `path`."""
    return (path, path.with_suffix(".bin")) if fmt == "openvino" else (path,)


def open_model(
    path: Path, *, provenance: tuple[dict[str, Any], ...] = (), called: str | None = None
) -> Artifact:
    """Read a model's specs by loading it, in a child process, into its own format's engine.

    `called` is what errors call it instead of its path, for models that EdgeKit made.

    Raises:
        ModelError: it is missing, empty, damaged, or of a format that is not read.
        EngineMissingError: the format's engine is not installed.
    """
    fmt = _checked_format(path)
    files = format_files(path, fmt)
    specs = sandbox.call(
        "edgekit.artifact:read_specs",
        {"path": str(path), "called": called or str(path)},
        limits=sandbox.Limits(timeout_s=300),
        what=f"reading {path}",
    )
    return Artifact(
        fmt,
        files,
        file_sha256(*files),
        tuple(spec_from_json(one) for one in specs["inputs"]),
        tuple(spec_from_json(one) for one in specs["outputs"]),
        provenance,
    )


def read_specs(path: str, called: str) -> dict[str, Any]:
    """Runs in the child: the inputs and outputs of a model its engine can load."""
    try:
        with load(path) as session:
            return {
                "inputs": [dataclasses.asdict(spec) for spec in session.inputs],
                "outputs": [dataclasses.asdict(spec) for spec in session.outputs],
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


def _checked_format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _NOT_YET:
        raise ModelError(f"{path} is {_NOT_YET[suffix]}; this version reads ONNX, TFLite and IR")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; this version reads .onnx, .tflite and .xml files")
    fmt = format_of(path)
    for one in format_files(path, fmt):
        if not one.exists():
            raise ModelError(f"no file {one}")
        if one.stat().st_size == 0 and one.suffix != ".bin":  # an IR may have no weights
            raise ModelError(f"{one} is empty")
    return fmt
