"""ONNX -> TFLite through onnx2tf and TensorFlow's converter.

onnx2tf guesses the layout of every tensor, and where it guesses wrong it fails, or makes a model
that computes something else and says nothing. So the model is cleaned and written more plainly
first, and what comes out is run in LiteRT against ONNX Runtime before it is handed on; some models
pass only after onnxslim has been over them, some only without.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit.tflite_file import read_tflite, write_tflite
from edgekit_converters.onnx import clean_up
from edgekit_converters.onnx2tf_graph import plain_graph
from edgekit_converters.onnx_files import load_model
from edgekit_converters.tflite_flatten import fold_flatten

__all__ = ["from_onnx"]

_MOST_BYTES = 2**31 - 1  # flatbuffers' offsets
#: float32 nets of some hundred layers differ by 1e-6 to 1e-4 of their largest output; what is
#: converted wrongly is off by more than a tenth
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4
_RECIPES = ("as cleaned", "after onnxslim")


def from_onnx(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write a float32 TFLite model with the ONNX model's names, layouts and fixed shapes.

    Options: those of `edgekit_converters.onnx.clean_up`. A batch dimension that is free becomes 1.

    Raises:
        ModelError: shapes are free, or onnx2tf fails at an operator, or makes another model of it.
        UsageError: an option contradicts the model.
    """
    # absolute, because the work is done in another folder
    source, target_path = [str(Path(one).absolute()) for one in source], Path(target).absolute()
    with _workshop(target_path.parent) as folder:
        cleaned = folder / "cleaned.onnx"
        facts = clean_up(source, str(cleaned), options)
        notes = [*facts["notes"], *_fix_batch(cleaned)]
        if sum(file.stat().st_size for file in folder.glob("cleaned.onnx*")) > _MOST_BYTES:
            raise ModelError("the model is bigger than 2 GB, which is all that TFLite can hold")
        reasons = []
        for recipe in _RECIPES:
            try:
                made = _convert(cleaned, folder / recipe.replace(" ", "-"), recipe)
                _check(cleaned, made)
            except ModelError as error:
                reasons.append(str(error))
                continue
            target_path.write_bytes(made)
            if recipe != _RECIPES[0]:
                notes.append(f"converted {recipe}; before it, {reasons[0]}")
            return {"opset": facts["opset"], "layouts": facts["layouts"], "notes": notes}
        raise ModelError(reasons[0])


@contextlib.contextmanager
def _workshop(parent: Path) -> Iterator[Path]:
    """A folder to work in. onnx2tf leaves files in the current one, and looks there for the test
    images that it downloads otherwise."""
    np = require("numpy", extra="tflite-convert")
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(dir=parent))
    images = np.random.default_rng(0).random((20, 128, 128, 3), np.float32)
    np.save(folder / "calibration_image_sample_data_20x128x128x3_float32.npy", images)
    try:
        os.chdir(folder)
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def _fix_batch(path: Path) -> list[str]:
    """Set a free batch dimension to 1; refuse other free dimensions."""
    inputs = load_model(path).graph.inputs
    shapes = {value.name: list(value.shape or []) for value in inputs}
    free = {name: [d for d in dims if not isinstance(d, int)] for name, dims in shapes.items()}
    batch = {dims[0].value for dims in shapes.values() if dims and not isinstance(dims[0], int)}
    wanted: dict[str, dict[str, Any]] = {}
    for name, dims in shapes.items():
        sizes = [
            1 if not isinstance(d, int) and (i == 0 or (d.value is not None and d.value in batch))
            else d for i, d in enumerate(dims)
        ]  # fmt: skip
        if not all(isinstance(size, int) for size in sizes):
            text = "x".join(
                str(d) if isinstance(d, int) else str(d.value or f"d{i}")
                for i, d in enumerate(dims)
            )
            raise UsageError(
                f"input {name!r} has free dimensions ({text}), which TFLite models do not have; "
                f"give all sizes: --inputs {name}={text} with numbers"
            )
        if free[name]:
            wanted[name] = {"shape": sizes}
    if wanted:
        clean_up([str(path)], str(path), {"inputs": wanted})
    return [f"the free batch dimension of input {name!r} was set to 1" for name in wanted]


