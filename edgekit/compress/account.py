"""What a quantizer really did: for each operator what it computes in, or why it stayed float, and
how much noise is in each tensor. Read from the file it wrote, not from what it was asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import sandbox
from edgekit.artifact import Artifact
from edgekit.compress.calibration import CalibrationSamples
from edgekit.compress.scheme import COMPUTE_OPERATORS, Scheme
from edgekit.divergence import matched
from edgekit.errors import require
from edgekit.graph import Graph, Operator, read_graph, with_batch_one
from edgekit.precision import STEPS_BETWEEN, computed_types, stored_type
from edgekit.taps import TAPPERS, Tap, taps_of
from edgekit_runtime.loading import load

__all__ = ["OperatorAccount", "account_of", "noise_of", "noise_of_tensors"]

_INTEGERS = ("int4", "uint4", "int8", "uint8", "int16", "uint16")
_COMPUTE = ("Conv", "ConvTranspose", "MatMul", "Gemm")


@dataclass(frozen=True)
class OperatorAccount:
    """One operator of the quantized model.

    `computed` is the type of its activations, `weights` that of its stored weights (None: it has
    none), `kept` why it is not quantized ("" if it is). `sqnr_db`: the power of its float output
    over that of the error on it, which includes the error of everything before it; None where the
    tensor is not found in both.
    """

    name: str
    type: str
    output: str
    computed: str
    weights: str | None
    kept: str
    sqnr_db: float | None = None

    @property
    def quantized(self) -> bool:
        """Whether anything of it is in fewer bits."""
        return not self.kept

    def to_json(self) -> dict[str, Any]:
        """For reports and provenance."""
        return asdict(self)


def account_of(
    quantized: Artifact, scheme: Scheme, tool: str, *,
    noise: Mapping[str, float] | None = None, reasons: Mapping[str, str] | None = None,
) -> list[OperatorAccount]:  # fmt: skip
    """A line for each operator of the model, in execution order. `noise` is the SQNR in decibel by
    tensor, `reasons` why operators of `scheme.keep` stay float, by their output.

    Raises:
        ModelError: the model cannot be read.
    """
    graph = read_graph(quantized.path, shapes=with_batch_one(quantized.inputs))
    types = computed_types(graph)
    found = []
    for operator in graph.operators:
        if operator.canonical in STEPS_BETWEEN or operator.type in STEPS_BETWEEN:
            continue
        if graph.folded(operator) or not operator.outputs:
            continue
        weights = _weights_of(operator, graph)
        computed = _computed(operator, graph, types)
        kept_float = not {*operator.outputs}.isdisjoint(scheme.keep)
        if kept_float or (weights is not None and "float" in weights):
            computed = "float32"  # what it reads is unpacked first
        is_quantized = computed in _INTEGERS or weights in (*_INTEGERS, "float16")
        kept = "" if is_quantized else _why(operator, weights, scheme, tool, reasons or {})
        output = operator.outputs[0]
        found.append(
            OperatorAccount(
                operator.path, operator.type, output, computed, weights, kept,
                (noise or {}).get(output),
            )
        )  # fmt: skip
    return found


def _weights_of(operator: Operator, graph: Graph) -> str | None:
    """The type its biggest constant is stored in; None where it multiplies nothing stored."""
    if operator.type.endswith(("MatMulNBits", "GatherBlockQuantized")):
        return "int4"
    if operator.macs == 0 and operator.canonical != "Gather":
        return None
    stored = [
        (graph.tensors[name].size_bytes or 0, name)
        for name in filter(None, operator.inputs)
        if graph.tensors[name].constant and len(graph.tensors[name].shape or ()) > 1
    ]
    return stored_type(graph, max(stored)[1]) if stored else None


def _computed(operator: Operator, graph: Graph, types: Mapping[str, str | None]) -> str:
    """The type of its first activation; of its output where it has none."""
    for name in filter(None, operator.inputs):
        if not graph.tensors[name].constant:
            return str(types[name])
    return str(types[operator.outputs[0]])


def _why(
    operator: Operator, weights: str | None, scheme: Scheme, tool: str, reasons: Mapping[str, str]
) -> str:
    for name in operator.outputs:
        if name in scheme.keep:
            return reasons.get(name, "asked to stay float")
    if scheme.operators != "all" and operator.canonical not in _COMPUTE:
        return f"the scheme is for {COMPUTE_OPERATORS}"
    if scheme.kind in ("int8-weights", "int4-weights", "fp16", "int8-dynamic") and weights is None:
        return "multiplies no stored weights"
    return f"{tool} leaves it"


# --- noise ----------------------------------------------------------------------------------------


def noise_of(
    before: Artifact, after: Artifact, calibration: dict[str, Any],
    *, limits: sandbox.Limits | None = None,
) -> dict[str, float]:  # fmt: skip
    """The SQNR in decibel of every tensor that both models have, by its name in `after`, on the
    samples of a `calibration_request`; both of one format.

    Raises:
        EdgeKitError: a model does not run, or crashed.
    """
    shapes = {n: list(s) for n, s in with_batch_one(before.inputs).items()}
    theirs = _all_comparable(taps_of(after, shapes), after.format)
    pairs = matched(_all_comparable(taps_of(before, shapes), before.format), theirs)
    if not pairs:
        return {}
    rounded = _rounded(read_graph(after.path, shapes=with_batch_one(after.inputs)))
    called = {rounded.get(name, name): name for name in pairs.values()}
    pairs = {one: rounded.get(name, name) for one, name in pairs.items()}
    found = sandbox.call(
        "edgekit.compress.account:noise_of_tensors",
        {"before": str(before.path), "after": str(after.path), "pairs": pairs,
         "calibration": calibration},
        limits=limits, what="comparing the tensors",
    )  # fmt: skip
    return {called[name]: float(value) for name, value in found.items()}


def _rounded(graph: Graph) -> dict[str, str]:
    """For tensors that are rounded right after they are made, the tensor as it goes on: quantizers
    leave a Relu out whose work the rounding does."""
    makers = {one.inputs[0]: one for one in graph.operators if one.canonical == "DequantizeLinear"}
    found = {}
    for one in graph.operators:
        if one.type == "FakeQuantize":
            found[one.inputs[0]] = one.outputs[0]
        elif one.canonical == "QuantizeLinear" and one.outputs[0] in makers:
            found[one.inputs[0]] = makers[one.outputs[0]].outputs[0]
    return found


def _all_comparable(taps: tuple[Tap, ...], fmt: str) -> list[Tap]:
    """TFLite's integers stand for floats, and are read as such here."""
    if fmt != "tflite":
        return list(taps)
    return [Tap(tap.name, tap.node, tap.inputs) for tap in taps]


