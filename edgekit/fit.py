"""Does a model fit a device? Judged from the model's graph and the profile, before any work.

Every operator is judged at every place it could run: the CPU by each engine of the profile, and
each accelerator. Memory is a lower bound for engines that run operators one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from edgekit.artifact import FORMAT_NAMES
from edgekit.device import Accelerator, DeviceProfile, EngineFacts, Quantization
from edgekit.graph import Graph, Operator
from edgekit.graph.names import native_names
from edgekit.operators import OperatorTable, engine_table, operator_table
from edgekit.precision import activation_types, computed_types, in_8_bits
from edgekit_runtime.engines import ENGINES

__all__ = ["Fit", "MemoryNeed", "Place", "Verdict", "format_name", "judge"]

#: they lead from float to 8 bits and back: no quantization makes their other side 8 bits, too
_BORDER = frozenset({"QuantizeLinear", "DequantizeLinear"})
State = Literal["runs", "no", "unknown"]
#: engines that compute on the CPU; the others only lead to an accelerator
_CPU_ENGINES = frozenset({*ENGINES, "tflm"})


@dataclass(frozen=True)
class Place:
    """Where operators can run: `cpu` by an engine, or an accelerator. `by` says whose list of
    operators the judgement is from."""

    id: str
    kind: str
    engine: str
    by: str


@dataclass(frozen=True)
class Verdict:
    """Of one operator at one place. `needs`: what must be done to the model first (`int8`,
    `float16`, `fixed shapes`), which `edgekit optimize` does or says."""

    state: State
    reason: str = ""
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.state != "runs":
            return {"no": "no", "unknown": "?"}[self.state]
        return f"if {' and '.join(self.needs)}" if self.needs else "yes"


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes at least, estimated: weights as stored, activations with operators run one by one.
    None where a free dimension hides it. `at` is the operator with the most activations."""

    precision: str
    weights: int
    activations: int | None
    at: str = ""

    @property
    def words(self) -> str:
        """For messages."""
        return "as the model came" if self.precision == "as it came" else f"even {self.precision}"


@dataclass(frozen=True)
class Fit:
    """The judgement. `verdicts[place.id]` has one entry per operator of the graph."""

    profile: DeviceProfile
    graph: Graph
    places: tuple[Place, ...]
    verdicts: Mapping[str, tuple[Verdict, ...]]
    needs: tuple[MemoryNeed, ...]

    @cached_property
    def hopeless(self) -> tuple[str, ...]:
        """Why the device cannot run the model in any precision its rules allow; empty if it may."""
        return (*self._too_big(), *self._nowhere())

    @cached_property
    def activations(self) -> frozenset[str]:
        """The types in which the operators that multiply matrices take their activations."""
        return activation_types(self.graph)

    def macs_share(self, place: Place) -> float | None:
        """The share of multiply-accumulates of operators that run at a place, after what they
        need was done; None if it is not known."""
        counts = [operator.macs for operator in self.graph.operators]
        here = self.verdicts[place.id]
        total = sum(count or 0 for count in counts)
        open_ones = (c != 0 and v.state == "unknown" for c, v in zip(counts, here, strict=True))
        if None in counts or not total or any(open_ones):
            return None
        run = sum(c or 0 for c, v in zip(counts, here, strict=True) if v.state == "runs")
        return run / total

    def limits(self, need: MemoryNeed) -> tuple[tuple[str, int, int | None, str], ...]:
        """`(field of the profile, its bytes, bytes needed at least, of what)`, one per limit."""
        return tuple(_limits(self.profile, need))

    def reasons(self, place: Place, state: State) -> dict[str, list[str]]:
        """Reason -> paths of the operators with this verdict at a place."""
        found: dict[str, list[str]] = {}
        for operator, verdict in zip(self.graph.operators, self.verdicts[place.id], strict=True):
            if verdict.state == state:
                found.setdefault(verdict.reason, []).append(operator.path)
        return found

    def too_big(self, need: MemoryNeed) -> Iterator[tuple[str, str]]:
        """`(field of the profile, words with both numbers)` of each limit that a need is over."""
        for field, limit, wanted, what in self.limits(need):
            if wanted is not None and wanted > limit:
                where = f" (most at {need.at})" if "activations" in what and need.at else ""
                yield (
                    field,
                    (
                        f"{what} need at least {_size(wanted)} {need.words}{where}; "
                        f"{self.profile.id} has {_size(limit)}"
                    ),
                )

    def _too_big(self) -> Iterator[str]:
        """As small as the rules allow: with 8-bit weights, say, and float activations."""
        least = self.needs[0]
        if len(self.needs) > 1:
            least = _smallest(self.graph, self.profile.quantization)
        for field, words in self.too_big(least):
            source = self.profile.source_of(field)
            yield f"{words} ({field}{f'; {source.title}' if source else ''}); estimated"

    def _nowhere(self) -> Iterator[str]:
        by_reason: dict[str, list[Operator]] = {}
        for number, operator in enumerate(self.graph.operators):
            here = [self.verdicts[place.id][number] for place in self.places]
            if here and all(one.state == "no" for one in here):
                reasons = dict.fromkeys(one.reason for one in here)
                by_reason.setdefault("; ".join(reasons), []).append(operator)
        for reason, operators in by_reason.items():
            kinds = ", ".join(dict.fromkeys(one.type for one in operators))
            paths = ", ".join(one.path for one in operators[:3])
            more = f" and {len(operators) - 3} more" if len(operators) > 3 else ""
            yield f"{kinds} ({paths}{more}) cannot run on {self.profile.id}: {reason}"

    def to_json(self) -> dict[str, Any]:
        """Every operator and every place."""
        return {
            "profile": self.profile.id,
            "places": [
                {
                    "id": place.id,
                    "kind": place.kind,
                    "engine": place.engine,
                    "judged_by": place.by,
                    "macs_share": self.macs_share(place),
                }
                for place in self.places
            ],
            "operators": [
                {
                    "name": operator.path,
                    "type": operator.type,
                    "version": operator.version,
                    "macs": operator.macs,
                    "places": {
                        place.id: {
                            "state": self.verdicts[place.id][number].state,
                            "needs": list(self.verdicts[place.id][number].needs),
                            "reason": self.verdicts[place.id][number].reason,
                        }
                        for place in self.places
                    },
                }
                for number, operator in enumerate(self.graph.operators)
            ],
            "macs": self.graph.macs,
            "memory": [
                {
                    "precision": need.precision,
                    "weight_bytes": need.weights,
                    "activation_bytes": need.activations,
                    "at": need.at,
                    "label": "estimated",
                }
                for need in self.needs
            ],
            "limits": [
                {"field": field, "bytes": limit, "for": what}
                for field, limit, _, what in self.limits(self.needs[0])
            ],
            "hopeless": list(self.hopeless),
        }


