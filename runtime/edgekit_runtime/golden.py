"""Golden checks: does the model compute here what it computed where the bundle was made?"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Union

import numpy as np

from .arrays import read_npz
from .bundle import Bundle
from .errors import BundleError, InputError, one_line
from .manifest import Tolerance
from .session import Session
from .source import Source

__all__ = ["GoldenResult", "check", "check_session", "compare", "read_arrays"]


@dataclass(frozen=True)
class GoldenResult:
    """One output over all golden samples. `worst` is max(|got - want| / allowed), good <= 1."""

    output: str
    ok: bool
    max_abs: float
    worst: float
    samples: int
    note: str = ""


def check(
    path: Union[str, Path], *, variant: Optional[str] = None, threads: Optional[int] = None
) -> List[GoldenResult]:
    """Run a bundle's golden inputs and compare with its golden outputs.

    Raises:
        BundleError: the bundle is damaged; also what `load` raises.
    """
    source = Source(Path(path), variant, threads)
    with Bundle(path) as bundle, Session(source, source.open(bundle)) as session:
        return check_session(session, bundle)


def check_session(session: Session, bundle: Bundle) -> List[GoldenResult]:
    """As `check`, with a session on the bundle that is open.

    Raises:
        BundleError: the golden arrays are not what the manifest says.
    """
    chosen = session.variant
    assert chosen is not None  # noqa: S101  (sessions on bundles have one)
    inputs = read_arrays(bundle.read(chosen.golden.inputs))
    wanted = read_arrays(bundle.read(chosen.golden.outputs))
    for array in (*inputs.values(), *wanted.values()):
        if array.ndim == 0 or len(array) != chosen.golden.samples:
            raise BundleError(
                f"{bundle.path}: a golden array has the shape {list(array.shape)}; "
                f"wanted {chosen.golden.samples} samples"
            )
    found = compare(session, inputs, wanted, chosen.golden.tolerance)
    session.postprocess({name: array[0, ...] for name, array in wanted.items()})
    return found


def compare(
    session: Session,
    inputs: Dict[str, np.ndarray],
    wanted: Dict[str, np.ndarray],
    tolerance: Dict[str, Tolerance],
) -> List[GoldenResult]:
    """Each sample alone through the session against `wanted`; arrays have a leading sample axis.

    Raises:
        BundleError: `wanted` or `tolerance` is not about exactly the session's outputs.
    """
    names = [spec.name for spec in session.outputs]
    if set(wanted) != set(names) or not set(names) <= set(tolerance) or not inputs:
        raise BundleError(
            f"golden outputs {sorted(wanted)} with tolerances {sorted(tolerance)}; wanted "
            f"both for {sorted(names)}"
        )
    samples = len(next(iter(inputs.values())))
    # [i, ...] and not [i]: a sample of a scalar input is an array, too
    got = [session.run({k: v[i, ...] for k, v in inputs.items()}) for i in range(samples)]
    return [
        _compare_output(name, [one[name] for one in got], wanted[name], tolerance[name])
        for name in names
    ]


def _compare_output(
    name: str, found: List[np.ndarray], expected: np.ndarray, limit: Tolerance
) -> GoldenResult:
    def failed(note: str) -> GoldenResult:
        return GoldenResult(name, False, float("inf"), float("inf"), len(found), note)

    for one in found:
        if one.shape != expected.shape[1:]:
            return failed(f"shape {list(one.shape)}, wanted {list(expected.shape[1:])}")
    if expected.dtype.kind not in "fiub":  # strings
        same = all(np.array_equal(one, want) for one, want in zip(found, expected))
        return GoldenResult(name, True, 0.0, 0.0, len(found)) if same else failed("other strings")
    wide, target = np.stack(found).astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(wide).all() and np.isfinite(target).all()):
        return failed("NaN or Inf")
    with np.errstate(over="ignore"):
        difference = np.abs(wide - target)
        allowed = limit.atol + limit.rtol * np.abs(target)
        # Where nothing is allowed, 1e-300 makes any difference infinitely too large.
        worst = float(np.max(difference / np.maximum(allowed, 1e-300), initial=0.0))
    largest = float(difference.max(initial=0.0))
    return GoldenResult(name, worst <= 1.0, largest, worst, len(found))


def read_arrays(data: bytes) -> Dict[str, np.ndarray]:
    """The arrays of an `.npz` held in memory; never unpickles.

    Raises:
        BundleError: it is unreadable, or compressed and so of a size nobody declared.
    """
    import zipfile

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                raise InputError("it is compressed; wanted numpy.savez")
        return read_npz(io.BytesIO(data))
    except Exception as error:
        raise BundleError(f"a golden file is unreadable: {one_line(error)}") from None
