"""Small models of one kind of arithmetic, to find out how fast an engine does it on a device.

Written here, without any converter, and run on the device by the ordinary runtime. All figures of
a model follow from its `size` n:

* `gemm`: (n, n) x (n, n), the second constant, so that engines pack it beforehand: 2 n^3
  operations. As a matrix product or as a convolution of 1x1 over n pixels and n channels, which is
  the same arithmetic: whichever the engine does faster. OpenVINO 2026.4 on AVX2 without VNNI does
  int8 twice as fast in a convolution; as a matrix product it is no faster than float32.
* `depthwise`: a chain of eight 3x3 convolutions over n channels of (n/8, n/8), 2.25 n^3
  operations. One alone would mostly measure the conversion between the caller's layout and the
  engine's: a chain reaches twice the rate with onnxruntime, OpenVINO and ncnn.

int8 models take and give 8-bit tensors, so that no conversion is timed (but ncnn's, which takes
floats only). Weights are within +-63: CPUs with AVX2 and without VNNI add products of unsigned and
signed bytes in pairs in int16 (`vpmaddubsw`), which overflows beyond, and results must be right
everywhere. How long it takes does not depend on the values.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekit.errors import UsageError, require
from edgekit.tflite_file import write_tflite

__all__ = ["Dtype", "Kind", "ProbeModel", "probe_models"]

Kind = Literal["gemm", "depthwise"]
Dtype = Literal["float32", "float16", "int8"]

_DTYPES: tuple[Dtype, ...] = ("float32", "int8")
CHAIN = 8  # depthwise convolutions one after the other; n is divided by as much
_TAPS = 9
_ROW = 16  # pixels of a row for the convolution of 1x1: fills the widest vector register
#: the highest weight; see above
_MOST = 63
_ACTIVATION = 1 / 255  # scale of 8-bit activations: real values are 0..1
_NCNN_ACTIVATION = 127.0  # ncnn's are symmetric, and it multiplies


@dataclass(frozen=True, slots=True)
class ProbeModel:
    """A model file and what it computes.

    `ops` are two per multiply-accumulate. `precision` is what the runtime must be asked for when
    it loads the file.
    """

    engine: str
    kind: Kind
    dtype: Dtype
    size: int
    path: Path
    precision: str = "float32"

    @property
    def ops(self) -> int:
        """Operations of one run."""
        if self.kind == "gemm":
            return 2 * self.size**3
        return CHAIN * 2 * _TAPS * self.size * _side(self.size) ** 2

    @property
    def files(self) -> list[Path]:
        """All files a device needs; the runtime finds the others by the name of `path`."""
        others = (".bin", ".json") if self.path.suffix == ".param" else ()
        return [self.path, *map(self.path.with_suffix, others)]


def probe_models(folder: Path, engines: Sequence[str], *, size: int) -> list[ProbeModel]:
    """Write the models of one size, in every format that `engines` need, into `folder`.

    float16 is there for OpenVINO only, as its float32 model with another precision: ncnn and
    LiteRT are loaded in float32 by EdgeKit's runtime, and ONNX Runtime converts float16 to float32
    and back where it has no kernel for it, without saying so.

    Raises:
        UsageError: an engine without probe models, or a size that is no multiple of 16.
        MissingExtraError: onnx or ai_edge_litert (it has the schema of TFLite) is not installed.
    """
    unknown = [engine for engine in engines if engine not in _WRITERS]
    if unknown:
        raise UsageError(f"no probe models for {unknown[0]!r}; known: {', '.join(_WRITERS)}")
    if size < 1 or size % _ROW:
        raise UsageError(f"size is {size}; wanted a multiple of {_ROW}")
    folder.mkdir(parents=True, exist_ok=True)
    return [model for engine in engines for model in _WRITERS[engine](folder, engine, size)]


# --- numbers --------------------------------------------------------------------------------------


def _side(size: int) -> int:
    return size // CHAIN


def _pixels(size: int) -> tuple[int, int]:
    """An image of so many pixels."""
    return size // _ROW, _ROW


@dataclass(frozen=True, slots=True)
class _Weights:
    """`integers` int8; the real weights are `integers * scales`, a scale per output channel, which
    are along `axis`."""

    integers: np.ndarray
    scales: np.ndarray
    axis: int = 0

    @property
    def floats(self) -> np.ndarray:
        """The real weights."""
        along = [1] * self.integers.ndim
        along[self.axis] = len(self.scales)
        return np.asarray(self.integers * self.scales.reshape(along), np.float32)


def _gemm_weights(size: int) -> _Weights:
    """(output channel, input channel)."""
    rng = np.random.default_rng(size)
    integers = rng.integers(-_MOST, _MOST + 1, (size, size)).astype(np.int8)
    return _Weights(integers, rng.uniform(0.5, 1, size).astype(np.float32) / _MOST)


def _gemm_scale(size: int) -> float:
    """The scale of the product: 127 steps are four standard deviations of a sum of n products.

    An input of 0..1 has a mean square of 1/3, a weight within +-a one of a^2 / 3.
    """
    return 4 * math.sqrt(size) / 3 / 127


def _depthwise_weights(size: int) -> list[_Weights]:
    """(channel, 3, 3) for each of the chain: mostly the centre, so that neither the values nor
    their differences die away."""
    rng = np.random.default_rng(size + 1)
    found = []
    for _ in range(CHAIN):
        integers = rng.integers(-8, 9, (size, 3, 3))
        integers[:, 1, 1] = rng.integers(_MOST - 8, _MOST + 1, size)
        scales = rng.uniform(0.8, 1, size).astype(np.float32) / _MOST
        found.append(_Weights(integers.astype(np.int8), scales))
    return found


# --- ONNX -----------------------------------------------------------------------------------------

# From this opset on weights are dequantized per channel; every engine in use reads it.
_OPSET, _IR_VERSION = 13, 8

_Node = tuple[str, list[str], str, dict[str, Any]]


def _onnx(folder: Path, engine: str, size: int) -> list[ProbeModel]:
    """For onnxruntime and OpenVINO, in the QDQ form that onnxruntime's quantizer writes. 8-bit
    activations are unsigned with zero point 0: what follows a ReLU, and every CPU's fast path."""
    gemm, chain = _gemm_weights(size), _depthwise_weights(size)
    product = _Operators("MatMul", (size, size), [_Weights(gemm.integers.T, gemm.scales, axis=1)])
    pointwise = _Operators(
        "Conv", (1, size, *_pixels(size)), [_Weights(gemm.integers[..., None, None], gemm.scales)]
    )
    planes = _Operators(
        "Conv", (1, size, _side(size), _side(size)),
        [_Weights(one.integers[:, None], one.scales) for one in chain],
        {"group": size, "pads": [1, 1, 1, 1]},
    )  # fmt: skip
    models = []
    forms: list[tuple[Kind, _Operators, _Operators, tuple[float, int]]] = [
        ("gemm", product, pointwise if engine == "openvino" else product, (_gemm_scale(size), 128)),
        ("depthwise", planes, planes, (_ACTIVATION, 0)),
    ]
    for kind, floats, integers, to in forms:
        whole, quantized = (folder / f"{engine}-{kind}-{dtype}-{size}.onnx" for dtype in _DTYPES)
        _write_onnx(whole, *_float_nodes(floats), floats.shape, "float32")
        _write_onnx(quantized, *_qdq_nodes(integers, to), integers.shape, "uint8")
        single = ProbeModel(engine, kind, "float32", size, whole)
        models += [single, replace(single, dtype="int8", path=quantized)]
        if engine == "openvino":
            models.append(replace(single, dtype="float16", precision="float16"))
    return models


