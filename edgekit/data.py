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
import tempfile
import zipfile
from collections.abc import Iterator
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
from edgekit_runtime.preprocess import Preprocess

__all__ = [
    "LABELS",
    "Dataset",
    "Split",
    "lay_out",
    "load_function",
    "open_dataset",
    "split_samples",
]

LABELS = "labels"
_INDEX = "index.json"
_LIST = "labels.csv"
_HEADERS = ("file", "filename", "path", "name", "image")
_HASHES = "hashes"
#: calibration takes this many samples; PTQ ranges settle well below (NNCF's default is 300)
CALIBRATION_SAMPLES = 200


@dataclass(frozen=True)
class Dataset:
    """Samples in a folder of the cache. Pickles and unequal lengths were refused on the way in."""

    folder: Path
    sha256: str
    source: str

    @cached_property
    def _index(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / _INDEX).read_text())
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
        other = (LABELS, _HASHES, *self.unused)
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

    @cached_property
    def hashes(self) -> NDArray[Any]:
        """uint64 per sample: equal samples have equal hashes."""
        return np.asarray(self._map(self._index["arrays"][_HASHES]))

    def sample(self, index: int, specs: tuple[TensorSpec, ...]) -> dict[str, NDArray[Any]]:
        """One sample, shaped for the model: with a leading 1 where the model has a batch axis."""
        out = {}
        for spec in specs:
            array = self.arrays[spec.name]
            has_batch = array.ndim == len(spec.shape)
            out[spec.name] = np.asarray(array[index : index + 1] if has_batch else array[index])
        return out

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
        if not (path / _LIST).is_file():
            raise UsageError(f"{path} has no {_LIST}; wanted a file of rows 'file,label'")
    elif not is_function and path.suffix != ".npz":
        raise UsageError(
            f"{path}: data is an .npz file, a folder with {_LIST}, or module.py:function"
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
        kind="data", layout=3, identity=identity, inputs=request["inputs"], steps=steps,
        runtime=__version__ if steps["preprocess"] else None,
    )  # fmt: skip

    def make(folder: Path) -> None:
        sandbox.call(
            "edgekit.data:lay_out", {**request, "folder": str(folder)}, what=f"reading {path}"
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


# --- in the child -------------------------------------------------------------------------------


def lay_out(
    source: str,
    function: str,
    inputs: list[dict[str, Any]],
    folder: str,
    *,
    preprocess: dict[str, Any],
    labels: list[str],
) -> None:
    """Write a source's arrays as files and check them against the model's inputs."""
    target = Path(folder)
    steps = {name: Preprocess(one["source"], one["steps"]) for name, one in preprocess.items()}
    if function:
        reference = f"{source}:{function}"
        rows = _rows(reference, load_function(reference, what="--data"))
        found = _from_rows(reference, _prepared(reference, rows, steps), target)
    elif Path(source).is_dir():
        rows = _from_folder(Path(source), list(steps), labels)
        found = _from_rows(source, _prepared(source, rows, steps), target)
    elif steps:
        with tempfile.TemporaryDirectory(dir=target) as raw:
            rows = _npz_rows(source, _from_npz(Path(source), Path(raw)), Path(raw), list(steps))
            found = _from_rows(source, _prepared(source, rows, steps), target)
    else:
        found = _from_npz(Path(source), target)
    specs = [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in inputs]
    count = _check_names_and_lengths(source, found, specs)
    unused = sorted(set(found) - {s.name for s in specs} - {LABELS})
    index: dict[str, Any] = {"count": count, "arrays": found, "ranges": {}, "unused": unused}
    (target / _INDEX).write_text(json.dumps(index))
    data = Dataset(target, "", source)
    for spec in specs:
        _check_fit(source, spec, data.arrays[spec.name])
        span = _range(source, spec.name, data.arrays[spec.name])
        if span is not None:
            index["ranges"][spec.name] = span
    if data.labels is not None and data.labels.dtype.kind == "f":
        _range(source, LABELS, data.labels)
    hashes = np.fromiter(
        (_hash([a[i] for a in data.arrays.values()]) for i in range(count)), np.uint64, count
    )
    hashes.tofile(target / _HASHES)
    index["arrays"][_HASHES] = _entry(_HASHES, hashes.dtype, hashes.shape)
    (target / _INDEX).write_text(json.dumps(index))


def _from_npz(path: Path, folder: Path) -> dict[str, Any]:
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for number, info in enumerate(archive.infolist()):
                name = info.filename.removesuffix(".npy")
                file = f"{number}.npy"
                with archive.open(info) as packed, (folder / file).open("wb") as out:
                    while chunk := packed.read(1 << 20):
                        out.write(chunk)
                with (folder / file).open("rb") as npy:
                    version = np.lib.format.read_magic(npy)
                    header = np.lib.format.read_array_header_1_0
                    if version != (1, 0):
                        header = np.lib.format.read_array_header_2_0
                    shape, fortran, dtype = header(npy)
                    if dtype.hasobject:
                        raise InputError(
                            f"{path}: {name!r} holds Python objects; save plain arrays"
                        )
                    if fortran and len(shape) > 1:
                        raise InputError(
                            f"{path}: {name!r} is in Fortran order; "
                            "save numpy.ascontiguousarray of it"
                        )
                    found[name] = _entry(file, dtype, shape, npy.tell())
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} is not a readable .npz: {one_line(error)}") from None
    return found


