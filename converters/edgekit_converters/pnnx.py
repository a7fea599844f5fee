"""ONNX and TorchScript -> ncnn, by the `pnnx` program.

pnnx calls inputs `in0`, `in1` ... and outputs `out0` ...; here they get the source's names back.
It writes what it cannot convert into the param file as it is (`aten::max`, `pnnx.Expression`),
where ncnn finds it only when loading: such layers are refused by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import MissingToolError, ModelError, UsageError, require
from edgekit_runtime.manifest import TensorSpec

__all__ = ["check_types", "convert", "onnx_to_ncnn"]

_TYPES = {"float32": "f32", "int32": "i32", "int64": "i64", "float64": "f64", "uint8": "u8",
          "int8": "i8", "int16": "i16", "float16": "f16", "bool": "bool"}  # fmt: skip
_BLOB = re.compile(r"\S{1,255}")  # ncnn reads names with %255s


def onnx_to_ncnn(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """ncnn from an ONNX file whose input shapes are fixed, or given by `--inputs`.

    Raises:
        ModelError: pnnx or ncnn cannot express the model; names the operators.
        UsageError: a free dimension has no size.
    """
    onnx = require("onnx", extra="onnx")
    _refuse(options)
    model = onnx.load(source[0], load_external_data=False)
    inputs, outputs = _onnx_specs(onnx, model.graph)
    inputs, notes = _fixed(inputs, options.get("inputs") or {})
    check_types(inputs)
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
        path = Path(folder) / "model.onnx"
        try:
            onnx.save(onnx.load(source[0]), str(path))  # pnnx wants the weights inside of the file
        except ValueError as error:
            raise ModelError("pnnx takes models up to 2 GB") from error
        try:
            made = convert(path, Path(target), inputs, outputs)
        except ModelError as error:
            inner = sorted({node.op_type for node in model.graph.node if _has_graph(node)})
            if not inner:
                raise
            raise ModelError(
                f"pnnx cannot convert the model: it has control flow ({', '.join(inner)}), which "
                "ncnn has not; if an input decides it, make that a constant (--set NAME=NUMBER), "
                "export it without, or use another format"
            ) from error
    return {**made, "notes": [*notes, *made["notes"]]}


def _has_graph(node: Any) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def check_types(inputs: Sequence[TensorSpec]) -> None:
    """Refuse inputs that ncnn's engine cannot be fed."""
    for spec in inputs:
        if spec.dtype not in ("float32", "int32", "int64"):
            raise ModelError(
                f"ncnn takes float32 and int32 only, the model has the input {spec}: export it "
                "with float32 inputs"
            )