@dataclass(frozen=True, slots=True)
class _Operators:
    """Operators of one kind in a row; what goes in and out has `shape`."""

    kind: str
    shape: tuple[int, ...]
    weights: list[_Weights]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> Iterable[tuple[int, _Weights, str, str]]:
        """Number, weights, and the names of what it takes and gives."""
        links = _links(len(self.weights))
        return ((i, self.weights[i], before, after) for i, (before, after) in enumerate(links))


def _float_nodes(operators: _Operators) -> tuple[list[_Node], dict[str, np.ndarray]]:
    nodes: list[_Node] = []
    constants: dict[str, np.ndarray] = {}
    for i, one, before, after in operators.steps:
        constants[f"w{i}"] = one.floats
        nodes.append((operators.kind, [before, f"w{i}"], after, operators.attributes))
    return nodes, constants


def _qdq_nodes(
    operators: _Operators, to: tuple[float, int]
) -> tuple[list[_Node], dict[str, np.ndarray]]:
    """`to` is the scale and zero point of what each operator gives."""
    nodes: list[_Node] = []
    constants: dict[str, np.ndarray] = {
        "x_scale": np.array(_ACTIVATION, np.float32), "x_zero": np.array(0, np.uint8),
        "y_scale": np.array(to[0], np.float32), "y_zero": np.array(to[1], np.uint8),
    }  # fmt: skip
    for i, one, before, after in operators.steps:
        constants[f"w{i}"] = np.ascontiguousarray(one.integers)
        constants[f"s{i}"], constants[f"z{i}"] = one.scales, np.zeros(len(one.scales), np.int8)
        nodes += [
            ("DequantizeLinear", [before, "x_scale", "x_zero"], f"x{i}_real", {}),
            ("DequantizeLinear", [f"w{i}", f"s{i}", f"z{i}"], f"w{i}_real", {"axis": one.axis}),
            (operators.kind, [f"x{i}_real", f"w{i}_real"], f"y{i}_real", operators.attributes),
            ("QuantizeLinear", [f"y{i}_real", "y_scale", "y_zero"], after, {}),
        ]
    return nodes, constants


