"""Keras models, from files (`keras_file`) and live: described, run, and saved as SavedModels."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit_converters.keras_file import load, said, written_by
from edgekit_converters.tf_graph import (
    EXTRA,
    SIDE_FILE,
    TO_NCHW,
    TO_NHWC,
    accept_options,
    fitted,
    samples_of,
)
from edgekit_runtime.arrays import write_npz
from edgekit_runtime.manifest import TensorSpec

__all__ = ["describe", "run", "save_live", "tensors", "to_savedmodel"]


def describe(source: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs and outputs, and its layers by kind.

    Raises:
        ModelError: it is damaged, holds weights only, or has layers that are code.
    """
    accept_options(options, "inputs", "layout", "trust_source")
    model, notes = load(source[0])
    ports = _interface(model, options)
    layers = Counter(type(layer).__name__ for layer in _leaves(model))
    return {
        "inputs": [dataclasses.asdict(spec) for spec in ports.inputs],
        "outputs": [dataclasses.asdict(spec) for spec in ports.outputs],
        "facts": {
            "framework": f"Keras {written_by(Path(source[0])) or '?'}",
            "parameters": int(model.count_params()),
            "layers": dict(layers.most_common()),
            "notes": [*notes, *ports.notes],
        },
    }


def run(
    source: list[str],
    options: dict[str, Any],
    inputs: str,
    outputs: str,
    taps: list[str] | None = None,
) -> None:
    """Run the model in Keras on each sample of `inputs`, without training behaviour.

    Arrays are in the source's own layout, whatever `options["layout"]` asks of the result.

    Raises:
        ModelError: see `describe`; or Keras fails on a sample.
        UsageError: `taps` are asked for: see `tensors`.
    """
    accept_options(options, "inputs", "layout", "trust_source")
    if taps:
        raise UsageError("a Keras model gives no intermediate tensors; ask its SavedModel for them")
    model, _ = load(source[0])
    ports = _interface(model, options)
    results: dict[str, np.ndarray] = {}
    for index, arrays in samples_of(inputs).items():
        try:
            given = ports.arguments(model, [arrays[spec.name] for spec in ports.inputs])
            made = ports.named(model(given, training=False))
        except Exception as error:
            raise ModelError(f"Keras cannot run sample {index}: {one_line(error)}") from error
        results |= {f"{index}/{name}": np.asarray(array) for name, array in made.items()}
    write_npz(Path(outputs), results)