def convert(
    path: Path, target: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> dict[str, Any]:
    """Run pnnx on `path`, which must lie alone in a folder of its own, and write `target`, its
    `.bin` and its `.json`.

    `inputs` have fixed shapes and the source's names; `outputs` its names.

    Raises:
        MissingToolError: pnnx or ncnn is not installed.
        ModelError: it crashes, or leaves layers that ncnn has not.
    """
    ncnn = require("ncnn", extra="ncnn")
    shapes = ",".join(f"[{','.join(map(str, spec.shape))}]{_TYPES[spec.dtype]}" for spec in inputs)
    log = _run(path, [f"inputshape={shapes}", "fp16=0", "device=cpu"])
    param, weights = path.with_suffix(".ncnn.param"), path.with_suffix(".ncnn.bin")
    if not param.exists() or not weights.exists():
        raise ModelError(f"pnnx cannot convert the model{_last_words(log)}")
    rows = _rows(param.read_text(errors="replace"))
    _check_layers(rows, ncnn, log)
    script = path.with_name(path.stem + "_ncnn.py")
    squeezed = _squeezed(script.read_text(errors="replace") if script.exists() else "")
    taken = [row[4] for row in rows if row[0] == "Input"]
    made = sorted({b for b in _blobs(rows) if re.fullmatch(r"out\d+", b)}, key=lambda b: int(b[3:]))
    wanted = [f"in{i}" for i in range(len(inputs))]
    missing = [spec.name for blob, spec in zip(wanted, inputs, strict=True) if blob not in taken]
    if missing:
        raise ModelError(
            f"pnnx drops the input {missing[0]!r}, on which no output depends (any more): remove "
            "it from the model"
        )
    if made != [f"out{i}" for i in range(len(outputs))]:
        raise ModelError(
            f"pnnx made {len(made)} of {len(outputs)} outputs: an output that is an input, a "
            "constant, or twice the same cannot be converted"
        )
    names = dict(zip(wanted, (s.name for s in inputs), strict=True))
    names.update(zip(made, (s.name for s in outputs), strict=True))
    target.write_text(_renamed(rows, names))
    shutil.copyfile(weights, target.with_suffix(".bin"))
    sidecar_in = [_entry(spec, wanted[i] in squeezed) for i, spec in enumerate(inputs)]
    notes = [
        f"ncnn takes {spec.name!r} as int32, the source as int64"
        for spec in inputs
        if spec.dtype == "int64"
    ]
    layers = {row[0] for row in rows}
    ranks = _mat_shapes(ncnn, target, sidecar_in, outputs)
    sidecar_out = [
        _output(spec, shape, f"out{i}" in squeezed)
        for i, (spec, shape) in enumerate(zip(outputs, ranks, strict=True))
    ]
    target.with_suffix(".json").write_text(
        json.dumps({"inputs": sidecar_in, "outputs": sidecar_out}, indent=1)
    )
    _try(target)
    return {"notes": notes, "operators": sorted(layers)}


def _executable() -> str:
    """The program in the installed package; importing the package would import torch."""
    spec = util.find_spec("pnnx")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    for name in ("pnnx", "pnnx.exe"):
        if folder is not None and (folder / name).is_file():
            return str(folder / name)
    raise MissingToolError("pnnx is not installed: pip install --no-deps pnnx")


def _run(path: Path, arguments: list[str]) -> str:
    """Run pnnx in the folder of `path`; its output is one log."""
    command = [_executable(), path.name, *arguments]
    done = subprocess.run(
        command, cwd=path.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = done.stdout.decode(errors="replace")
    if done.returncode < 0:
        name = str(-done.returncode)
        with suppress(ValueError):
            name = signal.Signals(-done.returncode).name
        raise ModelError(f"pnnx crashed with {name} on the model{_cause(path, log)}")
    return log


def _cause(path: Path, log: str) -> str:
    """Why it may have crashed: ncnn knows numbers only, and where pnnx meets truth values, it
    reads types that are not there."""
    param = path.with_suffix(".pnnx.param")
    rows = _rows(param.read_text(errors="replace")) if param.exists() else []
    made = [(row, row[4 + int(row[2]) : 4 + int(row[2]) + int(row[3])]) for row in rows]
    truth = [r[0] for r, blobs in made for b in blobs if any(_is_bool(word, b) for word in r)]
    phase = re.findall(r"^#{5,} (\w+)", log, re.MULTILINE)
    where = f" (in its {phase[-1]})" if phase else ""
    if truth:
        kinds = ", ".join(dict.fromkeys(truth))
        return f"{where}: it computes truth values ({kinds}), which ncnn has not"
    return where + _last_words(log)


def _is_bool(word: str, blob: str) -> bool:
    return word.startswith(f"#{blob}=") and word.endswith(")bool")


def _last_words(log: str) -> str:
    """What pnnx said last that is a complaint; its tables and progress are not."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).strip() for line in log.splitlines()]
    odd = re.compile(r"fail|error|unsupport|not support|unknown|abort|terminate|what\(\)|exception"
                     r"|invalid|not supported", re.I)  # fmt: skip
    said = [line for line in lines if odd.search(line) and "Unknown CPU" not in line]
    return f": {said[-1][:200]}" if said else ""


def _rows(text: str) -> list[list[str]]:
    """The layers: type, name, counts, blobs, parameters."""
    return [row for row in map(str.split, text.splitlines()[2:]) if row]


def _blobs(rows: Sequence[Sequence[str]]) -> list[str]:
    return [b for row in rows for b in row[4 : 4 + int(row[2]) + int(row[3])]]


def _check_layers(rows: Sequence[Sequence[str]], ncnn: Any, log: str) -> None:
    """Refuse what pnnx passed through as it is: by its type, or because pnnx says that it drops a
    parameter (`ignore LSTM LSTM_28 param hidden_size=128`), though ncnn has a layer of that name.
    """
    dropped = set(re.findall(r"^ignore (\S+) (\S+) param", log, re.MULTILINE))
    odd = [r for r in rows if ncnn.layer_to_index(r[0]) < 0 or (r[0], r[1]) in dropped]
    if odd:
        kinds = list(dict.fromkeys(row[0] for row in odd))
        shown = ", ".join(kinds[:6]) + (" ..." if len(kinds) > 6 else "")
        raise ModelError(
            f"pnnx has no way to express {shown} in ncnn (first at {odd[0][1]!r}): change the "
            "model so that it does without, or use another format"
        )


def _squeezed(script: str) -> set[str]:
    """The inputs and outputs that pnnx's own example gives and takes without the first axis."""
    inputs = re.findall(r'ex\.input\("(\w+)",[^\n]*(?:batch_index=0|squeeze\(0\))', script)
    outputs = re.findall(r"(\w+)\.numpy\(batch_index=0\)", script)
    outputs += re.findall(r"\((\w+)\)\)?\.unsqueeze\(0\)", script)
    return {*inputs, *outputs}


def _renamed(rows: Sequence[Sequence[str]], names: dict[str, str]) -> str:
    """The param file with the source's names for inputs and outputs; a blob that has one of these
    already gets another."""
    odd = [name for name in names.values() if not _BLOB.fullmatch(name)]
    if odd:
        raise ModelError(f"ncnn cannot name a blob {odd[0][:60]!r}: rename it, without blanks")
    taken = {*names.values()}
    table = dict(names)
    for blob in _blobs(rows):
        if blob not in table:
            new = blob
            while new in taken:
                new += "_"
            taken.add(new)
            table[blob] = new
    lines = []
    for row in rows:
        end = 4 + int(row[2]) + int(row[3])
        blobs = " ".join(table[b] for b in row[4:end])
        lines.append(f"{row[0]:<24} {row[1]:<24} {row[2]} {row[3]} {blobs} {' '.join(row[end:])}")
    made = sum(int(row[3]) for row in rows)
    return "\n".join(["7767517", f"{len(rows)} {made}", *(line.rstrip() for line in lines), ""])


def _entry(spec: TensorSpec, squeezed: bool) -> dict[str, Any]:
    rank = max(1, len(spec.shape) - squeezed)
    dtype = "int32" if spec.dtype == "int64" else spec.dtype
    if rank > 4 or any(d != 1 for d in spec.shape[: len(spec.shape) - rank]):
        raise ModelError(f"ncnn holds up to 4 axes (and a batch of 1), the model has {spec}")
    return {"name": spec.name, "dtype": dtype, "shape": list(spec.shape), "dims": rank}


def _output(spec: TensorSpec, mat: tuple[int, ...], squeezed: bool) -> dict[str, Any]:
    """What ncnn computed, in the source's shape where that is known: it must be the same."""
    found = (1, *mat) if squeezed else mat
    known = tuple(d for d in spec.shape if isinstance(d, int))
    if len(known) == len(spec.shape) and spec.shape != ():
        if known[len(known) - len(mat) :] == mat and not any(
            d != 1 for d in known[: len(known) - len(mat)]
        ):
            found = known
        elif found != known:
            raise ModelError(
                f"pnnx's result computes {spec.name!r} of the shape {[*found]}, the model "
                f"{[*known]}: it cannot express an operator of it; use another format"
            )
    return {"name": spec.name, "dtype": "float32", "shape": list(found), "dims": len(mat)}


def _mat_shapes(
    ncnn: Any, target: Path, inputs: Sequence[dict[str, Any]], outputs: Sequence[TensorSpec]
) -> list[tuple[int, ...]]:
    """The shapes that ncnn computes for inputs of zeros; ncnn may end the process over it."""
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = 1
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
        setattr(net.opt, name, False)
    if net.load_param(str(target)) != 0:
        raise ModelError("ncnn refuses what pnnx wrote; what it found is in the log")
    if net.load_model(str(target.with_suffix(".bin"))) != 0:
        raise ModelError("ncnn refuses the weights that pnnx wrote")
    extractor = net.create_extractor()
    for entry in inputs:
        shape = entry["shape"][len(entry["shape"]) - entry["dims"] :]
        array = np.zeros(shape, entry["dtype"])
        if extractor.input(entry["name"], ncnn.Mat(array.view(np.float32)).clone()) != 0:
            raise ModelError(f"ncnn refuses the input {entry['name']!r}")
    found = []
    for spec in outputs:
        code, mat = extractor.extract(spec.name)
        if code != 0 or mat.empty():
            raise ModelError(f"ncnn cannot compute {spec.name!r} from what pnnx wrote ({code})")
        found.append(tuple(np.asarray(mat).shape))
    return found


def _try(target: Path) -> None:
    """Load and run it as the runtime does; returns if that works."""
    from edgekit_runtime import load

    with load(str(target)) as session:
        feeds = {s.name: np.zeros(s.usual_shape(), s.dtype) for s in session.inputs}
        session.run(feeds)


def _refuse(options: dict[str, Any]) -> None:
    for name in ("weights", "signature", "layout"):
        if options.get(name):
            raise UsageError(f"--{name} does not go with ONNX to ncnn: leave it out")


def _onnx_specs(onnx: Any, graph: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    weights = {tensor.name for tensor in graph.initializer}

    def spec(value: Any) -> TensorSpec:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        dims = [
            d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or f"D{i}"
            for i, d in enumerate(kind.shape.dim)
        ]
        return TensorSpec(value.name, "string" if dtype == "object" else dtype, tuple(dims))

    inputs = [spec(value) for value in graph.input if value.name not in weights]
    return inputs, [spec(value) for value in graph.output]


def _fixed(
    inputs: Sequence[TensorSpec], wanted: dict[str, Any]
) -> tuple[list[TensorSpec], list[str]]:
    """The inputs with the sizes of --inputs; a free first axis is a batch of one."""
    names = [spec.name for spec in inputs]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UsageError(f"--inputs names {unknown[0]!r}; the model has {', '.join(names)}")
    fixed, notes = [], []
    for spec in inputs:
        shape = (wanted.get(spec.name) or {}).get("shape") or spec.shape
        fits = len(shape) == len(spec.shape) and all(
            isinstance(have, str) or want == have or isinstance(want, str)
            for have, want in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            raise UsageError(f"--inputs gives {spec.name!r} the shape {list(shape)}; it is {spec}")
        sizes = [
            have if isinstance(have, int) else want
            for have, want in zip(spec.shape, shape, strict=True)
        ]
        if sizes and isinstance(sizes[0], str):
            sizes[0] = 1
            notes.append(f"{spec.name}: the batch size is fixed to 1")
        if any(isinstance(size, str) for size in sizes):
            line = "x".join(str(s) if isinstance(s, int) else "224" for s in sizes)
            raise UsageError(
                f"ncnn needs fixed sizes; the model has {spec}: add "
                f"--inputs {spec.name}={line}:{spec.dtype} (with your sizes)"
            )
        fixed.append(replace(spec, shape=tuple(sizes)))
    return fixed, notes
