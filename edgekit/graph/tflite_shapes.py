"""Shapes of a TFLite model's tensors after its inputs were resized; nothing is run.

LiteRT works them out when it prepares the model, up to the first operator whose output shape is
computed by others (a Reshape to `[shape(x)[0], 10]`): it would run those first. Such arithmetic
has one answer as soon as the input shapes are fixed: it is evaluated here and stored as a constant
in a copy of the model, and LiteRT prepares that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from edgekit.errors import ModelError, one_line, require
from edgekit.graph.model import Shape
from edgekit.tflite_file import read_tflite, write_tflite

__all__ = ["names_of", "resized_shapes"]

#: arguments of Reshape and the like are few numbers
_MOST_ELEMENTS = 4096
_MOST_ROUNDS = 30


def resized_shapes(content: bytes, inputs: Mapping[int, list[int]]) -> dict[int, Shape]:
    """The shapes of the main graph's tensors by index, those that do not depend on data, when the
    inputs have these.

    Raises:
        ModelError: LiteRT cannot prepare the model: an operator it has not, a shape it refuses.
    """
    schema = require("ai_edge_litert.schema_py_generated", extra="litert")
    model = read_tflite(content)
    for _ in range(_MOST_ROUNDS):
        shapes, complete = _prepared(content, model, inputs)
        if complete or not _bake(schema, model, shapes | dict(_tuples(inputs))):
            return shapes
        content = write_tflite(model)
    return shapes


def names_of(enum: Any) -> dict[int, str]:
    """Number -> name of one of the schema's enumerations."""
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


def _tuples(inputs: Mapping[int, list[int]]) -> list[tuple[int, Shape]]:
    return [(place, tuple(shape)) for place, shape in inputs.items()]


def _prepared(
    content: bytes, model: Any, inputs: Mapping[int, list[int]]
) -> tuple[dict[int, Shape], bool]:
    """The shapes that LiteRT has worked out, and whether these are all."""
    module = require("ai_edge_litert.interpreter", extra="litert")
    plain = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        interpreter = module.Interpreter(model_content=content, experimental_op_resolver_type=plain)
        for place, wanted in inputs.items():
            interpreter.resize_tensor_input(place, wanted)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"LiteRT cannot give it these shapes: {one_line(error)}") from None
    shapes = {
        int(one["index"]): tuple(int(dim) for dim in one["shape"])
        for one in interpreter.get_tensor_details()
    }
    found: dict[int, Shape] = {place: shapes[place] for place in inputs}
    last: list[int] = []
    for operator in model.subgraphs[0].operators or ():
        outputs = [int(place) for place in operator.outputs if place >= 0]
        if not all(_has_memory(interpreter, place) for place in outputs):
            # It stopped after the operator before: the one whose own shape is the open question.
            for place in last:
                found.pop(place, None)
            return found, False
        found.update((place, shapes[place]) for place in outputs if place in shapes)
        last = outputs
    return found, True


def _has_memory(interpreter: Any, place: int) -> bool:
    try:
        interpreter.tensor(place)()
    except (RuntimeError, ValueError):
        return False
    return True


def _bake(schema: Any, model: Any, shapes: Mapping[int, Shape]) -> bool:
    """Store what follows from the shapes in the model, in place of the operators that compute it.
    False if there was nothing."""
    import numpy as np

    graph = model.subgraphs[0]
    kinds, dtypes = names_of(schema.BuiltinOperator), names_of(schema.TensorType)
    known = {place: value for place in range(len(graph.tensors))
             if (value := _stored(model, graph.tensors[place], dtypes)) is not None}  # fmt: skip
    kept = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = kinds.get(max(code.builtinCode, code.deprecatedBuiltinCode), "")
        value = None
        if len(operator.outputs) == 1:
            with suppress(Exception):  # what is wrong with it, LiteRT will say
                value = _evaluated(kind, operator, known, shapes)
        if value is None or operator.outputs[0] in graph.outputs:
            kept.append(operator)
            continue
        tensor = graph.tensors[operator.outputs[0]]
        dtype = np.dtype(dtypes[tensor.type].lower())
        value = np.asarray(value).astype(dtype)
        known[int(operator.outputs[0])] = value
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(value.tobytes(), np.uint8)
        model.buffers.append(buffer)
        tensor.buffer = len(model.buffers) - 1
        tensor.shape, tensor.shapeSignature = np.array(value.shape, np.int32), None
    changed = len(kept) < len(graph.operators)
    graph.operators = kept
    return changed


def _stored(model: Any, tensor: Any, dtypes: Mapping[int, str]) -> Any:
    """The value of a small integer constant."""
    import numpy as np

    data = model.buffers[tensor.buffer].data
    dtype = {"INT32": np.int32, "INT64": np.int64}.get(dtypes.get(tensor.type, ""))
    if data is None or len(data) == 0 or dtype is None or len(data) > 8 * _MOST_ELEMENTS:
        return None
    shape = [] if tensor.shape is None else [int(dim) for dim in tensor.shape]
    values = np.frombuffer(bytes(data), dtype)
    return values.reshape(shape) if math.prod(shape) == values.size else None


def _evaluated(
    kind: str, operator: Any, known: Mapping[int, Any], shapes: Mapping[int, Shape]
) -> Any:
    """The output of an operator of shape arithmetic; None if it is none, or an input is open."""
    import numpy as np

    places = [int(place) for place in operator.inputs]
    options = operator.builtinOptions
    if kind == "SHAPE":
        return np.array(shapes[places[0]]) if places[0] in shapes else None
    if any(place not in known for place in places) or not places:
        return None
    given = [known[place] for place in places]
    first = given[0]
    if kind == "STRIDED_SLICE":
        return _strided_slice(first, given[1], given[2], given[3], options)
    if kind == "RANGE" and (given[1] - first) / given[2] > _MOST_ELEMENTS:
        return None
    actions: dict[str, Any] = {
        "PACK": lambda: np.stack(given, options.axis),
        "CONCATENATION": lambda: np.concatenate(given, options.axis),
        "GATHER": lambda: np.take(first, given[1], options.axis),
        "SLICE": lambda: first[given[1][0] :][: given[2][0] if given[2][0] >= 0 else None],
        "CAST": lambda: first,
        "RESHAPE": lambda: first.reshape(given[1]),
        "SQUEEZE": first.squeeze,
        "EXPAND_DIMS": lambda: np.expand_dims(first, int(given[1])),
        "ADD": lambda: first + given[1],
        "SUB": lambda: first - given[1],
        "MUL": lambda: first * given[1],
        "FLOOR_DIV": lambda: first // given[1],
        "FLOOR_MOD": lambda: first % given[1],
        "MAXIMUM": lambda: np.maximum(first, given[1]),
        "MINIMUM": lambda: np.minimum(first, given[1]),
        "REDUCE_PROD": lambda: np.prod(
            first, axis=tuple(np.ravel(given[1])), keepdims=bool(options.keepDims)
        ),
        "RANGE": lambda: np.arange(first, given[1], given[2]),
    }
    return actions[kind]() if kind in actions and (first.ndim <= 1 or kind != "SLICE") else None


def _strided_slice(source: Any, begin: Any, end: Any, strides: Any, options: Any) -> Any:
    """Of one dimension; masks say which bounds count."""
    if source.ndim != 1 or options.ellipsisMask or options.newAxisMask:
        return None
    start, stop, step = int(begin[0]), int(end[0]), int(strides[0])
    if options.shrinkAxisMask & 1:
        return source[start]
    return source[
        None if options.beginMask & 1 else start : None if options.endMask & 1 else stop : step
    ]
