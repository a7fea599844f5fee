"""The ports of a TFLite model: their names and scales, and int8 in the place of float32."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.errors import ModelError, one_line, require
from edgekit.tflite_file import read_tflite, write_tflite

__all__ = ["Port", "Ports", "integer_ports", "port_names", "ports_of"]

_EXTRA = "litert"
#: what a flatbuffer raises whose offsets lead nowhere
_DAMAGED = (
    struct.error, TypeError, ValueError, IndexError, AttributeError, KeyError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output: `real = scale * (stored - zero_point)`. Without a scale the numbers are
    what they are."""

    dtype: str
    shape: tuple[int, ...]
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True, slots=True)
class Ports:
    """All ports by name, in the model's order."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


def integer_ports(content: bytes) -> tuple[bytes, Ports]:
    """A TFLite model whose quantized ports are integers: QUANTIZE behind an input and DEQUANTIZE
    before an output go; names of ports and signatures stay.

    A port that is not quantized, or whose float value something else uses, too, stays as it is.

    Raises:
        ModelError: it is damaged, has no graph, or an input has a free dimension.
    """
    try:
        model = read_tflite(content)
        _check_inputs(model)  # the float ports, which may be all that says that a dimension is free
        _Borders(model).take_away()
        made = write_tflite(model)
        return made, ports_of(made)
    except _DAMAGED as error:
        raise ModelError(f"damaged TFLite model: {one_line(error)}") from None


def ports_of(content: bytes) -> Ports:
    """The ports of a TFLite model as they are.

    Raises:
        ModelError: it is damaged, has no graph, or an input has a free dimension.
    """
    try:
        model = read_tflite(content)
        graph = _main(model)
        inputs, outputs = port_names(model)
        found = Ports(
            {name: _port(graph.tensors[at]) for name, at in zip(inputs, graph.inputs, strict=True)},
            {n: _port(graph.tensors[at]) for n, at in zip(outputs, graph.outputs, strict=True)},
        )
        _check_inputs(model)
    except _DAMAGED as error:
        raise ModelError(f"damaged TFLite model: {one_line(error)}") from None
    return found


def port_names(model: Any) -> tuple[list[str], list[str]]:
    """Names of a `ModelT`'s inputs and outputs in its order: those of its only signature, else the
    tensors', as the LiteRT engine has them. A tensor that is two ports has two names there."""
    graph = _main(model)
    signatures = list(model.signatureDefs or ())
    only = signatures[0] if len(signatures) == 1 and not signatures[0].subgraphIndex else None
    return (
        list(_names(graph, graph.inputs, only.inputs if only else ())),
        list(_names(graph, graph.outputs, only.outputs if only else ())),
    )


def _names(graph: Any, places: Any, given: Any) -> Iterator[str]:
    named: dict[int, list[str]] = {}
    for one in given or ():
        named.setdefault(int(one.tensorIndex), []).append(_text(one.name))
    for place in map(int, places):
        yield named[place].pop(0) if named.get(place) else _text(graph.tensors[place].name)


def _main(model: Any) -> Any:
    if not model.subgraphs:
        raise ModelError("damaged TFLite model: it has no graph")
    graph = model.subgraphs[0]
    graph.inputs = [] if graph.inputs is None else [int(at) for at in graph.inputs]
    graph.outputs = [] if graph.outputs is None else [int(at) for at in graph.outputs]
    return graph


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name or "")


def _check_inputs(model: Any) -> None:
    names, _ = port_names(model)
    graph = _main(model)
    for name, place in zip(names, graph.inputs, strict=True):
        _check_fixed(name, graph.tensors[place])


def _check_fixed(name: str, tensor: Any) -> None:
    declared = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
    sizes = [] if declared is None else [int(size) for size in declared]
    if any(size < 1 for size in sizes):
        place = next(at for at, size in enumerate(sizes) if size < 1)
        shape = "x".join("?" if size < 1 else str(size) for size in sizes)
        fixed = "x".join("1" if size < 1 else str(size) for size in sizes)
        raise ModelError(
            f"input {name!r} has a free dimension ({shape}, dimension {place}); microcontrollers "
            f"take fixed shapes: convert with --inputs {name}={fixed}"
        )


def _port(tensor: Any) -> Port:
    schema = require("ai_edge_litert.schema_py_generated", extra=_EXTRA)
    kinds = {
        value: name.lower() for name, value in vars(schema.TensorType).items() if name[0] != "_"
    }
    shape = () if tensor.shape is None else tuple(int(size) for size in tensor.shape)
    scale, zero_point = None, None
    stored = tensor.quantization
    if stored is not None and stored.scale is not None and len(stored.scale) == 1:
        scale, zero_point = float(stored.scale[0]), int(stored.zeroPoint[0])
    return Port(kinds[tensor.type], shape, scale, zero_point)


