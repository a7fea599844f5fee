"""Measuring inside a process of its own, commanded by lines of JSON.

The host starts one worker per candidate and asks them in turn for blocks of samples, so that a
noisy machine hits all candidates alike and no engine's threads or memory disturb another's.

    {"cmd": "sample", "count": 10, "untimed": 2}  ->  {"samples": [ns, ...], "cpu_ns": NS}
    {"cmd": "throughput", "seconds": 1.5, "batch": 4}  ->  {"runs": N, "wall_ns": NS, "cpu_ns": NS}
    {"cmd": "close"}                ->  the process ends
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from pathlib import Path
from typing import IO, Any, Dict, Iterator, List, Optional, Sequence

import numpy as np

from .arrays import read_npy, read_npz
from .bundle import Bundle, is_bundle
from .engines import ENGINE_OF_FORMAT, import_engine
from .errors import EdgeKitError, EngineMissingError, InputError, UsageError
from .loading import load
from .machine import memory_bytes, peak_rss_bytes
from .session import Session
from .source import format_of
from .timing import sample

_Arrays = Dict[str, np.ndarray]
_MOST_LEFT = 1000

__all__ = [
    "cold_start",
    "input_arrays",
    "main_loop",
    "raw_input",
    "read_samples",
    "synthetic_inputs",
]


def main_loop(
    path: Path, options: Dict[str, Any], inputs: Optional[Path], stdin: IO[str], stdout: IO[str]
) -> int:
    """Load, say so in one line, then answer commands until `close` or end of input."""

    def say(value: Dict[str, Any]) -> None:
        stdout.write(json.dumps(value) + "\n")
        stdout.flush()

    try:
        session = load(path, **options)
        samples = read_samples(session, inputs)
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
            "variant": session.variant.id if session.variant else None,
            "passed_over": "; not ".join(session.fallbacks),
            "engine_version": session.engine_version,
            "streams": session.streams,
            "placement": {
                "shares": placement.shares,
                "delegate": placement.delegate,
                "precision": placement.precision,
                "of": placement.of,
                "simulated": placement.simulated,
                "left": [node for node in placement.nodes if node[0] == "CPU"][:_MOST_LEFT],
            },
        }
    )
    turn = itertools.cycle(samples)
    for line in stdin:
        command = json.loads(line)
        if command["cmd"] == "close":
            break
        try:
            do = _throughput if command["cmd"] == "throughput" else _sample
            say({**do(session, turn, command), "peak_rss_bytes": peak_rss_bytes()})
        except EdgeKitError as error:
            say({"error": str(error), "exit_code": error.exit_code})
    session.close()
    return 0


def _sample(session: Session, turn: Iterator[_Arrays], command: Dict[str, Any]) -> Dict[str, Any]:
    taken: List[int] = []
    cpu_ns = 0
    for number in range(-command.get("untimed", 0), command["count"]):
        current = next(turn)
        if number == 0:
            cpu_ns = time.process_time_ns()
        ns = sample(lambda: session.run(current), 1)  # noqa: B023  (called at once)
        if number >= 0:
            taken += ns
    return {"samples": taken, "cpu_ns": time.process_time_ns() - cpu_ns}


def _throughput(
    session: Session, turn: Iterator[_Arrays], command: Dict[str, Any]
) -> Dict[str, Any]:
    """As many calls as are done in the time, as many side by side as the session has streams;
    `batch` samples a call."""
    batch = command.get("batch", 1)
    one = next(turn)
    whole = one if batch == 1 else {n: np.concatenate([a] * batch) for n, a in one.items()}
    for _ in session.run_batch([whole] * (2 * session.streams)):
        pass  # threads and buffers are made by the first calls
    cpu_ns, start = time.process_time_ns(), time.perf_counter_ns()
    end = start + int(command["seconds"] * 1e9)

    def endless() -> Iterator[_Arrays]:
        while time.perf_counter_ns() < end:
            yield whole

    runs = sum(1 for _ in session.run_batch(endless()))
    wall_ns = time.perf_counter_ns() - start
    return {"runs": runs, "wall_ns": wall_ns, "cpu_ns": time.process_time_ns() - cpu_ns}


def cold_start(
    path: Path, options: Dict[str, Any], inputs: Optional[Path], *, started_ns: Optional[int]
) -> Dict[str, Any]:
    """Import, load and run once in this fresh process; nanoseconds of each phase.

    `started_ns` is the clock before the runtime was imported, None if nobody looked (then there
    is no `import_ns`). Importing the engine's package counts as import, not as load. `memory_bytes`
    has `machine.memory_bytes` after each phase.
    """
    _import_engine_of(path, options)
    imported = time.perf_counter_ns()
    memory = {"import": memory_bytes()}
    begin = time.perf_counter_ns()
    session = load(path, **options)
    loaded = time.perf_counter_ns()
    memory["load"] = memory_bytes()
    samples = read_samples(session, inputs)
    first = time.perf_counter_ns()
    session.run(samples[0])
    end = time.perf_counter_ns()
    memory["first_run"] = memory_bytes()
    known = {} if started_ns is None else {"import_ns": imported - started_ns}
    return {
        **known,
        "load_ns": loaded - begin,
        "first_run_ns": end - first,
        "memory_bytes": memory,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _import_engine_of(path: Path, options: Dict[str, Any]) -> None:
    """Import the engine that `load` is going to take; what fails here, `load` explains."""
    engines = [options.get("engine")]
    if is_bundle(path):
        with Bundle(path) as bundle:
            chosen = options.get("variant")
            variants = bundle.manifest.variants
            engines = [v.engine for v in variants if chosen in (None, v.id)]
    elif engines == [None]:
        engines = [ENGINE_OF_FORMAT[format_of(path)]]
    for engine in engines:
        with contextlib.suppress(EngineMissingError):
            import_engine(str(engine))
            return


def synthetic_inputs(session: Session, *, seed: int = 0) -> Dict[str, np.ndarray]:
    """Seeded noise in each input's known range (0..1 for floats, 0..1 for integers if unknown).

    Free dimensions are as in the bundle's example, else 1.
    """
    rng = np.random.default_rng(seed)
    made = {}
    for spec in session.inputs:
        shape = spec.usual_shape()
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


def read_samples(
    session: Session, inputs: Optional[Path], *, raw: bool = False
) -> List[Dict[str, np.ndarray]]:
    """Inputs to run: each sample of an `.npz`, as `edgekit optimize --data` takes it, or noise.
    `raw` samples, for the bundle's preprocessing, get no batch axis."""
    if inputs is None:
        return [synthetic_inputs(session)]
    arrays = input_arrays(session, inputs)
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or counts == {0}:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(
            f"{inputs} holds no samples: {shapes or 'no arrays'}; wanted arrays of one length"
        )
    # With the batch axis where the model has one. [i, ...] and not [i]: a sample of a scalar
    # input is an array, too.
    rank = {} if raw else {spec.name: len(spec.shape) for spec in session.inputs}
    return [
        {n: a[i : i + 1] if a.ndim == rank.get(n) else a[i, ...] for n, a in arrays.items()}
        for i in range(counts.pop())
    ]


