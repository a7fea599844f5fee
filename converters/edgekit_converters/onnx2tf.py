"""ONNX -> TFLite through onnx2tf and TensorFlow's converter."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, one_line, require

__all__ = ["from_onnx"]


def from_onnx(source: list[str], target: str) -> None:
    """Write a float32 TFLite model with the ONNX model's names, layouts and a batch of one."""
    onnx = require("onnx", extra="tflite-convert")
    onnx2tf = require("onnx2tf", extra="tflite-convert")
    graph = onnx.load(source[0], load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in weights]
    folder = Path(tempfile.mkdtemp(dir=Path(target).parent))
    # It writes the names it makes up back into the file it is given: never the user's.
    copy = shutil.copy(source[0], folder / "model.onnx")
    try:
        onnx2tf.convert(
            input_onnx_file_path=str(copy),
            output_folder_path=str(folder),
            batch_size=1,
            # Without this, inputs turn from NCHW to NHWC: other data than the user prepared.
            keep_shape_absolutely_input_names=names,
            not_use_onnxsim=True,
            non_verbose=True,
        )
    except (Exception, SystemExit) as error:  # it calls sys.exit on what it cannot convert
        raise ModelError(f"onnx2tf cannot convert the model{_blame(folder, error)}") from error
    try:
        found = sorted(folder.glob("*_float32.tflite"))
        if not found:
            raise ModelError("onnx2tf wrote no float32 model")
        _save_named(found[0], Path(target), names, [value.name for value in graph.output])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_named(source: Path, target: Path, inputs: list[str], outputs: list[str]) -> None:
    """Give the model the signature it lost: onnx2tf keeps the order, but names outputs anew."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(bytearray(source.read_bytes()), 0)
    graph = model.subgraphs[0]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    signature.inputs = _name_tensors(schema, graph, graph.inputs, inputs)
    signature.outputs = _name_tensors(schema, graph, graph.outputs, outputs)
    model.signatureDefs = [signature]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    target.write_bytes(bytes(builder.Output()))


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


def _blame(folder: Path, error: BaseException) -> str:
    """The operator it stumbled over, where it says so; it writes that to a JSON, not the error."""
    shutil.rmtree(folder, ignore_errors=True)
    text: Any = one_line(error)
    named = re.search(r"onnx_op_type: (\S+) onnx_op_name: (\S+)", str(text))
    if named:
        return f": it fails at {named[1]} {named[2]!r}"
    return "" if text in ("", "1", "SystemExit") else f": {text}"
