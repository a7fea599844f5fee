"""Channels out of an ONNX model: what may go, and the smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compress.layers_onnx import Array, Tap
from edgekit.compress.prune_axes import Classes, Product, Remover, Trace, classes_of
from edgekit.compress.prune_operators import walk
from edgekit.errors import ModelError, one_line, require

__all__ = ["analyse", "macs_of", "masked", "remove", "verify", "weights_of"]

#: integers that may be shapes, bounds, indices
_MOST_VALUES = 64
#: walks to find which of the axes that a Reshape splits may shrink
_MOST_WALKS = 24
#: relative difference up to which a masked and a smaller model are the same
_SAME = 1e-3
#: what counts as nothing
_SMALL = 1e-2


def weights_of(model: Any) -> dict[str, Array]:
    """The initializers."""
    onnx = require("onnx", extra="onnx")
    return {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}


def analyse(model: Any, sample: Mapping[str, Array]) -> Classes:
    """What may go of a prepared model; shapes are those of the sample.

    Where a Reshape splits an axis, the choice that lets most weights go is taken, the same
    wherever an axis is split so.

    Raises:
        ModelError: the model does not run on the sample.
    """
    weights = weights_of(model)
    shapes, values = _shapes(model, sample, weights)

    def walked(choices: Mapping[tuple[int, ...], int]) -> Classes:
        trace = Trace(model, shapes, values, weights, choices)
        walk(trace)
        return classes_of(trace)

    choices: dict[tuple[int, ...], int] = {}
    best = walked(choices)
    walks = 0
    for sizes, count in sorted(best.trace.offered.items()):
        for choice in range(1, count):
            walks += 1
            if walks > _MOST_WALKS:
                return best
            found = walked({**choices, sizes: choice})
            if found.prunable > best.prunable:
                best, choices = found, {**choices, sizes: choice}
    return best


def _shapes(
    model: Any, sample: Mapping[str, Array], weights: Mapping[str, Array]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Array]]:
    names = [name for node in model.graph.node for name in node.output if name]
    try:
        found = Tap(model, names).run(sample)
    except Exception as error:  # onnxruntime's own classes
        raise ModelError(f"the model does not run on a sample: {one_line(error)}") from error
    arrays = {**weights, **{n: a for n, a in found.items() if isinstance(a, np.ndarray)}}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    values = {
        name: array for name, array in arrays.items()
        if array.dtype.kind == "i" and array.size <= _MOST_VALUES
        and name not in sample
    }  # fmt: skip
    return shapes, values


def macs_of(products: list[Product], of: NDArray[np.int64], gone: NDArray[np.bool_]) -> list[int]:
    """MACs of each product with these classes gone."""
    return [
        one.factor * int(np.prod([int((~gone[of[axis]]).sum()) for axis in one.axes]))
        for one in products
    ]


def remove(
    model: Any, classes: Classes, gone: NDArray[np.bool_],
    weights: Mapping[str, Array] | None = None,
) -> Any:  # fmt: skip
    """The model without these classes (bool by class): weights (the model's own, or `weights`) are
    cut, attributes and shape constants fitted."""
    onnx = require("onnx", extra="onnx")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.value_info[:]  # stale
    trace, atoms = classes.trace, gone[classes.of]
    for one in made.graph.initializer:
        axes = trace.known.get(one.name)
        array = (weights or trace.weights)[one.name]
        if array is trace.weights[one.name] and not any(
            a is not None and atoms[a].any() for a in axes or []
        ):
            continue
        for place, axis in enumerate(axes or []):
            if axis is not None:
                array = np.compress(~atoms[axis], array, axis=place)
        one.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array, order="C"), one.name))
    remover = Remover(made, atoms)
    for fix in trace.fixes:
        fix(remover)
    used = {name for node in made.graph.node for name in node.input}
    shown = {one.name for one in made.graph.output}
    inside = any(a.HasField("g") or a.graphs for n in made.graph.node for a in n.attribute)
    for one in [i for i in made.graph.initializer if i.name not in used | shown]:
        if not inside:
            made.graph.initializer.remove(one)
    return made


def masked(model: Any, classes: Classes, gone: NDArray[np.bool_]) -> Any:
    """The model of the old size in which the layers that make these classes' channels, and those
    that read them, have zeros there."""
    onnx = require("onnx", extra="onnx")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    atoms, weights = gone[classes.of], dict(classes.trace.weights)
    for one in classes.trace.products:
        if not one.weight:
            continue
        for name, place in ((one.weight, one.out_axis), (one.weight, one.in_axis), (one.bias, 0)):
            if not name or name not in weights:
                continue
            axis = classes.trace.axes(name)[place]
            if axis is not None:
                array = weights[name].copy()
                np.moveaxis(array, place, 0)[atoms[axis]] = 0
                weights[name] = array
    for one in made.graph.initializer:
        one.CopyFrom(onnx.numpy_helper.from_array(weights[one.name], one.name))
    return made


def verify(
    model: Any, classes: Classes, gone: NDArray[np.bool_], sample: Mapping[str, Array]
) -> float:
    """The proof that the smaller model is what was meant: what is left of each layer computes what
    it does in the masked model.

    Returns the greatest difference, as a share of the greatest value of its tensor.

    Raises:
        ModelError: it does not load, or computes something else.
    """
    trace, atoms = classes.trace, gone[classes.of]
    nodes = [model.graph.node[one.node] for one in trace.products if one.rows is not None]
    names = [*(one.output[0] for one in nodes), *(one.name for one in model.graph.output)]
    wanted = Tap(masked(model, classes, gone), names).run(sample)
    try:
        found = Tap(remove(model, classes, gone), names).run(sample)
    except Exception as error:  # onnxruntime's own classes
        raise ModelError(f"the smaller model does not run: {one_line(error)}") from error
    worst = 0.0
    for name in names:
        array = wanted[name]
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            continue
        most = max(float(np.abs(array).max(initial=0.0)), _SMALL)
        for place, axis in enumerate(trace.known[name]):
            if axis is not None:
                array = np.compress(~atoms[axis], array, axis=place)
        if found[name].shape != array.shape:
            raise ModelError(
                f"the smaller model's {name!r} is {found[name].shape}, wanted {array.shape}"
            )
        worst = max(worst, float(np.abs(found[name] - array).max(initial=0.0)) / most)
    if not worst <= _SAME:
        raise ModelError(f"the smaller model computes something else: off by {worst:.2g}")
    return worst
