"""Reads and writes ONNX models whose weights may not fit in memory twice.

Weights stay where they are (onnx-ir maps external data, and refers to what protobuf has parsed)
until they are written, one after the other. Everything in between works on the *skeleton*: the
model with its weights as typed inputs, which is small whatever the model weighs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError, ModelError, one_line, require

__all__ = [
    "LEAST_OPSET",
    "MOST_BYTES_IN_ONE_FILE",
    "copy_model",
    "external_files",
    "infer_shapes",
    "load_model",
    "model_files",
    "opset_of",
    "save_model",
    "skeleton",
    "through_onnx",
    "understood",
]

LEAST_OPSET = 7  # what ONNX Runtime still runs
#: protobuf ends at 2 GiB; tools that add shapes and names need some of it
MOST_BYTES_IN_ONE_FILE = 1_800_000_000
#: weights this small stay in the skeleton: shape inference reads them (Reshape's, Slice's ...)
_SMALL_BYTES = 1024
_LARGEST_ELEMENT_BYTES = 16  # complex128


@contextmanager
def understood(path: str | Path, doing: str) -> Iterator[None]:
    """Turn what libraries raise about a model that is not as it should be into a ModelError."""
    try:
        yield
    except (EdgeKitError, MemoryError):
        raise
    except OSError as error:
        if error.filename is None:  # how mmap and protobuf complain; others are about the disk
            raise ModelError(f"{Path(path).name}: {doing} fails: {one_line(error)}") from error
        raise
    except Exception as error:
        cause = error
        while type(cause).__name__ == "PassError" and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__  # onnx-ir's own words say which pass it was, not why
        raise ModelError(f"{Path(path).name}: {doing} fails: {one_line(cause)}") from error


def load_model(path: str | Path) -> Any:
    """The model as `onnx_ir.Model`; weights are read when they are needed.

    Raises:
        ModelError: it is no ONNX model, of an opset that is too old or too new, or its external
            data is missing, too short or outside its folder.
    """
    onnx = require("onnx", extra="onnx")
    ir = require("onnx_ir", extra="onnx")
    external_data = require("onnx_ir.external_data", extra="onnx")
    path = Path(path)
    proto = _parse(path)
    if _check_external(path, proto):
        _read_small(proto, path.parent)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:
        raise ModelError(f"{path.name}: not understood: {one_line(error)}") from error
    opset, newest = opset_of(model), onnx.defs.onnx_opset_version()
    if not LEAST_OPSET <= opset <= newest:
        raise ModelError(
            f"{path.name} is of opset {opset}, which is not in {LEAST_OPSET} to {newest}; "
            f"export it again with opset 17"
        )
    external_data.set_base_dir(model.graph, str(path.parent.absolute()))
    return model


def opset_of(model: Any) -> int:
    """The version of the standard operators it is written in."""
    return int(model.opset_imports.get("", 0))


def external_files(path: str | Path) -> list[Path]:
    """The files beside `path` that hold its weights; subgraphs are looked at too.

    Raises:
        ModelError: `path` is no ONNX model, or one of the files is missing, too short or outside
            its folder.
    """
    path = Path(path)
    return _check_external(path, _parse(path))


def model_files(path: str) -> list[str]:
    """All files of a model, the main one first: `external_files` for a child process."""
    return [path, *(str(file) for file in external_files(path))]


def skeleton(model: Any) -> tuple[Any, dict[str, Any]]:
    """The model's proto with its weights as typed inputs behind its own, and what they hold."""
    ir = require("onnx_ir", extra="onnx")
    graph = model.graph
    own_inputs, stored = list(graph.inputs), dict(graph.initializers)
    weights = {}
    for name, value in stored.items():
        tensor = value.const_value
        value.shape, value.type = tensor.shape, ir.TensorType(tensor.dtype)
        if tensor.nbytes > _SMALL_BYTES or isinstance(tensor, ir.ExternalTensor):
            weights[name] = tensor
            value.const_value = None
            del graph.initializers[name]
            if not value.is_graph_input():
                graph.inputs.append(value)
    try:
        return ir.serde.serialize_model(model), weights
    finally:
        graph.inputs[:] = own_inputs
        graph.initializers.clear()
        for name, value in stored.items():
            value.const_value = weights.get(name, value.const_value)
            graph.initializers.add(value)


