"""Do two contenders answer alike? Each runs in a child process, on the same inputs."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.measure.worker import Contender
from edgekit_runtime.arrays import read_npz, write_npz
from edgekit_runtime.loading import load
from edgekit_runtime.worker import read_samples, synthetic_inputs

__all__ = ["agreement", "run"]

_SAMPLES = 8


def agreement(base: Contender, new: Contender, *, inputs: Path | None) -> dict[str, Any]:
    """`{compared, cosine, top1, broken, why}` over 8 samples of `inputs`, or of seeded noise.

    `cosine` is the least of all outputs and samples, `top1` the share of rows with the same
    greatest value, `broken` whether `new` has NaN or infinities where `base` has none. Outputs are
    matched by name, by place where the names differ. `compared` is False, and `why` says so,
    where the two do not take the same inputs or give outputs of other shapes.

    Raises:
        EdgeKitError: one of them cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
        sides = []
        for name, one in (("base", base), ("new", new)):
            made = Path(scratch) / f"{name}.npz"
            request = {
                "model": str(one.path), "engine": one.engine, "threads": one.threads,
                "precision": one.precision, "inputs": str(inputs) if inputs else None,
                "outputs": str(made),
            }  # fmt: skip
            specs = sandbox.call("edgekit.measure.agreement:run", request, what=one.id)
            sides.append((specs, read_npz(made)))
    (base_specs, ours), (new_specs, theirs) = sides
    if inputs is None and base_specs != new_specs:
        return _not_compared(
            f"they take other inputs ({_text(base_specs)}; {_text(new_specs)}), for which noise "
            "cannot be the same: give samples with --input, or use edgekit check"
        )
    return _alike(ours, theirs)


def run(
    model: str, engine: str | None, *, threads: int, precision: str, inputs: str | None,
    outputs: str,
) -> list[list[Any]]:  # fmt: skip
    """In the child: run, write `outputs` (number/name), return the inputs' dtypes and shapes."""
    options: dict[str, Any] = {"engine": engine, "precision": precision}
    with load(model, threads=threads or None, **options) as session:
        if inputs is None:
            samples = [synthetic_inputs(session, seed=seed) for seed in range(_SAMPLES)]
        else:
            samples = list(islice(read_samples(session, Path(inputs)), _SAMPLES))
        made = {}
        for number, sample in enumerate(samples):
            for place, (name, array) in enumerate(session.run(sample).items()):
                made[f"{number}/{place}/{name}"] = array
        specs = [[spec.dtype, list(spec.usual_shape())] for spec in session.inputs]
    write_npz(Path(outputs), made)
    return specs


def _text(specs: list[list[Any]]) -> str:
    return ", ".join(f"{dtype} {shape}" for dtype, shape in specs)


def _not_compared(why: str) -> dict[str, Any]:
    return {"compared": False, "cosine": None, "top1": None, "broken": False, "why": why}


def _alike(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> dict[str, Any]:
    base, new = _grouped(ours), _grouped(theirs)
    least, same, rows, broken = 1.0, 0, 0, False
    for number, outputs in base.items():
        others = new.get(number, {})
        if len(outputs) != len(others):
            return _not_compared(f"{len(outputs)} outputs and {len(others)}")
        by_name = set(outputs) == set(others)
        for place, (name, one) in enumerate(outputs.items()):
            other = others[name] if by_name else list(others.values())[place]
            if one.size != other.size or one.dtype.kind not in "fiub":
                return _not_compared(f"output {name!r} is {one.shape} in one, {other.shape}")
            a, b = (array.astype(np.float64).ravel() for array in (one, other))
            broken |= bool(np.isfinite(a).all() and not np.isfinite(b).all())
            least = min(least, _cosine(a, b))
            if one.ndim >= 2 and one.shape[-1] > 1 and one.shape == other.shape:
                hits = one.argmax(-1) == other.argmax(-1)
                same, rows = same + int(hits.sum()), rows + hits.size
    return {
        "compared": True, "cosine": round(least, 6), "top1": same / rows if rows else None,
        "broken": broken, "why": "",
    }  # fmt: skip


def _grouped(arrays: dict[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in arrays.items():
        number, _, name = key.split("/", 2)
        found.setdefault(number, {})[name] = array
    return found


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if np.array_equal(a, b):
        return 1.0
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    found = float(a @ b) / size if size > 0 else 0.0
    return found if np.isfinite(found) else -1.0
