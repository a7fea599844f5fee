"""The least memory that activations need in a given order of operators."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.graph.model import Graph, Operator

__all__ = ["IN_PLACE", "VIEWS", "peak_activation"]

#: the output is the input's memory under another shape
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout"})

_UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Clip Cos Cosh Elu Erf Exp
    Floor Gelu HardSigmoid HardSwish LeakyRelu Log Mish Neg Not PRelu Reciprocal Relu Round Selu
    Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
    BatchNormalization Softmax LogSoftmax Cast""".split()  # noqa: SIM905
_BINARY = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less
    LessOrEqual Max Mean Min Mod Mul Or Pow Sub Sum Where Xor""".split()  # noqa: SIM905
#: operators that may write over an input of the same size that nobody needs afterwards
IN_PLACE = frozenset({*_UNARY, *_BINARY})


@dataclass
class _Buffer:
    """Memory of one tensor, or of several that are views of it: used from step `first` to `last`,
    both included."""

    size: int = 0
    first: int = 0
    last: int = 0


def peak_activation(graph: Graph, dtype_bytes: int | None = None) -> tuple[int, str] | None:
    """See `Graph.peak_activation_bytes`."""
    buffers = _buffers(graph, dtype_bytes)
    if buffers is None:
        return None
    steps = len(graph.operators)
    unique = {id(buffer): buffer for buffer in buffers.values()}.values()
    change = [0] * (steps + 2)
    for buffer in unique:
        change[max(0, buffer.first)] += buffer.size
        change[min(steps, buffer.last) + 1] -= buffer.size
    peak, where, live = 0, "", 0
    for step, operator in enumerate(graph.operators):
        live += change[step]
        needed = live - _saved_in_place(operator, step, buffers)
        if needed > peak:
            peak, where = needed, operator.path
    if not steps:
        peak = sum(buffer.size for buffer in unique)
    return peak, where


def _buffers(graph: Graph, dtype_bytes: int | None) -> dict[str, _Buffer] | None:
    """The buffer of each tensor that takes memory; None if a size is unknown."""
    from edgekit.graph.model import tensor_bytes

    end = len(graph.operators)
    made = {name: i for i, op in enumerate(graph.operators) for name in op.outputs if name}
    used = {name: i for i, op in enumerate(graph.operators) for name in op.inputs if name}
    found: dict[str, _Buffer] = {}
    for name, tensor in graph.tensors.items():
        if tensor.constant:
            continue
        if name not in made and name not in graph.inputs and not tensor.state:
            # What a loop's body is given: counted as what the outer operator was given.
            found[name] = _Buffer(0, 0, used.get(name, 0))
            continue
        size = tensor_bytes(tensor, dtype_bytes)
        if size is None:
            if name in made or name in used:
                return None
            continue
        first = made.get(name, -1)
        last = used.get(name, first)
        if tensor.state:
            first, last = -1, end
        found[name] = _Buffer(size, first, end if name in graph.outputs else last)
    for operator in graph.operators:
        if operator.canonical in VIEWS:
            _share(operator, found)
    return found


def _share(operator: Operator, buffers: dict[str, _Buffer]) -> None:
    """Give a view's output the buffer of its input."""
    source = buffers.get(operator.inputs[0]) if operator.inputs else None
    target = buffers.get(operator.outputs[0]) if operator.outputs else None
    if source is None or target is None or source is target:
        return
    # A body's input stands for memory that is counted elsewhere: so does a view of it.
    source.size = max(source.size, target.size) if source.size else 0
    source.first, source.last = (
        min(source.first, target.first),
        max(source.last, target.last),
    )
    for name, buffer in buffers.items():
        if buffer is target:
            buffers[name] = source


def _saved_in_place(operator: Operator, step: int, buffers: dict[str, _Buffer]) -> int:
    """Bytes an operator saves by writing its output over an input that ends here."""
    if operator.canonical not in IN_PLACE or not operator.outputs:
        return 0
    target = buffers.get(operator.outputs[0])
    if target is None:
        return 0
    return max(_dying(operator.inputs, step, target, buffers), default=0)


def _dying(
    names: Iterable[str], step: int, target: _Buffer, buffers: dict[str, _Buffer]
) -> Iterable[int]:
    for name in names:
        buffer = buffers.get(name)
        if buffer is None or buffer is target or buffer.last != step:
            continue
        if buffer.size == target.size:
            yield buffer.size
