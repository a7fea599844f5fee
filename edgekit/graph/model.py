"""What a model consists of: tensors, operators in execution order, and sums over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from edgekit.graph.memory import peak_activation

__all__ = [
    "DTYPE_BITS", "Graph", "Operator", "Shape", "Tensor", "assemble", "elements",
    "graph_from_json", "stored_bytes", "tensor_bytes", "with_batch_one",
]  # fmt: skip

Shape = tuple[int | str, ...]

#: bits of one element; strings, resources and variants have no size
DTYPE_BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "complex64": 64,
    "complex128": 128, "float8e4m3fn": 8, "float8e4m3fnuz": 8, "float8e5m2": 8,
    "float8e5m2fnuz": 8, "float8e8m0": 8, "float4e2m1": 4, "int64": 64, "int32": 32, "int16": 16,
    "int8": 8, "int4": 4, "int2": 2, "uint64": 64, "uint32": 32, "uint16": 16, "uint8": 8,
    "uint4": 4, "uint2": 2, "uint1": 1, "bool": 8,
}  # fmt: skip

#: operators whose answer differs from run to run, or that read what the graph does not show
_NEVER_CONSTANT = frozenset(
    {
        "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
        "Bernoulli", "If", "Loop", "Scan", "ReadValue", "STABLEHLO_RNG_BIT_GENERATOR",
    }
)  # fmt: skip
#: operators that need their input's shape only
_OF_SHAPE = frozenset({"Shape", "Size", "Rank"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value in the graph.

    `dtype` is numpy's name, or bfloat16, int4, string ...; None if unknown. `shape`: None if the
    rank is unknown; a str is a free dimension, its symbol or "?". `constant`: stored in the file,
    or computed from what is stored alone. `size_bytes` is that of the file for stored tensors
    (sparse and packed ones are smaller than their shape says). `state`: kept from one run to the
    next (TFLite variable tensors).

    `quantized`: has a scale. `per_channel`: more than one scale (per block, too). `symmetric`:
    every zero point is 0. The last two are None where it is not quantized, or where scale and
    zero point are not constants.
    """

    name: str
    dtype: str | None
    shape: Shape | None
    constant: bool = False
    size_bytes: int | None = None
    quantized: bool = False
    per_channel: bool | None = None
    symmetric: bool | None = None
    state: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """One step.

    `type` is the format's own name: `CONV_2D`, `Conv`, `com.microsoft:QLinearAdd`, `MatMul`, or
    what a custom TFLite operator calls itself. `version` is the TFLite operator version or the
    opset the ONNX definition in force is from; 0 where there is none. `custom`: not of the
    format's own operator set (com.microsoft counts as custom; whether an engine has it is for the
    engine's table to say). `inputs` and `outputs` are names of tensors, "" for absent ones.

    `macs` are multiply-accumulates: None where a dimension or the operator is unknown, 0 for
    operators that do none, and for those computed once from constants. In a loop's body it is the
    count over all iterations. `canonical` is the name of the ONNX operator that does the same.
    `scope` is the path of control-flow operators around it, "If_0:then_branch" say, "" outermost.
    `index` is its place in the file (of its own subgraph). `origin` is the module it was exported
    from (`encoder.layers.0`), where the file says: PyTorch's exporter does.
    """

    name: str
    type: str
    version: int
    custom: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int | None
    canonical: str | None
    scope: str = ""
    index: int = 0
    origin: str = ""

    @property
    def path(self) -> str:
        """Its name with its scope; unique in a graph."""
        return f"{self.scope}/{self.name}" if self.scope else self.name


