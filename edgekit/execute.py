"""Runs artifacts on host inputs: in their engine, or in the framework they come from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import SOURCES, Artifact
from edgekit.data import Dataset
from edgekit.sandbox import report_progress
from edgekit.taps import TAPPERS
from edgekit_runtime.arrays import read_npz, write_npz
from edgekit_runtime.loading import load

__all__ = ["Sample", "outputs_of", "run_in_engine", "run_samples"]

Sample = Mapping[str, NDArray[Any]]
#: engines of devices that run firmware -> what computes the same on this machine
_STAND_INS = dict.fromkeys(("tflm", "ethos-u"), "edgekit.firmware.reference:ReferenceSession")


def outputs_of(
    model: Path, options: dict[str, Any], data: Dataset, indices: NDArray[np.int64]
) -> Iterator[dict[str, NDArray[Any]]]:
    """The outputs by name for each sample, in order. Call in a child process.

    One at a time because that is what runs on the device: dynamic quantization takes its scales
    from the whole batch, so a batch would measure another model.
    """
    with _opened(model, options) as session:
        for done, index in enumerate(indices):
            yield session.run(data.sample(int(index), session.inputs))
            if done % 50 == 49:
                report_progress(done + 1, len(indices))


def _opened(model: Path, options: dict[str, Any]) -> AbstractContextManager[Any]:
    """What has the `inputs` of the model and runs a sample."""
    if options.get("engine") not in _STAND_INS:
        return load(model, **options)
    module, _, name = _STAND_INS[options["engine"]].partition(":")
    return nullcontext(getattr(import_module(module), name)(model.read_bytes()))


def run_samples(
    artifact: Artifact,
    samples: Sequence[Sample],
    *,
    taps: Sequence[str] = (),
    limits: sandbox.Limits | None = None,
) -> list[dict[str, NDArray[Any]]]:
    """The outputs, and the intermediate tensors `taps`, by name, for each sample. Runs in a child
    process, source frameworks on the CPU.

    Raises:
        EdgeKitError: the engine or framework refuses the model or the inputs, or crashed.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
        given, made = Path(scratch) / "inputs.npz", Path(scratch) / "outputs.npz"
        write_npz(given, {f"{i}/{n}": a for i, one in enumerate(samples) for n, a in one.items()})
        what = f"running {artifact.name}"
        request = {
            "source": list(artifact.arguments), "options": artifact.reading.of_source().to_json(),
            "inputs": str(given), "outputs": str(made), "taps": list(taps),
        }  # fmt: skip
        function = "edgekit.execute:run_in_engine"
        if artifact.format in SOURCES:
            function = SOURCES[artifact.format].format("run")
        sandbox.call(function, request, limits=limits, what=what)
        found: list[dict[str, NDArray[Any]]] = [{} for _ in samples]
        for key, array in read_npz(made).items():
            number, _, name = key.partition("/")
            found[int(number)][name] = array
        return found


def run_in_engine(
    source: list[str], options: dict[str, Any], inputs: str, outputs: str, taps: list[str]
) -> None:
    """Runs in the child: a model of a format that an engine loads, with intermediate tensors."""
    path = Path(source[0])
    if taps:
        target = Path(outputs).parent / f"tapped{path.suffix}"
        module, _, name = TAPPERS[path.suffix].partition(":")
        getattr(import_module(module), name)(str(path), str(target), taps)
        path = target
    samples: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in read_npz(Path(inputs)).items():
        number, _, name = key.partition("/")
        samples.setdefault(number, {})[name] = array
    made = {}
    with load(path) as session:
        for number, sample in samples.items():
            for name, array in session.run(sample).items():
                made[f"{number}/{name}"] = array
    write_npz(Path(outputs), made)
