"""`edgekit.export`: the live model at the end of a training script, converted and proven."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import TensorSpec, open_model
from edgekit.cache import Cache
from edgekit.conversion import (
    Given,
    check_target,
    convert_with_proof,
    write_result,
)
from edgekit.convert import SUFFIX, TARGETS
from edgekit.errors import LimitError, UsageError, one_line
from edgekit.noise import noise_sets
from edgekit.observer import Observer
from edgekit.reading import Layout, Reading, parse_inputs

__all__ = ["export"]

#: the package of a base class -> the converter that saves such an object, and as what
_FRAMEWORKS = {
    "keras": ("edgekit_converters.keras", "model"),
    "tf_keras": ("edgekit_converters.keras", "model"),
    "torch": ("edgekit_converters.torch", "model.pt2"),
    "sklearn": ("edgekit_converters.sklearn", "model.joblib"),
}
#: of the example's batch, so many rows go through every hop
_MOST_ROWS = 16


def export(
    model: Any,
    *,
    to: str,
    example_inputs: Any = None,
    inputs: Sequence[str] = (),
    layout: Layout | None = None,
    opset: int | None = None,
    cache: Cache | None = None,
) -> Path:
    """Convert a live Keras, PyTorch or scikit-learn model; returns the file written.

    Everything after saving the object happens as in `edgekit convert`: in child processes, with
    the ledger beside the result. `to` is the file to write; its suffix (`.onnx`, `.tflite`, `.xml`,
    `.param`, `.mlpackage`) says the format; a Core ML model is not run, so what it computes is not
    compared, and that is said. `example_inputs` (an array or tensor, a tuple of them, or a dict by
    input name; the first axis is the batch) are needed for PyTorch; they go through every hop, and
    what the live model makes of them is what the others must make. `inputs` are as `--inputs`:
    `["x=Nx3x224x224:float32"]`.

    Example::

        edgekit.export(model, example_inputs=x_test[:8], to="model.tflite")

    Raises:
        UsageError: it is no model of these frameworks, or an option cannot be obeyed.
        LimitError: no way gives a model that computes the same; its ledger is written.
        EdgeKitError: no converter takes it.
    """
    module, name = _framework(model)
    path = Path(to)
    target = _target(path)
    check_target(path, target)
    reading = Reading(parse_inputs(inputs), layout=layout, opset=opset, trust_source=True)
    cache = cache or Cache()
    with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
        saved = str(Path(scratch) / name)
        options = reading.of_source().to_json()
        if "keras" in module:
            facts = import_module(module).save_live(model, saved, options)
        elif "torch" in module:
            if example_inputs is None:
                raise UsageError("a PyTorch model needs example_inputs: a tensor or several")
            facts = import_module(module).save_live(model, example_inputs, saved, options)
        else:
            facts = import_module(module).save_live(model, saved, options)
        asked = Reading(layout=layout, opset=opset, trust_source=True)
        artifact = open_model(
            saved, reading=asked, called="the saved model",
            provenance=({"step": "export", "options": reading.to_json(), **facts},),
        )  # fmt: skip
        for note in facts.get("notes", ()):
            _Stderr().note(note)
        given = _given(model, module, example_inputs, artifact.inputs, artifact.outputs)
        found = convert_with_proof(artifact, target, cache=cache, given=given, observer=_Stderr())
        write_result(found, path)
    if found.not_compared:
        _Stderr().note(f"unverified: {found.not_compared}")
    if found.wrong:
        line = next(line for line in found.ledger if not line.passed)
        raise LimitError(
            f"the {target} model does not compute the same, so it was not written: "
            f"{line.reason()}; the ledger is in {path}.rejected.json"
        )
    return path


class _Stderr(Observer):
    def note(self, text: str) -> None:
        print(f"edgekit: {text}", file=sys.stderr)


def _framework(model: Any) -> tuple[str, str]:
    for base in type(model).__mro__:
        package = base.__module__.partition(".")[0]
        if package in _FRAMEWORKS:
            return _FRAMEWORKS[package]
    raise UsageError(
        f"{type(model).__module__}.{type(model).__qualname__} is no model that can be exported; "
        "Keras and PyTorch models and scikit-learn estimators are"
    )


def _target(path: Path) -> str:
    for name in TARGETS:
        if path.suffix.lower() == SUFFIX[name]:
            return name
    known = ", ".join(SUFFIX[name] for name in TARGETS)
    raise UsageError(f"to={str(path)!r} does not say a format by its suffix; known: {known}")


def _given(
    model: Any,
    module: str,
    example: Any,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> Given | None:
    """The examples row by row, or noise, and what the live model makes of them."""
    if example is None:
        text, samples = next(noise_sets(inputs, {}, count=4))
    else:
        whole = _by_name(example, inputs)
        rows = min(len(whole[spec.name]) for spec in inputs if whole[spec.name].ndim)
        free = all(spec.shape and isinstance(spec.shape[0], str) for spec in inputs)
        text, samples = "the example", [whole]
        if free and rows > 1:
            text = f"{min(rows, _MOST_ROWS)} of the examples"
            samples = [
                {name: array[row : row + 1] for name, array in whole.items()}
                for row in range(min(rows, _MOST_ROWS))
            ]
    if "sklearn" in module:  # the saved estimator is the estimator
        return Given(text, samples)
    call = _call_torch if "torch" in module else _call_keras
    names = [spec.name for spec in outputs]
    made = []
    for sample in samples:
        arrays = call(model, [sample[spec.name] for spec in inputs], example)
        made.append(dict(zip(names, arrays, strict=True)))
    return Given(text, samples, made)


def _by_name(example: Any, specs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    if not isinstance(example, Mapping):
        flat = list(example) if isinstance(example, (tuple, list)) else [example]
        if len(flat) != len(specs):
            wanted = ", ".join(spec.name for spec in specs)
            raise UsageError(f"{len(flat)} example inputs for {len(specs)} inputs ({wanted})")
        example = {spec.name: one for spec, one in zip(specs, flat, strict=True)}
    missing = [spec.name for spec in specs if spec.name not in example]
    if missing:
        raise UsageError(f"no example input for {', '.join(missing)}; given: {', '.join(example)}")
    arrays = {}
    for spec in specs:
        one = example[spec.name]
        one = one.detach().cpu().numpy() if hasattr(one, "detach") else np.asarray(one)
        try:
            arrays[spec.name] = one.astype(str if spec.dtype == "string" else spec.dtype)
        except (TypeError, ValueError) as error:
            raise UsageError(f"example for {spec.name}: {one_line(error)}") from None
    return arrays


def _call_torch(model: Any, arrays: list[NDArray[Any]], example: Any) -> list[NDArray[Any]]:
    import torch
    from torch.utils import _pytree as pytree

    was, tensors = model.training, [torch.from_numpy(array) for array in arrays]
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    tensors = [one.to(device) for one in tensors]
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                made = model(**dict(zip(example, tensors, strict=True)))
            else:
                made = model(*tensors)
    finally:
        model.train(was)
    return [one.detach().cpu().numpy() for one in pytree.tree_leaves(made)]


def _call_keras(model: Any, arrays: list[NDArray[Any]], example: Any) -> list[NDArray[Any]]:
    import tensorflow as tf

    made = model(arrays[0] if len(arrays) == 1 else arrays, training=False)
    return [np.asarray(one) for one in tf.nest.flatten(made)]