def _convert(cleaned: Path, folder: Path, recipe: str) -> bytes:
    """The TFLite model that onnx2tf makes of it, in the workshop's `folder`."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # it builds with Keras 2; before the first import
    onnx2tf = require("onnx2tf", extra="tflite-convert")
    ir = require("onnx_ir", extra="tflite-convert")
    model = load_model(cleaned)
    interface = [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]
    if recipe == "after onnxslim":
        slim = require("onnxslim", extra="tflite-convert").slim
        try:
            model = ir.serde.deserialize_model(slim(str(cleaned)))
        except Exception as error:
            raise ModelError(f"onnxslim fails on the model: {one_line(error)}") from error
    folder.mkdir()
    plain = folder / "model.onnx"
    inputs, _ = plain_graph(model, plain)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            onnx2tf.convert(
                input_onnx_file_path=str(plain),
                output_folder_path=str(folder),
                # Without this, inputs turn from NCHW to NHWC: other data than the user prepared.
                keep_shape_absolutely_input_names=inputs,
                not_use_onnxsim=True,
                not_use_opname_auto_generate=True,  # the plain names are unique already
                # TFLite has no Erf, of which exact GELU is made
                replace_to_pseudo_operators=["erf"],
                non_verbose=True,
            )
    except (Exception, SystemExit) as error:  # it calls sys.exit on what it cannot convert
        raise ModelError(
            f"onnx2tf cannot convert the model{_blame(said.getvalue(), error)}"
        ) from error
    found = sorted(folder.glob("*_float32.tflite"))
    if not found:
        raise ModelError("onnx2tf wrote no float32 model")
    return _finished(found[0].read_bytes(), *interface)


def _check(cleaned: Path, made: bytes) -> None:
    """Refuse what does not compute the same as ONNX Runtime on seeded inputs."""
    np = require("numpy", extra="tflite-convert")
    ort = require("onnxruntime", extra="tflite-convert")
    interpreter = require("ai_edge_litert.interpreter", extra="tflite-convert").Interpreter
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 4
    session = ort.InferenceSession(str(cleaned), quiet, providers=["CPUExecutionProvider"])
    engine = interpreter(model_content=made, num_threads=1)
    run = engine.get_signature_runner("serving_default")
    for seed in range(2):
        feed = _inputs(session, np.random.default_rng(seed))
        try:
            wanted = session.run(None, feed)
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot run the model: {one_line(error)}") from error
        found = run(**feed)
        for output, reference in zip(session.get_outputs(), wanted, strict=True):
            one = found[output.name]
            if one.shape != reference.shape:
                raise ModelError(
                    f"onnx2tf converts it wrongly: output {output.name!r} has shape "
                    f"{list(one.shape)}, not {list(reference.shape)}"
                )
            difference = np.abs(one.astype("float64") - reference).max(initial=0)
            largest = np.abs(reference).max(initial=0)
            if not difference <= _ABSOLUTE + _RELATIVE * largest:
                raise ModelError(
                    f"onnx2tf converts it wrongly: output {output.name!r} is off by "
                    f"{difference:.2g}, its largest value being {largest:.2g}"
                )


def _inputs(session: Any, random: Any) -> dict[str, Any]:
    feed = {}
    for one in session.get_inputs():
        if one.type == "tensor(string)":
            raise ModelError(f"input {one.name!r} is text, which TFLite models here cannot take")
        kind = one.type.removeprefix("tensor(").removesuffix(")")
        dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
        array = random.normal(size=one.shape)
        if "float" not in dtype:  # indices, more often than not: small ones are in range
            array = random.integers(0, 2, one.shape)
        feed[one.name] = array.astype(dtype)
    return feed


def _finished(tflite: bytes, inputs: list[str], outputs: list[str]) -> bytes:
    """Give the model the signature it lost: onnx2tf keeps the order, but names outputs anew."""
    schema = require("ai_edge_litert.schema_py_generated", extra="tflite-convert")
    model = read_tflite(tflite, extra="tflite-convert")
    fold_flatten(model)
    graph = model.subgraphs[0]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    signature.inputs = _name_tensors(schema, graph, graph.inputs, inputs)
    signature.outputs = _name_tensors(schema, graph, graph.outputs, outputs)
    model.signatureDefs = [signature]
    return write_tflite(model, extra="tflite-convert")


def _name_tensors(schema: Any, graph: Any, tensors: Any, names: list[str]) -> list[Any]:
    if len(tensors) != len(names):
        raise ModelError(f"onnx2tf made {len(tensors)} of {len(names)} inputs or outputs")
    maps = []
    for index, name in zip(tensors, names, strict=True):
        graph.tensors[index].name = name
        one = schema.TensorMapT()
        one.name, one.tensorIndex = name, index
        maps.append(one)
    return maps


def _blame(said: str, error: BaseException) -> str:
    """The operator it stumbled over, which it prints, and what it or TensorFlow says of it."""
    found = re.search(r"onnx_op_name: *(?:\x1b\[\S*?m)? *(\S+)", said)
    reason = one_line(error)
    named = f" at {found[1]!r}" if found else ""
    return named if reason in ("", "1", "SystemExit") else f"{named}: {reason}"