def _links(count: int) -> list[tuple[str, str]]:
    """The names of what each of `count` operators in a row takes and gives: x, t1, t2 ... y."""
    names = ["x", *(f"t{i}" for i in range(1, count)), "y"]
    return list(itertools.pairwise(names))


def _write_onnx(
    path: Path, nodes: list[_Node], constants: dict[str, np.ndarray], shape: tuple[int, ...],
    dtype: str,
) -> None:  # fmt: skip
    onnx = require("onnx", extra="onnx")
    helper = onnx.helper
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node(op, ins, [out], **attributes) for op, ins, out, attributes in nodes],
        "probe",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", _OPSET)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION), path)


# --- TFLite ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a TFLite file. `scales` (one per slice along `axis`) and `zero` if quantized."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray | None = None
    scales: Sequence[float] | np.ndarray | None = None
    zero: int = 0
    axis: int = 0


def _litert(folder: Path, engine: str, size: int) -> list[ProbeModel]:
    """FULLY_CONNECTED and DEPTHWISE_CONV_2D; int8 as TFLite specifies it: activations with a zero
    point, weights symmetric per output channel, biases int32
    (https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec)."""
    models = []
    side = _side(size)
    for dtype in _DTYPES:
        product = _tensor("y", dtype, (size, size), _gemm_scale(size), 0)
        source = _tensor("x", dtype, (size, size), _ACTIVATION, -128)
        gemm = [(source, *_constants("", dtype, _gemm_weights(size)), product)]
        path = folder / f"tflite-gemm-{size}-{dtype}.tflite"
        path.write_bytes(_tflite("FULLY_CONNECTED", gemm))
        models.append(ProbeModel(engine, "gemm", dtype, size, path))

        chain = []
        weights = _depthwise_weights(size)
        for i, (one, names) in enumerate(zip(weights, _links(CHAIN), strict=True)):
            before, after = (
                _tensor(name, dtype, (1, side, side, size), _ACTIVATION, -128) for name in names
            )
            channels_last = _Weights(np.moveaxis(one.integers, 0, -1)[None], one.scales, axis=3)
            chain.append((before, *_constants(str(i), dtype, channels_last), after))
        path = folder / f"tflite-depthwise-{size}-{dtype}.tflite"
        path.write_bytes(_tflite("DEPTHWISE_CONV_2D", chain))
        models.append(ProbeModel(engine, "depthwise", dtype, size, path))
    return models


