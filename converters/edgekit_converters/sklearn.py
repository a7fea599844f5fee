"""scikit-learn: estimators and pipelines from `.joblib`, `.pkl` and `.skops`, to ONNX.

The result holds operators of `ai.onnx.ml` (and, for texts, of `com.microsoft`), which ONNX Runtime
runs; no other engine does. `edgekit_converters.sklearn_file` says what may be read.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ModelError, require
from edgekit_converters.sklearn_file import check_estimator, estimators_in, load
from edgekit_converters.sklearn_model import Interface, check_options, interface_of
from edgekit_runtime.arrays import read_npz, write_npz
from edgekit_runtime.manifest import TensorSpec

__all__ = ["describe", "run", "save_live", "tensors", "to_onnx"]


def describe(source: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Inputs, outputs and facts.

    Texts are `text` (string [N, 1]), numbers `X` (float32 [N, features]), tables with text or
    categories one input per column ([N, 1]). A classifier gives `label` ([N], int64 or string) and
    `probabilities` ([N, classes]), or `scores`, its decision function, where it has no
    probabilities; a regressor or transformer gives `variable`.

    Raises:
        UsageError: reading the file may run code and `trust_source` is not set, or an option does
            not fit.
        ModelError: the file holds no fitted estimator.
    """
    check_options(options)
    loaded = load(Path(source[0]), trust_source=bool(options.get("trust_source")))
    made = interface_of(loaded.model, options)
    outputs = _output_specs(made)
    layers = collections.Counter(type(one).__name__ for one in estimators_in(loaded.model))
    sklearn = require("sklearn", extra="sklearn")
    classes = getattr(loaded.model, "classes_", None)
    facts: dict[str, Any] = {
        "framework": f"scikit-learn {sklearn.__version__}",
        "estimator": type(loaded.model).__name__,
        "parameters": sum(_numbers_in(one) for one in estimators_in(loaded.model)),
        "layers": dict(layers),
        "notes": list(loaded.notes),
    }
    if isinstance(classes, np.ndarray) and classes.ndim == 1:
        facts["classes"] = [str(one) for one in classes[:1000]]
    return {
        "inputs": [dataclasses.asdict(spec) for spec in made.inputs],
        "outputs": [dataclasses.asdict(spec) for spec in outputs],
        "facts": facts,
    }


def run(
    source: list[str],
    options: dict[str, Any],
    inputs: str,
    outputs: str,
    taps: list[str] | None = None,
) -> None:
    """Run samples in scikit-learn, float inputs as float64, in which it computes.

    Raises:
        ModelError: it fails on them, or `taps` are asked for (there are none).
    """
    if taps:
        raise ModelError("scikit-learn models have no intermediate tensors to look at")
    check_options(options)
    loaded = load(Path(source[0]), trust_source=bool(options.get("trust_source")))
    made = interface_of(loaded.model, options)
    samples: dict[str, dict[str, Any]] = {}
    for key, array in read_npz(Path(inputs)).items():
        number, _, name = key.partition("/")
        samples.setdefault(number, {})[name] = array
    found = {
        f"{number}/{name}": array
        for number, sample in samples.items()
        for name, array in made.run(sample).items()
    }
    write_npz(Path(outputs), found)


def tensors(source: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """None: between the steps of a pipeline, skl2onnx names tensors by itself."""
    return []


def to_onnx(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write the ONNX model of an estimator or a whole pipeline, texts included.

    Raises:
        UsageError: as `describe`.
        ModelError: an estimator has no converter, or one that computes something else.
    """
    from edgekit_converters.sklearn_onnx import converted

    check_options(options)
    loaded = load(Path(source[0]), trust_source=bool(options.get("trust_source")))
    made = interface_of(loaded.model, options)
    proto, facts = converted(loaded.model, made, options.get("opset"))
    Path(target).write_bytes(proto)
    facts["notes"] = [*loaded.notes, *facts["notes"]]
    return facts


def save_live(model: Any, path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write a live estimator to `path` (`.joblib`), for `to_onnx` to read with `trust_source`.

    Raises:
        ModelError: it is no fitted estimator, or is of a class that no other process can load.
    """
    check_options(options)
    check_estimator(model, f"the {type(model).__name__}")
    for one in estimators_in(model):
        if type(one).__module__ == "__main__":
            raise ModelError(
                f"{type(one).__name__} is a class of this script, for which there is no converter; "
                "keep to scikit-learn's own classes"
            )
    require("joblib", extra="sklearn").dump(model, path)
    sklearn = require("sklearn", extra="sklearn")
    return {"framework": f"scikit-learn {sklearn.__version__}", "notes": []}


def _output_specs(made: Interface) -> list[TensorSpec]:
    """As they come out for inputs of no meaning; the first axis is that of the inputs."""
    found = made.run(made.dummy(2))
    rows = made.inputs[0].shape[0]
    return [
        TensorSpec(
            name,
            "string" if array.dtype.kind in "UO" else str(array.dtype),
            (rows, *map(int, array.shape[1:])),
        )
        for name, array in found.items()
    ]


def _numbers_in(one: Any) -> int:
    """Floats that fitting found: arrays of attributes that end in `_`, nodes of trees."""
    total = 0
    for name, value in vars(one).items():
        if name == "tree_":
            total += int(value.threshold.size + value.value.size)
        elif name == "_predictors":  # of histogram-based gradient boosting
            total += sum(2 * len(tree.nodes) for row in value for tree in row)
        elif name == "_fit_X" or (name.endswith("_") and not name.startswith("_")):
            dtype = getattr(value, "dtype", None)
            if dtype is not None and np.dtype(dtype).kind == "f" and value.ndim:
                total += int(value.nnz if hasattr(value, "nnz") else value.size)
    return total
