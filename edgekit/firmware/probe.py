"""One operator through each tool for microcontrollers: what is installed may not work."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import sandbox
from edgekit.errors import EdgeKitError, require
from edgekit.firmware.tflm import interpret
from edgekit.firmware.vela import compile_model
from edgekit.tflite_file import write_tflite

__all__ = ["TOOLS", "one_operator", "probe_tool"]

#: what `doctor` names -> (its distribution, its extra)
TOOLS = {"vela": ("ethos-u-vela", "ethos-u"), "tflite-micro": ("tflite-micro", "micro")}
_TIMEOUT_S = 60
_ACCELERATOR = "ethos-u55-128"


def probe_tool(name: str) -> str | None:
    """None if the tool took a model of one operator, else why not."""
    limits = sandbox.Limits(timeout_s=_TIMEOUT_S)
    try:
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            model = Path(folder, "one-operator.tflite")
            model.write_bytes(one_operator(extra=TOOLS[name][1]))
            if name == "vela":
                out = Path(folder, "compiled.tflite")
                left = compile_model(model, _ACCELERATOR, out, limits=limits).on_cpu
                return f"it leaves {left[0].type} on the CPU: {left[0].reason}" if left else None
            x = np.array([[[[-128, -1, 2, 127]]]], np.int8)
            found = interpret(model, [{"x": x}], limits=limits).outputs[0]["y"]
    except EdgeKitError as error:
        return str(error)
    return None if np.array_equal(found, x) else f"{x.tolist()} + itself gave {found.tolist()}"


def one_operator(*, extra: str) -> bytes:
    """A TFLite model: y = x + x for int8 (1, 1, 1, 4). The scale doubles, so the numbers stay."""
    schema = require("ai_edge_litert.schema_py_generated", extra=extra)
    model, graph, operator = schema.ModelT(), schema.SubGraphT(), schema.OperatorT()
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    code.version = 2  # with int8
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 0], [1]
    operator.builtinOptionsType = schema.BuiltinOptions.AddOptions
    operator.builtinOptions = schema.AddOptionsT()
    graph.tensors = [_tensor(schema, "x", 0.5), _tensor(schema, "y", 1.0)]
    graph.inputs, graph.outputs, graph.operators = [0], [1], [operator]
    model.version, model.buffers = 3, [schema.BufferT()]  # buffer 0 is the empty one
    model.operatorCodes, model.subgraphs = [code], [graph]
    return write_tflite(model, extra=extra)


def _tensor(schema: Any, name: str, scale: float) -> Any:
    tensor, quantization = schema.TensorT(), schema.QuantizationParametersT()
    tensor.name, tensor.type, tensor.shape = name, schema.TensorType.INT8, [1, 1, 1, 4]
    quantization.scale, quantization.zeroPoint = [scale], [0]
    tensor.quantization = quantization
    return tensor
