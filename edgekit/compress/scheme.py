"""Quantization schemes as data: what to do, in words that are the same for every format."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["COMPUTE_OPERATORS", "Scheme", "schemes_for"]

#: where nearly all multiplications are; the usual cure when quantizing everything collapses
COMPUTE_OPERATORS = "Conv/MatMul/Gemm"


@dataclass(frozen=True)
class Scheme:
    """A precision scheme.

    kind: `fp32`, `int8-dynamic` (weights int8, activation scales at run time) or `int8-static`
    (activation scales from calibration). operators: `all`, or only those that multiply matrices.
    per_channel: weight scales per output channel. reduce_range: weights in 7 bits, for CPUs
    whose 8-bit pair sums saturate (x86 without VNNI).
    """

    kind: str
    operators: str = "all"
    per_channel: bool = True
    reduce_range: bool = False

    @property
    def id(self) -> str:
        """Short, for identifiers: `int8-static-matmul`."""
        return self.kind if self.operators == "all" else f"{self.kind}-matmul"

    def __str__(self) -> str:
        if self.kind == "fp32":
            return "fp32"
        scope = "all operators" if self.operators == "all" else self.operators
        if self.kind == "int8-dynamic":
            return f"int8 dynamic, {scope}"
        marks = ["per-channel" if self.per_channel else "per-tensor"]
        marks += ["7-bit weights"] if self.reduce_range else []
        return f"int8 static, {scope}, {', '.join(marks)}"

    def to_json(self) -> dict[str, Any]:
        """As stored in provenance."""
        return dataclasses.asdict(self)


def schemes_for(*, reduce_range: bool, per_channel: bool) -> tuple[Scheme, ...]:
    """What is tried, most promising first."""
    rules = {"per_channel": per_channel, "reduce_range": reduce_range}
    return (
        Scheme("fp32"),
        Scheme("int8-static", COMPUTE_OPERATORS, **rules),
        Scheme("int8-static", "all", **rules),
        Scheme("int8-dynamic", "all", **rules),
    )
