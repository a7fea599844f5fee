"""ONNX -> OpenVINO IR, by OpenVINO's own front end."""

from __future__ import annotations

from edgekit.errors import ModelError, one_line, require

__all__ = ["from_onnx"]


def from_onnx(source: list[str], target: str) -> None:
    """Write an IR with float32 weights (`target` and its `.bin`)."""
    ov = require("openvino", extra="openvino")
    try:
        model = ov.Core().read_model(source[0])
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot convert the model: {one_line(error)}") from error
    ov.save_model(model, target, compress_to_fp16=False)
