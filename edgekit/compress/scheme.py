"""Quantization schemes as data: what to do, in words that are the same for every format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from edgekit.device import Quantization
from edgekit.errors import UsageError

__all__ = ["BLOCKS", "COMPUTE_OPERATORS", "KINDS", "Kind", "Scheme", "broken_rule", "parse_scheme"]

Kind = Literal[
    "fp32", "fp16", "bf16", "int8-dynamic", "int8-static", "int16x8", "int8-weights",
    "int4-weights",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)

#: where nearly all multiplications are; the usual cure when quantizing everything collapses
COMPUTE_OPERATORS = "Conv/MatMul/Gemm"

#: weights that share a scale in int4-weights
BLOCKS = (32, 64, 128)
_DEFAULT_BLOCK = 64

#: how the range of a tensor is taken from what calibration saw
RANGES = ("minmax", "percentile", "entropy", "mse")
#: what wins accuracy back without training
RECOVERY = ("bias-correction", "equalization", "smooth-quant", "learned-rounding")
_TOOLS = ("onnxruntime", "nncf", "litert-quantizer", "tensorflow", "openvino", "edgekit")

#: kind -> the type of weights, of activations where the scheme decides that
_WEIGHTS: Mapping[str, str] = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8-dynamic": "int8",
    "int8-static": "int8", "int16x8": "int8", "int8-weights": "int8", "int4-weights": "int4",
}  # fmt: skip
_STATIC = ("int8-static", "int16x8")


@dataclass(frozen=True)
class Scheme:
    """A precision scheme.

    kind: `fp32`; `fp16` (weights stored so; computed so where the engine has it); `bf16` (computed
    so; nothing is stored differently); `int8-static` and `int16x8` (8-bit weights, 8- or 16-bit
    activations, their ranges from calibration); `int8-dynamic` (activation ranges at run time);
    `int8-weights`, `int4-weights` (stored so, computed in float).
    operators: `all`, or only those that multiply matrices. keep: operators that stay float, by the
    name of their first output. per_channel: weight scales per output channel. reduce_range: weights
    in 7 bits, for CPUs whose 8-bit pair sums saturate (x86 without VNNI). activations: their type,
    `uint8`, `int8` or `int16`; empty: the tool's usual one. symmetric: their zero point is 0, or
    128 where only uint8 is to be had. weights_symmetric: the same of weights. block: how many
    weights share a scale (`int4-weights`). ranges: how calibration takes them. recovery: what wins
    accuracy back. transformer: the quantizer's patterns for attention. tool: which quantizer, where
    a format has several; empty: the format's first.
    """

    kind: str
    operators: str = "all"
    per_channel: bool = True
    reduce_range: bool = False
    activations: str = ""
    symmetric: bool = False
    weights_symmetric: bool = True
    block: int = 0
    ranges: str = "minmax"
    recovery: tuple[str, ...] = ()
    transformer: bool = False
    tool: str = ""
    keep: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Short, for identifiers: `int8-static-matmul`. What a profile asks for is not in it."""
        parts = [self.kind]
        parts += ["matmul"] if self.operators != "all" else []
        parts += [str(self.block)] if self.block else []
        parts += [self.ranges] if self.ranges != "minmax" else []
        parts += self.recovery
        parts += ["transformer"] if self.transformer else []
        parts += [self.tool] if self.tool else []
        return "-".join(parts)

    @property
    def needs_data(self) -> bool:
        """Whether it is made from calibration samples."""
        return self.kind in _STATIC or "learned-rounding" in self.recovery

    @property
    def weights(self) -> str:
        """The type that weights are stored in."""
        return _WEIGHTS[self.kind]

    @property
    def options(self) -> frozenset[str]:
        """What it asks for beyond its kind, in the words of `parse_scheme`."""
        found = {*self.recovery, self.activations}
        found |= {"matmul"} if self.operators != "all" else set()
        found |= set() if self.per_channel else {"per-tensor"}
        found |= {"7-bit"} if self.reduce_range else set()
        found |= {"symmetric"} if self.symmetric else set()
        found |= set() if self.weights_symmetric else {"asymmetric-weights"}
        found |= {f"block={self.block}"} if self.block else set()
        found |= {self.ranges} if self.ranges != "minmax" else set()
        found |= {"transformer"} if self.transformer else set()
        found |= {"keep"} if self.keep else set()
        return frozenset(found - {""})

    def __str__(self) -> str:
        if self.kind in ("fp32", "fp16", "bf16"):
            return self.kind
        marks = ["all operators" if self.operators == "all" else self.operators]
        if self.block:
            marks.append(f"a scale per {self.block} weights")
        else:
            marks.append("per-channel" if self.per_channel else "per-tensor")
        marks += [] if self.weights_symmetric else ["asymmetric weights"]
        marks += ["7-bit weights"] if self.reduce_range else []
        if self.kind in _STATIC:
            marks += [f"{self.activations} activations"] if self.activations else []
            marks += ["symmetric"] if self.symmetric else []
            marks += [f"{self.ranges} ranges"] if self.ranges != "minmax" else []
        marks += [word.replace("-", " ") for word in self.recovery]
        marks += ["for transformers"] if self.transformer else []
        marks += [f"{len(self.keep)} kept float"] if self.keep else []
        marks += [f"by {self.tool}"] if self.tool else []
        return f"{_IN_WORDS.get(self.kind, self.kind)}, {', '.join(marks)}"

    def to_json(self) -> dict[str, Any]:
        """As stored in provenance."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Scheme:
        """What `to_json` gave, by way of JSON."""
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**made)

    def under(self, rules: Quantization, *, saturates: bool) -> Scheme:
        """With what the rules ask for. `saturates`: the engine multiplies 8-bit pairs with
        instructions whose sums can overflow on such a CPU."""
        narrow = rules.reduce_range and saturates and self.kind in ("int8-static", "int8-dynamic")
        has_scales = self.kind not in ("fp32", "fp16", "bf16") and not self.block
        return replace(
            self,
            per_channel=self.per_channel and (rules.per_channel or not has_scales),
            reduce_range=self.reduce_range or narrow,
            symmetric=self.symmetric or (rules.symmetric and self.kind in _STATIC),
        )


_IN_WORDS = {
    "int8-static": "int8 static", "int8-dynamic": "int8 dynamic", "int8-weights": "int8 weights",
    "int4-weights": "int4 weights", "int16x8": "int8 with int16 activations",
}  # fmt: skip


def parse_scheme(text: str) -> Scheme:
    """A scheme as people write it: `int8-static`, `int8-static:per-tensor,percentile`,
    `int4-weights:block=32`. Words in any order.

    Raises:
        UsageError: an unknown kind or word.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UsageError(f"no scheme {kind!r}; known: {', '.join(KINDS)}")
    made: dict[str, Any] = {"block": _DEFAULT_BLOCK} if kind == "int4-weights" else {}
    recovery: list[str] = []
    said: dict[str, str] = {}
    for word in filter(None, (one.strip() for one in rest.split(","))):
        if word in RECOVERY:
            recovery.append(word)
        elif word in _WORDS:
            for field, value in _WORDS[word].items():
                if said.setdefault(field, word) != word:
                    raise UsageError(
                        f"scheme {text!r}: {said[field]!r} and {word!r} exclude each other"
                    )
                made[field] = value
        else:
            raise UsageError(
                f"scheme {text!r}: unknown word {word!r}; known: {', '.join([*_WORDS, *RECOVERY])}"
            )
    return Scheme(kind, recovery=tuple(dict.fromkeys(recovery)), **made)


