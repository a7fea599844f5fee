"""Reads ONNX models: runs in a child process."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit.graph.macs import count_macs
from edgekit.graph.model import Operator, Shape, Tensor, assemble, elements, stored_bytes
from edgekit.graph.names import canonical_name
from edgekit.graph.onnx_shapes import (
    array_of,
    dtype_name,
    fix_shapes,
    infer,
    live_branch,
    shape_of,
    subgraphs,
    symbols_in,
)

__all__ = ["read"]

#: (tensor, scale, zero point) places among the inputs, then among the outputs, of quantized
#: operators; the scale of an output is among the inputs
_SCALES: dict[str, tuple[tuple[tuple[int, int, int], ...], tuple[tuple[int, int, int], ...]]] = {
    "QuantizeLinear": ((), ((0, 1, 2),)),
    "DequantizeLinear": (((0, 1, 2),), ()),
    "QLinearConv": (((0, 1, 2), (3, 4, 5)), ((0, 6, 7),)),
    "QLinearMatMul": (((0, 1, 2), (3, 4, 5)), ((0, 6, 7),)),
    "com.microsoft:QLinearAdd": (((0, 1, 2), (3, 4, 5)), ((0, 6, 7),)),
    "com.microsoft:QLinearMul": (((0, 1, 2), (3, 4, 5)), ((0, 6, 7),)),
    "com.microsoft:QGemm": (((0, 1, 2), (3, 4, 5)), ((0, 7, 8),)),
    **{
        f"com.microsoft:QLinear{name}": (((0, 1, 2),), ((0, 3, 4),))
        for name in ("Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool")
    },
}
#: zero points and trip counts are looked at; bigger constants are not
_MOST_ELEMENTS = 65536
_STANDARD = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training",
             "ai.onnx.training")  # fmt: skip


def read(path: str, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """The model's graph as JSON; external weights need not be there."""
    onnx = require("onnx", extra="onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ModelError(f"{path}: not an ONNX model: {one_line(error)}") from None
    if not model.HasField("graph") or not model.opset_import:
        raise ModelError(f"{path}: not an ONNX model: it has no graph")
    try:
        if model.functions:
            model = require("onnx.inliner", extra="onnx").inline_local_functions(model)
        declared = fix_shapes(model, shapes)
        inferred, known = infer(model)
        reader = _Reader(model, known)
        reader.read(model.graph, inferred.graph)
        found = reader.result(declared)
        json.dumps(found)  # names that are no text would only fail on their way out
    except (ModelError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:  # a field that cannot be
        raise ModelError(f"{path}: damaged: {one_line(error)}") from None
    return found


class _Reader:
    def __init__(self, model: Any, known: Mapping[str, Any]) -> None:
        self._model = model
        self._opsets = {
            ("" if one.domain == "ai.onnx" else one.domain): one.version
            for one in model.opset_import
        }
        self._values: dict[str, Any] = dict(known)  # of small constants, by unique name
        self._tensors: dict[str, Tensor] = {}
        self._operators: list[Operator] = []
        self._names: set[tuple[str, str]] = set()
        self._weight_bytes = 0
        self._symbols = symbols_in(model.graph)

    def result(self, declared: Mapping[str, Shape]) -> dict[str, Any]:
        """The graph; `declared` are shapes of outputs, for where inference found none."""
        graph = self._model.graph
        for name, shape in declared.items():
            tensor = self._tensors.get(name, Tensor(name, None, None))
            if elements(tensor.shape) is None:
                self._tensors[name] = replace(tensor, shape=shape)
        stored = {one.name for one in graph.initializer}
        inputs = [one.name for one in graph.input if one.name not in stored]
        for name in inputs:  # unnamed dimensions are called as the runtime calls them
            tensor = self._tensors[name]
            if tensor.shape is not None:
                dims = enumerate(tensor.shape)
                named = tuple(f"{name}_{i}" if dim == "?" else dim for i, dim in dims)
                self._tensors[name] = replace(tensor, shape=named)
        return assemble(
            format="onnx",
            operators=self._operators,
            tensors=self._tensors.values(),
            inputs=inputs,
            outputs=[one.name for one in graph.output],
            weight_bytes=self._weight_bytes,
            opsets=self._opsets,
        ).to_json()

    def read(
        self,
        graph: Any,
        inferred: Any,
        scope: str = "",
        outer: Mapping[str, str] | None = None,
        runs: int | None = 1,
    ) -> None:
        """All of a graph, bodies included; `outer` maps names around it to unique ones, `runs` is
        how often it is run."""
        names = dict(outer or {})
        self._read_tensors(graph, inferred, scope, names)
        nodes = {tuple(node.output): node for node in inferred.node}
        for index, node in enumerate(graph.node):
            if node.op_type == "Constant" and not node.domain:
                continue
            place = self._unique(node, index, scope)
            twin = nodes.get(tuple(node.output), node)
            bodies = zip(subgraphs(node), subgraphs(twin), strict=True)
            only = live_branch(twin) if twin is not node else None
            for (body, label), (body_inferred, _) in bodies:
                if only not in (None, label):
                    continue  # it follows from the shapes that this one never runs
                path = f"{scope}/{place}" if scope else place
                times = self._times(node, body, names)
                inner = None if times is None or runs is None else times * runs
                self.read(body, body_inferred, f"{path}:{label}", names, inner)
            self._add(node, place, names, scope=scope, index=index, runs=runs)

    def _read_tensors(self, graph: Any, inferred: Any, scope: str, names: dict[str, str]) -> None:
        def own(name: str) -> str:
            names[name] = f"{scope}/{name}" if scope else name
            return names[name]

        for tensor in (*graph.initializer, *(one.values for one in graph.sparse_initializer)):
            self._store(own(tensor.name), tensor)
        for sparse in graph.sparse_initializer:
            name = names[sparse.values.name]
            self._tensors[name] = replace(self._tensors[name], shape=tuple(sparse.dims))
        for node in graph.node:
            for name in filter(None, node.output):
                own(name)
            if node.op_type == "Constant" and not node.domain:
                self._store_node(names[node.output[0]], node)
        inputs = {one.name for one in graph.input}
        found = {one.name: one for one in (*graph.input, *inferred.value_info, *inferred.output)}
        for tensor in inferred.initializer:  # what was folded
            if names.get(tensor.name) not in self._tensors and tensor.name in names:
                self._tensors[names[tensor.name]] = Tensor(
                    names[tensor.name], dtype_name(tensor.data_type), tuple(tensor.dims)
                )
        for name, info in found.items():
            if name in inputs and names.get(name) not in self._tensors:
                own(name)
            if name in names and names[name] not in self._tensors:
                kind = info.type.tensor_type.elem_type if info.type.HasField("tensor_type") else 0
                shape = self._authored(shape_of(info.type))
                self._tensors[names[name]] = Tensor(names[name], dtype_name(kind), shape)

    def _authored(self, shape: Shape | None) -> Shape | None:
        """A shape without the symbols that inference invented."""
        if shape is None:
            return None
        return tuple(d if isinstance(d, int) or d in self._symbols else "?" for d in shape)

    def _store(self, name: str, tensor: Any) -> None:
        from onnx import numpy_helper

        dtype, shape = dtype_name(tensor.data_type), tuple(tensor.dims)
        size = stored_bytes(dtype, shape)
        self._tensors[name] = Tensor(name, dtype, shape, constant=True, size_bytes=size)
        self._weight_bytes += size or 0
        if math.prod(shape) <= _MOST_ELEMENTS:
            with suppress(Exception):  # stored elsewhere, or damaged
                self._values[name] = numpy_helper.to_array(tensor)

    def _store_node(self, name: str, node: Any) -> None:
        with suppress(Exception):
            self._values[name] = array_of(node)
        value = self._values.get(name)
        sparse = next((a.sparse_tensor for a in node.attribute if a.name == "sparse_value"), None)
        if value is None or sparse is not None:
            shape = tuple(sparse.dims) if sparse is not None else None
            self._tensors[name] = Tensor(name, None, shape, constant=True)
            return
        text = value.dtype.kind in "OUS"
        dtype = "string" if text else value.dtype.name
        size = None if text else stored_bytes(dtype, value.shape)
        self._tensors[name] = Tensor(name, dtype, tuple(value.shape), True, size)
        self._weight_bytes += size or 0

    def _add(
        self,
        node: Any,
        name: str,
        names: Mapping[str, str],
        *,
        scope: str,
        index: int,
        runs: int | None,
    ) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        kind = f"{domain}:{node.op_type}" if domain else node.op_type
        inputs = tuple(names.get(one, one) if one else "" for one in node.input)
        outputs = tuple(names.get(one, one) if one else "" for one in node.output)
        version = self._since(node.op_type, domain)
        custom = not version
        macs = count_macs(
            "onnx", kind, [self._shape(one) for one in inputs],
            [self._shape(one) for one in outputs], _attributes(node), custom=custom,
        )  # fmt: skip
        if macs and runs != 1:
            macs = None if runs is None else macs * runs
        self._quantized(kind, inputs, outputs)
        same = canonical_name(kind, "onnx")
        self._operators.append(
            Operator(
                name, kind, version, custom, inputs, outputs, macs, same, scope, index,
                _origin(node),
            )
        )  # fmt: skip

    def _shape(self, name: str) -> tuple[int | str, ...] | None:
        if not name:
            return ()
        return self._tensors[name].shape if name in self._tensors else None

    def _since(self, kind: str, domain: str) -> int:
        """The opset that the definition in force is from; 0 if ONNX does not define it."""
        from onnx import defs

        if domain not in _STANDARD:
            return 0
        with suppress(defs.SchemaError):
            schema = defs.get_schema(kind, self._opsets.get(domain, 1), domain)
            return int(schema.since_version)
        return 0

    def _quantized(self, kind: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Note scale and zero point of the integer tensors an operator takes and makes."""
        for side, places in zip((inputs, outputs), _SCALES.get(kind, ((), ())), strict=True):
            for place, scale, zero in places:
                name = side[place] if place < len(side) else ""
                if name not in self._tensors or scale >= len(inputs):
                    continue
                shape = self._shape(inputs[scale])
                count = elements(shape)
                self._tensors[name] = replace(
                    self._tensors[name],
                    quantized=True,
                    per_channel=None if count is None else count > 1,
                    symmetric=self._is_zero(inputs[zero] if zero < len(inputs) else ""),
                )

    def _is_zero(self, name: str) -> bool | None:
        if not name:
            return True  # the default
        value = self._values.get(name)
        return None if value is None else not value.astype("int32").any()

    def _times(self, node: Any, body: Any, names: Mapping[str, str]) -> int | None:
        """How often a body runs; None if that depends on data."""
        if node.op_type == "If":
            return 1
        if node.op_type == "Scan":
            attributes = _attributes(node)
            count = int(attributes.get("num_scan_inputs", 0))
            axes = attributes.get("scan_input_axes") or [0] * count
            shape = self._shape(names.get(node.input[-count], "")) if count else None
            length = shape[axes[0]] if shape else None
            return length if isinstance(length, int) else None
        if node.op_type == "Loop":
            most = self._values.get(names.get(node.input[0], ""))
            goes_on = {one.output[0]: one for one in body.node}.get(body.output[0].name)
            passes = goes_on is None or (
                goes_on.op_type == "Identity" and goes_on.input[0] == body.input[1].name
            )
            if goes_on is not None and goes_on.op_type == "Constant":
                passes = bool(array_of(goes_on))
            return int(most) if most is not None and passes else None
        return None

    def _unique(self, node: Any, index: int, scope: str) -> str:
        name = node.name or next(filter(None, node.output), "") or f"{node.op_type}#{index}"
        if (scope, name) in self._names:
            name = f"{name}#{index}"
        self._names.add((scope, name))
        return name


def _origin(node: Any) -> str:
    """The module that PyTorch's exporter says the node is of, which ends with the node itself."""
    said = {one.key: one.value for one in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
    with suppress(ValueError, SyntaxError, TypeError):
        scopes = ast.literal_eval(said or "[]")
        return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _attributes(node: Any) -> dict[str, Any]:
    """The plain attributes: numbers, lists of them, and text."""
    from onnx import AttributeProto, helper

    plain = (AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.STRING)
    found = {}
    for one in node.attribute:
        if one.type in plain:
            value = helper.get_attribute_value(one)
            found[one.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return found
