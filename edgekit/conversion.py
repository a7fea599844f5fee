"""Conversion with proof: every hop is run on the same inputs as the model it came from.

The ways to a format are tried in order until one converts the model and computes the same; what
the others failed at is kept in the ledger.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import FORMAT_NAMES, Artifact, TensorSpec
from edgekit.cache import Cache, file_sha256, write_atomically
from edgekit.convert import NOT_RUN, SUFFIX, Step, along, paths_for
from edgekit.data import Dataset
from edgekit.errors import EdgeKitError, InputError, MissingToolError, ModelError, UsageError
from edgekit.execute import Sample
from edgekit.noise import noise_sets
from edgekit.observer import Observer
from edgekit.parity import (
    Comparison,
    Tolerance,
    compare,
    explain,
    tolerance_between,
)
from edgekit.trial import Trial, inputs_for

__all__ = [
    "Attempt", "Conversion", "Given", "check", "check_target", "convert_with_proof",
    "default_name", "made_by_edgekit", "provenance_file", "write_model",
    "write_result",
]  # fmt: skip

#: samples that go through every hop, noise or the user's
SAMPLES = 4
_DATA_SAMPLES = 16
#: of an output's greatest value, for one rounding of the inputs: other noise may tell more
_TOO_SENSITIVE = 1e-5
_ON_AN_EDGE = 1e-3
#: what is written beside a model's main file
_BESIDE = {"openvino": (".bin",), "ncnn": (".bin", ".json")}
#: formats that are a folder
_FOLDERS = ("coreml",)
#: processes that run a model side by side
_AT_ONCE = 2

Chain = list[tuple[Artifact, dict[str, tuple[int, ...]]]]


@dataclass(frozen=True)
class Given:
    """Inputs to check with, what to call them, and what a live model made of them, if there is
    one."""

    text: str
    samples: Sequence[Sample]
    outputs: Sequence[Mapping[str, NDArray[Any]]] | None = None

    @classmethod
    def of(cls, data: Dataset | None, specs: tuple[TensorSpec, ...]) -> Given | None:
        """Samples from all over the data."""
        if data is None:
            return None
        picked = np.linspace(0, data.count - 1, min(data.count, _DATA_SAMPLES)).astype(int)
        samples = [data.sample(int(index), specs) for index in dict.fromkeys(picked.tolist())]
        return cls(f"{len(samples)} samples of {data.source}", samples)


@dataclass(frozen=True)
class Attempt:
    """A way that did not work, and why."""

    steps: tuple[Step, ...]
    reason: str


@dataclass(frozen=True)
class Conversion:
    """The result, the way that was taken, and the ledger: a line for each hop, then one from end to
    end where there were several. `inputs` says what went through. `not_compared` says why the
    result itself is in none of the lines, if it is not."""

    artifact: Artifact
    steps: tuple[Step, ...]
    ledger: tuple[Comparison, ...]
    inputs: str
    attempts: tuple[Attempt, ...] = ()
    notes: tuple[str, ...] = ()
    not_compared: str = ""

    @property
    def passed(self) -> bool:
        """Whether the result was compared and computes the same at every hop."""
        return not self.not_compared and not self.wrong

    @property
    def wrong(self) -> bool:
        """Whether something that was compared differs."""
        return not all(line.passed for line in self.ledger)

    @property
    def label(self) -> str:
        """`same`, `differs`, or `unverified`: nobody has compared the result."""
        if self.wrong:
            return "differs"
        return "unverified" if self.not_compared else "same"

    @property
    def checks(self) -> dict[str, Any]:
        """What its converter found by reading the result, where that cannot be run."""
        return next((one["checks"] for one in self.artifact.provenance if "checks" in one), {})

    def ledger_json(self) -> dict[str, Any]:
        """The ledger for provenance and `--json`."""
        unknown = {"not_compared": self.not_compared} if self.not_compared else {}
        return {
            "passed": None if self.label == "unverified" else self.passed,
            "label": self.label,
            **unknown,
            "inputs": self.inputs,
            "lines": [line.to_json() for line in self.ledger],
            "attempts": [
                {"path": [str(step) for step in one.steps], "reason": one.reason}
                for one in self.attempts
            ],
        }


def convert_with_proof(
    artifact: Artifact,
    target: str,
    *,
    cache: Cache,
    given: Given | None = None,
    limits: sandbox.Limits | None = None,
    observer: Observer | None = None,
    seed: int = 0,
) -> Conversion:
    """The artifact in another format, checked at every hop against the model as it came: on what
    is `given`, or on seeded noise.

    If no way gives a model that computes the same, the first that gave one is returned, with
    `wrong` true. A result that nothing here can run is not compared, only the hops before it:
    `not_compared` says so, and `passed` is false.

    Raises:
        UsageError: an option cannot be obeyed, or the model cannot be run on made-up inputs.
        EdgeKitError: no way leads to the format; the reason of the first, the others' after it.
    """
    observer = observer or Observer()
    ways = paths_for(artifact.format, target, artifact.reading)
    attempts: list[Attempt] = []
    errors: list[EdgeKitError] = []
    wrong: Conversion | None = None
    for steps in ways:
        try:
            chain = _chain(artifact, steps, cache, limits, observer)
            if target not in NOT_RUN:
                observer.phase("check that it computes the same")
                found = _proof(chain, steps, given, limits, seed)
            else:
                if len(steps) > 1:
                    observer.phase("check the hops before the last")
                found = _unverified(chain, steps, given, limits, seed)
        except EdgeKitError as error:
            if isinstance(error, UsageError) and not isinstance(error, ModelError):
                raise  # another way would meet it, too
            errors.append(error)
            attempts.append(Attempt(steps, str(error)))
            observer.note(f"{_path(steps)} does not work: {error}")
            continue
        if not found.wrong:
            return replace(found, attempts=tuple(attempts))
        wrong = wrong or found
        reason = next(line.reason() for line in found.ledger if not line.passed)
        attempts.append(Attempt(steps, reason))
        observer.note(f"{_path(steps)} gives other numbers: {reason}")
    if wrong is not None:
        return replace(wrong, attempts=tuple(attempts))
    raise _none_works(errors)


def _path(steps: Sequence[Step]) -> str:
    return ", ".join(map(str, steps))


def _none_works(errors: list[EdgeKitError]) -> EdgeKitError:
    first = next((one for one in errors if not isinstance(one, MissingToolError)), errors[0])
    others = [str(one) for one in errors if one is not first]
    text = str(first) + "".join(f"; also tried: {one}" for one in dict.fromkeys(others))
    return type(first)(text)


def _chain(
    artifact: Artifact,
    steps: Sequence[Step],
    cache: Cache,
    limits: sandbox.Limits | None,
    observer: Observer,
) -> Chain:
    """The source and what each step made of it, with the orders of axes the step changed."""
    chain: Chain = [(artifact, {})]
    for number, step in enumerate(steps, start=1):
        phase = f"[{number}/{len(steps)}]"
        observer.phase(f"{phase} {step}")
        made = along(
            step, chain[-1][0], cache=cache, limits=limits, phase=phase,
            progress=partial(observer.progress, str(step)),
        )  # fmt: skip
        layouts = made.provenance[-1].get("layouts", {})
        chain.append((made, {name: tuple(axes) for name, axes in layouts.items()}))
        for note in made.provenance[-1].get("notes", ()):
            observer.note(note)
    return chain


def _proof(
    chain: Chain,
    steps: tuple[Step, ...],
    given: Given | None,
    limits: sandbox.Limits | None,
    seed: int,
) -> Conversion:
    source, result = chain[0][0], chain[-1][0]
    inputs, trial = _first_trial(chain, given, limits, seed)
    shapes = {name: list(array.shape) for name, array in trial.samples[0].items()}
    usual = tolerance_between(*(artifact for artifact, _ in chain), shapes=shapes)
    ledger: list[Comparison] = []
    if given is not None and given.outputs is not None:
        live = replace(source, called="the live model")
        ledger.append(compare(Trial(live, given.samples, given.outputs), trial, usual))
    here = trial
    for (artifact, _), there in zip(chain[1:], _repeated(trial, chain, limits), strict=True):
        between = tolerance_between(here.artifact, artifact, shapes=shapes)
        line = compare(here, there, between if "assumed" not in between.why else usual)
        ledger.append(line if line.passed else explain(line, here, there, limits))
        here = there
    if len(chain) > 2:
        hops = ledger[len(ledger) - len(chain) + 1 :]
        added = sum(line.tolerance.relative for line in hops)
        rounded = any(line.tolerance.quantized for line in hops)
        tolerance = Tolerance(added, "the sum over the hops", quantized=rounded)
        ledger.append(compare(trial, here, tolerance))
    return _with_ledger(Conversion(result, steps, tuple(ledger), inputs), source)


def _unverified(
    chain: Chain,
    steps: tuple[Step, ...],
    given: Given | None,
    limits: sandbox.Limits | None,
    seed: int,
) -> Conversion:
    """The hops before the last compared, the result not."""
    result = chain[-1][0]
    last = steps[-1]
    why = f"{last} was not compared: {NOT_RUN[result.format]}"
    found = Conversion(result, steps, (), "nothing was run", not_compared=why)
    if len(chain) > 2:
        before = _proof(chain[:-1], steps[:-1], given, limits, seed)
        found = replace(found, ledger=before.ledger, inputs=before.inputs)
    return _with_ledger(found, chain[0][0])


def _with_ledger(found: Conversion, source: Artifact) -> Conversion:
    """The conversion with the ledger in its result's provenance."""
    result = found.artifact
    proof = {"step": "parity", "of": source.sha256, **found.ledger_json()}
    return replace(found, artifact=replace(result, provenance=(*result.provenance, proof)))