Samples = Iterator[tuple[dict[str, Any], Any]]


def _prepared(reference: str, rows: Samples, steps: dict[str, Preprocess]) -> Samples:
    """Rows with their raw samples made into inputs by the runtime's own code."""
    for number, (inputs, label) in enumerate(rows):
        ready = {}
        for name, value in inputs.items():
            try:
                ready[name] = steps[name](value) if name in steps else value
            except InputError as error:
                what = value.name if isinstance(value, Path) else f"sample {number}"
                raise InputError(f"{reference}: {what}: {error}") from None
        yield ready, label


def _npz_rows(source: str, found: dict[str, Any], folder: Path, wanted: list[str]) -> Samples:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{source} has the arrays {', '.join(found)}; there are steps for {missing[0]!r}"
        )
    counts = {name: one["shape"][0] if one["shape"] else 0 for name, one in found.items()}
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{source}: arrays of different lengths: {listed}")
    index: dict[str, Any] = {
        "count": counts[wanted[0]], "arrays": found, "ranges": {}, "unused": []
    }  # fmt: skip
    (folder / _INDEX).write_text(json.dumps(index))
    data = Dataset(folder, "", source)
    for i in range(data.count):
        label = None if data.labels is None else np.asarray(data.labels[i])
        yield {name: np.asarray(array[i]) for name, array in data.arrays.items()}, label


def _listed(folder: Path) -> list[Path]:
    """`labels.csv` and the files it names, as far as they exist."""
    with (folder / _LIST).open(newline="") as file:
        names = [row[0] for row in csv.reader(file) if row]
    return [folder / _LIST, *(p for p in (folder / name for name in names) if p.is_file())]


def _from_folder(folder: Path, inputs: list[str], labels: list[str]) -> Samples:
    """The files that `labels.csv` names, by path; labels are numbers or names of `labels`."""
    if len(inputs) != 1:
        raise InputError(f"{folder}: a folder of files is for one input, steps are for {inputs}")
    where = folder / _LIST
    try:
        with where.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read {where}: {one_line(error)}") from None
    if rows and rows[0][0].lower() in _HEADERS and not (folder / rows[0][0]).exists():
        rows = rows[1:]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) > 2:
        raise InputError(f"{where}: wanted rows 'file,label', or 'file' alone, all alike")
    for row in rows:
        path = (folder / row[0]).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise InputError(f"{where} names {row[0]!r}, which is no file in {folder}")
        yield {inputs[0]: path}, _label(where, row[1], labels) if len(row) == 2 else None


def _label(where: Path, text: str, labels: list[str]) -> int | float:
    if text in labels:
        return labels.index(text)
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"{where}: {text!r} is neither a number nor one of the {len(labels)} labels that "
            "stand at the top of the steps file: labels = [...] before the first [table]"
        ) from None


