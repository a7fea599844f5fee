"""Lays samples out as plain arrays, in a child process, and checks that they fit the model."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import TensorSpec
from edgekit.data import HASHES, INDEX, LABELS, LIST, Dataset, load_function
from edgekit.errors import InputError, one_line
from edgekit_runtime.preprocess import Preprocess

__all__ = ["lay_out"]

_HEADERS = ("file", "filename", "path", "name", "image")


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
    _shape_texts(found, specs)
    _number_labels(source, found, labels, target)
    count = _check_names_and_lengths(source, found, specs)
    unused = sorted(set(found) - {s.name for s in specs} - {LABELS})
    index: dict[str, Any] = {"count": count, "arrays": found, "ranges": {}, "unused": unused}
    (target / INDEX).write_text(json.dumps(index))
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
    hashes.tofile(target / HASHES)
    index["arrays"][HASHES] = _entry(HASHES, hashes.dtype, hashes.shape)
    (target / INDEX).write_text(json.dumps(index))


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
                            f"{path}: {name!r} holds Python objects; save plain arrays (texts: "
                            "numpy.array(texts, dtype=str))"
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
    (folder / INDEX).write_text(json.dumps(index))
    data = Dataset(folder, "", source)
    for i in range(data.count):
        label = None if data.labels is None else np.asarray(data.labels[i])
        yield {name: np.asarray(array[i]) for name, array in data.arrays.items()}, label


def _from_folder(folder: Path, inputs: list[str], labels: list[str]) -> Samples:
    """The files that `labels.csv` names, by path; labels are numbers or names of `labels`."""
    if len(inputs) != 1:
        raise InputError(f"{folder}: a folder of files is for one input, steps are for {inputs}")
    where = folder / LIST
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


def _shape_texts(found: dict[str, Any], specs: list[TensorSpec]) -> None:
    """A list of texts is a column of them, where the model takes columns."""
    for spec in specs:
        one = found.get(spec.name)
        if one and spec.dtype == "string" and len(one["shape"]) == 1 and len(spec.shape) == 2:
            one["shape"] = [*one["shape"], 1]


def _number_labels(source: str, found: dict[str, Any], labels: list[str], folder: Path) -> None:
    """Labels that are text become class numbers, where the classes' names are known."""
    one = found.get(LABELS)
    if not one or not labels or np.dtype(one["dtype"]).kind not in "US":
        return
    texts = np.memmap(folder / one["file"], one["dtype"], "r", one["offset"], tuple(one["shape"]))
    numbers = np.array([
        _number_of(str(text), labels, f"{source}: the label of sample {i}")
        for i, text in enumerate(texts.reshape(len(texts), -1)[:, 0].astype(str).tolist())
    ], np.int64)  # fmt: skip
    numbers.tofile(folder / "labels.bin")
    found[LABELS] = _entry("labels.bin", numbers.dtype, numbers.shape)


def _number_of(text: str, labels: list[str], where: str) -> int:
    if text in labels:
        return labels.index(text)
    close = difflib.get_close_matches(text, labels, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(labels[:20])}"
    raise InputError(f"{where} is {text!r}, which is none of the {len(labels)} classes; {hint}")


def _check_fit(source: str, spec: TensorSpec, array: NDArray[Any]) -> None:
    if spec.dtype == "string":
        if array.dtype.kind not in "US":
            raise InputError(
                f"{source}: {spec.name!r} has dtype {array.dtype}, the model takes texts; save it "
                "as numpy.array(texts, dtype=str)"
            )
    elif array.dtype.kind in "US":
        raise InputError(
            f"{source}: {spec.name!r} holds texts, the model takes {spec.dtype}; say with "
            "--preprocess how they become numbers"
        )
    elif array.dtype.kind not in "iufb":
        raise InputError(
            f"{source}: {spec.name!r} has dtype {array.dtype}, which no model takes; wanted "
            f"{spec.dtype}"
        )
    elif array.dtype != np.dtype(spec.dtype):
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
