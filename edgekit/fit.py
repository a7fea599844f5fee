"""Does a model fit a device? Judged from the model's graph and the profile, before any work.

Every operator is judged at every place it could run: the CPU by each engine of the profile, and
each accelerator. Memory is a lower bound, so "does not fit" is certain and "fits" is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from edgekit.artifact import FORMAT_NAMES
from edgekit.device import Accelerator, DeviceProfile, EngineFacts
from edgekit.graph import Graph, Operator
from edgekit.graph.names import native_names
from edgekit.operators import OperatorTable, engine_table, operator_table
from edgekit.precision import activation_types, computed_types
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

    precision: Literal["as it came", "int8"]
    weights: int
    activations: int | None
    at: str = ""


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

    def _too_big(self) -> Iterator[str]:
        rules = self.profile.quantization
        may = rules.activations is None or {"int8", "uint8"} & set(rules.activations)
        need = self.needs[-1] if may else self.needs[0]
        for field, limit, wanted, what in self.limits(need):
            if wanted is not None and wanted > limit:
                source = self.profile.source_of(field)
                where = f" (most at {need.at})" if "activations" in what and need.at else ""
                yield (
                    f"{what} need at least {_size(wanted)} {_as(need)}{where}; "
                    f"{self.profile.id} has {_size(limit)} ({field}"
                    f"{f'; {source.title}' if source else ''}); estimated"
                )

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
        if most and graph.opset and graph.opset > most:
            return Verdict("no", f"opset {graph.opset}; {table.called} takes up to {most}")
    if graph.format == table.format == "tflite" and not operator.custom:
        highest = (facts.operator_versions or {}).get(operator.type)
        highest = highest or table.operators[operator.type]
        if highest and operator.version > highest:
            return Verdict(
                "no",
                f"{operator.type} version {operator.version}; {table.called} takes up to {highest}",
            )
    needs = ("fixed shapes",) if facts.static_shapes and _free(operator, graph) else ()
    return Verdict("runs", listed.reason, needs)


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
    found = []
    made = {name for operator in graph.operators for name in operator.outputs}
    stored = [t for n, t in graph.tensors.items() if t.constant and n not in made]
    kinds: tuple[tuple[Literal["as it came", "int8"], int | None], ...] = (
        ("as it came", None), ("int8", 1),
    )  # fmt: skip
    saved = sum((t.size_bytes or 0) * 3 // 4 for t in stored if t.dtype == "float32")
    for precision, width in (
        kinds if any("float" in one for one in activation_types(graph)) else kinds[:1]
    ):
        peak = graph.peak_activation_bytes(width)
        weights = graph.weight_bytes - (saved if width else 0)
        activations, at = peak or (None, "")
        found.append(MemoryNeed(precision, max(0, weights), activations, at))
    return tuple(found)


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


def _as(need: MemoryNeed) -> str:
    return "even in int8" if need.precision == "int8" else "as the model came"


def _size(size_bytes: int) -> str:
    """Exact where it is small: two figures that differ must not look the same."""
    if size_bytes < 10_000:
        return f"{size_bytes} bytes"
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def format_name(graph: Graph) -> str:
    """`ONNX opset 15`, `TFLite`."""
    opset = f" opset {graph.opset}" if graph.opset else ""
    return f"{FORMAT_NAMES[graph.format]}{opset}"
