"""ONNX -> OpenVINO IR, by OpenVINO's own front end."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from edgekit.errors import ModelError, one_line, require

__all__ = ["from_onnx"]


def _blame(log: str) -> str:
    """The first operator its report names and what was wrong with it, without its source lines."""
    found = re.search(r"ONNX node '<Node\((\w+)\): ([^>]*)>'", log)
    branch = "_branch__" in log or "<Node(If)" in log
    hint = "; if an input decides a branch, make it a constant: --set NAME=NUMBER" if branch else ""
    classical = sorted(set(re.findall(r"ai\.onnx\.ml\.(\w+)", log)))
    if classical:
        return (
            f"it has operators of classical machine learning ({', '.join(classical)}), which only "
            "ONNX Runtime runs: use --to onnx"
        )
    reasons = [line for line in log.splitlines() if line.strip()]
    reason = next(
        (after for line, after in pairwise(reasons) if "failed with GeneralFailure" in line), ""
    )
    if found:
        reason = f": {reason.strip()}" if reason else ""
        return f"it fails at {found[1]} {found[2]!r}{reason}{hint}"
    return one_line(ValueError(log)) + hint


def from_onnx(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write an IR with float32 weights (`target` and its `.bin`).

    Raises:
        ModelError: OpenVINO cannot convert it; names the operator.
    """
    ov = require("openvino", extra="openvino")
    try:
        model = ov.Core().read_model(source[0])
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot convert the model: {_blame(str(error))}") from error
    ov.save_model(model, target, compress_to_fp16=False)
    return {}