@contextmanager
def _stopped_by_interrupt(limits: sandbox.Limits) -> Iterator[None]:
    """Ctrl-C ends the children that threads wait for."""
    try:
        yield
    except KeyboardInterrupt:
        limits.cancel.set()
        raise


def _repeated(trial: Trial, chain: Chain, limits: sandbox.Limits | None) -> list[Trial]:
    """The models after the source on its inputs, two at a time."""
    limits = limits or sandbox.Limits()
    with ThreadPoolExecutor(_AT_ONCE) as pool, _stopped_by_interrupt(limits):
        waiting = []
        here = trial.artifact, trial.samples
        for artifact, transposes in chain[1:]:
            turned = inputs_for(*here, artifact, transposes)
            waiting.append(pool.submit(Trial.of, artifact, turned, limits))
            here = artifact, turned
        made = [one.result() for one in waiting]
    moved = trial
    found = []
    for one in made:
        moved = one.as_sensitive_as(moved)
        found.append(moved)
    return found


def check(
    reference: Artifact,
    candidate: Artifact,
    *,
    given: Given | None = None,
    limits: sandbox.Limits | None = None,
    seed: int = 0,
) -> tuple[str, Comparison]:
    """Two models on the same inputs: what these were, and the line of the ledger.

    Raises:
        UsageError: the reference cannot be run on made-up inputs.
        EdgeKitError: the models take other inputs, or one cannot be run.
    """
    inputs, trial = _first_trial([(reference, {}), (candidate, {})], given, limits, seed)
    turned = inputs_for(reference, trial.samples, candidate)
    there = Trial.of(candidate, turned, limits).as_sensitive_as(trial)
    shapes = {name: list(array.shape) for name, array in trial.samples[0].items()}
    line = compare(trial, there, tolerance_between(reference, candidate, shapes=shapes))
    return inputs, line if line.passed else explain(line, trial, there, limits)


