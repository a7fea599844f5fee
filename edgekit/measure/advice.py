"""What to fix, read off a trace: time that is spent on something else than the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.measure.trace import Step

__all__ = ["Advice", "advice"]

_DEQUANTIZE = ("DequantizeLinear", "DEQUANTIZE")
_QUANTIZE = ("QuantizeLinear", "QUANTIZE")
_LAYOUT = ("Transpose", "TRANSPOSE", "Reorder", "ReorderInput", "ReorderOutput", "Permute")
_CASTS = ("Cast", "CAST", "Convert")
#: under a fiftieth of the time, a fix is not worth a line (islands are: they cost accuracy, too)
_LEAST_SHARE = 0.02
_ACCELERATORS = ("NPU", "GPU", "DSP", "TPU", "QNN", "CUDA")


@dataclass(frozen=True)
class Advice:
    """One thing to fix. `kind`: dequantize-island, layout-transpose, dtype-round-trip or
    wrong-device; `steps` are names; `share` is that of the run's time which may be won (0..1)."""

    kind: str
    steps: tuple[str, ...]
    share: float
    text: str

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return vars(self) | {"steps": list(self.steps)}


def advice(steps: Sequence[Step]) -> list[Advice]:
    """What to fix, the dearest first."""
    flow = _Flow(steps)
    found = [*_islands(flow), *_transposes(flow), *_round_trips(flow), *_elsewhere(flow)]
    return sorted(found, key=lambda one: -one.share)


class _Flow:
    """Steps with who feeds whom."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.total_ns = max(1, sum(one.duration_ns for one in steps))
        self._makers = {name: one for one in steps for name in one.outputs}
        self._users: dict[str, list[Step]] = {}
        for one in steps:
            for name in one.inputs:
                self._users.setdefault(name, []).append(one)

    def before(self, step: Step) -> list[Step]:
        return [self._makers[name] for name in step.inputs if name in self._makers]

    def after(self, step: Step) -> list[Step]:
        return [user for name in step.outputs for user in self._users.get(name, [])]

    def share(self, steps: Sequence[Step]) -> float:
        return sum(one.duration_ns for one in steps) / self.total_ns


def _islands(flow: _Flow) -> Iterator[Advice]:
    """Float operators between a dequantize and a quantize: everything around them is quantized."""
    seen: set[str] = set()
    for start in flow.steps:
        if start.type not in _DEQUANTIZE or start.name in seen:
            continue
        inside, borders, whole = _island(flow, start)
        seen |= {one.name for one in borders}
        if not inside or not whole:
            continue
        names = ", ".join(f"{one.name} ({one.type})" for one in inside[:4])
        names += f" and {len(inside) - 4} more" if len(inside) > 4 else ""
        share = flow.share([*inside, *borders])
        yield Advice(
            "dequantize-island", tuple(one.name for one in inside), share,
            f"{names} run in float between a dequantize and a quantize, {100 * share:.1f} % of the "
            "time together: quantize them, too, or replace them by operators that can be",
        )  # fmt: skip


def _island(flow: _Flow, start: Step) -> tuple[list[Step], list[Step], bool]:
    """The float steps reached, the (de)quantize steps around them, and whether they are enclosed
    on all sides."""
    inside: dict[str, Step] = {}
    borders = {start.name: start}
    whole = True
    waiting = [start]
    while waiting:
        one = waiting.pop()
        users = flow.after(one)
        whole &= bool(users)  # what nobody uses is an output: the end of the model, no island
        for user in users:
            if user.type in _QUANTIZE:
                borders[user.name] = user
            elif user.name not in inside:
                inside[user.name] = user
                waiting.append(user)
                for source in flow.before(user):
                    if source.type in _DEQUANTIZE and source.name not in borders:
                        borders[source.name] = source
                        waiting.append(source)
                    elif source.type not in _DEQUANTIZE and source.name not in inside:
                        whole = False  # comes from float operators that were never quantized
    return list(inside.values()), list(borders.values()), whole


def _transposes(flow: _Flow) -> Iterator[Advice]:
    moves = [one for one in flow.steps if one.type in _LAYOUT]
    share = flow.share(moves)
    if share < _LEAST_SHARE:
        return
    moves.sort(key=lambda one: -one.duration_ns)
    names = ", ".join(f"{one.name} ({one.type})" for one in moves[:4])
    names += f" and {len(moves) - 4} more" if len(moves) > 4 else ""
    yield Advice(
        "layout-transpose", tuple(one.name for one in moves), share,
        f"{100 * share:.1f} % of the time goes into changing layouts: {names}; convert in the "
        "layout that the engine computes in (edgekit convert --layout), or move transposes out of "
        "the model",
    )  # fmt: skip


def _round_trips(flow: _Flow) -> Iterator[Advice]:
    for start in flow.steps:
        if start.type not in _CASTS or not start.dtypes:
            continue
        came = {kind for one in flow.before(start) for kind in one.dtypes}
        if len(came) != 1:
            continue
        between: list[Step] = []
        at = start
        for _ in range(4):
            users = flow.after(at)
            if len(users) != 1:
                break
            at = users[0]
            if at.type in _CASTS and set(at.dtypes) == came:
                yield _round_trip(flow, start, between, at)
                break
            between.append(at)


def _round_trip(flow: _Flow, start: Step, between: list[Step], end: Step) -> Advice:
    share = flow.share([start, end])
    (kind,) = end.dtypes[:1]
    inner = ", ".join(f"{one.name} ({one.type})" for one in between) or "nothing"
    return Advice(
        "dtype-round-trip", (start.name, end.name), share,
        f"{start.name} casts {kind} to {start.dtypes[0]} and {end.name} back, with {inner} between "
        f"them, {100 * share:.1f} % of the time: compute in {kind} throughout",
    )  # fmt: skip


def _elsewhere(flow: _Flow) -> Iterator[Advice]:
    """Steps on the processor while others run on an accelerator."""
    quick = {d for d in {one.device for one in flow.steps} if d.upper().startswith(_ACCELERATORS)}
    left = [one for one in flow.steps if one.device not in quick]
    if not quick or not left:
        return
    share = flow.share(left)
    kinds = ", ".join(sorted({one.type for one in left})[:6])
    yield Advice(
        "wrong-device", tuple(one.name for one in left), share,
        f"{len(left)} of {len(flow.steps)} operators ({kinds}) ran on {left[0].device}, not on "
        f"{'+'.join(sorted(quick))}, {100 * share:.1f} % of the time: edgekit inspect --for "
        "PROFILE says which operators the accelerator takes",
    )  # fmt: skip
