"""Reads OpenVINO IR: runs in a child process."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit.graph.macs import count_macs
from edgekit.graph.model import Operator, Shape, Tensor, assemble
from edgekit.graph.names import canonical_name

__all__ = ["read"]

_DTYPES = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
    "f8e4m3": "float8e4m3fn", "f8e5m2": "float8e5m2", "f8e8m0": "float8e8m0",
    "f4e2m1": "float4e2m1", "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8",
    "i4": "int4", "u64": "uint64", "u32": "uint32", "u16": "uint16", "u8": "uint8",
    "u4": "uint4", "u2": "uint2", "u1": "uint1", "nf4": "nf4", "boolean": "bool",
    "string": "string",
}  # fmt: skip
#: what holds a place in a graph, and computes nothing
_NO_OPERATORS = frozenset({"Parameter", "Result", "Constant"})


def read(path: str, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """The model's graph as JSON, in an order its operators can run in."""
    openvino = require("openvino", extra="openvino")
    xml = Path(path).read_bytes()
    weights = Path(path).with_suffix(".bin").read_bytes()
    try:
        model = openvino.Core().read_model(xml, weights)
    except RuntimeError as error:
        raise ModelError(f"{path}: not an OpenVINO IR: {_last_line(error)}") from None
    try:
        _fix_shapes(openvino, model, shapes)
        reader = _Reader()
        reader.read_main(model)
        return reader.result(_stored_bytes(xml))
    except (ModelError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None


def _fix_shapes(openvino: Any, model: Any, shapes: Mapping[str, list[int]]) -> None:
    """Set the shapes of inputs, in place, and work out all others.

    Raises:
        UsageError: no such input, wrong rank, or another fixed dimension.
        ModelError: OpenVINO refuses them.
    """
    if not shapes:
        return
    inputs = {_port_name(port): port for port in model.inputs}
    for name, wanted in shapes.items():
        if name not in inputs:
            raise UsageError(f"no input {name!r}; inputs: {', '.join(inputs)}")
        partial = inputs[name].partial_shape
        if partial.rank.is_static and len(partial) != len(wanted):
            raise UsageError(f"input {name!r} has {len(partial)} dimensions, not {len(wanted)}")
        if not partial.compatible(openvino.PartialShape(wanted)):
            raise UsageError(f"input {name!r} is {partial}, cannot be {wanted}")
    wishes = {inputs[name]: openvino.PartialShape(shape) for name, shape in shapes.items()}
    try:
        model.reshape(wishes)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot give it these shapes: {_last_line(error)}") from None


class _Reader:
    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._operators: list[Operator] = []
        self._inputs: list[str] = []
        self._outputs: list[str] = []

    def read_main(self, model: Any) -> None:
        names = self.read(model, "", 1)
        self._inputs = [names[_key(port)] for port in model.inputs]
        self._outputs = [names[_key(port.get_node().input_value(0))] for port in model.outputs]

    def result(self, weight_bytes: int) -> dict[str, Any]:
        return assemble(
            format="openvino",
            operators=self._operators,
            tensors=self._tensors.values(),
            inputs=dict.fromkeys(self._inputs),
            outputs=dict.fromkeys(self._outputs),
            weight_bytes=weight_bytes,
        ).to_json()

    def read(self, model: Any, scope: str, runs: int | None) -> dict[tuple[str, int], str]:
        """All of a model or body, `runs` times run; returns the names of its tensors."""
        names: dict[tuple[str, int], str] = {}
        taken: set[str] = set()
        nodes = model.get_ordered_ops()
        called = {_key(port): _port_name(port) for port in model.inputs}
        for port in model.outputs:  # named as the runtime names them
            called.setdefault(_key(port.get_node().input_value(0)), _port_name(port))
        for index, node in enumerate(nodes):
            for port in node.outputs():
                name = called.get(_key(port)) or _port_name(port)
                name = f"{scope}/{name}" if scope else name
                name = f"{name}#{index}" if name in taken else name
                taken.add(name)
                names[_key(port)] = name
                self._tensors[name] = self._tensor(node, port, name, scope)
        for index, node in enumerate(nodes):
            if node.get_type_name() not in _NO_OPERATORS:
                self._add(node, index, names, scope, runs)
        for node in nodes:
            self._note_quantization(node, names)
        return names

    def _tensor(self, node: Any, port: Any, name: str, scope: str) -> Tensor:
        dtype = _DTYPES.get(port.get_element_type().get_type_name())
        shape = _shape(port, name if node.get_type_name() == "Parameter" and not scope else None)
        if node.get_type_name() != "Constant":
            return Tensor(name, dtype, shape)
        return Tensor(name, dtype, shape, constant=True, size_bytes=int(node.get_byte_size()))

    def _add(
        self,
        node: Any,
        index: int,
        names: Mapping[tuple[str, int], str],
        scope: str,
        runs: int | None,
    ) -> None:
        kind, name = node.get_type_name(), node.get_friendly_name()
        path = f"{scope}/{name}" if scope else name
        for label, body, times in _bodies(node):
            inner = None if runs is None or times is None else runs * times
            self.read(body, f"{path}:{label}", inner)
        inputs = tuple(names[_key(port)] for port in node.input_values())
        outputs = tuple(names[_key(port)] for port in node.outputs())
        custom = not node.get_type_info().version_id.startswith("opset")
        macs = count_macs(
            "openvino", kind, [self._tensors[one].shape for one in inputs],
            [self._tensors[one].shape for one in outputs], _attributes(node), custom=custom,
        )  # fmt: skip
        if macs and runs != 1:
            macs = None if runs is None else macs * runs
        same = canonical_name(kind, "openvino")
        self._operators.append(
            Operator(name, kind, 0, custom, inputs, outputs, macs, same, scope, index)
        )

    def _note_quantization(self, node: Any, names: Mapping[tuple[str, int], str]) -> None:
        """FakeQuantize, and integer weights with Convert, Subtract, Multiply behind them."""
        kind = node.get_type_name()
        if kind == "FakeQuantize":
            low, high = (_constant(node.input_value(place)) for place in (3, 4))
            tensor = names[_key(node.output(0))]
            levels = int(_attributes(node).get("levels", 256))
            several = None if low is None else max(low.size, high.size) > 1
            symmetric = None if low is None else _zero_point_is_zero(low, high, levels)
        elif kind == "Constant" and _is_integer(node):
            chain = _scaling(node)
            if chain is None:
                return
            scale, zero = chain
            tensor = names[_key(node.output(0))]
            several = scale.size > 1
            symmetric = zero is None or not zero.any()
        else:
            return
        self._tensors[tensor] = replace(
            self._tensors[tensor], quantized=True, per_channel=several, symmetric=symmetric
        )


def _stored_bytes(xml: bytes) -> int:
    """Bytes of all constants in the `.bin`; equal ones are stored once."""
    found = re.findall(rb'<data\b[^>]*\boffset="(\d+)"[^>]*\bsize="(\d+)"', xml)
    return sum(int(size) for _, size in set(found))


def _zero_point_is_zero(low: Any, high: Any, levels: int) -> bool:
    """Whether the range is [0, high], [-high, high], or the same with one more step below (NNCF's
    symmetric one: -128 to 127)."""
    import numpy as np

    whole = np.abs(low + high) <= 1e-3 * np.abs(high)
    one_more = np.abs(low + high * levels / max(1, levels - 2)) <= 1e-3 * np.abs(high)
    return bool(np.all((low == 0) | whole | one_more))


def _is_integer(node: Any) -> bool:
    return node.get_element_type().get_type_name() in {"i8", "u8", "i4", "u4", "u2"}


def _scaling(node: Any) -> tuple[Any, Any] | None:
    """Scale and zero point (None: none) of Constant, Convert, maybe Subtract, Multiply."""
    zero = None
    for _ in range(3):
        users = list(node.output(0).get_target_inputs())
        if len(users) != 1:
            return None
        node = users[0].get_node()
        other = node.input_value(1 - users[0].get_index()) if node.get_input_size() == 2 else None
        if node.get_type_name() == "Subtract":
            zero = _constant(other)
        elif node.get_type_name() == "Multiply":
            scale = _constant(other)
            return None if scale is None else (scale, zero)
        elif node.get_type_name() != "Convert":
            return None
    return None


def _constant(port: Any) -> Any:
    """The value of a constant, also behind a Convert; None if it is computed."""
    node = port.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    with suppress(RuntimeError):  # a type that numpy has not
        return node.get_data()
    return None


def _bodies(node: Any) -> Iterator[tuple[str, Any, int | None]]:
    """The bodies of a control-flow node, and how often each is run."""
    kind = node.get_type_name()
    if kind == "If":
        yield "then_body", node.get_then_body(), 1
        yield "else_body", node.get_else_body(), 1
    elif kind in ("Loop", "TensorIterator"):
        times = int(node.get_num_iterations())
        yield "body", node.get_function(), times if times >= 0 else None


def _attributes(node: Any) -> dict[str, Any]:
    with suppress(RuntimeError, TypeError):  # some nodes' have no Python form
        return dict(node.get_attributes())
    return {}


def _shape(port: Any, named: str | None) -> Shape | None:
    """Its shape; free dimensions of inputs are called as the runtime calls them."""
    partial = port.get_partial_shape()
    if partial.rank.is_dynamic:
        return None
    return tuple(
        dim.get_length() if dim.is_static else f"{named}_{place}" if named else "?"
        for place, dim in enumerate(partial)
    )


def _key(port: Any) -> tuple[str, int]:
    """What tells outputs of nodes apart: a node's own name is unique, a friendly one is not."""
    return port.get_node().get_name(), int(port.get_index())


def _port_name(port: Any) -> str:
    if port.get_names():
        return str(port.get_any_name())
    node = port.get_node()
    name = str(node.get_friendly_name())
    return f"{name}:{port.get_index()}" if node.get_output_size() > 1 else name


def _last_line(error: Exception) -> str:
    """OpenVINO's messages begin with where they were thrown, on lines of their own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(RuntimeError(lines[-1])) if lines else "no reason given"
