"""Where a model really runs: what was asked for beside what the engine says it did."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Mapping, Tuple

from .errors import LimitError

__all__ = ["Placement", "by_macs", "enforce", "shortfall"]

#: what multiplies and accumulates, in the names of the engines that tell their operators one by one
_MULTIPLIES = (
    r"(Fused|QLinear|Q)?(Conv|MatMul|Gemm)|Deconv|InnerProduct|LSTM|GRU|RNN|Attention|Einsum"
)
_NAMED = 3

#: of an operator: its device, its type and its name
Node = Tuple[str, str, str]


@dataclass(frozen=True)
class Placement:
    """Read from the engine after loading, never assumed.

    `shares` maps a device (`CPU`, `GPU`, `NPU`) to its share, 0..1: of the operators, or of the
    multiply-accumulates where they are known (`of`). `unknown` is the share of which the engine
    does not say where it runs. `precision` is what the engine computes floats in (`float32`,
    `bfloat16`, ...). `delegate` is what executes them there (`CPUExecutionProvider`, `XNNPACK`,
    ...). `nodes` are the operators one by one, where an accelerator was asked for. `simulated`
    names what stands in for the accelerator on this machine: no time taken on it means anything.
    """

    shares: Dict[str, float]
    delegate: str
    precision: str
    operators: Dict[str, Any] = field(default_factory=dict)
    nodes: Tuple[Node, ...] = ()
    of: str = "operators"
    simulated: str = ""

    def __str__(self) -> str:
        shares = ", ".join(f"{d} {100 * s:.4g} %" for d, s in sorted(self.shares.items()))
        emulated = f", simulated by {self.simulated}" if self.simulated else ""
        return f"{shares} ({self.delegate}, {self.precision}{emulated})"

    def elsewhere(self, device: str) -> Tuple[Node, ...]:
        """The operators that are not on a device."""
        return tuple(one for one in self.nodes if one[0] != device)


def by_macs(found: Placement, macs: Mapping[str, int]) -> Placement:
    """The shares as shares of the multiply-accumulates, `macs` by operator.

    Engines merge and rename operators before they place them. What is not found by its name
    counts where every operator that multiplies and whose name is not known is; where those are in
    two places, as `unknown`.
    """
    total = sum(macs.values())
    if not total or not found.nodes:
        return found
    counts: Dict[str, float] = {}
    strange = set()
    for device, kind, name in found.nodes:
        if name in macs:
            counts[device] = counts.get(device, 0) + macs[name]
        elif re.match(_MULTIPLIES, kind) or kind == "EPContext":
            strange.add(device)
    rest = total - sum(counts.values())
    if rest > 0:
        where = strange or {device for device, _, _ in found.nodes if device != "CPU"}
        device = where.pop() if len(where) == 1 else "unknown"
        counts[device] = counts.get(device, 0) + rest
    return replace(found, shares={d: n / total for d, n in counts.items()}, of="MACs")


def shortfall(contract: Mapping[str, float], found: Placement) -> str:
    """How what the engine did falls short of the shares that a contract wants, naming operators
    that are elsewhere; empty if it does not."""
    for device, wanted in contract.items():
        share = found.shares.get(device, 0.0)
        if share + 1e-6 >= wanted:
            continue
        what = "multiply-accumulates" if found.of == "MACs" else "operators"
        left = found.elsewhere(device)
        left = tuple(one for one in left if re.match(_MULTIPLIES, one[1])) or left
        named = ", ".join(f"{kind} {name}" for _, kind, name in left[:_NAMED])
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        return (
            (f"not on {device}: {named}{more}; " if named else "")
            + f"{100 * share:.4g} % of its {what} are on {device}, wanted {100 * wanted:.4g} % "
            + f"({found})"
        )
    return ""


def enforce(contract: Mapping[str, float], found: Placement, *, variant: str) -> None:
    """Compare what the engine did with what the bundle promises.

    Raises:
        LimitError: a device has a smaller share than the contract says.
    """
    why = shortfall(contract, found)
    if why:
        raise LimitError(f"variant {variant!r}: {why}; refused: nothing falls back in silence")