def _tensor(name: str, dtype: str, shape: tuple[int, ...], scale: float, zero: int) -> _Tensor:
    if dtype == "float32":
        return _Tensor(name, dtype, shape)
    return _Tensor(name, dtype, shape, scales=[scale], zero=zero)


def _constants(suffix: str, dtype: str, weights: _Weights) -> tuple[_Tensor, _Tensor]:
    """Weights and a bias of zero."""
    w, b, count = f"w{suffix}", f"b{suffix}", len(weights.scales)
    integers = np.ascontiguousarray(weights.integers)
    if dtype == "int8":
        zeros, of_sums = np.zeros(count, np.int32), weights.scales * np.float32(_ACTIVATION)
        return (
            _Tensor(w, dtype, integers.shape, integers, weights.scales, axis=weights.axis),
            _Tensor(b, "int32", (count,), zeros, of_sums),
        )
    return (
        _Tensor(w, dtype, integers.shape, weights.floats),
        _Tensor(b, dtype, (count,), np.zeros(count, np.float32)),
    )


_Step = tuple[_Tensor, _Tensor, _Tensor, _Tensor]


def _tflite(kind: str, steps: list[_Step]) -> bytes:
    """A flatbuffer of operators of one kind in a row; each takes input, weights, bias and gives
    an output."""
    schema = require("ai_edge_litert.schema_py_generated", extra="litert")
    model, graph, code = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT()
    model.version, model.buffers = 3, [schema.BufferT()]  # buffer 0 is the empty one
    code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
    # The versions in which int8 with a scale per channel came (tensorflow/lite/tools/versioning);
    # they are no condition for float32, and any runtime has them.
    code.version = {"FULLY_CONNECTED": 4, "DEPTHWISE_CONV_2D": 3}[kind]
    graph.tensors, graph.operators, place = [], [], {}
    for step in steps:
        for one in step:
            if one.name not in place:
                place[one.name] = len(graph.tensors)
                graph.tensors.append(_schema_tensor(schema, one, model.buffers))
        operator = schema.OperatorT()
        operator.opcodeIndex = 0
        operator.inputs = np.array([place[one.name] for one in step[:3]], np.int32)
        operator.outputs = np.array([place[step[3].name]], np.int32)
        operator.builtinOptionsType, operator.builtinOptions = _options(schema, kind)
        graph.operators.append(operator)
    graph.inputs = np.array([place["x"]], np.int32)
    graph.outputs = np.array([place["y"]], np.int32)
    model.operatorCodes, model.subgraphs = [code], [graph]
    return write_tflite(model)


def _options(schema: Any, kind: str) -> tuple[int, Any]:
    if kind == "FULLY_CONNECTED":
        return schema.BuiltinOptions.FullyConnectedOptions, schema.FullyConnectedOptionsT()
    options = schema.DepthwiseConv2DOptionsT()
    options.padding, options.depthMultiplier = schema.Padding.SAME, 1
    options.strideH = options.strideW = 1
    return schema.BuiltinOptions.DepthwiseConv2DOptions, options