def judge(graph: Graph, profile: DeviceProfile) -> Fit:
    """Judge every operator of a graph at every place of a device, and the memory.

    Raises:
        UsageError: the profile names an operator table that does not exist.
    """
    types = computed_types(graph)
    places, verdicts = [], {}
    for name, facts in profile.engines.items():
        if name not in _CPU_ENGINES:
            continue
        table = engine_table(name, version=facts.version, distribution=facts.distribution)
        by = table.called if table else "nobody: no list of its operators is known"
        places.append(Place(name, "cpu", name, by))
        verdicts[name] = tuple(_on_cpu(one, graph, facts, table) for one in graph.operators)
    for name, one in profile.accelerators.items():
        table = operator_table(one.operator_table) if one.operator_table else None
        by = table.called if table else ("the profile" if one.operators else "nobody")
        places.append(Place(name, one.kind, one.engine, by))
        verdicts[name] = tuple(
            _on_accelerator(operator, graph, one, table, types) for operator in graph.operators
        )
    return Fit(profile, graph, tuple(places), verdicts, _needs(graph))


# --- operators ----------------------------------------------------------------------------------

_AT_LOAD = Verdict("runs", "computed once, at load")


def _on_cpu(
    operator: Operator, graph: Graph, facts: EngineFacts, table: OperatorTable | None
) -> Verdict:
    if table is None:
        return Verdict("unknown", "no list of its operators is known")
    listed = _listed(operator, graph, table.format, table.operators, table.called)
    if listed.state != "runs":
        return listed
    if graph.format == table.format == "onnx" and not operator.custom:
        most = facts.opset or table.opset
        fault = _onnx_version(operator, graph, table, most)
        if fault:
            return fault
    if graph.format == table.format == "tflite" and not operator.custom:
        highest = (facts.operator_versions or {}).get(operator.type)
        highest = highest or table.operators[operator.type]
        if highest and operator.version > highest:
            return Verdict(
                "no",
                f"{operator.type} version {operator.version}; {table.called} takes up to {highest}",
            )
    rare = {graph.tensors[n].dtype for n in (*operator.inputs, *operator.outputs) if n} & _RARE
    if rare:
        kinds = ", ".join(sorted(map(str, rare)))
        return Verdict("unknown", f"which kernels of {table.called} take {kinds} is not listed")
    needs = ("fixed shapes",) if facts.static_shapes and _free(operator, graph) else ()
    return Verdict("runs", listed.reason, needs)


