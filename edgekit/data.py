"""Datasets: samples by input name, optional labels, split without overlap.

Whatever the source, samples are laid out once as plain arrays in the cache and mapped from there:
memory does not grow with their number, and child processes open them by folder.

A source is an `.npz` whose arrays are named like the model's inputs (first axis: samples) and
optionally `labels`; `module.py:function` that yields `(inputs, label)`, `inputs` being a dict
of arrays without the sample axis and `label` a number, an array or None; or a folder of files with
a `labels.csv` of `file,label` rows. With preprocessing declared, the samples of an input that has
steps are raw, and what is laid out is what the steps made of them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.artifact import TensorSpec
from edgekit.cache import Cache, content_key, file_sha256
from edgekit.errors import InputError, UsageError, one_line
from edgekit.pipeline import Pipeline
from edgekit_runtime import __version__

__all__ = [
    "HASHES",
    "INDEX",
    "LABELS",
    "LIST",
    "Dataset",
    "Split",
    "check_calibration",
    "load_function",
    "open_dataset",
    "split_samples",
]

Labels = NDArray[Any] | None

LABELS = "labels"
INDEX = "index.json"
LIST = "labels.csv"
HASHES = "hashes"
#: calibration takes this many samples; PTQ ranges settle well below (NNCF's default is 300)
CALIBRATION_SAMPLES = 200
#: fewer seldom show the values that an activation takes now and then
_FEW_FOR_CALIBRATION = 32
#: a float input of more elements than this that are all equal is no sample
_MOST_EQUAL_ELEMENTS = 16


@dataclass(frozen=True)
class Dataset:
    """Samples in a folder of the cache. Pickles and unequal lengths were refused on the way in."""

    folder: Path
    sha256: str
    source: str

    @cached_property
    def _index(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / INDEX).read_text())
        return loaded

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self._index["count"])

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Least and greatest value of each numeric input."""
        return {k: (v[0], v[1]) for k, v in self._index["ranges"].items()}

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The inputs by name, mapped, first axis: samples."""
        other = (LABELS, HASHES, *self.unused)
        return {n: self._map(a) for n, a in self._index["arrays"].items() if n not in other}

    @cached_property
    def labels(self) -> NDArray[Any] | None:
        """The labels, first axis: samples; None when the source has none."""
        raw = self._index["arrays"].get(LABELS)
        return None if raw is None else self._map(raw)

    @property
    def unused(self) -> tuple[str, ...]:
        """Arrays of the source that are neither inputs nor labels."""
        return tuple(self._index["unused"])

    def array(self, name: str) -> NDArray[Any]:
        """Any array of the source, labels and unused ones among them.

        Raises:
            InputError: there is none of that name, or it has no single value per sample.
        """
        known = [one for one in self._index["arrays"] if one != HASHES]
        if name not in known:
            raise InputError(f"{self.source} has no array {name!r}; it has {', '.join(known)}")
        found = self._map(self._index["arrays"][name])
        if found.ndim != 1 or len(found) != self.count:
            raise InputError(
                f"{self.source}: {name!r} has the shape {list(found.shape)}; wanted one value per "
                "sample"
            )
        return found

    @property
    def notes(self) -> list[str]:
        """What the user should know of it."""
        if not self.unused:
            return []
        return [f"arrays of {self.source} not used: {', '.join(self.unused)}"]

    @cached_property
    def hashes(self) -> NDArray[Any]:
        """uint64 per sample: equal samples have equal hashes."""
        return np.asarray(self._map(self._index["arrays"][HASHES]))

    def sample(self, index: int, specs: tuple[TensorSpec, ...]) -> dict[str, NDArray[Any]]:
        """One sample, shaped for the model: with a leading 1 where the model has a batch axis."""
        out = {}
        for spec in specs:
            array = self.arrays[spec.name]
            has_batch = array.ndim == len(spec.shape)
            out[spec.name] = np.asarray(array[index : index + 1] if has_batch else array[index])
        return out

    def release(self) -> None:
        """Give the pages that were read back to the system; they are read again when needed. Mapped
        pages count as this process's memory, though the system may take them at any time."""
        for array in self.arrays.values():
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, raw: dict[str, Any]) -> NDArray[Any]:
        return np.memmap(
            self.folder / raw["file"],
            np.dtype(raw["dtype"]),
            "r",
            raw["offset"],
            tuple(raw["shape"]),
        )


