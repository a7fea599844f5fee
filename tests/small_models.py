"""Small models whose answers numpy knows, in every format the runtime loads.

Each is a function `(folder) -> path`. TFLite files are put together from the schema, so that no
converter has a say in names, order and free dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = np.array(
    [[0.5, -1.0, 2.0], [1.5, 0.25, -0.75], [-2.0, 1.0, 0.0], [3.0, -0.5, 1.25]], np.float32
)
BIAS = np.array([0.5, -1.0, 2.0], np.float32)
KERNEL = np.arange(9, dtype=np.float32).reshape(3, 3)


def linear(x: np.ndarray) -> np.ndarray:
    """The answer of the `linear` model for float32 (N, 4)."""
    return x @ WEIGHTS + BIAS


def convolved(image: np.ndarray) -> np.ndarray:
    """The answer of the `conv` model for one image (H, W)."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3))
    return np.einsum("hwij,ij->hw", windows, KERNEL)


# --- ONNX -----------------------------------------------------------------------------------------


def onnx_model(
    nodes: Sequence[tuple[str, Sequence[str], Sequence[str], Mapping[str, Any]]],
    inputs: Mapping[str, tuple[str, Sequence[int | str | None]]],
    outputs: Mapping[str, tuple[str, Sequence[int | str | None]]],
    constants: Mapping[str, np.ndarray] | None = None,
) -> Any:
    """An ONNX ModelProto; inputs and outputs are `name: (dtype, shape)`."""
    from onnx import TensorProto, checker, helper, numpy_helper

    def infos(specs: Mapping[str, tuple[str, Sequence[int | str | None]]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(
                name,
                TensorProto.STRING
                if dtype == "string"
                else helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
                list(shape),
            )
            for name, (dtype, shape) in specs.items()
        ]

    graph = helper.make_graph(
        [helper.make_node(op, i, o, **attributes) for op, i, o, attributes in nodes],
        "small",
        infos(inputs),
        infos(outputs),
        [numpy_helper.from_array(a, name) for name, a in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    return model


def onnx_linear(
    shape: Sequence[int | str | None] = ("N", 4),
    answer: Sequence[int | str | None] = ("N", 3),
    *,
    weights: np.ndarray = WEIGHTS,
) -> Any:
    return onnx_model(
        [("MatMul", ["x", "w"], ["t"], {}), ("Add", ["t", "b"], ["y"], {})],
        {"x": ("float32", shape)},
        {"y": ("float32", answer)},
        {"w": weights, "b": BIAS},
    )


def _onnx_two() -> Any:
    return onnx_model(
        [("Add", ["a", "a"], ["q"], {}), ("Mul", ["z", "z"], ["b"], {})],
        {"z": ("float32", (1, 4)), "a": ("int32", (1, 2))},
        {"q": ("int32", (1, 2)), "b": ("float32", (1, 4))},
    )


def _onnx_stubborn() -> Any:
    return onnx_model(
        [("Reshape", ["x", "s"], ["y"], {})],
        {"x": ("float32", ("N", 4))},
        {"y": ("float32", (2, 2))},
        {"s": np.array([2, 2], np.int64)},
    )


def _onnx_conv() -> Any:
    return onnx_model(
        [("Conv", ["x", "k"], ["y"], {})],
        {"x": ("float32", (1, 1, "H", "W"))},
        {"y": ("float32", (1, 1, None, None))},
        {"k": KERNEL.reshape(1, 1, 3, 3)},
    )


def _onnx_where() -> Any:
    return onnx_model(
        [("NonZero", ["x"], ["t"], {}), ("Transpose", ["t"], ["y"], {})],
        {"x": ("bool", ("N",))},
        {"y": ("int64", ("K", 1))},
    )


def _onnx_scalar() -> Any:
    return onnx_model(
        [("Add", ["x", "x"], ["y"], {})], {"x": ("float32", ())}, {"y": ("float32", ())}
    )


_ONNX: dict[str, Callable[[], Any]] = {
    "linear": onnx_linear,
    "two": _onnx_two,
    "stubborn": _onnx_stubborn,
    "conv": _onnx_conv,
    "where": _onnx_where,
    "scalar": _onnx_scalar,
}


def save_onnx(folder: Path, name: str) -> Path:
    import onnx

    path = folder / f"{name}.onnx"
    onnx.save(_ONNX[name](), path)
    return path


def save_openvino(folder: Path, name: str) -> Path:
    import openvino

    path = folder / f"{name}.xml"
    model = openvino.convert_model(save_onnx(folder, name))
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


# --- TFLite ---------------------------------------------------------------------------------------


def tflite_model(
    operators: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    inputs: Mapping[str, tuple[str, Sequence[int | None]]],
    outputs: Mapping[str, tuple[str, Sequence[int | None]]],
    constants: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """A TFLite flatbuffer with one signature; a dimension of None is free."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    constants = constants or {}
    specs: dict[str, tuple[str, Sequence[int | None]]] = {**inputs, **outputs}
    specs |= {name: (array.dtype.name, array.shape) for name, array in constants.items()}
    place = {name: index for index, name in enumerate(specs)}
    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT()]
    graph = schema.SubGraphT()
    graph.tensors = []
    for name, (dtype, shape) in specs.items():
        tensor = schema.TensorT()
        tensor.name = f"tensor/{name}"  # the signature's name is what counts
        tensor.type = getattr(schema.TensorType, dtype.upper())
        tensor.shape = np.array([dim or 1 for dim in shape], np.int32)
        if None in shape:
            tensor.shapeSignature = np.array([dim or -1 for dim in shape], np.int32)
        if name in constants:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(constants[name].tobytes(), np.uint8)
            model.buffers.append(buffer)
            tensor.buffer = len(model.buffers) - 1
        graph.tensors.append(tensor)
    model.operatorCodes, graph.operators = [], []
    for index, (kind, ins, outs) in enumerate(operators):
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 1
        model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = index
        operator.inputs = np.array([place[n] for n in ins], np.int32)
        operator.outputs = np.array([place[n] for n in outs], np.int32)
        options = {
            "FULLY_CONNECTED": "FullyConnectedOptions", "ADD": "AddOptions", "MUL": "MulOptions",
            "CONV_2D": "Conv2DOptions", "RESHAPE": "ReshapeOptions", "WHERE": "WhereOptions",
        }[kind]  # fmt: skip
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
        operator.builtinOptions = getattr(schema, f"{options}T")()
        if kind == "CONV_2D":
            operator.builtinOptions.padding = schema.Padding.VALID
            operator.builtinOptions.strideH = operator.builtinOptions.strideW = 1
        graph.operators.append(operator)
    graph.inputs = np.array([place[name] for name in inputs], np.int32)
    graph.outputs = np.array([place[name] for name in outputs], np.int32)
    signature = schema.SignatureDefT()
    signature.signatureKey = "serving_default"
    signature.inputs, signature.outputs = [], []
    for names, into in ((inputs, signature.inputs), (outputs, signature.outputs)):
        for name in names:
            pair = schema.TensorMapT()
            pair.name, pair.tensorIndex = name, place[name]
            into.append(pair)
    model.subgraphs, model.signatureDefs = [graph], [signature]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tflite(name: str) -> bytes:
    f = "float32"
    if name == "linear":
        return tflite_model(
            [("FULLY_CONNECTED", ["x", "w", "b"], ["y"])],
            {"x": (f, (None, 4))},
            {"y": (f, (None, 3))},
            {"w": np.ascontiguousarray(WEIGHTS.T), "b": BIAS},
        )
    if name == "two":
        return tflite_model(
            [("ADD", ["a", "a"], ["q"]), ("MUL", ["z", "z"], ["b"])],
            {"z": (f, (1, 4)), "a": ("int32", (1, 2))},
            {"q": ("int32", (1, 2)), "b": (f, (1, 4))},
        )
    if name == "stubborn":
        return tflite_model(
            [("RESHAPE", ["x", "s"], ["y"])],
            {"x": (f, (None, 4))},
            {"y": (f, (2, 2))},
            {"s": np.array([2, 2], np.int32)},
        )
    if name == "conv":  # TFLite's layout is NHWC
        return tflite_model(
            [("CONV_2D", ["x", "k", "b"], ["y"])],
            {"x": (f, (1, None, None, 1))},
            {"y": (f, (1, None, None, 1))},
            {"k": KERNEL.reshape(1, 3, 3, 1), "b": np.zeros(1, np.float32)},
        )
    if name == "where":
        return tflite_model(
            [("WHERE", ["x"], ["y"])], {"x": ("bool", (None,))}, {"y": ("int64", (None, 1))}
        )
    assert name == "scalar"
    return tflite_model([("ADD", ["x", "x"], ["y"])], {"x": (f, ())}, {"y": (f, ())})


def save_tflite(folder: Path, name: str) -> Path:
    path = folder / f"{name}.tflite"
    path.write_bytes(_tflite(name))
    return path


def save_ncnn(folder: Path, name: str) -> Path:
    import ncnn_models

    return ncnn_models.save_ncnn(folder, name)


#: engine -> how its own format is written
SAVERS: dict[str, Callable[[Path, str], Path]] = {
    "onnxruntime": save_onnx,
    "openvino": save_openvino,
    "litert": save_tflite,
    "ncnn": save_ncnn,
}

#: engine -> models it cannot have, and why
LACKING = {
    "ncnn": {
        "two": "ncnn computes on float32 only, this model has int32",
        "where": "ncnn computes on float32 only, this model has bool",
        "stubborn": "ncnn reshapes 12 numbers to 2 x 2 by dropping eight, without an error",
    }
}