#: types for which CPU engines have kernels of some operators only
_RARE = frozenset({"bfloat16", "float64", "int16", "uint16", "uint32", "uint64", "int4", "uint4"})


def _onnx_version(
    operator: Operator, graph: Graph, table: OperatorTable, most: int | None
) -> Verdict | None:
    """What speaks against an ONNX operator in the version its model uses."""
    opset = graph.opset or 0
    if most and opset > most:
        return Verdict("no", f"opset {opset}; {table.called} takes up to {most}")
    if table.opset_least and 0 < opset < table.opset_least:
        return Verdict(
            "unknown", f"opset {opset}; {table.called} promises {table.opset_least} and newer"
        )
    known = table.operators[operator.type]
    if known and operator.version > known:
        return Verdict(
            "no",
            f"{operator.type} as of opset {operator.version}; {table.called} has that of {known}",
        )
    return None


def _on_accelerator(
    operator: Operator,
    graph: Graph,
    place: Accelerator,
    table: OperatorTable | None,
    types: Mapping[str, str | None],
) -> Verdict:
    if graph.folded(operator):
        return _AT_LOAD
    if table is not None:
        listed = _listed(operator, graph, table.format, table.operators, table.called)
    elif place.operators is not None and place.operator_format is not None:
        own = dict.fromkeys(place.operators, 0)
        listed = _listed(operator, graph, place.operator_format, own, "the profile")
    else:
        listed = Verdict("unknown", "no list of its operators is known")
    needs, fault = _conversions(operator, graph, place, types)
    if listed.state == "no":
        return listed
    fault = fault or _limit_broken(operator, graph, place, needs)
    if fault:
        return Verdict("no", fault)
    if place.static_shapes and _free(operator, graph):
        needs.append("fixed shapes")
    return Verdict(listed.state, listed.reason, tuple(needs))


def _conversions(
    operator: Operator, graph: Graph, place: Accelerator, types: Mapping[str, str | None]
) -> tuple[list[str], str | None]:
    """What must become of the activations' types first; or which type cannot become any that is
    taken."""
    needs: dict[str, None] = {}
    for name in filter(None, (*operator.inputs, *operator.outputs)):
        dtype = types.get(name)
        constant = graph.tensors[name].constant
        if constant or place.dtypes is None or dtype is None or dtype in place.dtypes:
            continue
        step = _towards(dtype, place.dtypes)
        if step is None or operator.canonical in _BORDER:
            return [], f"{dtype} activations; takes {', '.join(place.dtypes)}"
        needs[step] = None
    return list(needs), None


def _limit_broken(
    operator: Operator, graph: Graph, place: Accelerator, needs: list[str]
) -> str | None:
    touched = [graph.tensors[n] for n in (*operator.inputs, *operator.outputs) if n]
    most = place.most_dimensions
    rank = max((len(t.shape) for t in touched if t.shape and not t.constant), default=0)
    if most and rank > most:
        return f"a tensor of {rank} dimensions; takes at most {most}"
    if place.per_channel is False and any(t.constant and t.per_channel for t in touched):
        return "weights with a scale per channel; takes one per tensor"
    size = graph.bytes_moved(operator, 1 if any("int8" in one for one in needs) else None)
    if place.memory_bytes and size and size > place.memory_bytes:
        return f"needs {_size(size)}, has {_size(place.memory_bytes)}"
    return None


def _listed(
    operator: Operator, graph: Graph, fmt: str, known: Mapping[str, int], called: str
) -> Verdict:
    """Whether a list of operators has this one, under the list's own names for it. Also one that
    is computed once, at load: the engine does that with its own kernel."""
    if graph.format == fmt:
        if operator.type in known:
            return Verdict("runs")
        kind = "custom operator " if operator.custom else ""
        return Verdict("no", f"{kind}{operator.type} is not among the operators of {called}")
    if operator.canonical is None and operator.custom:
        return Verdict("no", f"custom operator {operator.type} has no counterpart elsewhere")
    names: frozenset[str] = frozenset()
    if operator.canonical and fmt != "ncnn":  # what pnnx makes of an operator is not tabled
        names = native_names(operator.canonical, fmt)
    here = sorted(names & set(known))
    # Converting may build it of others: an absent name proves nothing.
    unknown = Verdict("unknown", f"{operator.type} has no counterpart of its own there")
    return Verdict("runs", f"as {here[0]}") if here else unknown


