"""What the tools for microcontrollers say of int8 models that EdgeKit made of public networks.

    python benchmarks/firmware.py FOLDER [NET ...]

Per network: TensorFlow Lite for Microcontrollers against LiteRT on test samples, its arena and
whether that many bytes, and 5 % fewer, are enough; vela's placement and estimates; whether the C
sources compile for arm64.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from quantization_data import Case, prepare

from edgekit.errors import EdgeKitError, MissingToolError
from edgekit.firmware.export import c_sources
from edgekit.firmware.ports import Port, Ports, integer_ports
from edgekit.firmware.tflm import Interpreted, interpret
from edgekit.firmware.vela import Compiled, compile_model
from edgekit.sandbox import Limits

__all__ = ["main"]

#: the shape of the only input that TFLite has
FIXED = {"vww": "input_1=1x96x96x3", "kws": "input_1=1x50x10x1", "digits": "x=1x1x28x28"}
ACCELERATORS = ("ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-512", "ethos-u85-256")
SAMPLES = 100
LIMITS = Limits(timeout_s=300)
CROSS = ["aarch64-linux-gnu-gcc", "-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-c"]


def edgekit(*arguments: str) -> None:
    """The command line, quiet unless it fails."""
    done = subprocess.run(
        [sys.executable, "-c", "from edgekit.cli import main; main()", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"edgekit {' '.join(arguments)}: {done.stderr}")


def int8_model(case: Case, folder: Path) -> Path:
    """Made by EdgeKit from the trained model: fixed shapes, int8 static, float ports."""
    plain, made = folder / f"{case.name}.tflite", folder / f"{case.name}-int8.tflite"
    source = ["--weights", case.weights, "--trust-source"] if case.weights else []
    edgekit(
        "convert", case.model, *source, "--to", "tflite", "--inputs", FIXED[case.name],
        "-o", str(plain),
    )  # fmt: skip
    edgekit(
        "quantize", str(plain), "--scheme", "int8-static", "--for", "corstone-300",
        "--data", case.test, "--calibration", case.calibration, "-o", str(made), "--keep",
    )  # fmt: skip
    return made


def stored(values: NDArray[np.float32], port: Port) -> NDArray[np.int8]:
    """Real values as the port stores them."""
    assert port.scale is not None
    assert port.zero_point is not None
    steps = np.round(values / np.float32(port.scale)) + port.zero_point
    return np.clip(steps, -128, 127).astype(np.int8).reshape(port.shape)


def samples_of(case: Case, ports: Ports) -> list[dict[str, NDArray[np.int8]]]:
    """Test samples as the model's input stores them."""
    ((name, port),) = ports.inputs.items()
    with np.load(case.test) as arrays:
        rows = arrays[next(key for key in arrays.files if key != "labels")]
    return [{name: stored(row, port)} for row in rows[:SAMPLES]]


def litert_outputs(
    model: Path, samples: list[dict[str, NDArray[np.int8]]]
) -> list[NDArray[np.int8]]:
    """LiteRT's reference kernels on the same integers."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(model), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    interpreter.allocate_tensors()
    found = []
    for sample in samples:
        interpreter.set_tensor(
            interpreter.get_input_details()[0]["index"], next(iter(sample.values()))
        )
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy())
    return found


def starts_with(model: Path, ports: Ports, arena_bytes: int) -> str:
    """Whether the interpreter runs in an arena of so many bytes."""
    zeros = {name: np.zeros(port.shape, port.dtype) for name, port in ports.inputs.items()}
    try:
        interpret(model, [zeros], limits=LIMITS, arena_bytes=arena_bytes)
    except MissingToolError:
        raise
    except EdgeKitError as error:
        return f"no ({error})"
    return "yes"


def tell_tflm(model: Path, ports: Ports, case: Case) -> Interpreted:
    """Print what tflite-micro says."""
    samples = samples_of(case, ports)
    found = interpret(model, samples, limits=LIMITS)
    wanted = litert_outputs(model, samples)
    given = [next(iter(one.values())) for one in found.outputs]
    steps = max(
        int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(given, wanted, strict=True)
    )
    same = np.mean([a.argmax() == b.argmax() for a, b in zip(given, wanted, strict=True)])
    print(f"  tflite-micro: {', '.join(found.operators)}")
    print(
        f"  arena {found.arena_bytes} bytes (activations {found.head_bytes}, the rest "
        f"{found.tail_bytes}); starts in that many: "
        f"{starts_with(model, ports, found.arena_bytes)}; in 5 % fewer: "
        f"{starts_with(model, ports, found.arena_bytes * 95 // 100)}"
    )
    print(
        f"  against LiteRT on {len(samples)} samples: at most {steps} steps apart, top-1 equal "
        f"on {same:.1%}"
    )
    return found


def tell_vela(model: Path, folder: Path) -> Compiled:
    """Print what vela says for each accelerator; that of U55-128."""
    kept: Compiled | None = None
    for accelerator in ACCELERATORS:
        out = folder / f"{model.stem}-{accelerator}.tflite"
        found = compile_model(model, accelerator, out, limits=LIMITS)
        left = "; ".join(f"{one.type} {one.name}: {one.reason}" for one in found.on_cpu)
        print(
            f"  {accelerator} ({found.system_config}, {found.memory_mode}, "
            f"{found.clock_hz / 1e6:.0f} MHz): {found.share:.1%} of {found.macs} MACs on the NPU, "
            f"{found.cycles} cycles, {found.latency_ns / 1e6:.3f} ms, SRAM {found.sram_bytes}, "
            f"flash {found.flash_bytes} bytes, estimated; on the CPU: {left or 'nothing'}"
        )
        kept = found if accelerator == "ethos-u55-128" else kept
    assert kept is not None
    return kept


def tell_sources(name: str, model: Path, ports: Ports, found: Interpreted, folder: Path) -> None:
    """Write the C sources and compile them."""
    texts = c_sources(
        name, model.read_bytes(), arena_bytes=found.arena_bytes, arena_source="tflite-micro",
        operators=found.operators, ports=ports, ethos_u=False,
    )  # fmt: skip
    place = folder / f"{name}-firmware"
    place.mkdir(exist_ok=True)
    for file, text in texts.items():
        (place / file).write_text(text)
    code = place / f"{name}_model.c"
    made = place / f"{name}_model.o"
    done = subprocess.run([*CROSS, str(code), "-o", str(made)], check=False)
    print(f"  {' '.join(CROSS)} {code.name}: code {done.returncode}")


def main() -> None:
    """The evidence of docs/evidence/accelerators.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("nets", nargs="*", default=list(FIXED))
    arguments = parser.parse_args()
    for name in arguments.nets:
        case = prepare(name, arguments.folder.resolve())
        folder = arguments.folder.resolve() / name
        made = int8_model(case, folder)
        content, ports = integer_ports(made.read_bytes())
        model = folder / f"{name}-int8-ports.tflite"
        model.write_bytes(content)
        print(f"{name}: {made.stat().st_size} bytes, {len(content)} with integer ports")
        found = tell_tflm(model, ports, case)
        tell_vela(model, folder)
        tell_sources(name, model, ports, found, folder)


if __name__ == "__main__":
    main()
