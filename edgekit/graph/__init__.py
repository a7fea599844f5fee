"""What a model is made of, read without running it: operators, shapes, MACs, memory.

One file per format reads it, in a child process; `names` says which operator of one format is
which of another; `macs` has the formulas, `memory` the liveness analysis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekit import sandbox
from edgekit.errors import ModelError, UsageError
from edgekit.graph.model import Graph, Operator, Tensor, graph_from_json, with_batch_one

__all__ = ["Graph", "Operator", "Tensor", "read_graph", "with_batch_one"]

_READERS = {
    "onnx": "edgekit.graph.onnx:read",
    "tflite": "edgekit.graph.tflite:read",
    "openvino": "edgekit.graph.openvino:read",
}


def read_graph(path: Path, *, shapes: Mapping[str, Sequence[int]] | None = None) -> Graph:
    """Read a model's operators in a child process, without running it.

    `shapes` fixes the shapes of inputs, all or some; free dimensions stay free otherwise.

    Raises:
        ModelError: the file is missing, empty, damaged, or of a format that is not read; or its
            shapes cannot be changed.
        UsageError: `shapes` names no input, has the wrong rank, or contradicts the model.
        MissingExtraError: the library that reads this format is not installed.
    """
    from edgekit_runtime.source import format_of  # brings numpy

    fmt = format_of(path)
    if fmt not in _READERS:
        raise ModelError(f"{path}: operators of {fmt} models are not read; ONNX, TFLite, IR are")
    for one in (path, path.with_suffix(".bin")) if fmt == "openvino" else (path,):
        if not one.is_file():
            raise ModelError(f"no file {one}")
        if one.stat().st_size == 0 and one.suffix != ".bin":  # an IR may have no weights
            raise ModelError(f"{one} is empty")
    raw = sandbox.call(
        _READERS[fmt],
        {"path": str(path), "shapes": _checked(shapes or {})},
        limits=sandbox.Limits(timeout_s=120),
        what=f"reading {path}",
    )
    return graph_from_json(raw)


def _checked(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    for name, shape in shapes.items():
        if any(isinstance(dim, bool) or not isinstance(dim, int) or dim < 1 for dim in shape):
            raise UsageError(f"shape of {name!r}: {list(shape)} is not all numbers from 1 on")
    return {name: list(shape) for name, shape in shapes.items()}
