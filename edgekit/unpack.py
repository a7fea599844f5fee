"""Takes a bundle apart: plain model files, labels and a short how-to for an app's project."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekit.errors import BundleError, UsageError
from edgekit.firmware.export import c_sources
from edgekit.firmware.ports import Port, Ports
from edgekit_runtime.bundle import Bundle
from edgekit_runtime.engines.accelerators import split_engine
from edgekit_runtime.manifest import InputSteps, Manifest, TensorSpec, Variant

__all__ = ["unpack"]

_NUMBERS = {"float32": "Float", "int32": "Int", "int64": "Long", "int8": "Byte", "bool": "Boolean"}

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def unpack(bundle: Path, folder: Path) -> Manifest:
    """Write what is in a bundle to a new folder, whole or not at all.

    Each variant's files and golden arrays get a folder of the variant's name; beside them are
    `labels.txt` (a label a line), `processing.json` (the steps before and after the model),
    `manifest.json` and `HOW-TO.md`, each where there is something to say.

    Raises:
        BundleError: it is no sound bundle.
        UsageError: the folder is there, and not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty; name a new folder")
    with Bundle(bundle) as opened:
        opened.verify()
        manifest = opened.manifest
        new = folder.parent / f".{folder.name}-{os.getpid()}"
        try:
            for variant, name in _folders(manifest):
                place = new / name
                place.mkdir(parents=True)
                for path in variant.files:
                    (place / Path(path).name).write_bytes(opened.read(path))
                (place / "golden-inputs.npz").write_bytes(opened.read(variant.golden.inputs))
                (place / "golden-outputs.npz").write_bytes(opened.read(variant.golden.outputs))
                for file, text in _firmware(variant, opened).items():
                    (place / file).write_text(text)
            _write_words(manifest, new)
            if folder.exists():
                folder.rmdir()
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return manifest


def _firmware(variant: Variant, opened: Bundle) -> dict[str, str]:
    """What a firmware's project includes, by file name, of a variant for a microcontroller."""
    known = variant.expected.get("firmware")
    if not known:
        return {}
    try:
        ports = Ports(*(_ports(known[kind]) for kind in ("inputs", "outputs")))
        arena, source = int(known["arena_bytes"]), str(known["memory_from"])
        operators = [str(one) for one in known["operators"]]
        (path,) = variant.files
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{opened.path}: variant {variant.id!r} does not say what a firmware needs: "
            f"{type(error).__name__} {error}"
        ) from None
    return c_sources(
        opened.manifest.name, opened.read(path), arena_bytes=arena,
        arena_source=source, operators=operators, ports=ports,
        ethos_u=variant.engine == "ethos-u",
    )  # fmt: skip


def _ports(stated: Any) -> dict[str, Port]:
    return {
        str(one["name"]): Port(
            str(one["dtype"]), tuple(int(size) for size in one["shape"]),
            None if one["scale"] is None else float(one["scale"]),
            None if one["zero_point"] is None else int(one["zero_point"]),
        )
        for one in stated
    }  # fmt: skip


def _folders(manifest: Manifest) -> Iterator[tuple[Variant, str]]:
    """Each variant and the name of its folder: its id, if that is a plain name."""
    for number, variant in enumerate(manifest.variants, 1):
        yield variant, variant.id if _PLAIN.fullmatch(variant.id) else f"variant {number}"


def _write_words(manifest: Manifest, folder: Path) -> None:
    (folder / "manifest.json").write_text(manifest.to_json())
    (folder / "HOW-TO.md").write_text(_how_to(manifest))
    if manifest.labels is not None:
        (folder / "labels.txt").write_text("".join(f"{one}\n" for one in manifest.labels))
    if manifest.preprocess or manifest.postprocess:
        steps = {name: asdict(one) for name, one in manifest.preprocess.items()}
        document = {"preprocess": steps, "postprocess": list(manifest.postprocess)}
        (folder / "processing.json").write_text(json.dumps(document, indent=1) + "\n")


