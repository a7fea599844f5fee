"""Golden checks: does the model compute here what it computed where the bundle was made?"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Union

import numpy as np

from .bundle import Bundle
from .errors import BundleError, one_line
from .manifest import Tolerance
from .session import Session, open_variant

__all__ = ["GoldenResult", "check", "compare", "read_arrays"]


@dataclass(frozen=True)
class GoldenResult:
    """One output over all golden samples. `worst` is max(|got - want| / allowed), good <= 1."""

    output: str
    ok: bool
    max_abs: float
    worst: float
    note: str = ""


def check(
    path: Union[str, Path], *, variant: Optional[str] = None, threads: Optional[int] = None
) -> List[GoldenResult]:
    """Run a bundle's golden inputs and compare with its golden outputs.

    Raises:
        BundleError: the bundle is damaged; also what `load` raises.
    """
    with Bundle(path) as bundle, open_variant(bundle, variant, threads=threads) as session:
        chosen = session.variant
        assert chosen is not None  # noqa: S101  (sessions on bundles have one)
        inputs = read_arrays(bundle.read(chosen.golden.inputs))
        wanted = read_arrays(bundle.read(chosen.golden.outputs))
        return compare(session, inputs, wanted, chosen.golden.tolerance)


def compare(
    session: Session,
    inputs: Dict[str, np.ndarray],
    wanted: Dict[str, np.ndarray],
    tolerance: Dict[str, Tolerance],
) -> List[GoldenResult]:
    """Each sample alone through the session against `wanted`; arrays have a leading sample axis."""
    samples = len(next(iter(inputs.values())))
    got = [session.run({k: v[i] for k, v in inputs.items()}) for i in range(samples)]
    results = []
    for name, expected in wanted.items():
        limit = tolerance[name]
        found = np.stack([one[name] for one in got])
        if found.shape != expected.shape:
            note = f"shape {list(found.shape[1:])}, wanted {list(expected.shape[1:])}"
            results.append(GoldenResult(name, False, float("inf"), float("inf"), note))
            continue
        if not np.all(np.isfinite(found.astype(np.float64))):
            results.append(GoldenResult(name, False, float("inf"), float("inf"), "NaN or Inf"))
            continue
        wide, target = found.astype(np.float64), expected.astype(np.float64)
        difference = np.abs(wide - target)
        allowed = limit.atol + limit.rtol * np.abs(target)
        worst = float(np.max(difference / np.maximum(allowed, 1e-300), initial=0.0))
        results.append(GoldenResult(name, worst <= 1.0, float(difference.max(initial=0.0)), worst))
    return results


def read_arrays(data: bytes) -> Dict[str, np.ndarray]:
    """The arrays of an `.npz` held in memory; never unpickles."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise BundleError(f"a golden file is unreadable: {one_line(error)}") from None
