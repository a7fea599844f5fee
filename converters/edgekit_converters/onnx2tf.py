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
    names = [value.name for value in onnx.load(source[0]).graph.input]
    folder = Path(tempfile.mkdtemp(dir=Path(target).parent))
    try:
        onnx2tf.convert(
            input_onnx_file_path=source[0],
            output_folder_path=str(folder),
            batch_size=1,
            # Without this, inputs turn from NCHW to NHWC: other data than the user prepared.
            keep_shape_absolutely_input_names=names,
            copy_onnx_input_output_names_to_tflite=True,
            not_use_onnxsim=True,
            non_verbose=True,
        )
    except (Exception, SystemExit) as error:  # it calls sys.exit on what it cannot convert
        raise ModelError(f"onnx2tf cannot convert the model{_blame(folder, error)}") from error
    try:
        found = sorted(folder.glob("*_float32.tflite"))
        if not found:
            raise ModelError("onnx2tf wrote no float32 model")
        shutil.move(found[0], target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _blame(folder: Path, error: BaseException) -> str:
    """The operator it stumbled over, where it says so; it writes that to a JSON, not the error."""
    shutil.rmtree(folder, ignore_errors=True)
    text: Any = one_line(error)
    named = re.search(r"onnx_op_type: (\S+) onnx_op_name: (\S+)", str(text))
    if named:
        return f": it fails at {named[1]} {named[2]!r}"
    return "" if text in ("", "1", "SystemExit") else f": {text}"