def _first_trial(
    chain: Chain, given: Given | None, limits: sandbox.Limits | None, seed: int
) -> tuple[str, Trial]:
    """The source on what is given, or on the first noise that it takes and that tells inputs
    apart: outputs that are the same for all of it prove little."""
    source = chain[0][0]
    if given is not None:
        trial = Trial.twice(source, given.samples, limits)
        if given.outputs is not None:
            return given.text, trial
        return _steady(given.text, trial)
    specs = _common_specs(chain)
    if not specs:
        raise InputError(f"{source.name} takes no inputs: there is nothing to compare it on")
    sizes = {
        dim: size
        for spec in specs
        for declared in [source.reading.inputs.get(spec.name)]
        if declared is not None
        for dim, size in zip(spec.shape, declared.shape, strict=False)
        if isinstance(dim, str) and isinstance(size, int)
    }
    reason: EdgeKitError | None = None
    found: list[tuple[str, Trial]] = []
    for text, noise in noise_sets(specs, sizes, count=SAMPLES, seed=seed):
        try:
            trial = Trial.twice(source, noise, limits)
        except EdgeKitError as error:
            reason = reason or error
            continue
        inputs = f"{len(noise)} samples of {text} (seed {seed})"
        inputs, trial = _steady(inputs, trial)
        if trial.varies() and all(one < _TOO_SENSITIVE for one in trial.sensitivity.values()):
            return inputs, trial
        why = "one rounding of them moves the outputs"
        why = why if trial.varies() else "all give the same outputs"
        found.append((f"{inputs}; {why}, so give real ones: --data", trial))
    if found:  # those that tell samples apart, then those that tell most
        return min(
            found, key=lambda one: (not one[1].varies(), max([0.0, *one[1].sensitivity.values()]))
        )
    raise InputError(
        f"{source.name} cannot be run on made-up inputs ({reason}); give real ones with --data, "
        "or its shapes with --inputs"
    )