def _how_to(manifest: Manifest) -> str:
    firmware = all("firmware" in one.expected for one in manifest.variants)
    into = "" if firmware else " Copy the model into `app/src/main/assets/`."
    right = (
        "`golden-inputs.npz` and `golden-outputs.npz` beside a model hold samples and what it gave "
        "for them (first axis: samples). Run them once in "
    )
    parts = [
        f"# {manifest.name} in {'a firmware' if firmware else 'an app'}",
        "From an EdgeKit bundle; `manifest.json` says what was measured and how it was made."
        f"{into} Variants are in order of preference.",
        _processing(manifest),
        *(_variant(one, name, manifest) for one, name in _folders(manifest)),
        f"## Is it right there?\n\n{right}a test of the firmware."
        if firmware
        else f"## Is it right on the phone?\n\n{right}an instrumented test. Or, without an app: "
        "`edgekit check BUNDLE --on adb:SERIAL`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _processing(manifest: Manifest) -> str:
    lines = [f"* `{name}`: {_steps(one)}" for name, one in manifest.preprocess.items()]
    if lines:
        lines = ["The app does this before the model (exactly, see `processing.json`):", "", *lines]
    after = ", ".join(str(step["op"]) for step in manifest.postprocess)
    if after:
        lines += ["", f"And after it: {after}."]
    if manifest.states:
        pairs = ", ".join(f"`{one.output}` into `{one.input}`" for one in manifest.states)
        lines += ["", f"It keeps a state: feed {pairs} of the next call; zeros at first."]
    return "## Before and after\n\n" + "\n".join(lines).strip() if lines else ""


def _steps(steps: InputSteps) -> str:
    return f"from {steps.source}: {', '.join(str(one['op']) for one in steps.steps)}"


def _variant(variant: Variant, folder: str, manifest: Manifest) -> str:
    file = Path(variant.files[0]).name
    table = [
        "| | name in the model | type | shape |", "|---|---|---|---|",
        *_rows("input", manifest.inputs, variant.input_names),
        *_rows("output", manifest.outputs, variant.output_names),
    ]  # fmt: skip
    code = {
        "onnxruntime": _onnxruntime, "onnxruntime:qnn": _onnxruntime, "litert": _litert,
        "litert:gpu": _litert, "tflm": _tflm, "ethos-u": _tflm,
    }.get(variant.engine)  # fmt: skip
    shown = code(file, variant, manifest) if code else _other(variant)
    head = f"## `{folder}/{file}` ({variant.scheme}, {variant.threads} thread(s))"
    return "\n\n".join([head, "\n".join(table), shown])


def _rows(kind: str, specs: Sequence[TensorSpec], names: Sequence[str]) -> list[str]:
    return [
        f"| {kind} | `{name}` | {spec.dtype} | {' x '.join(map(str, spec.shape)) or 'scalar'} |"
        for spec, name in zip(specs, names, strict=True)
    ]


def _litert(file: str, variant: Variant, manifest: Manifest) -> str:
    kinds = [
        _NUMBERS.get(spec.dtype, "Float") for spec in (manifest.inputs[0], manifest.outputs[0])
    ]
    where = split_engine(variant.engine)[1].upper() or "CPU"
    return (
        'LiteRT for Android, `implementation("com.google.ai.edge.litert:litert:2.1.0")` or '
        "newer:\n\n```kotlin\n"
        f'val model = CompiledModel.create(context.assets, "{file}",\n'
        f"    CompiledModel.Options(Accelerator.{where}))\n"
        "val inputs = model.createInputBuffers()\nval outputs = model.createOutputBuffers()\n"
        f"inputs[0].write{kinds[0]}(values)  // all of `{variant.input_names[0]}`, row-major\n"
        f"model.run(inputs, outputs)\nval answer = outputs[0].read{kinds[1]}()\n```"
    )


def _onnxruntime(file: str, variant: Variant, manifest: Manifest) -> str:
    shape = ", ".join(map(str, manifest.inputs[0].usual_shape()))
    kind = _NUMBERS.get(manifest.inputs[0].dtype, "Float")
    package, settings = "onnxruntime-android", ""
    if variant.engine == "onnxruntime:qnn":
        package += "-qnn"
        settings = 'options.addQnn(mapOf("backend_path" to "libQnnHtp.so"))\n'
        if not variant.expected.get("placement", {}).get("left", True):
            settings += 'options.addConfigEntry("session.disable_cpu_ep_fallback", "1")\n'
    return (
        f'ONNX Runtime for Android, `implementation("com.microsoft.onnxruntime:{package}:'
        '<version>")`:\n\n```kotlin\nval environment = OrtEnvironment.getEnvironment()\n'
        "val options = OrtSession.SessionOptions()\n"
        f"options.setIntraOpNumThreads({variant.threads})\n{settings}"
        f'val bytes = context.assets.open("{file}").readBytes()\n'
        "val session = environment.createSession(bytes, options)\n"
        f"val input = OnnxTensor.createTensor(environment, {kind}Buffer.wrap(values),\n"
        f"    longArrayOf({shape}))\n"
        f'session.run(mapOf("{variant.input_names[0]}" to input)).use {{\n'
        f'    val answer = it.get("{variant.output_names[0]}").get().value\n}}\n```'
    )


def _tflm(file: str, variant: Variant, manifest: Manifest) -> str:
    return (
        f"TensorFlow Lite Micro: add the `.c` and `.h` files beside `{file}` to the firmware's "
        "project; `README.md` there says how."
    )


def _other(variant: Variant) -> str:
    return f"For {variant.engine}; its own documentation says how an app uses {variant.format}."