_WORDS: dict[str, dict[str, Any]] = {
    "matmul": {"operators": COMPUTE_OPERATORS},
    "per-channel": {"per_channel": True},
    "per-tensor": {"per_channel": False},
    "7-bit": {"reduce_range": True},
    "int8": {"activations": "int8"},
    "uint8": {"activations": "uint8"},
    "symmetric": {"symmetric": True},
    "asymmetric-weights": {"weights_symmetric": False},
    **{f"block={size}": {"block": size} for size in BLOCKS},
    **{name: {"ranges": name} for name in RANGES},
    "transformer": {"transformer": True},
    **{name: {"tool": name} for name in _TOOLS},
}


def broken_rule(
    scheme: Scheme, rules: Quantization, source_activations: frozenset[str]
) -> tuple[str, str] | None:
    """The profile's field that a scheme breaks, and how; None if it is legal.

    Restricted to some operators, or with scales made at run time, the other activations are what
    they are in the model as it came (`source_activations`), so those must be allowed, too.
    """
    activations = set(source_activations)
    if scheme.kind in _STATIC:
        others = set() if scheme.operators == "all" and not scheme.keep else activations
        activations = {scheme.activations} | others
    elif scheme.kind == "int8-dynamic":
        activations |= {scheme.activations}
        if rules.symmetric:
            return "quantization.symmetric", "scales made at run time come with a zero point"
    elif scheme.kind == "bf16":
        activations = {"bfloat16"}
    if not rules.per_channel and scheme.block:
        return "quantization.per_channel", f"a scale per {scheme.block} weights is not one each"
    weights = scheme.weights
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
