"""Reads TFLite models by their flatbuffer schema: runs in a child process."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit.graph.macs import count_macs
from edgekit.graph.model import Operator, Shape, Tensor, assemble
from edgekit.graph.names import canonical_name
from edgekit.graph.tflite_shapes import names_of, resized_shapes
from edgekit.tflite_file import read_tflite

__all__ = ["read"]

_DTYPES = {"complex64": "complex64", "float4_e2m1fn": "float4e2m1"}
_MOST_DEPTH = 16
#: operators whose bodies run once, or when the model is loaded
_RUNS = {"IF": 1, "CALL": 1, "STABLEHLO_COMPOSITE": 1, "STABLEHLO_CASE": 1, "CALL_ONCE": 0}


def read(path: str, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """The model's graph as JSON."""
    schema = require("ai_edge_litert.schema_py_generated", extra="litert")
    content = Path(path).read_bytes()
    if content[4:8] != b"TFL3":
        raise ModelError(
            f"{path}: not a TFLite model: bytes 4..8 are {content[4:8]!r}, wanted b'TFL3'"
        )
    try:
        model = read_tflite(content)
        reader = _Reader(schema, model)
        reader.read_main(_fixed_shapes(content, reader, shapes))
        return reader.result()
    except (ModelError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None
    except (
        struct.error, TypeError, ValueError, IndexError, AttributeError, KeyError, OverflowError,
    ) as error:  # fmt: skip  # what a flatbuffer raises whose offsets lead nowhere
        raise ModelError(f"{path}: damaged: {one_line(error)}") from None


class _Reader:
    def __init__(self, schema: Any, model: Any) -> None:
        self._model = model
        self._builtins = names_of(schema.BuiltinOperator)
        self._types = names_of(schema.TensorType)
        self._blockwise = schema.QuantizationDetails.BlockwiseQuantization
        self._subgraphs = list(model.subgraphs or ())
        if not self._subgraphs:
            raise ModelError("damaged: it has no graph")
        self._tensors: dict[str, Tensor] = {}
        self._operators: list[Operator] = []
        self._buffers: dict[int, int] = {}
        #: converters that note a known rank note it for all tensors, scalars too
        self._notes_rank = any(t.hasRank for g in self._subgraphs for t in g.tensors or ())
        self.inputs: list[str] = []
        self._outputs: list[str] = []

    def read_main(self, shapes: Mapping[int, Shape]) -> None:
        """All of the model; `shapes` are those of tensors in place of the file's."""
        graph = self._subgraphs[0]
        names = self._main_names()
        self.inputs = _once(names[i] for i in _ints(graph.inputs))
        self._outputs = _once(names[i] for i in _ints(graph.outputs))
        self._read(0, names, shapes, "", 1)
        for name in self.inputs:  # free dimensions are called as the runtime calls them
            shape = self._tensors[name].shape or ()
            named = tuple(f"{name}_{i}" if d == "?" else d for i, d in enumerate(shape))
            self._tensors[name] = replace(self._tensors[name], shape=named)

    def result(self) -> dict[str, Any]:
        return assemble(
            format="tflite",
            operators=self._operators,
            tensors=self._tensors.values(),
            inputs=self.inputs,
            outputs=self._outputs,
            weight_bytes=sum(self._buffers.values()),
        ).to_json()

    def input_places(self) -> dict[str, int]:
        """The tensor index of each input by name."""
        names = self._main_names()
        return {names[i]: i for i in _ints(self._subgraphs[0].inputs)}

    def declared(self, place: int) -> Shape | None:
        """The shape of a tensor of the main graph in the file."""
        return self._shape(self._subgraphs[0].tensors[place])

    def _main_names(self) -> list[str]:
        """Unique names of the main graph's tensors, those of its only signature first."""
        graph = self._subgraphs[0]
        given: dict[int, str] = {}
        signatures = list(self._model.signatureDefs or ())
        if len(signatures) == 1 and not signatures[0].subgraphIndex:
            for one in (*(signatures[0].inputs or ()), *(signatures[0].outputs or ())):
                given.setdefault(one.tensorIndex, _text(one.name))
        order = [*given, *(i for i in range(len(graph.tensors)) if i not in given)]
        taken: set[str] = set()
        names = [""] * len(graph.tensors)
        for place in order:
            name = given.get(place) or _text(graph.tensors[place].name) or f"#{place}"
            names[place] = f"{name}#{place}" if name in taken else name
            taken.add(names[place])
        return names

    def _read(
        self,
        number: int,
        names: list[str],
        shapes: Mapping[int, Shape],
        scope: str,
        runs: int | None,
    ) -> None:
        """One subgraph and what it calls; `runs` is how often it is run, None if unknown."""
        if scope.count("/") > _MOST_DEPTH:
            raise ModelError("damaged: its subgraphs call each other in circles")
        graph = self._subgraphs[number]
        operators = list(graph.operators or ())
        made = {place for one in operators for place in _ints(one.outputs)}
        given = set(_ints(graph.inputs))
        for place, raw in enumerate(graph.tensors or ()):
            stored = self._stored(raw, place in made or place in given)
            tensor = self._tensor(raw, names[place], stored)
            if place in shapes and not tensor.constant:
                tensor = replace(tensor, shape=shapes[place])
            self._tensors[names[place]] = tensor
        for index, raw in enumerate(operators):
            self._operator(raw, index, names, scope, runs)

    def _operator(
        self, raw: Any, index: int, names: list[str], scope: str, runs: int | None
    ) -> None:
        code = self._model.operatorCodes[raw.opcodeIndex]
        # the old field is a byte; newer operators have 127 there
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        kind = self._builtins.get(builtin, f"BUILTIN_{builtin}")
        custom = kind == "CUSTOM"
        if custom:
            kind = _text(code.customCode) or "CUSTOM"
        name = f"{kind}#{index}"
        attributes = _attributes(raw.builtinOptions) | _attributes(raw.builtinOptions2)
        path = f"{scope}/{name}" if scope else name
        for label, number in _bodies(attributes):
            if not 0 <= number < len(self._subgraphs):
                raise ModelError(f"damaged: {name} calls subgraph {number}, which is not there")
            times = _RUNS.get(kind)
            inner = None if runs is None or times is None else runs * times
            below = f"{path}:{label}"
            size = len(self._subgraphs[number].tensors or ())
            own = [f"{below}/#{place}" for place in range(size)]
            self._read(number, own, {}, below, inner)
        inputs = tuple("" if i < 0 else names[i] for i in _ints(raw.inputs))
        outputs = tuple("" if i < 0 else names[i] for i in _ints(raw.outputs))
        macs = count_macs(
            "tflite", kind, [self._tensors[i].shape if i else () for i in inputs],
            [self._tensors[o].shape if o else () for o in outputs], attributes, custom=custom,
        )  # fmt: skip
        if macs and runs != 1:
            macs = None if runs is None else macs * runs
        same = canonical_name(kind, "tflite")
        self._operators.append(
            Operator(
                name, kind, int(code.version), custom, inputs, outputs, macs, same, scope, index
            )
        )

    def _stored(self, raw: Any, made: bool) -> int | None:
        """Bytes of a constant in the file; None for tensors that are none."""
        buffers = self._model.buffers or []
        buffer = buffers[raw.buffer] if 0 <= raw.buffer < len(buffers) else None
        size = len(buffer.data) if buffer is not None and buffer.data is not None else 0
        if raw.externalBuffer:
            return 0
        if size and not raw.isVariable:
            self._buffers[raw.buffer] = size
            return size
        return None if made or raw.isVariable else 0  # an empty constant

    def _tensor(self, raw: Any, name: str, stored: int | None) -> Tensor:
        dtype = self._types.get(raw.type, "").lower()
        dtype = _DTYPES.get(dtype, dtype)
        shape = self._shape(raw)
        if shape == () and self._notes_rank and not raw.hasRank and stored is None:
            shape = None
        quantization = raw.quantization
        scales = _count(quantization.scale) if quantization is not None else 0
        blocks = quantization is not None and quantization.detailsType == self._blockwise
        if not (scales or blocks):
            return Tensor(name, dtype, shape, stored is not None, stored or None,
                          state=bool(raw.isVariable))  # fmt: skip
        zeros = quantization.zeroPoint
        return Tensor(
            name, dtype, shape, stored is not None, stored or None, quantized=True,
            per_channel=blocks or scales > 1,
            symmetric=not any(zeros) if _count(zeros) else True,
            state=bool(raw.isVariable),
        )  # fmt: skip

    @staticmethod
    def _shape(raw: Any) -> Shape | None:
        shape = _ints(raw.shape)
        signature = _ints(raw.shapeSignature)
        if len(signature) == len(shape):
            shape = signature
        return tuple("?" if dim < 0 else dim for dim in shape)


def _fixed_shapes(
    content: bytes, reader: _Reader, shapes: Mapping[str, list[int]]
) -> dict[int, Shape]:
    """The shapes of the main graph's tensors after inputs got theirs, as LiteRT works them out;
    nothing is run. Empty if the file has these shapes already.

    Raises:
        UsageError: no such input, wrong rank or another fixed dimension.
        ModelError: LiteRT cannot prepare the model: an operator it has not, a wrong shape.
    """
    places = reader.input_places()
    changes = {}
    for name, wanted in shapes.items():
        if name not in places:
            raise UsageError(f"no input {name!r}; inputs: {', '.join(places)}")
        has = reader.declared(places[name]) or ()
        if len(has) != len(wanted):
            raise UsageError(f"input {name!r} has {len(has)} dimensions, not {len(wanted)}")
        if any(d not in ("?", v) for d, v in zip(has, wanted, strict=True)):
            raise UsageError(f"input {name!r} is {list(has)}, cannot be {wanted}")
        if list(has) != wanted:
            changes[places[name]] = wanted
    return resized_shapes(content, changes) if changes else {}


def _bodies(attributes: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The subgraphs an operator's options name: condSubgraphIndex ..."""
    for name, value in attributes.items():
        match = re.fullmatch(r"(\w*?)_?[sS]ubgraph(Index)?", name)
        if match and isinstance(value, int):
            yield match[1] or "body", value
        elif name == "branchSubgraphIndices":
            yield from ((f"branch_{i}", int(number)) for i, number in enumerate(value))


def _attributes(options: Any) -> dict[str, Any]:
    return dict(vars(options)) if options is not None else {}


def _text(raw: Any) -> str:
    return raw.decode(errors="replace") if isinstance(raw, bytes) else raw or ""


def _count(values: Any) -> int:
    return 0 if values is None else len(values)


def _ints(values: Any) -> list[int]:
    return [] if values is None else [int(one) for one in values]


def _once(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))