def _free(operator: Operator, graph: Graph) -> bool:
    return any(
        shape is None or any(isinstance(dim, str) for dim in shape)
        for shape in (graph.tensors[n].shape for n in (*operator.inputs, *operator.outputs) if n)
    )


def _towards(dtype: str, allowed: list[Any]) -> str | None:
    """What would turn a type into an allowed one; None if nothing does."""
    if dtype in ("int8", "uint8"):
        return next((one for one in ("int8", "uint8") if one in allowed), None)
    if "float" not in dtype:
        return None
    eight = next((one for one in ("int8", "uint8") if one in allowed), None)
    half = next((one for one in ("float16", "bfloat16") if one in allowed), None)
    found = [one for one in (eight, half) if one] or [one for one in ("int16",) if one in allowed]
    return " or ".join(found) or None


# --- memory -------------------------------------------------------------------------------------


def _needs(graph: Graph) -> tuple[MemoryNeed, ...]:
    """As it came, and with every float in one byte, unless it computes in 8 bits already."""
    small = in_8_bits(graph)
    activations, at = small.peak_activation_bytes() or (None, "")
    as_it_came = MemoryNeed("as it came", graph.weight_bytes, activations, at)
    if not any("float" in one for one in activation_types(graph)):
        return (as_it_came,)
    return as_it_came, _need(graph, "in int8", weight_bytes=1, activation_bytes=1)


def _smallest(graph: Graph, rules: Quantization) -> MemoryNeed:
    """What the rules allow at best."""
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}
    weights = min((sizes.get(one, 1) for one in rules.weights or ["int8"]), default=1)
    activations = min((sizes.get(one, 1) for one in rules.activations or ["int8"]), default=1)
    words = "in int8"
    if (weights, activations) != (1, 1):
        words = f"with {weights} bytes a weight and {activations} an activation"
    return _need(graph, words, weight_bytes=weights, activation_bytes=activations)


def _need(graph: Graph, words: str, *, weight_bytes: int, activation_bytes: int) -> MemoryNeed:
    made = {name for operator in graph.operators for name in operator.outputs}
    stored = [t for n, t in graph.tensors.items() if t.constant and n not in made]
    float32 = sum(t.size_bytes or 0 for t in stored if t.dtype == "float32")
    saved = float32 * (4 - weight_bytes) // 4
    peak, at = graph.peak_activation_bytes(activation_bytes) or (None, "")
    return MemoryNeed(words, max(0, graph.weight_bytes - saved), peak, at)


def _limits(profile: DeviceProfile, need: MemoryNeed) -> Iterator[tuple[str, int, int | None, str]]:
    """`(field, limit, what is needed, of what)` in bytes; a microcontroller keeps weights in
    flash and activations in SRAM or the RAM beside the chip, others both in RAM."""
    memory = profile.memory
    both = None if need.activations is None else need.activations + need.weights
    if memory.model_bytes:
        yield "memory.model_bytes", memory.model_bytes, both, "weights and activations"
    if profile.kind == "microcontroller" or memory.sram_bytes:
        arena = "sram_bank_bytes" if memory.sram_bank_bytes else "sram_bytes"
        if (memory.ram_bytes or 0) > (getattr(memory, arena) or 0):
            arena = "ram_bytes"  # outside the chip, slower, but there
        if getattr(memory, arena):
            yield f"memory.{arena}", getattr(memory, arena), need.activations, "activations"
        if memory.flash_bytes:
            yield "memory.flash_bytes", memory.flash_bytes, need.weights, "weights"
        return
    least = memory.ram_bytes or min(memory.ram_sold_bytes or [0])
    field = "memory.ram_bytes" if memory.ram_bytes else "memory.ram_sold_bytes"
    if least:
        yield field, least, both, "weights and activations"


def _size(size_bytes: int) -> str:
    """Exact where it is small: two figures that differ must not look the same."""
    if size_bytes < 10_000:
        return f"{size_bytes} bytes"
    if size_bytes >= 1e12:
        return f"{size_bytes:.3g} bytes"
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def format_name(graph: Graph) -> str:
    """`ONNX opset 15`, `TFLite`."""
    opset = f" opset {graph.opset}" if graph.opset else ""
    return f"{FORMAT_NAMES[graph.format]}{opset}"
