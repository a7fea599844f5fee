"""Keras models in files: `.keras` (Keras 3) and `.h5`/`.hdf5` (Keras 2), checked before loading.

A file is never trusted: its stored configuration is checked before Keras builds anything from it,
and Keras loads it in safe mode. Nothing in it that would be code is run, whatever the options: what
a Lambda layer or a class of one's own does is not in the file in a form to rely on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit_converters.tf_graph import EXTRA

__all__ = ["load", "said", "written_by"]

_INSTEAD = (
    "export the live model from the training script: edgekit.export(model, ...); or give a "
    "module.py:factory with --trust-source"
)
#: layers that hold another framework's model, or the path of one
_FOREIGN = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")
_ON_TEXT = ("StringLookup", "IntegerLookup", "TextVectorization", "Hashing", "FeatureSpace")
#: where the functions are that a layer may be given
_FUNCTIONS = ("keras.activations", "keras.initializers", "keras.regularizers", "keras.constraints")
#: classes in a stored configuration that are values, not layers
_VALUES = ("__tuple__", "__ellipsis__", "__slice__", "__tensor__", "__numpy__", "__bytes__",
           "__keras_tensor__", "TensorShape")  # fmt: skip
#: Keras-2 names of what Keras 3 calls otherwise or has inside
_LEGACY = ("Functional", "Model", "Sequential", "Policy", "PolicyV1")


# --- loading ------------------------------------------------------------------------------------


def load(path: str) -> tuple[Any, list[str]]:
    """The model of a file, after its configuration was checked; and what was repaired."""
    file = Path(path)
    archive = zipfile.is_zipfile(file)
    config = _zip_config(file) if archive else _h5_config(file)
    notes = _repair(config, written_by(file))
    keras = _keras()
    _refuse(keras, config)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ("model.keras" if archive else "model.h5")
        (_zip_copy if archive else _h5_copy)(file, copy, config)
        try:
            model = keras.models.load_model(str(copy), compile=False, safe_mode=True)
        except Exception as error:
            raise ModelError(f"Keras {keras.__version__} cannot load it: {said(error)}") from error
    return model, notes


def _keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    require("tensorflow", extra=EXTRA)
    keras = require("keras", extra=EXTRA)
    if keras.backend.backend() != "tensorflow":
        raise UsageError(
            f"Keras runs on {keras.backend.backend()} here; set KERAS_BACKEND=tensorflow"
        )
    return keras


def _h5_config(file: Path) -> dict[str, Any]:
    h5py = require("h5py", extra=EXTRA)
    try:
        with h5py.File(file, "r") as opened:
            raw = opened.attrs.get("model_config")
            names = set(opened.attrs) | set(opened)
    except Exception as error:  # h5py raises what it likes on damaged files
        raise ModelError(
            f"{file.name} is no Keras model that can be read: {one_line(error)}"
        ) from None
    if raw is None:
        if names & {"layer_names", "layers", "_layer_checkpoint_dependencies", "vars"}:
            raise ModelError(
                f"{file.name} holds weights only, not the model they belong to; save the whole "
                "model: model.save('model.keras')"
            )
        raise ModelError(f"{file.name} is HDF5, but not a Keras model: it has no model_config")
    return _parsed(raw, file)


def _zip_config(file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            raw = archive.read("config.json")
    except (KeyError, zipfile.BadZipFile, OSError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"{file.name} is no .keras file that can be read: {one_line(error)}"
        ) from None
    return _parsed(raw, file)


def _parsed(raw: bytes | str, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError, TypeError) as error:
        raise ModelError(f"{file.name}: its configuration is damaged: {one_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict | list):
        raise ModelError(f"{file.name}: its configuration describes no model")
    return config


def _h5_copy(file: Path, copy: Path, config: dict[str, Any]) -> None:
    h5py = require("h5py", extra=EXTRA)
    shutil.copyfile(file, copy)
    try:
        with h5py.File(copy, "r+") as opened:
            opened.attrs["model_config"] = json.dumps(config)
    except Exception as error:  # h5py raises what it likes on damaged files
        raise ModelError(f"{file.name} is damaged: {one_line(error)}") from None


def _zip_copy(file: Path, copy: Path, config: dict[str, Any]) -> None:
    try:
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(copy, "w") as new:
            for info in old.infolist():
                if info.filename != "config.json":
                    with (
                        old.open(info) as source,
                        new.open(info.filename, "w", force_zip64=True) as to,
                    ):
                        shutil.copyfileobj(source, to)
            new.writestr("config.json", json.dumps(config))
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{file.name} is damaged: {one_line(error)}") from None


def written_by(file: Path) -> str | None:
    with contextlib.suppress(Exception):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return str(json.loads(archive.read("metadata.json"))["keras_version"])
        h5py = require("h5py", extra=EXTRA)
        with h5py.File(file, "r") as opened:
            version = opened.attrs["keras_version"]
            return version.decode() if isinstance(version, bytes) else str(version)
    return None


# --- what is in the configuration ---------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """An object in a stored configuration: a layer, or something a layer is made with."""

    layer: str
    class_name: str
    module: str | None
    registered: str | None
    config: Any


def _entries(config: Any, layer: str = "the model") -> Iterator[_Entry]:
    waiting: list[tuple[Any, str]] = [(config, layer)]
    while waiting:
        value, name = waiting.pop()
        if isinstance(value, dict):
            kind = value.get("class_name")
            if isinstance(kind, str):
                inner = value.get("config")
                own = inner.get("name") if isinstance(inner, dict) else None
                called = own if isinstance(own, str) else value.get("name")
                name = called if isinstance(called, str) else name
                yield _Entry(name, kind, value.get("module"), value.get("registered_name"), inner)
            waiting += [(one, name) for one in value.values()]
        elif isinstance(value, list):
            waiting += [(one, name) for one in reversed(value)]


def _repair(config: dict[str, Any], version: str | None) -> list[str]:
    """Correct in place what Keras 3 reads otherwise than the Keras that wrote it; returns notes."""
    legacy = version is not None and version.startswith(("1.", "2."))
    return [*_drop_groups(config), *(_renumber_nested(config) if legacy else [])]


def _renumber_nested(config: dict[str, Any]) -> list[str]:
    """Keras 2 counts the calls of a nested Sequential from 1 (0 was its own making), Keras 3
    from 0: without this, the graph of the outer model has loose ends.
    """
    moved: list[str] = []
    for entry in _entries(config):
        layers = entry.config.get("layers") if isinstance(entry.config, dict) else None
        if entry.class_name not in ("Functional", "Model") or not isinstance(layers, list):
            continue
        nested = {
            one.get("name")
            for one in layers
            if isinstance(one, dict) and one.get("class_name") == "Sequential"
        }
        ends = [entry.config.get("output_layers"), *(one.get("inbound_nodes") for one in layers)]
        calls = [call for call in _calls(ends) if call[0] in nested]
        first = {name: min(call[1] for call in calls if call[0] == name) for name, *_ in calls}
        for call in calls:
            if first[call[0]] > 0:
                call[1] -= 1
                moved.append(call[0])
    if not moved:
        return []
    return [f"renumbered the calls of {_listed(moved)} (Sequential): Keras 3 counts them from 0"]


def _calls(value: Any) -> Iterator[list[Any]]:
    """All `[layer, call, tensor, ...]` in a Keras-2 list of connections."""
    if isinstance(value, list):
        if len(value) >= 3 and isinstance(value[0], str) and isinstance(value[1], int):
            yield value
        else:
            for one in value:
                yield from _calls(one)


def _drop_groups(config: dict[str, Any]) -> list[str]:
    repaired = []
    for entry in _entries(config):
        if entry.class_name == "DepthwiseConv2D" and isinstance(entry.config, dict):
            groups = entry.config.get("groups", 1)
            if groups != 1:
                raise ModelError(
                    f"layer {entry.layer!r} (DepthwiseConv2D) has groups={groups}; a depthwise "
                    "convolution takes each channel alone, so only 1 makes sense: correct the model"
                )
            if "groups" in entry.config:
                del entry.config["groups"]
                repaired.append(entry.layer)
    if not repaired:
        return []
    return [
        f"dropped groups=1 of {len(repaired)} DepthwiseConv2D layers ({repaired[0]}"
        f"{', ...' if len(repaired) > 1 else ''}): Keras 3 has no such argument"
    ]


def _refuse(keras: Any, config: dict[str, Any]) -> None:
    """Refuse what is code, and what Keras does not know; all such layers in one message."""
    known = {
        name
        for part in ("layers", "models", "initializers", "regularizers", "constraints",
                     "dtype_policies", "activations", "quantizers")
        if hasattr(keras, part)
        for name in dir(getattr(keras, part))
    }  # fmt: skip
    known |= {*_VALUES, *_LEGACY}
    model = {key: value for key, value in config.items() if key != "compile_config"}
    faults: dict[str, list[str]] = {}
    for entry in _entries(model):
        fault = _fault(entry, known)
        if fault:
            faults.setdefault(fault, []).append(entry.layer)
    for layer, name in _activations(model):
        if name not in dir(keras.activations) and name not in dir(keras.layers):
            faults.setdefault(f"(activation {name!r}): it is not part of Keras", []).append(layer)
    if faults:
        said = "; ".join(f"{_listed(layers)} {fault}" for fault, layers in faults.items())
        raise ModelError(f"{said}; {_INSTEAD}")


def _fault(entry: _Entry, known: set[str]) -> str | None:
    kind, module = entry.class_name, entry.module
    if kind in ("Lambda", "__lambda__"):
        return f"({kind}): Python code, which is never run from a file"
    if kind in _FOREIGN:
        return f"({kind}): another framework's model"
    if kind in _ON_TEXT:
        return f"({kind}): it works on strings or tables, which no engine on a device has"
    if kind == "function":
        standard = (module == "builtins" and entry.config in known) or _is_of(module, _FUNCTIONS)
        return None if standard else f"(function {entry.config!r}): it is not part of Keras"
    ours = kind in _VALUES or (kind in known if module is None else _is_of(module, ("keras",)))
    if isinstance(entry.registered, str) and ">" in entry.registered:
        ours = False  # registered by somebody, and Keras looks there first
    return None if ours else f"({kind}): a class that is not part of Keras"


def _is_of(module: Any, packages: tuple[str, ...]) -> bool:
    return isinstance(module, str) and any(
        module == one or module.startswith(f"{one}.") for one in packages
    )


def _activations(config: Any) -> Iterator[tuple[str, str]]:
    """Activations given by name; those of one's own are names of nothing."""
    for entry in _entries(config):
        if isinstance(entry.config, dict):
            for key in ("activation", "recurrent_activation"):
                if isinstance(entry.config.get(key), str):
                    yield entry.layer, entry.config[key]


def _listed(layers: list[str]) -> str:
    names = list(dict.fromkeys(layers))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"layer{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:2]))}{more}"


def said(error: Exception) -> str:
    """Keras' message without the escape sequences that make it bold."""
    return one_line(ValueError(re.sub(r"\x1b\[[0-9;]*m", "", str(error))))
