"""Where a model really runs: what was asked for beside what the engine says it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict

from .errors import LimitError

__all__ = ["Placement", "enforce"]


@dataclass(frozen=True)
class Placement:
    """Read from the engine after loading, never assumed.

    `shares` maps a device (`CPU`, `GPU`, `NPU`) to its share of the operators, 0..1.
    `precision` is what the engine computes floats in (`float32`, `bfloat16`, ...).
    `delegate` is what executes them there (`CPUExecutionProvider`, `XNNPACK`, ...).
    """

    shares: Dict[str, float]
    delegate: str
    precision: str
    operators: Dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shares = ", ".join(f"{d} {100 * s:.0f} %" for d, s in sorted(self.shares.items()))
        return f"{shares} ({self.delegate}, {self.precision})"


def enforce(contract: Dict[str, float], found: Placement, *, variant: str) -> None:
    """Compare what the engine did with what the bundle promises.

    Raises:
        LimitError: a device has a smaller share than the contract says.
    """
    for device, wanted in contract.items():
        share = found.shares.get(device, 0.0)
        if share + 1e-6 < wanted:
            raise LimitError(
                f"variant {variant!r} was to run {100 * wanted:.0f} % of its operators on "
                f"{device}, "
                f"the engine placed {100 * share:.0f} % there ({found}); "
                "refused: nothing falls back in silence"
            )
