"""Measuring inside a process of its own, commanded by lines of JSON.

The host starts one worker per candidate and asks them in turn for blocks of samples, so that a
noisy machine hits all candidates alike and no engine's threads or memory disturb another's.

    {"cmd": "sample", "count": 10}  ->  {"samples": [ns, ...]}
    {"cmd": "close"}                ->  the process ends
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, IO, List, Optional

import numpy as np

from .errors import EdgeKitError, InputError
from .session import Session, load
from .timing import sample

__all__ = ["cold_start", "main_loop", "peak_rss_bytes", "synthetic_inputs"]

#: at the beginning of each block: others have used the caches since the last one
_UNTIMED_RUNS = 2


def main_loop(
    path: Path, options: Dict[str, Any], inputs: Optional[Path], stdin: IO[str], stdout: IO[str]
) -> int:
    """Load, say so in one line, then answer commands until `close` or end of input."""

    def say(value: Dict[str, Any]) -> None:
        stdout.write(json.dumps(value) + "\n")
        stdout.flush()

    try:
        session = load(path, **options)
        samples = _samples(session, inputs)
        start = time.perf_counter_ns()
        session.run(samples[0])
        first_run_ns = time.perf_counter_ns() - start
    except EdgeKitError as error:
        say({"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    placement = session.placement
    say(
        {
            "ready": True,
            "first_run_ns": first_run_ns,
            "engine_version": session.engine_version,
            "placement": {
                "shares": placement.shares,
                "delegate": placement.delegate,
                "precision": placement.precision,
            },
        }
    )
    position = 0
    for line in stdin:
        command = json.loads(line)
        if command["cmd"] == "close":
            break
        taken: List[int] = []
        for number in range(-_UNTIMED_RUNS, command["count"]):
            current = samples[position % len(samples)]
            position += 1
            ns = sample(lambda: session.run(current), 1)  # noqa: B023  (called at once)
            if number >= 0:
                taken += ns
        say({"samples": taken, "peak_rss_bytes": peak_rss_bytes()})
    session.close()
    return 0


def cold_start(
    path: Path, options: Dict[str, Any], inputs: Optional[Path], *, imported_ns: int
) -> Dict[str, Any]:
    """Load and run once in this fresh process; nanoseconds of each phase.

    `imported_ns` is what importing the runtime took, measured by the caller.
    """
    start = time.perf_counter_ns()
    session = load(path, **options)
    loaded = time.perf_counter_ns()
    samples = _samples(session, inputs)
    begin = time.perf_counter_ns()
    session.run(samples[0])
    end = time.perf_counter_ns()
    return {
        "import_ns": imported_ns,
        "load_ns": loaded - start,
        "first_run_ns": end - begin,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def synthetic_inputs(session: Session, *, seed: int = 0) -> Dict[str, np.ndarray]:
    """Seeded noise in each input's known range (0..1 for floats, 0..1 for integers if unknown).

    Free dimensions are 1.
    """
    rng = np.random.default_rng(seed)
    made = {}
    for spec in session.inputs:
        shape = spec.with_batch(1)
        low, high = spec.range or (0.0, 1.0)
        if spec.dtype == "string":
            raise InputError(f"input {spec.name!r} takes strings; give real inputs with --input")
        dtype = np.dtype(spec.dtype)
        if dtype.kind in "iu":
            made[spec.name] = rng.integers(int(low), int(high) + 1, shape).astype(dtype)
        elif dtype.kind == "b":
            made[spec.name] = rng.integers(0, 2, shape).astype(dtype)
        else:
            made[spec.name] = rng.uniform(low, high, shape).astype(dtype)
    return made


def peak_rss_bytes() -> int:
    """The process's peak resident memory, 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _samples(session: Session, inputs: Optional[Path]) -> List[Dict[str, np.ndarray]]:
    """Inputs to measure with: each sample of an `.npz` with a leading axis, or seeded noise."""
    if inputs is None:
        return [synthetic_inputs(session)]
    try:
        with np.load(os.fspath(inputs), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {inputs}: {error}") from None
    count = len(next(iter(arrays.values()))) if arrays else 0
    if not count:
        raise InputError(f"{inputs} holds no samples")
    return [{name: array[i] for name, array in arrays.items()} for i in range(count)]
