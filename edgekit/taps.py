"""Looking inside: models with intermediate tensors as further outputs, and what these are.

Used to find the first tensor that differs between two models (`edgekit.parity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import sandbox
from edgekit.artifact import SOURCES, Artifact
from edgekit.errors import EdgeKitError, ModelError, one_line, require
from edgekit.graph import read_graph
from edgekit.tflite_file import read_tflite, write_tflite

__all__ = ["TAPPERS", "Tap", "add_openvino_outputs", "add_tflite_outputs", "taps_of"]

#: suffix -> the function `(source, target, names)` that writes a model with further outputs
TAPPERS = {
    ".onnx": "edgekit_converters.onnx:add_outputs",
    ".xml": "edgekit.taps:add_openvino_outputs",
    ".tflite": "edgekit.taps:add_tflite_outputs",
}


@dataclass(frozen=True)
class Tap:
    """An intermediate tensor: what computes it, in the words of its format, and from what.

    `comparable`: of floats, so that it can be looked at; others only pass on what they came from.
    """

    name: str
    node: str
    inputs: tuple[str, ...]
    comparable: bool = True


def taps_of(artifact: Artifact, shapes: dict[str, list[int]]) -> tuple[Tap, ...]:
    """The tensors of a model in the order they are computed; none where its format does not let
    one look inside. `shapes` fixes those of inputs."""
    if artifact.format in SOURCES:
        found = sandbox.call(
            SOURCES[artifact.format].format("tensors"),
            {"source": list(artifact.arguments), "options": artifact.reading.of_source().to_json()},
            what=f"reading the tensors of {artifact.name}",
        )
        return tuple(Tap(one["name"], one["node"], tuple(one["inputs"])) for one in found)
    try:
        graph = read_graph(artifact.path, shapes=shapes)
    except EdgeKitError:
        return ()
    found = []
    for operator in graph.operators:
        if operator.scope or graph.folded(operator):
            continue
        inputs = tuple(name for name in operator.inputs if name)
        node = operator.name if operator.type in operator.name else ""
        node = node or f"{operator.name} ({operator.type})"
        for name in filter(None, operator.outputs):
            comparable = "float" in (graph.tensors[name].dtype or "")
            found.append(Tap(name, node, inputs, comparable))
    return tuple(found)


def add_openvino_outputs(source: str, target: str, names: Sequence[str]) -> None:
    """Write an IR with these tensors, named as `edgekit.graph` names them, as further outputs.

    Raises:
        ModelError: there is no such tensor.
    """
    ov = require("openvino", extra="openvino")
    model = ov.Core().read_model(source)
    ports = {
        name: port
        for node in model.get_ordered_ops()
        for port in node.outputs()
        for friendly in [node.get_friendly_name()]
        for name in (*port.get_names(), friendly, f"{friendly}:{port.get_index()}")
    }
    for name in names:
        if name not in ports:
            raise ModelError(f"OpenVINO has no tensor {name!r}")
        port = ports[name]
        model.add_outputs(port)
        port.get_tensor().add_names({name})
    ov.save_model(model, target, compress_to_fp16=False)


def add_tflite_outputs(source: str, target: str, names: Sequence[str]) -> None:
    """Write a TFLite model with these tensors as further outputs.

    Raises:
        ModelError: there is no such tensor, or the model is damaged.
    """
    schema = require("ai_edge_litert.schema_py_generated", extra="litert")
    try:
        model = read_tflite(Path(source).read_bytes())
        graph = model.subgraphs[0]
        places = _places(graph)
        outputs = [int(place) for place in graph.outputs]
        for signature in model.signatureDefs or []:
            signature.outputs = [*signature.outputs, *(_map(schema, n, places[n]) for n in names)]
        graph.outputs = [*outputs, *(places[name] for name in names)]
        content = write_tflite(model)
    except KeyError as error:
        raise ModelError(f"the TFLite model has no tensor {error}") from None
    except Exception as error:
        raise ModelError(f"damaged: {one_line(error)}") from error
    Path(target).write_bytes(content)


def _places(graph: Any) -> dict[str, int]:
    """The index of each tensor by the name that `edgekit.graph` gives it."""
    found: dict[str, int] = {}
    for place, tensor in enumerate(graph.tensors):
        name = (tensor.name or b"").decode(errors="replace") or f"#{place}"
        found.setdefault(name, place)
        found[f"{name}#{place}"] = place
    return found


def _map(schema: Any, name: str, place: int) -> Any:
    one = schema.TensorMapT()
    one.name, one.tensorIndex = name, place
    return one
