"""ONNX -> ONNX: clean-up, so that every later step meets one way of writing a model.

`clean_up` never changes what a model computes, nor the names and the order of its inputs and
outputs. It repeats its passes until nothing changes, so a cleaned model comes out as it went in.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, require
from edgekit_converters.onnx_affine import fold_affine
from edgekit_converters.onnx_files import (
    external_files,
    infer_shapes,
    load_model,
    model_files,
    opset_of,
    save_model,
    skeleton,
    understood,
)
from edgekit_converters.onnx_inputs import (
    apply_inputs,
    apply_layout,
    apply_values,
    forget_false_names,
)
from edgekit_converters.onnx_opset import upgrade

__all__ = ["add_outputs", "clean_up", "external_files", "model_files", "simplify"]

#: folding makes no tensor of more elements, and reads none: bigger ones are not "small things"
_MOST_FOLDED = 65536
#: each round gets behind one more computed shape; the corpus takes up to 4
_MOST_ROUNDS = 20


def clean_up(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write the model cleaned: opset upgraded, shapes inferred, constants as initializers and
    folded, BatchNormalization and zero padding folded into Conv, no identities, inference Dropouts,
    dead nodes and outputs.

    Options: `inputs` (shapes in the source's layout), `values` (inputs that become constants),
    `layout`, `opset`. Facts: `opset`,
    `operators` [before, after], `folded`, `layouts` {input: permutation of an original
    array}, `notes`, `files`.

    Raises:
        ModelError: the model is damaged, or its operators cannot be upgraded.
        UsageError: an option contradicts the model, or asks for something else.
    """
    _refuse_other(options)
    with understood(source[0], "clean-up"):
        return _clean_up(source[0], target, options)


def add_outputs(source: str, target: str, names: list[str]) -> None:
    """Write the model with these tensors of its outermost graph as further outputs.

    External data is copied. Runs in a child.

    Raises:
        UsageError: the graph has no tensor of one of the names.
    """
    with understood(source, "adding outputs"):
        _add_outputs(source, target, names)


def _add_outputs(source: str, target: str, names: list[str]) -> None:
    passes = require("onnx_ir.passes.common", extra="onnx")
    model = load_model(source)
    # Inference takes 2 GB at most, without the weights
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    infer_shapes(model)
    graph = model.graph
    values = {output.name: output for node in graph for output in node.outputs}
    values |= {value.name: value for value in (*graph.initializers.values(), *graph.inputs)}
    for name in names:
        if name not in values:
            raise UsageError(f"no tensor {name!r} in the outermost graph of {Path(source).name}")
        if not values[name].is_graph_output():
            graph.outputs.append(values[name])
    save_model(model, target)


def _clean_up(source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    model = load_model(source)
    interface = _interface(model)
    operators = sum(1 for _ in model.graph.all_nodes())
    notes = [
        f"input {name!r} is optional: its stored value was made a constant"
        for name in _optional_inputs(model)
    ]
    _prepare(model)
    apply_values(model, options.get("values") or {})
    if options.get("inputs"):
        apply_inputs(model, options["inputs"])
    opset = opset_of(model)
    if upgrade(model, options.get("opset")):
        notes.append(f"upgraded from opset {opset} to {opset_of(model)}")
    layouts = apply_layout(model, options["layout"]) if options.get("layout") else {}
    folded = simplify(model)
    inputs, outputs = _interface(model)
    if (inputs, outputs) != ([i for i in interface[0] if i in inputs], interface[1]):
        raise ModelError(f"clean-up changed inputs or outputs: {interface} to {inputs}, {outputs}")
    return {
        "opset": opset_of(model),
        "operators": [operators, sum(1 for _ in model.graph.all_nodes())],
        "folded": folded,
        "layouts": layouts,
        "notes": notes,
        "files": save_model(model, target),
    }


def _refuse_other(options: dict[str, Any]) -> None:
    for option in ("signature", "weights"):
        if options.get(option):
            raise UsageError(f"--{option} is not for ONNX models, which have one graph and it all")


def _interface(model: Any) -> tuple[list[str], list[str]]:
    return [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]


def _optional_inputs(model: Any) -> list[str]:
    """Inputs with a stored value, from IR version 4 on: there, it is a default."""
    stored = [v.name for v in model.graph.inputs if v.is_initializer()]
    return stored if model.ir_version >= 4 else []


def _prepare(model: Any) -> None:
    """Weights to where everything else looks for them: the outermost graph's initializers."""
    passes = require("onnx_ir.passes.common", extra="onnx")
    if model.functions:
        passes.InlinePass()(model)
    passes.RemoveInitializersFromInputsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.NameFixPass()(model)
    forget_false_names(model)


def simplify(model: Any) -> int:
    """Repeat the passes, in place, until nothing changes; returns how many operators went into
    the one before them. The model's constants must be initializers of its outermost graph."""
    passes = require("onnx_ir.passes.common", extra="onnx")
    optimizer = require("onnxscript.optimizer", extra="onnx")
    rewriter = require("onnxscript.rewriter", extra="onnx")
    rules = require("onnxscript.rewriter.rules.common", extra="onnx")
    folded = 0
    before = b""
    for _ in range(_MOST_ROUNDS):
        infer_shapes(model)
        optimizer.fold_constants(
            model,
            input_size_limit=_MOST_FOLDED,
            output_size_limit=_MOST_FOLDED,
            should_fold=_is_small_fill,
        )
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.LiftSubgraphInitializersToMainGraphPass()(model)
        rewriter.rewrite(model, pattern_rewrite_rules=[rules.fuse_pad_into_conv_rule])
        folded += fold_affine(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.RemoveUnusedOpsetsPass()(model)
        passes.NameFixPass()(model)
        _drop_notes(model)
        after = _digest(model)
        if after == before:
            break
        before = after
    return folded


def _is_small_fill(node: Any) -> bool | None:
    """Also fold ConstantOfShape, which the optimizer keeps: exported Pad arguments start there."""
    if node.op_type != "ConstantOfShape" or node.inputs[0].const_value is None:
        return None
    return bool(node.inputs[0].const_value.numpy().prod() <= _MOST_FOLDED)


def _drop_notes(model: Any) -> None:
    """What the optimizer writes beside each tensor; it would grow with every round."""
    for graph in model.graphs():
        produced = (output for node in graph for output in node.outputs)
        for value in (*graph.initializers.values(), *produced):
            for key in [key for key in value.metadata_props if key.startswith("pkg.onnxscript")]:
                del value.metadata_props[key]


def _digest(model: Any) -> bytes:
    proto, weights = skeleton(model)
    text = proto.SerializeToString(deterministic=True) + repr(sorted(weights)).encode()
    return hashlib.sha256(text).digest()