def _schema_tensor(schema: Any, one: _Tensor, buffers: list[Any]) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.type = one.name, getattr(schema.TensorType, one.dtype.upper())
    tensor.shape = np.array(one.shape, np.int32)
    if one.data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(one.data.tobytes(), np.uint8)
        tensor.buffer = len(buffers)
        buffers.append(buffer)
    if one.scales is not None:
        quantization = schema.QuantizationParametersT()
        quantization.scale = np.array(one.scales, np.float32)
        quantization.zeroPoint = np.full(len(one.scales), one.zero, np.int64)
        quantization.quantizedDimension = one.axis
        tensor.quantization = quantization
    return tensor


# --- ncnn -----------------------------------------------------------------------------------------

# What precedes weights in a .bin (ncnn's ModelBin): float32, int8.
_FLOAT_TAG, _INT8_TAG = bytes(4), (0x000D4B38).to_bytes(4, "little")


def _ncnn(folder: Path, engine: str, size: int) -> list[ProbeModel]:
    """Convolution of 1x1 and ConvolutionDepthWise. InnerProduct would do the same as the former
    over rows, but slower: by a fifth in float32, seven times in int8 (1.0.20261020, AVX2).

    Parameters by number: 0 outputs, 1 kernel, 4 padding, 5 bias, 6 weights, 7 groups, 8 int8, of
    which 2 is a scale per channel, 1 one for depthwise, and +100 that the output stays int8.
    """
    models, side = [], _side(size)
    pixels, planes = (1, size, *_pixels(size)), (1, size, side, side)
    gemm, chain = _gemm_weights(size), _depthwise_weights(size)
    for dtype in _DTYPES:
        whole = dtype == "int8"
        path = folder / f"ncnn-gemm-{size}-{dtype}.param"
        layer = f"Convolution conv 1 1 x y 0={size} 1=1 6={size * size} 8={2 * whole}"
        _write_ncnn(path, [layer], pixels, _ncnn_weights(dtype, gemm, last=True))
        models.append(ProbeModel(engine, "gemm", dtype, size, path))

        path = folder / f"ncnn-depthwise-{size}-{dtype}.param"
        layers, data = [], b""
        for i, (one, (before, after)) in enumerate(zip(chain, _links(CHAIN), strict=True)):
            last = i == CHAIN - 1
            layers.append(
                f"ConvolutionDepthWise conv{i} 1 1 {before} {after} 0={size} 1=3 4=1 "
                f"6={_TAPS * size} 7={size} 8={whole * (1 if last else 101)}"
            )
            data += _ncnn_weights(dtype, one, last=last)
        _write_ncnn(path, layers, planes, data)
        models.append(ProbeModel(engine, "depthwise", dtype, size, path))
    return models


def _ncnn_weights(dtype: str, weights: _Weights, *, last: bool) -> bytes:
    """Weights of one layer; int8 ones are followed by their scales and the scale of what comes in
    and, unless it is the last, of what goes out. Scales are steps per unit."""
    if dtype == "float32":
        return _FLOAT_TAG + weights.floats.tobytes()
    integers = weights.integers.tobytes()
    integers += bytes(-len(integers) % 4)
    scales = [*(1 / weights.scales), *[_NCNN_ACTIVATION] * (1 if last else 2)]
    return _INT8_TAG + integers + np.array(scales, np.float32).tobytes()


def _write_ncnn(path: Path, layers: list[str], shape: tuple[int, ...], weights: bytes) -> None:
    lines = ["7767517", f"{len(layers) + 1} {len(layers) + 1}", "Input in 0 1 x", *layers, ""]
    path.write_text("\n".join(lines))
    path.with_suffix(".bin").write_bytes(weights)
    specs = {
        field: [{"name": name, "dtype": "float32", "shape": shape}]
        for field, name in (("inputs", "x"), ("outputs", "y"))
    }
    path.with_suffix(".json").write_text(json.dumps(specs))


#: engine -> (folder, engine, size) -> its models
_WRITERS: dict[str, Callable[[Path, str, int], Iterable[ProbeModel]]] = {
    "onnxruntime": _onnx,
    "openvino": _onnx,
    "litert": _litert,
    "ncnn": _ncnn,
}