@dataclass(frozen=True)
class Split:
    """Sample numbers of the three parts; no sample, nor an equal copy of it, is in two."""

    calibration: NDArray[np.int64]
    selection: NDArray[np.int64]
    confirmation: NDArray[np.int64]
    #: calibration samples may come from a data set of their own
    calibration_data: Dataset
    note: str = ""


def open_dataset(
    source: str,
    specs: tuple[TensorSpec, ...],
    cache: Cache,
    pipeline: Pipeline | None = None,
) -> Dataset:
    """Lay out and check a data source against the model's inputs.

    Raises:
        InputError: names, dtypes, shapes, lengths or values (NaN, Inf) do not fit the model.
        UsageError: there is no such source, or it is of an unknown kind.
    """
    path_text, _, function = source.partition(".py:")
    is_function = bool(function)
    path = Path(path_text + ".py") if is_function else Path(source)
    if not path.exists():
        raise UsageError(f"no data at {path}")
    steps = (pipeline or Pipeline()).for_data()
    if path.is_dir():
        if not steps["preprocess"]:
            raise UsageError(
                f"{path} is a folder of files: say with --preprocess how they become inputs"
            )
        if not (path / LIST).is_file():
            raise UsageError(f"{path} has no {LIST}; wanted a file of rows 'file,label'")
    elif not is_function and path.suffix != ".npz":
        raise UsageError(
            f"{path}: data is an .npz file, a folder with {LIST}, or module.py:function"
        )
    request = {
        "source": str(path.resolve()),
        "function": function,
        "inputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs],
        **steps,
    }
    identity = file_sha256(*(sorted(_listed(path)) if path.is_dir() else [path]))
    if is_function:  # what it yields may change while the file does not: never reuse
        identity = hashlib.sha256(np.random.default_rng().bytes(16)).hexdigest()
    key = content_key(
        kind="data", layout=4, identity=identity, inputs=request["inputs"], steps=steps,
        runtime=__version__ if steps["preprocess"] else None,
    )  # fmt: skip

    def make(folder: Path) -> None:
        sandbox.call(
            "edgekit.layout:lay_out", {**request, "folder": str(folder)}, what=f"reading {path}"
        )

    folder = cache.folder(key, make)
    sha = _folder_sha256(folder) if is_function or steps["preprocess"] else identity
    return Dataset(folder, sha, source)


