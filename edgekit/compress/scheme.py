"""Quantization schemes as data: what to do, in words that are the same for every format."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from edgekit.device import Quantization

__all__ = ["COMPUTE_OPERATORS", "Scheme", "broken_rule", "schemes_for"]

#: where nearly all multiplications are; the usual cure when quantizing everything collapses
COMPUTE_OPERATORS = "Conv/MatMul/Gemm"

#: types a format's quantizer can give to activations, the usual one first (NNCF refuses to be
#: told: its `signedness_to_force` conflicts with every target device)
_ACTIVATIONS = {"onnx": ("uint8", "int8"), "openvino": ("uint8",), "tflite": ("int8",)}
#: the type that activations get at run time in dynamic schemes
_DYNAMIC = {"onnx": "uint8", "openvino": "int8", "tflite": "int8"}
#: formats whose engines multiply 8-bit pairs with instructions that can saturate; LiteRT's kernels
#: (XNNPACK) widen to 16 bits first (tests/contract/test_quantizers.py shows it)
_SATURATES = ("onnx", "openvino")


@dataclass(frozen=True)
class Scheme:
    """A precision scheme.

    kind: `fp32`, `int8-dynamic` (weights int8, activation scales at run time) or `int8-static`
    (activation scales from calibration). operators: `all`, or only those that multiply matrices.
    per_channel: weight scales per output channel. reduce_range: weights in 7 bits, for CPUs
    whose 8-bit pair sums saturate (x86 without VNNI). activations: their type, from calibration
    or at run time, `uint8` or `int8`. symmetric: their zero point is 0, or 128 where only uint8
    is to be had.
    """

    kind: str
    operators: str = "all"
    per_channel: bool = True
    reduce_range: bool = False
    activations: str = ""
    symmetric: bool = False

    @property
    def id(self) -> str:
        """Short, for identifiers: `int8-static-matmul`."""
        return self.kind if self.operators == "all" else f"{self.kind}-matmul"

    def __str__(self) -> str:
        if self.kind == "fp32":
            return "fp32"
        scope = "all operators" if self.operators == "all" else self.operators
        marks = ["per-channel" if self.per_channel else "per-tensor"]
        marks += ["7-bit weights"] if self.reduce_range else []
        if self.kind == "int8-dynamic":
            return f"int8 dynamic, {', '.join([scope, *marks])}"
        marks += [f"{self.activations} activations"] if self.activations else []
        marks += ["symmetric"] if self.symmetric else []
        return f"int8 static, {', '.join([scope, *marks])}"

    def to_json(self) -> dict[str, Any]:
        """As stored in provenance."""
        return dataclasses.asdict(self)


def schemes_for(fmt: str, rules: Quantization) -> tuple[Scheme, ...]:
    """What may be tried for a format, most promising first, made to fit the rules where the
    format's quantizer can; `broken_rule` says of each whether it does. Nothing quantizes ncnn."""
    if fmt == "ncnn":
        return (Scheme("fp32"),)
    options = _ACTIVATIONS.get(fmt, ("int8",))
    # The zero point of a symmetric uint8 tensor is 128, so symmetric prefers int8.
    preferred = sorted(options, key=lambda one: one != "int8") if rules.symmetric else options
    allowed = [one for one in preferred if one in (rules.activations or options)]
    narrow = rules.reduce_range and fmt in _SATURATES
    weights: dict[str, Any] = {"per_channel": rules.per_channel, "reduce_range": narrow}
    static = {**weights, "activations": (allowed or preferred)[0], "symmetric": rules.symmetric}
    if fmt == "openvino":  # NNCF's weight compression has 8 bits only; it computes in float
        weights["reduce_range"] = False
    return (
        Scheme("fp32"),
        Scheme("int8-static", COMPUTE_OPERATORS, **static),
        Scheme("int8-static", "all", **static),
        Scheme("int8-dynamic", "all", **weights, activations=_DYNAMIC.get(fmt, "int8")),
    )


def broken_rule(
    scheme: Scheme, rules: Quantization, source_activations: frozenset[str]
) -> tuple[str, str] | None:
    """The profile's field that a scheme breaks, and how; None if it is legal.

    Restricted to some operators, or with scales made at run time, the other activations are what
    they are in the model as it came (`source_activations`), so those must be allowed, too.
    """
    activations = set(source_activations)
    if scheme.kind == "int8-static":
        others = set() if scheme.operators == "all" else activations
        activations = {scheme.activations} | others
    elif scheme.kind == "int8-dynamic":
        activations |= {scheme.activations}
        if rules.symmetric:
            return "quantization.symmetric", "scales made at run time come with a zero point"
    weights = "int8"
    if scheme.kind == "fp32":
        weights = "float32" if "float32" in activations else min(activations, default="int8")
    if rules.activations is not None and not activations <= set(rules.activations):
        foreign = ", ".join(sorted(activations - set(rules.activations)))
        whose = "its activations are"
        if scheme.operators != "all" and scheme.activations in rules.activations:
            whose = f"operators other than {scheme.operators} stay"
        return (
            "quantization.activations",
            f"{whose} {foreign}, allowed are {', '.join(rules.activations)}",
        )
    if rules.weights is not None and weights not in rules.weights:
        return (
            "quantization.weights",
            f"its weights are {weights}, allowed are {', '.join(rules.weights)}",
        )
    return None
