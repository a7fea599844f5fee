"""C sources of a model that a firmware project can include."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from edgekit.errors import ModelError
from edgekit.firmware.ports import Port, Ports
from edgekit.operators import engine_table

__all__ = ["c_sources", "resolver_calls"]

#: what an interpreter and an Ethos-U want a model and an arena to begin at
_ALIGNMENT = 16
_A_LINE = 16
#: methods of MicroMutableOpResolver (tensorflow/lite/micro/micro_mutable_op_resolver.h) that are
#: not the operator's name in camel case
_IRREGULAR = {
    "BATCH_MATMUL": "BatchMatMul", "CUMSUM": "CumSum", "PADV2": "PadV2",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTM",
    "CIRCULAR_BUFFER": "CircularBuffer", "TFLite_Detection_PostProcess": "DetectionPostprocess",
}  # fmt: skip
_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4,
    "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip


def c_sources(
    name: str,
    model: bytes,
    *,
    arena_bytes: int,
    arena_source: str,
    operators: Sequence[str],
    ports: Ports,
    ethos_u: bool,
) -> dict[str, str]:
    """Text by file name: `NAME_model.c` (the model, aligned to 16 bytes, in flash), `NAME_model.h`
    (its length, the arena, scales and zero points), `NAME_ops.h` (the operators to register, C++)
    and `README.md`.

    `operators` are TFLite's names of what the interpreter runs; `ethos_u`: the model was compiled
    by vela, and has the NPU's own operator beside them. `arena_source` says where `arena_bytes` is
    from; the macro is rounded up to 16.

    Raises:
        ModelError: TensorFlow Lite for Microcontrollers has no such operator.
    """
    word = _identifier(name)
    calls = resolver_calls(operators, ethos_u=ethos_u)
    return {
        f"{word}_model.c": _model_c(word, model),
        f"{word}_model.h": _model_h(word, len(model), arena_bytes, arena_source, ports),
        f"{word}_ops.h": _ops_h(word, calls),
        "README.md": _readme(word, len(model), arena_bytes, arena_source, ports, ethos_u=ethos_u),
    }


def resolver_calls(operators: Sequence[str], *, ethos_u: bool = False) -> list[str]:
    """Methods of `MicroMutableOpResolver` that register these operators, each once.

    Raises:
        ModelError: there is no such operator.
    """
    table = engine_table("tflm")
    known = set(table.operators if table else ()) | set(_IRREGULAR)
    found = ["AddEthosU"] if ethos_u else []
    for kind in dict.fromkeys(operators):
        if kind not in known:
            raise ModelError(
                f"TensorFlow Lite for Microcontrollers has no operator {kind}: register your own "
                "kernel with AddCustom, or take the operator out of the model"
            )
        camel = "".join(part.capitalize() for part in kind.split("_"))
        found.append(f"Add{_IRREGULAR.get(kind) or re.sub(r'(?<=[0-9])d$', 'D', camel)}")
    return found


def _identifier(name: str) -> str:
    word = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower() or "model"
    return f"m_{word}" if word[0].isdigit() else word


def _model_c(word: str, model: bytes) -> str:
    rows = (model[at : at + _A_LINE] for at in range(0, len(model), _A_LINE))
    body = "\n".join("  " + " ".join(f"0x{byte:02x}," for byte in row) for row in rows)
    return (
        f'/* Made by EdgeKit. */\n#include "{word}_model.h"\n\n#include <stdalign.h>\n\n'
        f"alignas({_ALIGNMENT}) const unsigned char {word}_model[{word.upper()}_MODEL_BYTES] = {{\n"
        f"{body}\n}};\n"
    )


def _model_h(word: str, size: int, arena_bytes: int, arena_source: str, ports: Ports) -> str:
    upper = word.upper()
    lines = [
        "/* Made by EdgeKit. */", f"#ifndef {upper}_MODEL_H", f"#define {upper}_MODEL_H", "",
        "#ifdef __cplusplus", 'extern "C" {', "#endif", "",
        "/* A TFLite flatbuffer: give it to tflite::GetModel. */",
        f"#define {upper}_MODEL_BYTES {size}",
        f"extern const unsigned char {word}_model[{upper}_MODEL_BYTES];", "",
        f"/* {_comment(arena_source)} */",
        f"#define {upper}_ARENA_BYTES {_rounded(arena_bytes)}", "",
        "/* real = SCALE * (stored - ZERO_POINT) */",
        *_port_macros(f"{upper}_INPUT", ports.inputs),
        *_port_macros(f"{upper}_OUTPUT", ports.outputs),
        "", "#ifdef __cplusplus", "}", "#endif", "", f"#endif /* {upper}_MODEL_H */", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _port_macros(prefix: str, ports: Mapping[str, Port]) -> Iterator[str]:
    for number, (name, port) in enumerate(ports.items()):
        yield f"/* {_comment(name)}: {_shape(port)} */"
        yield f"#define {prefix}_{number}_BYTES {_size(port)}"
        if port.scale is not None:
            yield f"#define {prefix}_{number}_SCALE {_float(port.scale)}"
            yield f"#define {prefix}_{number}_ZERO_POINT ({port.zero_point})"


def _ops_h(word: str, calls: Sequence[str]) -> str:
    upper, head = word.upper(), "tensorflow/lite/micro/micro_mutable_op_resolver.h"
    body = "\n".join(f"  TF_LITE_ENSURE_STATUS(resolver.{call}());" for call in calls)
    return (
        f"// Made by EdgeKit: the operators of {word}_model, and no others.\n"
        f'#ifndef {upper}_OPS_H\n#define {upper}_OPS_H\n\n#include "{head}"\n\n'
        f"namespace {word} {{\n\n"
        f"using OpResolver = tflite::MicroMutableOpResolver<{max(1, len(calls))}>;\n\n"
        "inline TfLiteStatus RegisterOps(OpResolver& resolver) {\n"
        f"{body}\n  return kTfLiteOk;\n}}\n\n}}  // namespace {word}\n\n#endif  // {upper}_OPS_H\n"
    )


def _readme(
    word: str, size: int, arena_bytes: int, arena_source: str, ports: Ports, *, ethos_u: bool
) -> str:
    upper = word.upper()
    table = [
        "| | name | type and shape | scale | zero point |", "|---|---|---|---|---|",
        *_rows("input", ports.inputs), *_rows("output", ports.outputs),
    ]  # fmt: skip
    npu = (
        "Compiled by vela: the firmware needs the Ethos-U driver (ethosu-core-driver) and"
        " TensorFlow Lite for Microcontrollers built with the `ethos_u` co-processor.\n\n"
        if ethos_u
        else ""
    )
    return (
        f"# {word} in a firmware\n\n"
        f"{npu}The model has {size} bytes of flash; the arena {_rounded(arena_bytes)} bytes of "
        f"RAM ({arena_source}).\n\n" + "\n".join(table) + "\n\n"
        "`real = scale * (stored - zero point)`; a number is stored as "
        "`round(real / scale) + zero point`, clamped to its type.\n\n```cpp\n"
        f'#include "{word}_model.h"\n#include "{word}_ops.h"\n'
        '#include "tensorflow/lite/micro/micro_interpreter.h"\n\n'
        f"alignas({_ALIGNMENT}) static uint8_t arena[{upper}_ARENA_BYTES];\n\n"
        f"static {word}::OpResolver resolver;\n{word}::RegisterOps(resolver);\n"
        "static tflite::MicroInterpreter interpreter(\n"
        f"    tflite::GetModel({word}_model), resolver, arena, sizeof(arena));\n"
        "interpreter.AllocateTensors();\n"
        "// fill interpreter.input(0), then\ninterpreter.Invoke();\n"
        "// read interpreter.output(0)\n```\n"
    )


def _rows(kind: str, ports: Mapping[str, Port]) -> Iterator[str]:
    for name, port in ports.items():
        scale = "-" if port.scale is None else f"{port.scale:.9g}"
        zero = "-" if port.zero_point is None else str(port.zero_point)
        yield f"| {kind} | `{name}` | {_shape(port)} | {scale} | {zero} |"


def _shape(port: Port) -> str:
    return f"{port.dtype} {'x'.join(map(str, port.shape)) or 'scalar'}"


def _size(port: Port) -> int:
    return math.prod(port.shape) * _BYTES.get(port.dtype, 1)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _float(value: float) -> str:
    """A float32 that reads back as it was: nine digits tell them apart."""
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _comment(text: str) -> str:
    """On one line, without what would end a comment, or is a line's continuation."""
    return " ".join(text.split()).replace("*/", "* /").replace("/*", "/ *").replace("\\", "/")
