"""Channels that go together: the smaller model computes what the large one does without them."""

import numpy as np
import onnx
import pytest
from pruned_graphs import BLOCKS, generated

from edgekit.compress.prune_axes import Classes
from edgekit.compress.prune_channels import analyse, macs_of, remove, verify, weights_of

pytestmark = pytest.mark.needs("onnxruntime")


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def some(classes: Classes, seed: int) -> np.ndarray:
    """About two fifths of what may go, something left along every axis."""
    draw = np.random.default_rng(seed)
    gone = np.zeros(len(classes.of), bool)
    axes = [a for known in classes.trace.known.values() for a in known if a is not None]
    for one in draw.permutation(classes.free)[: max(1, len(classes.free) * 2 // 5)]:
        gone[one] = True
        if any(gone[classes.of[axis]].all() for axis in axes):
            gone[one] = False
    return gone


def zeroed(model: onnx.ModelProto, classes: Classes, gone: np.ndarray, side: str):
    """The model in which these channels really are zero: by the weights that make them, or by
    those that read them; found by the weights' axes alone."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    weights = weights_of(model)
    for product in classes.trace.products:
        places = {"makers": ((product.weight, product.out_axis), (product.bias, 0)),
                  "readers": ((product.weight, product.in_axis),)}[side]  # fmt: skip
        for name, place in places:
            axis = classes.trace.axes(name)[place] if name in weights and place >= 0 else None
            if axis is not None:
                array = np.moveaxis(weights[name].copy(), place, 0)
                array[gone[classes.of[axis]]] = 0
                weights[name] = np.moveaxis(array, 0, place)
    if side == "makers":  # the biases that stand beside a MatMul, and what scales
        for name, axes in classes.trace.known.items():
            if name in weights and weights[name].dtype == np.float32 and weights[name].ndim == 1:
                weights[name] = np.where(gone[classes.of[axes[0]]], 0, weights[name]).astype("f")
    for one in made.graph.initializer:
        one.CopyFrom(
            onnx.numpy_helper.from_array(np.ascontiguousarray(weights[one.name]), one.name)
        )
    return made


@pytest.mark.parametrize("seed", range(60))
def test_generated_graphs_without_channels_that_are_zero_compute_the_same(seed) -> None:
    model = generated(seed)
    x = np.random.default_rng(seed).normal(size=(1, 3, 8, 8)).astype(np.float32)
    classes = analyse(model, {"x": x})
    gone = some(classes, seed)
    assert gone.any()
    for side in ("makers", "readers"):
        large = zeroed(model, classes, gone, side)
        trace = analyse(large, {"x": x})
        assert np.array_equal(trace.of, classes.of)  # of structure alone
        small = remove(large, trace, gone)
        onnx.checker.check_model(small, full_check=True)
        np.testing.assert_allclose(outputs(small, x), outputs(large, x), atol=1e-5)
    total, left = (
        sum(macs_of(classes.trace.products, classes.of, one)) for one in (np.zeros_like(gone), gone)
    )
    assert left < total
    verify(model, classes, gone, {"x": x})


def test_every_block_is_met() -> None:
    assert {seed % len(BLOCKS) for seed in range(60)} == set(range(len(BLOCKS)))