def _steady(inputs: str, trial: Trial) -> tuple[str, Trial]:
    """Without samples on an edge of the model's, and said so."""
    steady = trial.steady(_ON_AN_EDGE)
    left = len(trial.samples) - len(steady.samples)
    said = f"; {left} left out, at which one rounding changes the answer" if left else ""
    return f"{inputs}{said}", steady


def _common_specs(chain: Chain) -> tuple[TensorSpec, ...]:
    """The source's inputs, free dimensions fixed where a later model fixes them."""
    specs = chain[0][0].inputs
    fixed: dict[int | str, int] = {}
    axes = [tuple(range(len(spec.shape))) for spec in specs]
    for artifact, transposes in chain[1:]:
        by_name = {spec.name: spec for spec in artifact.inputs}
        for place, spec in enumerate(specs):
            other = by_name.get(spec.name)
            if other is None and len(artifact.inputs) == len(specs):
                other = artifact.inputs[place]
            if other is None or len(other.shape) != len(spec.shape):
                continue
            if spec.name in transposes:
                axes[place] = tuple(axes[place][axis] for axis in transposes[spec.name])
            for ours, dim in zip(axes[place], other.shape, strict=True):
                if isinstance(spec.shape[ours], str) and isinstance(dim, int):
                    fixed[spec.shape[ours]] = dim
    values = chain[0][0].reading.values
    return tuple(
        replace(
            spec, shape=tuple(fixed.get(dim, dim) for dim in spec.shape),
            range=(values[spec.name],) * 2 if spec.name in values else spec.range,
        )
        for spec in specs
    )  # fmt: skip


# --- files --------------------------------------------------------------------------------------


def default_name(artifact: Artifact, target: str) -> str:
    """The file name of the result: the model's own with the format's suffix."""
    path = artifact.path.resolve()
    stem = path.parent.name if artifact.format == "savedmodel" else path.stem
    name = f"{stem}{SUFFIX[target]}"
    taken = Path(name).resolve() in {path.resolve() for path in artifact.files}
    return f"{stem}-clean{SUFFIX[target]}" if taken else name


def provenance_file(path: Path) -> Path:
    """Where the provenance of a model at `path` is written."""
    return path.with_name(f"{path.name}.provenance.json")


