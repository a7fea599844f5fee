"""Upgrades the operators of an ONNX model to a newer opset.

By onnx's own converter, which goes into subgraphs too; where it (1.23) changes what is computed
without a word, the missing attribute is put in, or the model is refused.
"""

from __future__ import annotations

import re
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit_converters.onnx_files import infer_shapes, opset_of, through_onnx

__all__ = ["upgrade"]

#: from 13 on quantization per channel and axes as inputs can be written; older ones become 17
_OLDEST_KEPT, _UPGRADE = 13, 17


def upgrade(model: Any, wanted: int | None) -> bool:
    """Rewrite the operators for opset `wanted`, in place (if None: for 17 where it is older than
    13); True if that was to be done.

    Raises:
        ModelError: an operator cannot be upgraded.
        UsageError: `wanted` is older than the model, or newer than onnx knows.
    """
    onnx = require("onnx", extra="onnx")
    has, newest = opset_of(model), onnx.defs.onnx_opset_version()
    target = wanted or (has if has >= _OLDEST_KEPT else _UPGRADE)
    if target < has:
        raise UsageError(f"the model is of opset {has}, wanted {target}: there is no way back")
    if target > newest:
        raise UsageError(f"no opset {target}; onnx {onnx.__version__} knows up to {newest}")
    if target == has:
        return False
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", target)])
    model.ir_version = max(model.ir_version, needed)
    try:
        if has < 11 <= target:
            _convert(model, 11)
            _keep_resize(model)
        infer_shapes(model)
        if has < 13 <= target:
            _check_13(model)
        if has < 21 <= target:
            _check_21(model)
        _convert(model, target)
    except ModelError as error:
        raise ModelError(
            f"the model cannot be upgraded from opset {has} to {target}: {error}; "
            "export it again with a newer opset"
        ) from error
    return True


def _convert(model: Any, opset: int) -> None:
    converter = require("onnx.version_converter", extra="onnx")
    infer_shapes(model)  # Softmax of opset 12 is written by its input's rank
    try:
        through_onnx(model, lambda proto: converter.convert_version(proto, opset))
    except Exception as error:
        # C++ assertions: "/project/onnx/...: operator(): Assertion `...` failed: Attribute ..."
        reason = re.sub(r".*Assertion `.*?` failed:? *", "", one_line(error)) or one_line(error)
        raise ModelError(reason) from error
    model.opset_imports[""] = opset


def _keep_resize(model: Any) -> None:
    """Until opset 10 (and in Upsample) pixels were counted from their corners, and rounded down."""
    ir = require("onnx_ir", extra="onnx")
    for node in model.graph.all_nodes():
        if node.op_type == "Resize" and node.domain == "":
            node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
            node.attributes.add(ir.AttrString("nearest_mode", "floor"))


def _check_13(model: Any) -> None:
    """Hardmax flattened its input until opset 12; Resize lost a mode with 13."""
    for node in model.graph.all_nodes():
        if node.op_type == "Hardmax" and node.domain == "":
            shape = node.inputs[0].shape
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            if shape is None or axis % len(shape) != len(shape) - 1:
                raise ModelError(f"Hardmax {node.name!r} along axis {axis} means another thing now")
        mode = node.attributes.get("coordinate_transformation_mode")
        if mode is not None and mode.value == "tf_half_pixel_for_nn" and node.domain == "":
            raise ModelError(f"{node.op_type} {node.name!r} is in mode tf_half_pixel_for_nn")


def _check_21(model: Any) -> None:
    """GroupNormalization's scale is per channel from 21 on, and was per group."""
    for node in model.graph.all_nodes():
        if node.op_type == "GroupNormalization" and node.domain == "":
            raise ModelError(f"GroupNormalization {node.name!r} means another thing now")