def tensors(source: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """None: the SavedModel on the way to every format has them (`savedmodel.tensors`)."""
    return []


def to_savedmodel(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write a SavedModel with one signature, `serving_default`, under the model's own names.

    Raises:
        ModelError: see `describe`.
    """
    accept_options(options, "inputs", "layout", "trust_source")
    model, notes = load(source[0])
    facts = save_live(model, target, options)
    return {**facts, "notes": [*notes, *facts["notes"]]}


def save_live(model: Any, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Save a Keras model (3, or tf_keras) that is in memory as a SavedModel, and return facts.

    `options["inputs"]` fixes shapes, and says what goes in where the model does not know: a
    subclassed one that was never built. `options["layout"]` is `nchw` or `nhwc`: inputs of rank
    4 that have the other one get a transpose in front, and `layouts` in the result holds, for
    each, the permutation that turns an array for the model into one for the SavedModel.

    Raises:
        UsageError: Keras runs on another backend, or the inputs contradict the model.
        ModelError: its inputs are not known, or TensorFlow cannot trace or save it.
    """
    accept_options(options, "inputs", "layout", "trust_source")
    tf = require("tensorflow", extra=EXTRA)
    ports = _interface(model, options)
    changed = _changed_layouts(ports.inputs, options.get("layout"))

    def serve(*given: Any) -> Any:
        arrays = list(given)
        for place, (spec, array) in enumerate(zip(ports.inputs, arrays, strict=True)):
            if spec.name in changed:
                arrays[place] = tf.transpose(array, np.argsort(changed[spec.name]))
        return ports.named(model(ports.arguments(model, arrays), training=False))

    wanted = []
    for spec in ports.inputs:
        sizes = [size if isinstance(size, int) else None for size in spec.shape]
        order = changed.get(spec.name, range(len(sizes)))
        wanted.append(tf.TensorSpec([sizes[axis] for axis in order], spec.dtype, name=spec.name))
    hint = "".join(
        f"; if its free sizes are the reason, fix them: --inputs {spec.name}=..."
        for spec in ports.inputs[:1]
        if any(isinstance(size, str) for size in spec.shape[1:])
    )
    try:
        _write(model, folder, serve, wanted)
    except Exception as error:
        raise ModelError(f"TensorFlow cannot save the model: {said(error)}{hint}") from error
    _note_names(Path(folder), ports, changed)
    notes = [
        f"input {name!r} is {options['layout'].upper()} now, with a transpose in front of the model"
        for name in changed
    ]
    facts: dict[str, Any] = {"signature": "serving_default", "notes": [*ports.notes, *notes]}
    return {**facts, "layouts": changed} if changed else facts


# --- inputs and outputs -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Interface:
    """The model's tensors under their names, and how a call takes and gives them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...]
    arguments: Callable[[Any, list[Any]], Any]
    named: Callable[[Any], dict[str, Any]]


def _interface(model: Any, options: dict[str, Any]) -> _Interface:
    given = options.get("inputs") or {}
    known = getattr(model, "inputs", None)
    if not known:
        return _traced_interface(model, given)
    notes: list[str] = []
    names = _unique([_tensor_name(one) for one in known], "input", notes)
    for name in given:
        if name not in names:
            raise UsageError(f"the model has no input {name!r}; it has: {', '.join(names)}")
    layout = _own_layout(model)
    inputs = tuple(
        _spec(name, one, given.get(name) or {}, layout)
        for name, one in zip(names, known, strict=True)
    )
    ends = _unique(_output_names(model), "output", notes)
    outputs = tuple(
        _spec(name, one, {}, layout)
        for name, one in zip(ends, _flat(_structure(model, "output")), strict=True)
    )
    return _Interface(inputs, outputs, tuple(notes), _packed, _namer(ends))


def _traced_interface(model: Any, given: dict[str, Any]) -> _Interface:
    """Of a subclassed model: its inputs as given, its outputs as tracing finds them."""
    import inspect

    tf = require("tensorflow", extra=EXTRA)
    if not given or any(one.get("shape") is None for one in given.values()):
        raise ModelError(
            "the model is a subclass that does not know its inputs; give their names, shapes and "
            "types: --inputs x=Nx28x28x1:float32, or example_inputs={'x': ...} from a script"
        )
    inputs = tuple(
        TensorSpec(name, one.get("dtype") or "float32", tuple(one["shape"]))
        for name, one in given.items()
    )
    names = [spec.name for spec in inputs]
    by_name = len(names) > 1 and set(names) <= set(inspect.signature(model.call).parameters)

    def arguments(_: Any, arrays: list[Any]) -> Any:
        return arrays[0] if len(arrays) == 1 else arrays

    if by_name:
        raise ModelError(
            f"the subclassed model takes {len(names)} separate arguments; wanted one tensor, list "
            "or dict: wrap it in a functional model, keras.Model(inputs, model(...))"
        )
    try:
        made = tf.function(lambda *arrays: model(arguments(model, list(arrays)), training=False))
        traced = made.get_concrete_function(
            *(tf.TensorSpec([_fixed(s) for s in spec.shape], spec.dtype) for spec in inputs)
        ).structured_outputs
    except Exception as error:
        raise ModelError(f"TensorFlow cannot trace the model: {one_line(error)}") from error
    ends = list(traced) if isinstance(traced, dict) else _numbered(len(_flat(traced)))
    layout = _own_layout(model)
    outputs = tuple(
        _spec(name, one, {}, layout) for name, one in zip(ends, _flat(traced), strict=True)
    )
    return _Interface(inputs, outputs, (), arguments, _namer(ends))


def _fixed(size: int | str) -> int | None:
    return size if isinstance(size, int) else None


def _numbered(count: int) -> list[str]:
    return [f"output_{index}" for index in range(count)]


def _flat(tree: Any) -> list[Any]:
    """The tensors of a list, tuple or dict, in the framework's order (dicts by sorted key)."""
    tf = require("tensorflow", extra=EXTRA)
    return list(tf.nest.flatten(tree))


def _output_names(model: Any) -> list[str]:
    made = _structure(model, "output")
    if isinstance(made, dict) and len(_flat(made)) == len(made):
        return sorted(made)  # as `model.predict` calls them, in the order of `_flat`
    names = getattr(model, "output_names", None)  # Keras 3's Sequential has none
    return list(names) if names else [model.layers[-1].name]


def _structure(model: Any, which: str) -> Any:
    """How a call takes its inputs, or gives its outputs: a tensor, or a list or dict of them."""
    try:
        return getattr(model, which)
    except AttributeError:  # Keras 3's Sequential, unless it was called on symbolic tensors
        return getattr(model, f"{which}s")[0]


def _packed(model: Any, arrays: list[Any]) -> Any:
    tf = require("tensorflow", extra=EXTRA)
    order = {id(one): array for one, array in zip(model.inputs, arrays, strict=True)}
    return tf.nest.map_structure(lambda one: order[id(one)], _structure(model, "input"))


def _namer(names: list[str]) -> Callable[[Any], dict[str, Any]]:
    return lambda made: dict(zip(names, _flat(made), strict=True))


def _tensor_name(tensor: Any) -> str:
    return str(tensor.name).partition(":")[0]


def _unique(names: list[str], what: str, notes: list[str]) -> list[str]:
    """The names, a number behind those that come again (a layer with two outputs)."""
    found: list[str] = []
    for name in names:
        new, count = name, 0
        while new in found:
            count += 1
            new = f"{name}_{count}"
        if new != name:
            notes.append(f"a second {what} {name!r} is called {new!r}")
        found.append(new)
    return found


def _spec(name: str, tensor: Any, given: dict[str, Any], layout: str) -> TensorSpec:
    raw = tensor.dtype
    dtype = raw if isinstance(raw, str) else raw.name
    shape = tuple(
        size if size is not None else ("N" if axis == 0 else f"{name}_{axis}")
        for axis, size in enumerate(tensor.shape)
    )
    found = fitted(name, dtype, shape, given) or ()
    return TensorSpec(name, dtype, found, layout if len(found) == len(TO_NCHW) else None)


def _own_layout(model: Any) -> str:
    """What its layers say; Keras' default where none says anything."""
    for layer in _leaves(model):
        if getattr(layer, "data_format", None) == "channels_first":
            return "NCHW"
    return "NHWC"


def _leaves(model: Any) -> Iterator[Any]:
    for layer in getattr(model, "layers", []):
        if getattr(layer, "layers", None):
            yield from _leaves(layer)
        else:
            yield layer


# --- saving -------------------------------------------------------------------------------------


def _changed_layouts(inputs: tuple[TensorSpec, ...], wanted: str | None) -> dict[str, list[int]]:
    orders = {("NHWC", "nchw"): TO_NCHW, ("NCHW", "nhwc"): TO_NHWC}
    found = {spec.name: orders.get((spec.layout or "", wanted or "")) for spec in inputs}
    return {name: list(order) for name, order in found.items() if order}


def _write(model: Any, folder: str, serve: Callable[..., Any], wanted: list[Any]) -> None:
    legacy = type(model).__module__.startswith("tf_keras") or any(
        base.__module__.startswith("tf_keras") for base in type(model).__mro__
    )
    export = require("tf_keras.export" if legacy else "keras.export", extra=EXTRA)
    archive = export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", serve, input_signature=wanted)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces where it saved
        archive.write_out(folder)


def _note_names(folder: Path, ports: _Interface, changed: dict[str, list[int]]) -> None:
    inputs = {
        spec.name: [spec.shape[axis] for axis in changed.get(spec.name, range(len(spec.shape)))]
        for spec in ports.inputs
    }
    outputs = {spec.name: list(spec.shape) for spec in ports.outputs}
    file = folder / SIDE_FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"serving_default": {"inputs": inputs, "outputs": outputs}}))