def made_by_edgekit(path: Path) -> bool:
    """Whether what is there was written by a conversion, and not changed since."""
    try:
        noted = json.loads(provenance_file(path).read_text())
        if path.is_dir():
            files = [path / Path(name).relative_to(path.name) for name in noted["files"]]
            whole = {*files} == {one for one in path.rglob("*") if one.is_file()}
        else:
            files = [path.with_name(Path(name).name) for name in noted["files"]]
            whole = path in files
        return whole and bool(file_sha256(*files) == noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_target(path: Path, target: str) -> None:
    """Raise before any work if a result cannot be written there.

    Raises:
        UsageError: the suffix is not the format's, or the folder is not there or not writable.
    """
    suffix = SUFFIX[target]
    if path.suffix.lower() != suffix:
        raise UsageError(f"-o {path} does not end in {suffix}, as {FORMAT_NAMES[target]} does")
    if not path.parent.is_dir():
        raise UsageError(f"no folder {path.parent} to write {path.name} into")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path.parent} may not be written into")
    if target in _FOLDERS:
        if path.exists() and not made_by_edgekit(path):
            raise UsageError(
                f"{path} is there already, and EdgeKit did not make it: choose another name with -o"
            )
    elif path.is_dir():
        raise UsageError(f"-o {path} is a folder; wanted a file name")
    for other in (path.with_suffix(one) for one in _BESIDE.get(target, ())):
        if other.exists() and not made_by_edgekit(path):
            raise UsageError(
                f"{other} would be written, too, but is there already and belongs to something "
                "else: choose another name with -o"
            )


def write_result(conversion: Conversion, path: Path, *, keep: bool = False) -> list[Path]:
    """Write the model (unless it was found to compute something else, or with `keep`) and, beside
    it, its provenance with the ledger; returns what was written. The model's main file comes
    last: if it is there, all is.

    Raises:
        UsageError: the suffix is not the format's, or the folder is not there.
    """
    return write_model(conversion.artifact, path, rejected=conversion.wrong and not keep)


def write_model(
    made: Artifact, path: Path, *, rejected: bool = False, more: Mapping[str, Any] | None = None
) -> list[Path]:
    """As `write_result`: the model unless it is `rejected`, and beside it its provenance, with
    what `more` there is to say.

    Raises:
        UsageError: the suffix is not the format's, or the folder is not there.
    """
    check_target(path, made.format)
    folder = made.format in _FOLDERS
    place = _place_folder if folder else _place
    written = [] if rejected else place(made, path)
    note = provenance_file(path)
    if not written:  # what is there may be an older result, which keeps its own
        note = path.with_name(f"{path.name}.rejected.json")
    document = {
        "schema": "edgekit.provenance/1",
        "files": [str(one.relative_to(path.parent)) for one in written],
        "sha256": file_sha256(*written) if written else made.sha256, "steps": list(made.provenance),
        **(more or {}),
    }  # fmt: skip
    write_atomically(note, json.dumps(document, indent=1).encode())
    return [path, note] if folder and written else [*written, note]


def _place_folder(made: Artifact, path: Path) -> list[Path]:
    """Its folder at `path`, written whole under another name first; an older one goes last."""
    inside = [file.relative_to(made.location) for file in made.files]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as work:
        copy = Path(work) / "new"
        for source, name in zip(made.files, inside, strict=True):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy / name)
            with (copy / name).open("rb+") as file:
                os.fsync(file.fileno())
        if path.exists():
            path.rename(Path(work) / "old")
        copy.rename(path)
    return [path / name for name in inside]


def _place(made: Artifact, path: Path) -> list[Path]:
    """Its files at `path`: all written whole under another name first, the main one in place last,
    so that if it is there, all is."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as work:
        copies = [
            Path(work) / (path.stem + f.name.removeprefix(made.path.stem)) for f in made.files
        ]
        if made.format == "onnx" and len(made.files) > 1:  # it says where its weights are by name
            sandbox.call(
                "edgekit_converters.onnx_files:copy_model",
                {"source": str(made.path), "target": str(copies[0])}, what=f"writing {path}",
            )  # fmt: skip
            copies = sorted(Path(work).iterdir(), key=lambda one: one.name != path.name)
        else:
            for source, copy in zip(made.files, copies, strict=True):
                shutil.copyfile(source, copy)
        for copy in copies:
            copy.chmod(0o644)
            with copy.open("rb+") as file:
                os.fsync(file.fileno())
        for copy in reversed(copies):
            copy.replace(path.with_name(copy.name))
    return [path.with_name(copy.name) for copy in copies]