class _Borders:
    """The QUANTIZE and DEQUANTIZE operators at the ports of a model's main graph."""

    def __init__(self, model: Any) -> None:
        schema = require("ai_edge_litert.schema_py_generated", extra=_EXTRA)
        self._model, self._graph = model, _main(model)
        self._kinds = schema.BuiltinOperator
        self._float = schema.TensorType.FLOAT32
        self._renamed: dict[int, int] = {}  # a float port's tensor -> the integer one's
        self._gone: set[int] = set()  # id() of operators

    def take_away(self) -> None:
        """Change the model in place."""
        for place in dict.fromkeys(self._graph.inputs):
            self._free_input(place)
        for place in dict.fromkeys(self._graph.outputs):
            self._free_output(place)
        graph = self._graph
        graph.operators = [one for one in graph.operators or () if id(one) not in self._gone]
        graph.inputs = [self._renamed.get(at, at) for at in graph.inputs]
        graph.outputs = [self._renamed.get(at, at) for at in graph.outputs]
        for signature in self._model.signatureDefs or ():
            if not signature.subgraphIndex:
                for one in (*(signature.inputs or ()), *(signature.outputs or ())):
                    one.tensorIndex = self._renamed.get(one.tensorIndex, one.tensorIndex)
        self._drop_tensors()
        self._drop_codes()
        self._shorten_names()

    def _free_input(self, place: int) -> None:
        users = [one for one in self._graph.operators or () if place in _ints(one.inputs)]
        if self._graph.tensors[place].type != self._float or place in self._graph.outputs:
            return
        if len(users) == 1 and self._is(users[0], "QUANTIZE"):
            self._replace(place, int(users[0].outputs[0]), users[0])

    def _free_output(self, place: int) -> None:
        operators = self._graph.operators or ()
        makers = [one for one in operators if place in _ints(one.outputs)]
        users = [one for one in operators if place in _ints(one.inputs)]
        if self._graph.tensors[place].type != self._float or users or len(makers) != 1:
            return
        stored = int(makers[0].inputs[0])
        is_port = stored in (*self._graph.inputs, *self._graph.outputs, *self._renamed.values())
        if self._is(makers[0], "DEQUANTIZE") and not is_port and self._computed(stored):
            self._replace(place, stored, makers[0])

    def _replace(self, place: int, stored: int, border: Any) -> None:
        if stored in self._graph.outputs or not _one_scale(self._graph.tensors[stored]):
            return
        tensors = self._graph.tensors
        tensors[place].name, tensors[stored].name = tensors[stored].name, tensors[place].name
        self._renamed[place] = stored
        self._gone.add(id(border))

    def _computed(self, place: int) -> bool:
        """Whether an operator makes it: a constant is no output of an integer model."""
        return any(place in _ints(one.outputs) for one in self._graph.operators or ())

    def _is(self, operator: Any, kind: str) -> bool:
        code = self._model.operatorCodes[operator.opcodeIndex]
        found = max(code.builtinCode, code.deprecatedBuiltinCode)
        return bool(found == getattr(self._kinds, kind))

    def _drop_tensors(self) -> None:
        """The float ports' tensors: an interpreter keeps a record of each tensor in its arena."""
        graph = self._graph
        kept = [at for at in range(len(graph.tensors)) if at not in self._renamed]
        new = {-1: -1, **{old: place for place, old in enumerate(kept)}}
        graph.tensors = [graph.tensors[at] for at in kept]
        graph.inputs = [new[at] for at in graph.inputs]
        graph.outputs = [new[at] for at in graph.outputs]
        for one in graph.operators:
            one.inputs = [new[at] for at in _ints(one.inputs)]
            one.outputs = [new[at] for at in _ints(one.outputs)]
            if one.intermediates is not None and len(one.intermediates):
                one.intermediates = [new[at] for at in _ints(one.intermediates)]
        for signature in self._model.signatureDefs or ():
            if not signature.subgraphIndex:
                for one in (*(signature.inputs or ()), *(signature.outputs or ())):
                    one.tensorIndex = new[one.tensorIndex]

    def _drop_codes(self) -> None:
        """Operator codes that nothing uses any more: a firmware would register their kernels."""
        operators = [one for graph in self._model.subgraphs for one in graph.operators or ()]
        kept = sorted({one.opcodeIndex for one in operators})
        new = {old: place for place, old in enumerate(kept)}
        self._model.operatorCodes = [self._model.operatorCodes[at] for at in kept]
        for one in operators:
            one.opcodeIndex = new[one.opcodeIndex]

    def _shorten_names(self) -> None:
        """Tensors that are no ports keep the first of the names that a converter strung together:
        nothing on the device reads them, and they took a fifth of a small model's flash."""
        ports = {*self._graph.inputs, *self._graph.outputs}
        taken = {_text(self._graph.tensors[at].name) for at in ports}
        for place, tensor in enumerate(self._graph.tensors):
            if place not in ports:
                name = _text(tensor.name).partition(";")[0]
                tensor.name = f"{name}#{place}" if name in taken else name
                taken.add(tensor.name)


def _one_scale(tensor: Any) -> bool:
    stored = tensor.quantization
    return stored is not None and stored.scale is not None and len(stored.scale) == 1


def _ints(places: Any) -> list[int]:
    return [] if places is None else [int(at) for at in places]
