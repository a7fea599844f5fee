"""Sets every free dimension of a model's inputs, for engines that take fixed shapes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.artifact import Artifact, open_model
from edgekit.cache import Cache, content_key
from edgekit.convert import SUFFIX, tool_versions
from edgekit.errors import ModelError, one_line, require
from edgekit.tflite_file import read_tflite, write_tflite

__all__ = ["fix_onnx", "fix_openvino", "fix_shapes", "fix_tflite", "has_free_dimensions"]

#: format -> (the function that runs in the child, the distribution that does it)
_FIXERS = {
    "onnx": ("edgekit.compress.fix_shapes:fix_onnx", "onnxruntime"),
    "openvino": ("edgekit.compress.fix_shapes:fix_openvino", "openvino"),
    "tflite": ("edgekit.compress.fix_shapes:fix_tflite", "ai-edge-litert"),
}


def has_free_dimensions(artifact: Artifact) -> bool:
    """Whether an input has a dimension that is decided by what is fed."""
    return any(not isinstance(size, int) for spec in artifact.inputs for size in spec.shape)


def fix_shapes(
    artifact: Artifact,
    shapes: Mapping[str, Sequence[int]],
    *,
    cache: Cache,
    limits: sandbox.Limits | None = None,
) -> Artifact:
    """The artifact with its inputs' shapes set to `shapes` (by input name).

    Raises:
        ModelError: the model cannot compute such shapes.
    """
    function, distribution = _FIXERS[artifact.format]
    wanted = {name: [int(size) for size in shape] for name, shape in shapes.items()}
    tools = tool_versions((distribution,))
    key = content_key(kind="fix-shapes", source=artifact.sha256, shapes=wanted, tools=tools)
    name = f"model{SUFFIX[artifact.format]}"

    def make(folder: Path) -> None:
        request: dict[str, Any] = {
            "source": str(artifact.path),
            "target": str(folder / name),
            "shapes": wanted,
        }
        sandbox.call(function, request, limits=limits, what="fixing the shapes")

    folder = cache.folder(key, make)
    step = {"step": "fix-shapes", "shapes": wanted, "tools": tools}
    called = "the model with fixed shapes"
    return open_model(folder / name, provenance=(*artifact.provenance, step), called=called)


def fix_onnx(source: str, target: str, shapes: dict[str, list[int]]) -> None:
    """Runs in the child.

    Raises:
        ModelError: onnxruntime's tool refuses.
    """
    onnx = require("onnx", extra="onnx")
    tools = require("onnxruntime.tools.onnx_model_utils", extra="onnx")
    try:
        model = onnx.load(source)
        for name, shape in shapes.items():
            tools.make_input_shape_fixed(model.graph, name, shape)
        del model.graph.value_info[:]  # stale: it still has the free dimensions
        tools.fix_output_shapes(model)
        onnx.save(model, target)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(f"shapes {shapes} cannot be set: {one_line(error)}") from error


def fix_openvino(source: str, target: str, shapes: dict[str, list[int]]) -> None:
    """Runs in the child.

    Raises:
        ModelError: OpenVINO cannot compute such shapes.
    """
    ov = require("openvino", extra="openvino")
    try:
        model = ov.Core().read_model(source)
        model.reshape(shapes)
        ov.save_model(model, target, compress_to_fp16=False)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(f"shapes {shapes} cannot be set: {one_line(error)}") from error


def fix_tflite(source: str, target: str, shapes: dict[str, list[int]]) -> None:
    """Runs in the child. The shapes of a TFLite model are those it was written with; what makes
    them free is a second, "signature" shape beside them.

    Raises:
        ModelError: other shapes are wanted than it was written with.
    """
    model = read_tflite(Path(source).read_bytes())
    main = model.subgraphs[0]
    names = {number: main.tensors[number].name.decode() for number in main.inputs}
    for signature in model.signatureDefs or []:  # the names that users know
        if signature.subgraphIndex == 0:
            names.update({one.tensorIndex: one.name.decode() for one in signature.inputs})
    for number, name in names.items():
        written = [int(size) for size in main.tensors[number].shape]
        if shapes.get(name, written) != written:
            raise ModelError(
                f"input {name} was written for {written}, wanted {shapes[name]}; export the "
                "TFLite model again with these shapes"
            )
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.shapeSignature = None
    Path(target).write_bytes(write_tflite(model))
