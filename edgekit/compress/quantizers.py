"""The table of quantizers: which tool makes which schemes of which format, with which options.

Adding one touches three files: the module, the table's entry, the contract test's parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import util

from edgekit.artifact import FORMAT_NAMES
from edgekit.compress.scheme import COMPUTE_OPERATORS, Scheme
from edgekit.device import Quantization
from edgekit.errors import UsageError, pip_install

__all__ = [
    "QUANTIZERS", "Quantizer", "candidate_schemes", "fitted", "quantizer_for", "readable_as",
]  # fmt: skip


@dataclass(frozen=True)
class Quantizer:
    """One tool on one format.

    function: `(source, target, scheme, data, indices)`, run in a child. source: the format it
    reads, where that is not `target`: a quantizer inside a converter. kinds: the schemes it makes
    -> the option words it obeys there. activations: what it can give to activations with ranges
    from calibration, the usual one first. saturates: its models are multiplied with instructions
    whose pair sums overflow on x86 without VNNI; LiteRT's kernels (XNNPACK) widen to 16 bits first
    (tests/contract/test_quantizers.py shows it). recovers: kind -> what wins accuracy back on the
    float ONNX model before this tool sees it (`edgekit.compress.recovery`).
    """

    tool: str
    target: str
    function: str
    module: str
    extra: str
    distributions: tuple[str, ...]
    kinds: Mapping[str, frozenset[str]]
    activations: tuple[str, ...] = ("int8",)
    dynamic: str = "int8"
    saturates: bool = False
    source: str = ""
    recovers: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def takes(self) -> str:
        """The format it reads."""
        return self.source or self.target

    def missing(self) -> str | None:
        """What to type to have it, or None."""
        if util.find_spec(self.module) is not None:
            return None
        return f"quantizing needs {self.module}: {pip_install(self.extra)}"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BLOCKS = "block=32 block=64 block=128"

QUANTIZERS = (
    Quantizer(
        "onnxruntime", "onnx", "edgekit.compress.quantize_onnx:quantize_onnx", "onnx", "onnx",
        ("onnxruntime", "onnx"),
        {
            "fp16": _words("keep"),
            "int8-static": _words(
                "matmul per-tensor 7-bit int8 uint8 symmetric asymmetric-weights percentile entropy"
                " mse bias-correction equalization learned-rounding keep"
            ),
            "int16x8": _words("matmul per-tensor symmetric int16 percentile keep"),
            "int8-dynamic": _words("matmul per-tensor 7-bit uint8 asymmetric-weights keep"),
            "int8-weights": _words("matmul per-tensor asymmetric-weights keep"),
            "int4-weights": _words(f"{_BLOCKS} asymmetric-weights learned-rounding keep"),
        },
        ("uint8", "int8"), "uint8", saturates=True,
        recovers={
            "int8-static": _words("bias-correction equalization learned-rounding"),
            "int4-weights": _words("learned-rounding"),
        },
    ),
    Quantizer(
        "nncf", "onnx", "edgekit.compress.quantize_onnx_nncf:quantize_onnx_nncf", "nncf",
        "openvino", ("nncf", "onnxruntime", "onnx"),
        {
            "int8-static": _words(
                "matmul per-tensor 7-bit uint8 symmetric percentile bias-correction smooth-quant"
                " transformer keep"
            ),
        },
        ("uint8",), saturates=True,
    ),
    Quantizer(
        "nncf", "openvino", "edgekit.compress.quantize_openvino:quantize_openvino", "nncf",
        "openvino", ("nncf", "openvino"),
        {
            "fp16": _words(""),
            "int8-static": _words(
                "matmul per-tensor 7-bit uint8 symmetric percentile mse bias-correction"
                " smooth-quant transformer equalization learned-rounding keep"
            ),
            "int8-weights": _words("asymmetric-weights keep"),
            "int4-weights": _words(f"{_BLOCKS} asymmetric-weights learned-rounding keep"),
        },
        ("uint8",), saturates=True,
        recovers={"int8-static": _words("equalization learned-rounding")},
    ),
    Quantizer(
        "litert-quantizer", "tflite", "edgekit.compress.quantize_tflite:quantize_tflite",
        "litert_quantizer", "tflite-convert", ("litert-quantizer", "ai-edge-litert"),
        {
            "fp16": _words("keep"),
            "int8-static": _words(
                "matmul per-tensor int8 symmetric percentile entropy mse bias-correction"
                " equalization learned-rounding keep"
            ),
            "int16x8": _words("matmul per-tensor int16 symmetric percentile keep"),
            "int8-dynamic": _words("matmul per-tensor int8 keep"),
            "int8-weights": _words("matmul per-tensor keep"),
            "int4-weights": _words(f"matmul {_BLOCKS} learned-rounding keep"),
        },
        recovers={
            "int8-static": _words("bias-correction equalization learned-rounding"),
        },
    ),
    Quantizer(
        "tensorflow", "tflite", "edgekit.compress.quantize_savedmodel:quantize_savedmodel",
        "tensorflow", "tensorflow", ("tensorflow-cpu",),
        {
            "fp16": _words(""),
            "int8-static": _words("per-tensor int8"),
            "int16x8": _words("int16 symmetric"),
            "int8-dynamic": _words("int8"),
        },
        source="savedmodel",
    ),
)  # fmt: skip


def readable_as(came: str) -> str:
    """The format, if any, in which quantizers inside converters read a model that came so."""
    return "savedmodel" if came in ("keras", "savedmodel") else ""


def quantizer_for(scheme: Scheme, target: str, *, source: str = "") -> Quantizer:
    """The tool for a scheme of a format: the one it names, else the first that makes the kind from
    a model of that format (or of `source`).

    Raises:
        UsageError: none does, or not with these options.
    """
    name = FORMAT_NAMES[target]
    of_format = [
        one for one in QUANTIZERS if one.target == target and one.takes in (target, source)
    ]
    able = [one for one in of_format if scheme.kind in one.kinds]
    if not able:
        kinds = sorted({kind for one in of_format for kind in one.kinds})
        known = f"known: {', '.join(kinds)}" if kinds else "nothing quantizes it"
        raise UsageError(f"{scheme.kind} cannot be made of {name}; {known}")
    named = [one for one in able if scheme.tool in ("", one.tool)]
    if not named:
        tools = ", ".join(one.tool for one in able)
        raise UsageError(f"{scheme.tool} makes no {scheme.kind} of {name}; {tools} does")
    fit = [one for one in named if scheme.options <= one.kinds[scheme.kind]]
    if not fit:
        first = named[0]
        foreign = ", ".join(sorted(scheme.options - first.kinds[scheme.kind]))
        takes = ", ".join(sorted(first.kinds[scheme.kind])) or "no options"
        raise UsageError(
            f"{first.tool} cannot do {foreign} with {scheme.kind} of {name}; it takes: {takes}"
        )
    return fit[0]


def fitted(scheme: Scheme, quantizer: Quantizer, rules: Quantization) -> Scheme:
    """Completed with what the rules ask for and the tool can do, and with the type that
    activations get; `broken_rule` says whether that is legal."""
    made = scheme.under(rules, saturates=quantizer.saturates)
    if made.kind == "int8-weights":
        made = replace(made, reduce_range=False)  # computed in float
    if made.activations or made.kind not in ("int8-static", "int16x8", "int8-dynamic"):
        return made
    if made.kind == "int16x8":
        return replace(made, activations="int16")
    if made.kind == "int8-dynamic":
        return replace(made, activations=quantizer.dynamic)
    options = quantizer.activations
    # The zero point of a symmetric uint8 tensor is 128, so symmetric prefers int8.
    preferred = sorted(options, key=lambda one: one != "int8") if made.symmetric else options
    allowed = [one for one in preferred if one in (rules.activations or options)]
    return replace(made, activations=(allowed or preferred)[0])


def candidate_schemes(target: str, rules: Quantization, came: str = "") -> tuple[Scheme, ...]:
    """What `optimize` tries for a format, most promising first, made to fit the rules. `came`: the
    format the model came in."""
    source = readable_as(came)
    tried = _TRIED.get(target, ())
    if source and target == "tflite":
        tried += (Scheme("int8-static", tool="tensorflow"),)
    made = (fitted(one, quantizer_for(one, target, source=source), rules) for one in tried)
    return (Scheme("fp32"), *made)


_MATMUL = Scheme("int8-static", COMPUTE_OPERATORS)
_STATIC = Scheme("int8-static")
_TRIED = {
    "onnx": (_MATMUL, _STATIC, Scheme("int8-dynamic"), Scheme("fp16")),
    "openvino": (
        _MATMUL, _STATIC, Scheme("int8-static", transformer=True),
        Scheme("int8-weights", weights_symmetric=False), Scheme("fp16"),
    ),
    "tflite": (_MATMUL, _STATIC, Scheme("int8-dynamic"), Scheme("fp16")),
}  # fmt: skip