def split_samples(data: Dataset, calibration: Dataset | None, *, seed: int = 0) -> Split:
    """Part the samples: calibration first (unless it has data of its own), the rest in halves.

    Class proportions are kept. Copies of one sample go to one part, and samples that also stand
    in the evaluation data are taken out of separate calibration data.

    Raises:
        InputError: too few samples for three parts.
    """
    rng = np.random.default_rng(seed)
    groups = _shuffled_groups(data, rng)
    wanted = 0 if calibration else min(CALIBRATION_SAMPLES, data.count // 4)
    least = 4 if calibration else 8
    if len(groups) < least:
        raise InputError(
            f"{data.source} has {len(groups)} different samples; at least {least} are needed "
            "to calibrate, select and confirm on samples of their own"
        )
    # Any run of the groups has the classes' proportions.
    taken = np.cumsum([len(g) for g, _ in groups])
    first = int(np.searchsorted(taken, wanted, side="left")) + 1 if wanted else 0
    selection: list[NDArray[np.int64]] = []
    confirmation: list[NDArray[np.int64]] = []
    turns: dict[int, bool] = {}
    note = ""
    for group, kind in groups[first:]:  # members of each class in turn, the first by lot
        turn = turns[kind] = not turns.get(kind, bool(rng.integers(2)))
        (selection if turn else confirmation).append(group)
    if calibration is None:
        chosen, source = _flat([g for g, _ in groups[:first]]), data
    else:
        known = set(data.hashes.tolist())
        clean = np.array(
            [i for i, h in enumerate(calibration.hashes.tolist()) if h not in known], np.int64
        )
        dropped = calibration.count - len(clean)
        if dropped:
            note = f"{dropped} calibration samples also stand in the evaluation data: left out"
        if not len(clean):
            raise InputError(
                f"every sample of {calibration.source} also stands in {data.source}; "
                "give other calibration data, or none to have it taken from the evaluation data"
            )
        chosen = np.sort(rng.permutation(clean)[:CALIBRATION_SAMPLES])
        source = calibration
    return Split(chosen, _flat(selection), _flat(confirmation), source, note)


def check_calibration(
    data: Dataset, indices: NDArray[np.int64], labels: Sequence[str] = (), *, known: Labels = None
) -> list[str]:
    """What should be said of the samples (by number) that ranges are to be taken from.

    `labels` are the classes' names, if they have such; `known` the class numbers that there are,
    those of the whole data otherwise.

    Raises:
        InputError: there are none, all are the same, or one holds NaN, infinities or the same
            value everywhere; says which.
    """
    if not len(indices):
        raise InputError(f"{data.source}: no samples to calibrate with; wanted about 200")
    picked = np.sort(np.asarray(indices))
    for name, array in data.arrays.items():
        if array.dtype.kind != "f":
            continue
        for index in picked.tolist():
            _check_sample(data.source, name, index, np.asarray(array[index]))
    if len(picked) > 1 and len(np.unique(data.hashes[picked])) == 1:
        raise InputError(
            f"{data.source}: all {len(picked)} calibration samples are the same; ranges taken from "
            "one sample hold for no other"
        )
    notes = []
    if len(picked) < _FEW_FOR_CALIBRATION:
        notes.append(
            f"only {len(picked)} samples to calibrate with, wanted {_FEW_FOR_CALIBRATION} or more "
            f"(usual are {CALIBRATION_SAMPLES}): what an activation takes only now and then is cut "
            "off at the greatest value that these few show"
        )
    missing = _uncovered(data, picked, known)
    if len(missing):
        listed = [labels[c] if 0 <= c < len(labels) else str(c) for c in missing[:10]]
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        notes.append(
            f"no calibration sample of the classes {', '.join(listed)}{more}: their activations "
            "may be cut off"
        )
    return notes


def _check_sample(source: str, name: str, index: int, value: NDArray[Any]) -> None:
    if not np.isfinite(value).all():
        raise InputError(f"{source}: sample {index} of {name!r} holds NaN or Inf")
    if value.size > _MOST_EQUAL_ELEMENTS and value.min() == value.max():
        raise InputError(
            f"{source}: sample {index} of {name!r} is {value.flat[0]:g} everywhere; that is no "
            "sample to calibrate with: leave it out"
        )


def _uncovered(data: Dataset, picked: NDArray[np.int64], known: Labels) -> list[int]:
    """Class numbers that are known, but not among those of the picked samples."""
    ours = data.labels
    if ours is None or ours.ndim != 1 or ours.dtype.kind not in "iub":
        return []
    every = ours if known is None or known.ndim != 1 or known.dtype.kind not in "iub" else known
    missing = np.setdiff1d(np.asarray(every), np.asarray(ours[picked]))
    return [int(one) for one in missing]


def load_function(reference: str, *, what: str) -> Any:
    """The function that `module.py:function` names; runs the module (the user's own code).

    Raises:
        UsageError: no such file or function, or the module fails to run.
    """
    import importlib.util

    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.exists():
        raise UsageError(f"{what}: no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{what}: {path} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{what}: {path} fails: {one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{what}: {path} has no function {name!r}")
    return function


def _listed(folder: Path) -> list[Path]:
    """`labels.csv` and the files it names, as far as they exist."""
    with (folder / LIST).open(newline="") as file:
        names = [row[0] for row in csv.reader(file) if row]
    return [folder / LIST, *(p for p in (folder / name for name in names) if p.is_file())]


def _folder_sha256(folder: Path) -> str:
    return file_sha256(*sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".npy")))


def _shuffled_groups(
    data: Dataset, rng: np.random.Generator
) -> list[tuple[NDArray[np.int64], int]]:
    """Groups of equal samples with their class, in random order, classes evenly interleaved."""
    _, first, inverse = np.unique(data.hashes, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    bounds = np.cumsum(np.bincount(inverse))[:-1]
    groups = np.split(order, bounds)
    labels = data.labels
    classes = np.zeros(len(groups), np.int64)
    if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iub":
        classes = np.asarray(labels)[first].astype(np.int64)
    # Within each class number the members 0..n-1 at random; sorting all by (rank + u) / n, u
    # random, spreads every class evenly over the whole order.
    position = np.empty(len(groups))
    for one in np.unique(classes):
        members = np.flatnonzero(classes == one)
        ranks = rng.permutation(len(members))
        position[members] = (ranks + rng.random(len(members))) / len(members)
    return [(groups[i].astype(np.int64), int(classes[i])) for i in np.argsort(position)]


def _flat(groups: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.sort(np.concatenate(groups)) if groups else np.zeros(0, np.int64)