def raw_input(session: Session, files: Sequence[str], *, tensors: bool = False) -> Dict[str, Any]:
    """One sample from files given as `[NAME=]FILE`: the arrays of an `.npz` or `.npy`; of others
    the path, for the bundle's preprocessing to read.

    Raises:
        InputError: a file is missing or cannot be read, or a name is not an input's.
        UsageError: a file's input is not clear.
    """
    names = [spec.name for spec in session.inputs]
    found: Dict[str, Any] = {}
    for one in files:
        name, separator, rest = one.partition("=")
        path = Path(one)
        if separator and not path.exists() and (name in names or Path(rest).exists()):
            path = Path(rest)
            if name not in names:
                raise InputError(f"no input {name!r}; the model has: {', '.join(names)}")
        else:
            name = names[0] if len(names) == 1 else ""
        if name in found:
            raise UsageError(f"the input {name!r} is given twice; one sample a call")
        if path.suffix == ".npz":
            found.update(input_arrays(session, path))
            continue
        if not name:
            raise UsageError(
                f"{one}: the model's inputs are {', '.join(names)}; say which: {names[0]}={one}"
            )
        if not path.is_file():
            why = "Is a directory" if path.is_dir() else "No such file"
            raise InputError(f"cannot read {path}: {why}")
        if path.suffix == ".npy":
            found[name] = read_npy(path)
        elif session.takes_raw and not tensors:
            found[name] = path
        elif tensors:
            raise InputError(f"{path} is no array file; with --tensors give an .npy or .npz")
        else:
            raise InputError(
                f"{path} is no array file, and the model brings no preprocessing for it: give "
                "an .npy or .npz, or make the bundle with --preprocess"
            )
    return found


def input_arrays(session: Session, path: Path) -> Dict[str, np.ndarray]:
    """The arrays of an `.npz` without `labels`, which evaluation data brings along."""
    arrays = read_npz(path)
    if "labels" not in {spec.name for spec in session.inputs}:
        arrays.pop("labels", None)
    return arrays