def through_onnx(model: Any, function: Callable[[Any], Any]) -> None:
    """Replace the model's graph by what `function` (ModelProto -> ModelProto) makes of it."""
    ir = require("onnx_ir", extra="onnx")
    proto, weights = skeleton(model)
    inputs = [value.name for value in model.graph.inputs]
    graph = ir.serde.deserialize_model(function(proto)).graph
    values = {value.name: value for value in graph.inputs}
    graph.inputs[:] = [values[name] for name in inputs]
    for name, tensor in weights.items():
        values[name].const_value = tensor
    values |= graph.initializers
    order = dict.fromkeys([*model.graph.initializers, *graph.initializers])
    graph.initializers.clear()
    for name in order:  # as they were, so that the file is
        if name in values and values[name].const_value is not None:
            graph.initializers.add(values[name])
    model.graph = graph


def infer_shapes(model: Any) -> None:
    """Set shapes and types where they follow; silent where they do not."""
    shapes = require("onnx.shape_inference", extra="onnx")
    through_onnx(model, lambda proto: shapes.infer_shapes(proto, data_prop=True))


def save_model(model: Any, target: str | Path) -> list[str]:
    """Write one file, or, if that would be too big, `target` and `target.data`; returns them.

    Raises:
        ModelError: the model is too big even without its weights.
    """
    ir = require("onnx_ir", extra="onnx")
    target = Path(target)
    stored = list(model.graph.initializers.values())
    for value in stored:
        value.const_value.name = value.name
    if sum(value.const_value.nbytes for value in stored) < MOST_BYTES_IN_ONE_FILE:
        _write_whole(model, target)
        return [str(target)]
    data = f"{target.name}.data"
    ir.save(model, target, external_data=data, size_threshold_bytes=_SMALL_BYTES)
    return [str(target), str(target.with_name(data))]


def copy_model(source: str, target: str) -> None:
    """Write a model and the files of its weights under another name.

    Raises:
        ModelError: as `load_model`.
    """
    with understood(source, "copying it"):
        save_model(load_model(source), target)


def _parse(path: Path) -> Any:
    onnx = require("onnx", extra="onnx")
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except FileNotFoundError:
        raise ModelError(f"no file {path}") from None
    except Exception as error:
        raise ModelError(f"{path.name}: not an ONNX model: {one_line(error)}") from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path.name}: not an ONNX model: it has no graph")
    for graph in _graphs(proto.graph):
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise ModelError(
                f"{path.name}: weight {name!r} is a sparse tensor, which no engine here reads; "
                "store it dense where the model is exported"
            )
    return proto


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for one in attribute.graphs:
                yield from _graphs(one)


def _initializers(graph: Any) -> Iterator[Any]:
    for one in _graphs(graph):
        yield from one.initializer