@dataclass(frozen=True)
class Graph:
    """A model's operators in execution order; those in bodies of If, Loop ... come right before
    the operator they belong to, which ends after them.

    `opset` is that of ONNX's default domain, `opsets` has all; empty for other formats.
    `weight_bytes` are the bytes of weights stored in the file, shared ones counted once.
    """

    format: str
    opset: int | None
    opsets: Mapping[str, int]
    operators: tuple[Operator, ...]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int
    _scopes: Mapping[str, list[Operator]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        scopes: dict[str, list[Operator]] = {}
        for operator in self.operators:
            scopes.setdefault(operator.scope, []).append(operator)
        object.__setattr__(self, "_scopes", scopes)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one run; of an If, those of its dearest branch. None if those
        of any operator are unknown."""
        return self._macs_of("")

    def free_dimensions(self) -> tuple[str, ...]:
        """The free dimensions of the inputs, each once, in order; unnamed ones are called
        `input_0` by their place, as in the specs of `edgekit_runtime`. An input of unknown rank
        counts as `input_*`."""
        found: dict[str, None] = {}
        for name in self.inputs:
            shape = self.tensors[name].shape
            if shape is None:
                found[f"{name}_*"] = None
            for position, dim in enumerate(shape or ()):
                if isinstance(dim, str):
                    found[f"{name}_{position}" if dim == "?" else dim] = None
        return tuple(found)

    def peak_activation_bytes(self, dtype_bytes: int | None = None) -> tuple[int, str] | None:
        """The least memory for activations, in bytes, that the operators need when run one by one
        in this order, and the path of the operator that needs it. None if a size is unknown.

        At each operator: what it reads and writes, what a later one reads, graph inputs until
        their last use, graph outputs from when they are made. An operator that can work in place
        on an input nobody needs afterwards counts it once; views (Reshape ...) cost nothing.
        Constants, temporary buffers (im2col, packed weights) and fragmentation are not in it. An
        engine that fuses operators may need less.

        `dtype_bytes`: the size of an element of all float tensors, in place of their own.
        """
        return peak_activation(self, dtype_bytes)

    def bytes_moved(self, operator: Operator, dtype_bytes: int | None = None) -> int | None:
        """Bytes an operator reads (weights, too) and writes, each tensor once; None if unknown.

        For operators that read parts of a tensor (Gather) it is too many, for views (Reshape) as
        well: engines move nothing there. `dtype_bytes` as in `peak_activation_bytes`.
        """
        total = 0
        for name in {*operator.inputs, *operator.outputs} - {""}:
            size = tensor_bytes(self.tensors[name], dtype_bytes)
            if size is None:
                return None
            total += size
        return total

    def folded(self, operator: Operator) -> bool:
        """Whether it is computed from constants alone: most engines do that once, at load."""
        outputs = [name for name in operator.outputs if name]
        return bool(outputs) and all(self.tensors[name].constant for name in outputs)

    def to_json(self) -> dict[str, Any]:
        """For `graph_from_json`."""
        return {
            "format": self.format,
            "opset": self.opset,
            "opsets": dict(self.opsets),
            "operators": [_values(one) for one in self.operators],
            "tensors": [_values(one) for one in self.tensors.values()],
            "inputs": self.inputs,
            "outputs": self.outputs,
            "weight_bytes": self.weight_bytes,
        }

    def _macs_of(self, scope: str) -> int | None:
        total = 0
        for operator in self._scopes.get(scope, []):
            inner = f"{operator.path}:"
            bodies = [
                self._macs_of(one)
                for one in self._scopes
                if one.startswith(inner) and not {"/", ":"} & set(one[len(inner) :])
            ]
            counts = [operator.macs, *bodies]
            known = [count for count in counts if count is not None]
            if len(known) < len(counts):
                return None
            total += max(known) if operator.canonical == "If" else sum(known)
        return total


def tensor_bytes(tensor: Tensor, dtype_bytes: int | None = None) -> int | None:
    """Bytes of a tensor, `dtype_bytes` for each element if it is of floats."""
    if dtype_bytes is not None and tensor.dtype is not None and "float" in tensor.dtype:
        count = elements(tensor.shape)
        return None if count is None else count * dtype_bytes
    return tensor.size_bytes


def elements(shape: Shape | None) -> int | None:
    """The number of elements; None with a free dimension or unknown rank."""
    if shape is None or any(isinstance(dim, str) for dim in shape):
        return None
    return math.prod(int(dim) for dim in shape)


def stored_bytes(dtype: str | None, shape: Shape | None) -> int | None:
    """Bytes of a dense tensor, those under a byte packed; None if unknown."""
    count, bits = elements(shape), DTYPE_BITS.get(dtype or "")
    return None if count is None or bits is None else (count * bits + 7) // 8


class _HasShape(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[int | str] | None: ...


def with_batch_one(inputs: Iterable[_HasShape]) -> dict[str, tuple[int, ...]]:
    """Shapes for `read_graph` that set a leading free dimension to 1, for those inputs whose only
    free dimension it is. Takes Tensors and TensorSpecs; the others are left out, so stay free."""
    shapes = {}
    for one in inputs:
        dims = list(one.shape or ())
        if dims and isinstance(dims[0], str):
            rest = [dim for dim in dims[1:] if not isinstance(dim, str)]
            if len(rest) == len(dims) - 1:
                shapes[one.name] = (1, *rest)
    return shapes


def assemble(
    *,
    format: str,  # noqa: A002  (the field's name)
    operators: Iterable[Operator],
    tensors: Iterable[Tensor],
    inputs: Iterable[str],
    outputs: Iterable[str],
    weight_bytes: int,
    opsets: Mapping[str, int] | None = None,
) -> Graph:
    """A Graph from what a reader found: what follows from constants alone becomes constant, its
    MACs 0; sizes that are not given come from shapes."""
    by_name = {one.name: one for one in tensors}
    for name, tensor in by_name.items():
        if tensor.size_bytes is None:
            size = stored_bytes(tensor.dtype, tensor.shape)
            by_name[name] = replace(tensor, size_bytes=size)
    steps = []
    for step in operators:
        operator = step
        for name in (*step.inputs, *step.outputs):
            if name and name not in by_name:
                by_name[name] = Tensor(name, None, None)
        if _follows_from_constants(step, by_name):
            operator = replace(step, macs=0)
            for name in filter(None, step.outputs):
                by_name[name] = replace(by_name[name], constant=True)
        steps.append(operator)
    domains = dict(opsets or {})
    return Graph(
        format, domains.get(""), domains, tuple(steps), by_name, tuple(inputs), tuple(outputs),
        weight_bytes,
    )  # fmt: skip


def _follows_from_constants(operator: Operator, tensors: Mapping[str, Tensor]) -> bool:
    given = [tensors[name] for name in operator.inputs if name]
    if not given or operator.custom or {operator.canonical, operator.type} & _NEVER_CONSTANT:
        return False
    if operator.canonical in _OF_SHAPE and elements(given[0].shape) is not None:
        return True
    return all(tensor.constant for tensor in given)


def graph_from_json(raw: Mapping[str, Any]) -> Graph:
    """The Graph that `Graph.to_json` wrote."""
    tensors = {}
    for values in raw["tensors"]:
        name, dtype, shape, *rest = values
        tensors[name] = Tensor(name, dtype, None if shape is None else tuple(shape), *rest)
    operators = []
    for values in raw["operators"]:
        name, kind, version, custom, ins, outs, *rest = values
        operators.append(Operator(name, kind, version, custom, tuple(ins), tuple(outs), *rest))
    return Graph(
        raw["format"], raw["opset"], raw["opsets"], tuple(operators), tensors,
        tuple(raw["inputs"]), tuple(raw["outputs"]), raw["weight_bytes"],
    )  # fmt: skip


def _values(one: Tensor | Operator) -> list[Any]:
    return [getattr(one, name) for name in one.__slots__]
