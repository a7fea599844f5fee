"""One operator through a conversion, to know whether it works here: runs in a child process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from edgekit.errors import ModelError, require
from edgekit_runtime.probe import ONNX_MODEL, tflite_model

__all__ = ["convert_one_operator"]

_FACTORY = """
import torch

def factory():
    return torch.nn.ReLU(), torch.zeros(1, 2)
"""


def convert_one_operator(source_format: str, function: str, name: str) -> None:
    """Make a model of one operator in its framework, and convert it to a file called `name`.

    Raises:
        EdgeKitError: the converter's own, or nothing was written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source, inputs = _MAKERS[source_format](folder)
        target = folder / name
        module, _, verb = function.partition(":")
        options: dict[str, object] = {"inputs": inputs} if inputs else {}
        if source_format not in ("onnx", "tflite"):
            options["trust_source"] = True
        getattr(import_module(module), verb)([str(source)], str(target), options)
        if not target.exists():
            raise ModelError("it wrote nothing")


def _onnx(folder: Path) -> tuple[Path, dict[str, object]]:
    path = folder / "probe.onnx"
    path.write_bytes(ONNX_MODEL)
    return path, {}


def _tflite(folder: Path) -> tuple[Path, dict[str, object]]:
    path = folder / "probe.tflite"
    path.write_bytes(tflite_model())
    return path, {}


def _keras(folder: Path) -> tuple[Path, dict[str, object]]:
    keras = require("keras", extra="tensorflow")
    model = keras.Sequential([keras.Input((2,)), keras.layers.ReLU()])
    model.save(folder / "probe.keras")
    return folder / "probe.keras", {}


def _savedmodel(folder: Path) -> tuple[Path, dict[str, object]]:
    tf = require("tensorflow", extra="tensorflow")
    module = tf.Module()
    spec = tf.TensorSpec((1, 2), tf.float32, name="x")
    serve = tf.function(lambda x: {"y": tf.nn.relu(x)}, input_signature=[spec])
    tf.saved_model.save(module, str(folder / "saved"), signatures=serve)
    return folder / "saved", {}


def _torch(folder: Path) -> tuple[str, dict[str, object]]:
    (folder / "probe.py").write_text(_FACTORY)
    return f"{folder / 'probe.py'}:factory", {}


def _torch_export(folder: Path) -> tuple[Path, dict[str, object]]:
    torch = require("torch", extra="torch")
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(1, 2),))
    torch.export.save(program, folder / "probe.pt2")
    return folder / "probe.pt2", {}


def _torchscript(folder: Path) -> tuple[Path, dict[str, object]]:
    torch = require("torch", extra="torch")
    torch.jit.trace(torch.nn.ReLU(), torch.zeros(1, 2)).save(str(folder / "probe.pt"))
    return folder / "probe.pt", {"input": {"shape": [1, 2], "dtype": "float32"}}


def _sklearn(folder: Path) -> tuple[Path, dict[str, object]]:
    joblib = require("joblib", extra="sklearn")
    preprocessing = require("sklearn.preprocessing", extra="sklearn")
    scaler = preprocessing.StandardScaler().fit([[0.0, 1.0], [2.0, 3.0]])
    joblib.dump(scaler, folder / "probe.joblib")
    return folder / "probe.joblib", {}


_MAKERS: dict[str, Callable[[Path], tuple[Path | str, dict[str, object]]]] = {
    "onnx": _onnx, "tflite": _tflite, "keras": _keras, "savedmodel": _savedmodel,
    "torch": _torch, "torch-export": _torch_export, "torchscript": _torchscript,
    "sklearn": _sklearn,
}  # fmt: skip