def _attributes(graph: Any) -> Iterator[Any]:
    """Tensors in nodes: Constant's, mostly."""
    for one in _graphs(graph):
        for node in one.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _check_external(path: Path, proto: Any) -> list[Path]:
    """The external files, in the order of first use, each inside the folder and long enough."""
    external = require("onnx", extra="onnx").TensorProto.EXTERNAL
    folder = path.parent.resolve()
    ends: dict[str, tuple[int, str]] = {}
    for tensor in (*_initializers(proto.graph), *_attributes(proto.graph)):
        if tensor.data_location != external:
            continue
        entry = {one.key: one.value for one in tensor.external_data}
        location = entry.get("location", "")
        try:
            offset, length = int(entry.get("offset", 0)), int(entry.get("length", 0))
        except ValueError:
            offset, length = -1, -1
        if not location or offset < 0 or length < 0:
            raise ModelError(f"{path.name}: weight {tensor.name!r} is damaged: {entry}")
        ends[location] = max(ends.get(location, (0, "")), (offset + length, tensor.name))
    files = []
    for location, (end, name) in ends.items():
        # backslashes are separators on the machine the model may go to
        file = (folder / location.replace("\\", "/")).resolve()
        if not file.is_relative_to(folder):
            raise ModelError(
                f"{path.name}: weight {name!r} lies in {location!r}, outside the model's folder; "
                "put the file beside the model"
            )
        if not file.is_file():
            raise ModelError(
                f"{path.name}: its weights are in {location}, which is not beside it; "
                "copy both to one folder"
            )
        if file.stat().st_size < end:
            raise ModelError(
                f"{path.name}: {location} has {file.stat().st_size} bytes, weight {name!r} ends "
                f"at {end}; copy it again"
            )
        if file.stat().st_nlink > 1:  # onnx-ir and ONNX Runtime refuse such files, rightly
            raise ModelError(
                f"{path.name}: {location} has further names (hard links), maybe outside the "
                "model's folder; copy it"
            )
        files.append(path.parent / location)
    return files


def _read_small(proto: Any, folder: Path) -> None:
    """Take small external tensors in (their values are looked at), and those of attributes."""
    onnx = require("onnx", extra="onnx")
    helper = require("onnx.external_data_helper", extra="onnx")
    small = (
        tensor
        for tensor in _initializers(proto.graph)
        if math.prod(tensor.dims) * _LARGEST_ELEMENT_BYTES <= _SMALL_BYTES
    )
    for tensor in (*small, *_attributes(proto.graph)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


# --- writing ------------------------------------------------------------------------------------
# serialize_model + SerializeToString hold the weights three times. The graph is one field of the
# model and each initializer one field of the graph, so they can be written one by one between the
# parts that protobuf serializes (https://protobuf.dev/programming-guides/encoding/).

_LENGTH_DELIMITED = 2  # wire type


def _write_whole(model: Any, target: Path) -> None:
    ir = require("onnx_ir", extra="onnx")
    stored = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    try:
        proto = ir.serde.serialize_model(model)
    finally:
        for value in stored:
            model.graph.initializers.add(value)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    heads = [_head(value.const_value) for value in stored]
    sizes = [len(head) + _data_bytes(v.const_value) for head, v in zip(heads, stored, strict=True)]
    fields = type(proto.graph).DESCRIPTOR.fields_by_name
    entries = [_tag(fields["initializer"].number) + _varint(size) for size in sizes]
    total = len(graph) + sum(map(len, entries)) + sum(sizes)
    with target.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.write(_tag(type(proto).DESCRIPTOR.fields_by_name["graph"].number) + _varint(total))
        file.write(graph)
        for entry, head, value in zip(entries, heads, stored, strict=True):
            file.write(entry + head)
            start, size = file.tell(), _data_bytes(value.const_value)
            if size:
                value.const_value.tofile(file)
            if file.tell() - start != size:
                raise ModelError(
                    f"weight {value.name!r} is damaged: it has {file.tell() - start} bytes of data "
                    f"and a shape of {size}"
                )


def _is_text(tensor: Any) -> bool:
    return bool(tensor.dtype.name == "STRING")


def _head(tensor: Any) -> bytes:
    """All of a TensorProto but its data."""
    onnx = require("onnx", extra="onnx")
    ir = require("onnx_ir", extra="onnx")
    if _is_text(tensor):  # has no raw form
        return bytes(ir.serde.serialize_tensor(tensor).SerializeToString(deterministic=True))
    proto = onnx.TensorProto(name=tensor.name, data_type=tensor.dtype.value)
    proto.dims.extend(tensor.shape.numpy())
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    number = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number
    return (
        bytes(proto.SerializeToString(deterministic=True)) + _tag(number) + _varint(tensor.nbytes)
    )


def _data_bytes(tensor: Any) -> int:
    return 0 if _is_text(tensor) else int(tensor.nbytes)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