def _from_rows(reference: str, rows: Samples, folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = {}
    kinds: dict[str, tuple[Any, tuple[int, ...]]] = {}
    count = 0
    for inputs, label in rows:
        row = dict(inputs) if label is None else {**inputs, LABELS: label}
        if count and set(row) != set(kinds):
            raise InputError(f"{reference}: sample {count} has {', '.join(row)}; the first had "
                             f"{', '.join(kinds)}")  # fmt: skip
        for name, value in row.items():
            array = np.ascontiguousarray(value)
            if np.ndim(value) == 0:
                array = array.reshape(())
            kind = (array.dtype, array.shape)
            if kinds.setdefault(name, kind) != kind:
                raise InputError(
                    f"{reference}: {name!r} of sample {count} is {array.dtype} {array.shape}; "
                    f"the first was {kinds[name][0]} {kinds[name][1]}"
                )
            if name not in files:
                files[name] = (folder / f"{len(files)}.bin").open("wb")
            files[name].write(array.tobytes())
        count += 1
    for file in files.values():
        file.close()
    if not count:
        raise InputError(f"{reference} yielded no samples")
    return {
        name: _entry(Path(files[name].name).name, dtype, (count, *shape))
        for name, (dtype, shape) in kinds.items()
    }


def _rows(reference: str, function: Any) -> Samples:
    """What the user's function yields; its mistakes with the sample they happened at."""
    count = 0
    try:
        for item in function():
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], dict)):
                raise InputError(
                    f"{reference}: sample {count} is {type(item).__name__}; wanted a pair of a "
                    "dict of arrays by input name, and a label or None"
                )
            yield item
            count += 1
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{reference} fails at sample {count}: {one_line(error)}") from error


def _entry(file: str, dtype: Any, shape: tuple[int, ...], offset: int = 0) -> dict[str, Any]:
    return {"file": file, "dtype": np.dtype(dtype).str, "shape": list(shape), "offset": offset}


def _check_names_and_lengths(source: str, found: dict[str, Any], specs: list[TensorSpec]) -> int:
    wanted = [spec.name for spec in specs]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{source} has the arrays {', '.join(found) or '(none)'}; the model's inputs are "
            f"{', '.join(wanted)}: name the arrays like the inputs"
        )
    lengths = {
        name: found[name]["shape"][0] if found[name]["shape"] else None
        for name in (*wanted, *([LABELS] if LABELS in found else []))
    }
    first = lengths[wanted[0]]
    if not first:
        raise InputError(f"{source}: {wanted[0]!r} holds no samples")
    for name, length in lengths.items():
        if length != first:
            raise InputError(
                f"{source}: {name!r} has {length} samples, {wanted[0]!r} has {first}; "
                "all need the same number"
            )
    return int(first)


def _check_fit(source: str, spec: TensorSpec, array: NDArray[Any]) -> None:
    if array.dtype != np.dtype(spec.dtype):
        raise InputError(
            f"{source}: {spec.name!r} has dtype {array.dtype}, the model takes {spec.dtype}; "
            f"save it with .astype(numpy.{spec.dtype})"
        )
    row = (1, *array.shape[1:]) if array.ndim == len(spec.shape) else array.shape[1:]
    if not spec.accepts(row):
        fixed = spec.shape and isinstance(spec.shape[0], int) and spec.shape[0] > 1
        hint = "; EdgeKit evaluates one sample at a time: export the model with batch 1" if (
            fixed and len(row) == len(spec.shape)
        ) else ""  # fmt: skip
        raise InputError(
            f"{source}: one sample of {spec.name!r} has shape {list(row)}, the model takes "
            f"[{', '.join(map(str, spec.shape))}]{hint}"
        )


def _range(source: str, name: str, array: NDArray[Any]) -> tuple[float, float] | None:
    """Least and greatest value, read in pieces.

    Raises:
        InputError: a value is NaN or infinite; says in which sample.
    """
    if array.dtype.kind not in "iufb":
        return None
    low, high = np.inf, -np.inf
    step = max(1, (8 << 20) // max(1, array[0].nbytes))
    for start in range(0, len(array), step):
        piece = np.asarray(array[start : start + step])
        if piece.dtype.kind == "f" and not np.isfinite(piece).all():
            bad = ~np.isfinite(piece.reshape(len(piece), -1)).all(axis=1)
            number = start + int(np.flatnonzero(bad)[0])
            raise InputError(f"{source}: sample {number} of {name!r} holds NaN or Inf")
        low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    return low, high


def _hash(arrays: list[NDArray[Any]]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little")


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