def noise_of_tensors(
    before: str, after: str, pairs: dict[str, str], calibration: dict[str, Any]
) -> dict[str, float]:
    """Runs in a child: sample by sample, so that memory does not grow with their number."""
    power = dict.fromkeys(pairs.values(), 0.0)
    error = dict.fromkeys(pairs.values(), 0.0)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
        first = _Inside(Path(before), list(pairs), Path(work) / "before")
        second = _Inside(Path(after), list(pairs.values()), Path(work) / "after")
        for sample in CalibrationSamples(calibration):
            wanted, found = first.run(sample), second.run(sample)
            for name, other in pairs.items():
                if name not in wanted or other not in found:
                    continue
                one, two = wanted[name].astype(np.float64), found[other].astype(np.float64)
                if one.shape == two.shape:
                    power[other] += float((one**2).sum())
                    error[other] += float(((one - two) ** 2).sum())
    least = np.finfo(np.float64).tiny
    return {
        name: min(200.0, 10 * float(np.log10(power[name] / max(error[name], least))))
        for name in power
        if power[name] > 0
    }


class _Inside:
    """A model whose intermediate tensors are read with its outputs."""

    def __init__(self, path: Path, names: list[str], work: Path) -> None:
        self._names = names
        self._interpreter: Any = None
        if path.suffix == ".tflite":
            self._open_tflite(path)
            return
        module, _, name = TAPPERS[path.suffix].partition(":")
        tapped = work.with_suffix(path.suffix)
        getattr(import_module(module), name)(str(path), str(tapped), names)
        self._session = load(tapped)

    def run(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors by name, integers as the numbers they stand for."""
        if self._interpreter is None:
            return dict(self._session.run(sample))
        for name, place in self._inputs.items():
            self._interpreter.set_tensor(place, sample[name])
        self._interpreter.invoke()
        return {
            name: self._real(place) for name, place in self._places.items() if place is not None
        }

    def _open_tflite(self, path: Path) -> None:
        tools = require("ai_edge_litert.interpreter", extra="litert")
        self._interpreter = tools.Interpreter(
            str(path), experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=tools.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )  # fmt: skip
        with load(path) as session:
            names = [spec.name for spec in session.inputs]
            shapes = {spec.name: spec.shape for spec in session.inputs}
        details = self._interpreter.get_input_details()
        self._inputs = dict(zip(names, (one["index"] for one in details), strict=True))
        for name, place in self._inputs.items():
            if any(not isinstance(size, int) for size in shapes[name]):
                fixed = [size if isinstance(size, int) else 1 for size in shapes[name]]
                self._interpreter.resize_tensor_input(place, fixed)
        self._interpreter.allocate_tensors()
        self._details = {one["index"]: one for one in self._interpreter.get_tensor_details()}
        by_name: dict[str, int] = {}
        for place, one in self._details.items():
            by_name.setdefault(one["name"], place)
            by_name[f"{one['name']}#{place}"] = place
        self._places = {name: by_name.get(name) for name in self._names}

    def _real(self, place: int) -> Any:
        array = self._interpreter.get_tensor(place)
        scales = self._details[place]["quantization_parameters"]
        if len(scales["scales"]) != 1 or array.dtype.kind not in "iu":
            return array
        return (array.astype(np.float32) - scales["zero_points"][0]) * scales["scales"][0]
