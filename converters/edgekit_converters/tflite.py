"""TFLite -> ONNX by tf2onnx, and -> OpenVINO IR by OpenVINO's own front end.

Both get a copy of the file in which every tensor has one name of its own, and the inputs and
outputs those of the signature, as the engine calls them: TFLite allows names that are empty or come
twice, and the tools know tensors by name.

Quantized models stay quantized: their operators become QDQ pairs (ONNX) or FakeQuantize (IR), which
round at the same places as TFLite's integer kernels but not always to the same side, so single
values may differ by a step or two of the output's scale.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ModelError, one_line, require
from edgekit.tflite_file import read_tflite, write_tflite
from edgekit_converters.tf2onnx import checked_opset, finish
from edgekit_converters.tf_graph import EXTRA, accept_options

__all__ = ["to_onnx", "to_openvino"]

#: types of weights by their number in TFLite's schema
_STORED = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 9: np.dtype(np.int8)}
_OLDEST_OPSET = 13  # per-channel DequantizeLinear, which tf2onnx writes for quantized weights


@dataclass(frozen=True)
class _Renamed:
    """A copy for the tools: its path, and the shapes of inputs and outputs, in the file's order."""

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    notes: list[str]


def to_onnx(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write an ONNX model that takes and gives what the TFLite model does, types included.

    Raises:
        ModelError: it is damaged, or has operators without a counterpart; they are named.
    """
    accept_options(options, "opset")
    opset = checked_opset(options.get("opset"), _OLDEST_OPSET)
    convert = require("tf2onnx.convert", extra=EXTRA)
    _teach_gelu()
    with _renamed(source[0], Path(target).parent) as copy:
        try:
            model, _ = convert.from_tflite(str(copy.path), opset=opset)
        except Exception as error:
            raise ModelError(f"tf2onnx cannot convert the model: {one_line(error)}") from error
        finish(model, target, copy.inputs, copy.outputs, {})
        return {"opset": opset, "notes": copy.notes}


def _teach_gelu() -> None:
    """tf2onnx 1.17 knows TFLite's GELU by name only."""
    handler = require("tf2onnx.handler", extra=EXTRA)

    def node(ctx: Any, kind: str, *inputs: str) -> str:
        made = ctx.make_node(
            kind, list(inputs), skip_conversion=False, dtypes=[ctx.get_dtype(inputs[0])],
            shapes=[ctx.get_shape(inputs[0])],
        )  # fmt: skip
        return str(made.output[0])

    class Gelu:
        @classmethod
        def to_tf(cls, ctx: Any, node_: Any, **_: Any) -> None:
            """x/2 (1 + erf(x / sqrt(2))), or with 2/pi and tanh where it is `approximate`."""
            x, dtype = node_.input[0], np.float32

            def number(value: float) -> str:
                name = f"{node_.name}/{value:g}"
                found = ctx.get_node_by_name(name)
                made = found or ctx.make_const(name, np.array(value, dtype), skip_conversion=True)
                return str(made.output[0])

            inner = node(ctx, "Mul", x, number(0.5**0.5))
            if node_.attr["approximate"].i:
                cube = node(ctx, "Mul", node(ctx, "Mul", x, x), x)
                inner = node(ctx, "Add", x, node(ctx, "Mul", cube, number(0.044715)))
                inner = node(ctx, "Mul", inner, number((2 / np.pi) ** 0.5))
            kind = "Tanh" if node_.attr["approximate"].i else "Erf"
            half = node(ctx, "Mul", node(ctx, "Add", node(ctx, kind, inner), number(1.0)),
                        number(0.5))  # fmt: skip
            made = node(ctx, "Mul", half, x)
            ctx.replace_all_inputs(node_.output[0], made)
            outputs = [made if name == node_.output[0] else name for name in ctx.outputs]
            ctx.outputs[:] = outputs
            ctx.remove_node(node_.name)

    handler.tfl_op(["TFL_GELU"])(Gelu)


def to_openvino(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write an IR with float32 weights that takes and gives what the TFLite model does.

    Raises:
        ModelError: it is damaged, or OpenVINO has no counterpart for an operator.
    """
    accept_options(options)
    ov = require("openvino", extra="openvino")
    with _renamed(source[0], Path(target).parent) as copy:
        try:
            model = ov.Core().read_model(copy.path)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot convert the model: {one_line(error)}") from error
        for ports, names in ((model.inputs, copy.inputs), (model.outputs, copy.outputs)):
            for port, name in zip(ports, names, strict=True):
                port.get_tensor().set_names({name})
        for parameter, name in zip(model.get_parameters(), copy.inputs, strict=True):
            parameter.set_friendly_name(name)
        ov.save_model(model, target, compress_to_fp16=False)
        return {"notes": copy.notes}


@contextmanager
def _renamed(source: str, folder: Path) -> Iterator[_Renamed]:
    model = _parsed(source)
    _refuse_custom(model)
    graph = model.subgraphs[0]
    notes = [*_dynamic_range(model), *_densified(model)]
    inputs, outputs = _interface(model, notes)
    for index, name in (inputs | outputs).items():
        graph.tensors[index].name = name
    taken = {*inputs.values(), *outputs.values()}
    for number, part in enumerate(model.subgraphs):
        for index, tensor in enumerate(part.tensors):
            if number == 0 and (index in inputs or index in outputs):
                continue
            name = _text(tensor.name) or f"tensor_{index}"
            while name in taken:
                name += f"_{index}"
            taken.add(name)
            tensor.name = name
    shapes = [
        {name: _shape(graph.tensors[index], name) for index, name in ports.items()}
        for ports in (inputs, outputs)
    ]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "model.tflite"
        path.write_bytes(write_tflite(model))
        yield _Renamed(path, shapes[0], shapes[1], notes)


def _parsed(source: str) -> Any:
    interpreter = require("ai_edge_litert.interpreter", extra="litert")
    data = Path(source).read_bytes()
    try:
        interpreter.Interpreter(model_content=data)  # it verifies; the schema's reader does not
        model = read_tflite(data)
    except Exception as error:
        raise ModelError(f"{Path(source).name} is no TFLite model: {one_line(error)}") from None
    if not model.subgraphs:
        raise ModelError(f"{Path(source).name} holds no graph")
    return model


def _refuse_custom(model: Any) -> None:
    used = {one.opcodeIndex for part in model.subgraphs for one in part.operators or []}
    names = [_text(model.operatorCodes[i].customCode) for i in sorted(used)]
    custom = list(dict.fromkeys(name for name in names if name))
    if custom:
        raise ModelError(
            f"it uses custom operators, which only their maker's runtime has: {', '.join(custom)}; "
            "no other format has them either: replace them in the model it was made from"
        )


def _interface(model: Any, notes: list[str]) -> tuple[dict[int, str], dict[int, str]]:
    """Tensor index -> name of the inputs and of the outputs, in the graph's order.

    Those of the signature if there is one, else the tensors' own, as the engine calls them.
    """
    graph = model.subgraphs[0]
    signatures = model.signatureDefs or []
    found: list[dict[int, str]] = []
    for indices, kind in ((graph.inputs, "inputs"), (graph.outputs, "outputs")):
        places = [int(index) for index in indices]
        if len(set(places)) != len(places):
            raise ModelError(f"two of its {kind} are one tensor, which other formats do not have")
        own = {index: _text(graph.tensors[index].name) or f"tensor_{index}" for index in places}
        if len(signatures) == 1:
            own |= {
                int(one.tensorIndex): _text(one.name)
                for one in getattr(signatures[0], kind) or []
                if int(one.tensorIndex) in own
            }
        found.append(own)
    inputs, outputs = found
    if set(inputs) & set(outputs):
        raise ModelError("an output is an input as it came, which other formats do not have")
    for index, name in outputs.items():
        if name in inputs.values():
            outputs[index] = f"{name}_out"
            notes.append(f"output {name!r} is called '{name}_out': an input has its name")
    return inputs, outputs


def _shape(tensor: Any, name: str) -> tuple[int | str, ...]:
    sizes = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
    return tuple(
        int(size) if size >= 0 else f"{name}_{axis}"
        for axis, size in enumerate(sizes if sizes is not None else ())
    )


def _dynamic_range(model: Any) -> list[str]:
    """A note if weights are integers under float operators: LiteRT then rounds activations, too."""
    schema = require("ai_edge_litert.schema_py_generated", extra="litert")
    kinds, codes = schema.TensorType, schema.BuiltinOperator
    computing = {codes.CONV_2D, codes.DEPTHWISE_CONV_2D, codes.FULLY_CONNECTED, codes.BATCH_MATMUL}
    graph = model.subgraphs[0]
    for one in graph.operators or []:
        code = model.operatorCodes[one.opcodeIndex]
        if max(code.builtinCode, code.deprecatedBuiltinCode) in computing and len(one.inputs) > 1:
            data, weights = (graph.tensors[int(index)].type for index in one.inputs[:2])
            if data == kinds.FLOAT32 and weights == kinds.INT8:
                return [
                    "it has int8 weights under float operators (dynamic range): LiteRT rounds the "
                    "activations to int8 while it runs, the converted model does not and is closer "
                    "to the float model"
                ]
    return []


def _densified(model: Any) -> list[str]:
    """Write sparse weights out in full and drop the DENSIFY operators: the tools know neither."""
    schema = require("ai_edge_litert.schema_py_generated", extra="litert")
    count = 0
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.sparsity is not None:
                buffer = model.buffers[tensor.buffer]
                kind = _STORED.get(tensor.type)
                if kind is None:
                    raise ModelError(f"sparse weights {_text(tensor.name)!r} have an unusual type")
                try:
                    dense = _dense(tensor, np.asarray(buffer.data, np.uint8).view(kind))
                except (ValueError, IndexError, TypeError, AttributeError, MemoryError) as error:
                    raise ModelError(
                        f"sparse weights {_text(tensor.name)!r} are damaged: {one_line(error)}"
                    ) from None
                buffer.data = dense.reshape(-1).view(np.uint8)
                tensor.sparsity = None
                count += 1
        replaced: dict[int, int] = {}
        kept = []
        for one in graph.operators or []:
            code = model.operatorCodes[one.opcodeIndex]
            if max(code.builtinCode, code.deprecatedBuiltinCode) == schema.BuiltinOperator.DENSIFY:
                replaced[int(one.outputs[0])] = int(one.inputs[0])
            else:
                one.inputs = [replaced.get(int(index), int(index)) for index in one.inputs]
                kept.append(one)
        graph.operators = kept
    return [f"wrote {count} sparse weight tensors out in full"] if count else []


def _dense(tensor: Any, values: Any) -> Any:
    """The tensor in full, out of TFLite's format (schema.fbs, `SparsityParameters`): a tree with a
    level for each axis in `traversalOrder`, blocks last; `values` are its leaves in order.
    """
    shape = [int(size) for size in tensor.shape]
    order = [int(axis) for axis in tensor.sparsity.traversalOrder]
    levels = tensor.sparsity.dimMetadata
    paths: list[Any] = []
    nodes = 1
    for level in levels:
        if level.format == 0:  # DENSE: every node has as many
            counts = np.full(nodes, level.denseSize)
            inside = np.tile(np.arange(level.denseSize), nodes)
        else:
            counts = np.diff(np.asarray(level.arraySegments.values, np.int64))
            inside = np.asarray(level.arrayIndices.values, np.int64)
        paths = [np.repeat(path, counts) for path in paths] + [inside]
        nodes = len(inside)
    found = np.zeros(shape, values.dtype)
    places = [paths[order.index(axis)] for axis in range(len(shape))]
    for block, axis in enumerate(tensor.sparsity.blockMap or [], start=len(shape)):
        level = order.index(block)
        places[int(axis)] = places[int(axis)] * levels[level].denseSize + paths[level]
    found[tuple(places)] = values
    return found


def _text(name: bytes | str | None) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name or ""
