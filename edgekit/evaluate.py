"""Runs models over samples: outputs become rows, rows figures with intervals.

What runs in child processes: `evaluate` for candidates of an optimization, paired with the
reference; `assess` for one model in full.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.errors import InputError, ModelError, UsageError
from edgekit.execute import outputs_of
from edgekit.intervals import Z
from edgekit.metrics import (
    METRICS,
    Labels,
    Metric,
    Outputs,
    Rows,
    class_table,
    cosine_of,
    metric_named,
    scores_of,
)
from edgekit.subject import Subject

__all__ = ["METRICS", "Metric", "assess", "evaluate", "metric_named", "paired_interval"]

_BOOTSTRAP_RUNS = 1000
_BOOTSTRAP_BUDGET_S = 20.0
_KEPT_OUTPUT_BYTES = 256 << 20
#: a confusion matrix with more classes is given by its most confused pairs only
_MOST_CLASSES = 300
_MOST_PAIRS = 50


def paired_interval(
    metric: Metric, rows: Rows, reference: Rows, labels: Labels, *, seed: int = 0,
    budget_s: float = _BOOTSTRAP_BUDGET_S,
) -> tuple[float, float] | None:  # fmt: skip
    """95 % interval of the drop, from paired samples; None when there are too few.

    For metrics that count samples: the adjusted Wald interval of a difference of paired
    proportions (Agresti and Min, Statistics in Medicine 24, 2005: half an observation added to
    each cell), honest also when no sample changed. For others: the percentile bootstrap over
    samples.
    """
    n = len(rows)
    if n < 8:
        return None
    if metric.hits is not None and metric.counts and labels is not None:
        right, was = metric.hits(rows, labels), metric.hits(reference, labels)
        lost = float((was & ~right).sum()) + 0.5
        won = float((right & ~was).sum()) + 0.5
        total = n + 2.0
        middle = (lost - won) / total
        spread = Z * np.sqrt(lost + won - (lost - won) ** 2 / total) / total
        return middle - float(spread), middle + float(spread)
    rng = np.random.default_rng(seed)
    drops = []
    deadline = time.monotonic() + budget_s
    for _ in range(_BOOTSTRAP_RUNS):
        pick = rng.integers(0, n, n)
        some = None if labels is None else labels[pick]
        value = _defined(metric, rows[pick], some)
        base = _defined(metric, reference[pick], some)
        if math.isfinite(value) and math.isfinite(base):
            drops.append(metric.drop(value, base))
        if time.monotonic() > deadline:
            break
    if len(drops) < 50:
        return None
    low, high = np.quantile(drops, [0.025, 0.975])
    return float(low), float(high)


def _defined(metric: Metric, rows: Rows, labels: Labels) -> float:
    """The figure; NaN where these samples leave out what it needs."""
    try:
        return metric.reduce(rows, labels)
    except UsageError:
        return math.nan


# --- candidates of an optimization: runs in the child -------------------------------------------


def evaluate(
    model: str,
    options: dict[str, Any],
    data: dict[str, str],
    indices: str,
    *,
    metric: str,
    folder: str,
    reference: str | None = None,
    slice_by: str | None = None,
) -> dict[str, Any]:
    """Run a model over samples; returns its figure and, given a reference, the paired drop; the
    same for each value that the data's array `slice_by` has.

    `folder` receives the rows and, for a reference, outputs to compare others with.
    `reference` is the folder an earlier call made for the reference model on the same samples.
    """
    chosen = metric_named(metric)
    if chosen.name == "sqnr":
        raise UsageError("sqnr is for edgekit eval; without labels, decide by cosine or agreement")
    samples = np.load(indices)
    dataset = Dataset(Path(data["folder"]), data["sha256"], data["source"])
    labels = None if dataset.labels is None else np.asarray(dataset.labels[samples])
    if chosen.needs_labels and labels is None:
        raise UsageError(f"--metric {metric} needs labels; {dataset.source} has no array 'labels'")
    base = Path(reference) if reference else None
    store = None if base else _OutputStore(Path(folder), everything=chosen.needs_reference)
    rows, cosines, broken = _RowFile(Path(folder) / "rows"), [], 0
    for position, outputs in enumerate(outputs_of(Path(model), options, dataset, samples)):
        named = _canonical(outputs, base, store)
        if position == 0:
            _check_labels(chosen, labels, named, dataset.source)
        broken += not _sound(named)
        kept = _OutputStore.load(base, position) if base else None
        rows.add(chosen.digest(named, kept, None if labels is None else labels[position]))
        if kept is not None:
            cosines.append(cosine_of(named, kept))
        if store is not None:
            store.add(position, named)
    table = rows.array()
    value = chosen.reduce(table, labels)
    result: dict[str, Any] = {"metric": value, "samples": len(table), "broken": int(broken)}
    if base is not None:
        before = _RowFile(base / "rows").array()
        was = chosen.reduce(before, labels)
        result |= {
            "drop": chosen.drop(value, was),
            "drop_interval": paired_interval(chosen, table, before, labels),
            "cosine": float(np.min(cosines)) if cosines else None,
        }
    if slice_by is not None:
        parts = np.asarray(dataset.array(slice_by)[samples])
        others = None if base is None else _RowFile(base / "rows").array()
        result["slices"] = _slices(chosen, table, others, labels, (slice_by, parts))
    return result


def _slices(
    metric: Metric, rows: Rows, before: Rows | None, labels: Labels,
    by: tuple[str, NDArray[Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """The figure of each part of the samples, and what it lost."""
    name, parts = by
    found = []
    for value in np.unique(parts):
        of = parts == value
        some = None if labels is None else labels[of]
        figure = _defined(metric, rows[of], some)
        one: dict[str, Any] = {
            "name": f"{name}={value}", "samples": int(of.sum()),
            "metric": figure if math.isfinite(figure) else None, "drop": None,
        }  # fmt: skip
        if before is not None:
            drop = metric.drop(figure, _defined(metric, before[of], some))
            one["drop"] = drop if math.isfinite(drop) else None
            one["drop_interval"] = paired_interval(metric, rows[of], before[of], some)
        found.append(one)
    return found


def _sound(outputs: Outputs) -> bool:
    return all(np.isfinite(v).all() for v in outputs.values() if v.dtype.kind == "f")


def _canonical(outputs: Outputs, base: Path | None, store: _OutputStore | None) -> Outputs:
    """Outputs under the reference's names, in its order. A single one may have been renamed."""
    if store is not None:
        store.names(list(outputs))
        return outputs
    assert base is not None  # noqa: S101  (one of the two is given)
    names = (base / "names.txt").read_text().split("\n")
    if set(names) == set(outputs):
        return {name: outputs[name] for name in names}
    if len(names) == len(outputs) == 1:
        return dict(zip(names, outputs.values(), strict=True))
    raise ModelError(f"conversion renamed outputs: {', '.join(names)} became {', '.join(outputs)}")


def _check_labels(metric: Metric, labels: Labels, outputs: Outputs, source: str) -> None:
    """Class numbers must be ones the model can answer."""
    if metric.classes:
        _refuse_one_hot(labels, outputs, source)
    if labels is None or not metric.classes or labels.ndim != 1 or labels.dtype.kind not in "iub":
        return
    first = next(iter(outputs.values()))
    if first.size == 1 and first.dtype.kind in "iu":  # it names a class
        return
    classes = max(2, scores_of(outputs).size)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"{source}: labels go from {low} to {high}; the model's scores are for {classes} "
            f"classes (0 to {classes - 1})"
        )


def _refuse_one_hot(labels: Labels, outputs: Outputs, source: str) -> None:
    """As many columns as the model has scores, and nothing but a single 1 in each row."""
    if labels is None or labels.ndim != 2 or labels.dtype.kind not in "fiub":
        return
    first, width = labels[:1000], labels.shape[1]
    single = np.isin(first, (0, 1)).all() and (first.sum(axis=1) == 1).all()
    if width > 1 and width == scores_of(outputs).size and single:
        raise InputError(
            f"{source}: labels are rows of {width} numbers, one of them 1; wanted class numbers: "
            "labels.argmax(1)"
        )


# --- one model in full: runs in the child -------------------------------------------------------


def assess(
    model: dict[str, Any],
    data: dict[str, str],
    *,
    metrics: list[str],
    folder: str,
    reference: str | None = None,
    keep: bool = False,
    seed: int = 0,
    folds: int | None = None,
) -> dict[str, Any]:
    """Run a model over all samples; returns its figures with intervals, the spread over `folds`
    parts, and for classifiers how classes are confused.

    `folder` receives rows and, to `keep`, outputs. `reference` is the folder that an earlier call
    made for a reference model. Without `metrics`, those that suit labels and outputs are taken.
    """
    subject = Subject.of(model)
    dataset = Dataset(Path(data["folder"]), data["sha256"], data["source"])
    labels = None if dataset.labels is None else np.asarray(dataset.labels)
    if labels is not None and labels.dtype.kind in "USiu":
        labels = subject.class_numbers(labels)
    base = Path(reference) if reference else None
    store = _OutputStore(Path(folder), everything=True) if keep else None
    chosen: list[Metric] = [_asked(name, labels, dataset.source) for name in metrics]
    files: dict[str, _RowFile] = {}
    broken: list[int] = []
    for position, outputs in enumerate(subject.outputs(dataset)):
        kept = _OutputStore.load(base, position) if base else None
        named = outputs if kept is None else _as_reference(outputs, kept)
        if position == 0:
            chosen = chosen or _usual(
                labels, named, dataset.source, compared=keep or base is not None
            )
            for one in chosen:
                _check_labels(one, labels, named, dataset.source)
            files = {one.name: _RowFile(_rows_path(Path(folder), one)) for one in chosen}
            if any(one.classes or one.name == "auc" for one in chosen):
                files[""] = _RowFile(Path(folder) / "answers")
        if not _sound(named):
            broken.append(position)
        label = None if labels is None else labels[position]
        for one in chosen:
            files[one.name].add(one.digest(named, kept, label))
        if "" in files:
            files[""].add(METRICS["top1"].digest(named, None, None))
        if store is not None:
            store.names(list(named))
            store.add(position, named)
    parts = _parts(labels, dataset.count, folds, seed) if folds else None
    results = []
    for one in chosen:
        rows = files[one.name].array()
        result = _figure(one, rows, labels, parts, seed)
        if base is not None and not one.needs_reference:
            before = _RowFile(_rows_path(base, one)).array()
            result |= _drop(one, result["value"], rows, before, labels, seed=seed)
        results.append(result)
    found: dict[str, Any] = {
        "samples": dataset.count,
        "broken": broken[:_MOST_PAIRS],
        "broken_count": len(broken),
        "metrics": results,
    }
    if "" in files and labels is not None:
        found |= _confusion(files[""].array(), labels)
    return found


def _rows_path(folder: Path, metric: Metric) -> Path:
    return folder / f"rows-{metric.name.rpartition(':')[2]}-{len(metric.name)}"


def _asked(name: str, labels: Labels, source: str) -> Metric:
    metric = metric_named(name)
    if metric.needs_labels and labels is None:
        raise UsageError(f"--metric {name} needs labels; {source} has no array 'labels'")
    return metric


def _usual(labels: Labels, outputs: Outputs, source: str, *, compared: bool) -> list[Metric]:
    """Metrics for labels and outputs of these kinds."""
    scores = scores_of(outputs)
    if labels is None:
        if not compared:
            raise UsageError(
                f"{source} has no array 'labels': give it class numbers or numbers to reach, or a "
                "model to compare with (--reference)"
            )
        names = ["cosine", "sqnr"]
        if scores.size > 1 and next(iter(outputs.values())).ndim <= 2:
            names.append("agreement")
    elif not _are_classes(labels, outputs):
        _refuse_one_hot(labels, outputs, source)
        names = ["mae", "rmse"]
    else:
        names = ["top1", "f1"]
        if np.ptp(labels) > 0 and (scores.size > 1 or scores.dtype.kind == "f"):
            names.append("auc")
    return [METRICS[name] for name in names]


def _are_classes(labels: NDArray[Any], outputs: Outputs) -> bool:
    """Class numbers; not so where a single number is to be reached."""
    if labels.dtype.kind not in "iubUS" or labels.size != len(labels):
        return False
    first = next(iter(outputs.values()))
    single = first.dtype.kind == "f" and scores_of(outputs).size == 1
    return labels.dtype.kind in "US" or not (single and int(labels.max()) > 1)


def _as_reference(outputs: Outputs, reference: Outputs) -> Outputs:
    """Outputs under the reference's names: the same, or those at the same places."""
    if set(outputs) == set(reference):
        return {name: outputs[name] for name in reference}
    if len(outputs) != len(reference):
        raise InputError(
            f"the model has the outputs {', '.join(outputs)}, the reference "
            f"{', '.join(reference)}: wanted as many"
        )
    return dict(zip(reference, outputs.values(), strict=True))


def _parts(labels: Labels, count: int, folds: int, seed: int) -> NDArray[np.int64]:
    """The part of each sample, by lot; classes spread evenly."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iub":
        order = order[np.argsort(labels[order], kind="stable")]
    parts = np.empty(count, np.int64)
    parts[order] = np.arange(count) % folds
    return parts


def _figure(
    metric: Metric, rows: Rows, labels: Labels, parts: NDArray[np.int64] | None, seed: int
) -> dict[str, Any]:
    value = metric.reduce(rows, labels)
    span = metric.interval_of(rows, labels, seed=seed) if math.isfinite(value) else None
    found: dict[str, Any] = {
        "name": metric.name,
        "value": value if math.isfinite(value) else None,
        "undefined": "" if math.isfinite(value) else _why_undefined(metric, value, rows),
        "interval": [span.low, span.high] if span else None,
        "interval_method": span.method if span else None,
        "higher_is_better": metric.higher_is_better,
    }
    if parts is not None:
        each = np.array([
            _defined(metric, rows[parts == k], None if labels is None else labels[parts == k])
            for k in range(int(parts.max()) + 1)
        ])  # fmt: skip
        known = each[np.isfinite(each)]
        found["folds"] = {
            "values": [float(one) if math.isfinite(one) else None for one in each],
            "mean": float(known.mean()) if len(known) else None,
            "sd": float(known.std(ddof=1)) if len(known) > 1 else None,
            "least": float(known.min()) if len(known) else None,
            "greatest": float(known.max()) if len(known) else None,
        }
    return found


def _why_undefined(metric: Metric, value: float, rows: Rows) -> str:
    if metric.name == "sqnr" and value > 0:
        return "the outputs are equal to the reference's"
    if not np.isfinite(rows).all():
        return "outputs hold NaN or infinities"
    if metric.name == "auc":
        return "the labels hold one class only, or classes without a score"
    return "there are too few samples"


def _drop(
    metric: Metric, value: float | None, rows: Rows, before: Rows, labels: Labels, *, seed: int
) -> dict[str, Any]:
    was = metric.reduce(before, labels)
    if value is None or not math.isfinite(was):
        return {"reference": None, "drop": None, "drop_interval": None}
    span = paired_interval(metric, rows, before, labels, seed=seed, budget_s=10.0)
    if span is not None and span[0] == span[1]:
        span = None  # nothing changed: resampling cannot tell how little that proves
    return {"reference": was, "drop": metric.drop(value, was), "drop_interval": span}


def _confusion(answers: Rows, labels: Labels) -> dict[str, Any]:
    """Each class with its figures, and the matrix (rows: labels, columns: answers)."""
    table = class_table(answers, labels)
    cells = table.confusion
    figures = {
        what: (table.each(what), *table.limits(what)) for what in ("precision", "recall", "f1")
    }
    classes = [
        {
            "class": int(number),
            "samples": int(cells[i].sum()),
            "answers": int(cells[:, i].sum()),
            "right": int(cells[i, i]),
            **{
                key: value for what, (each, low, high) in figures.items()
                for key, value in (
                    (what, float(each[i])), (f"{what}_interval", [float(low[i]), float(high[i])])
                )
            },
        }
        for i, number in enumerate(table.classes)
    ]  # fmt: skip
    wrong = cells - np.diag(np.diag(cells))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [
        [int(table.classes[i]), int(table.classes[j]), int(wrong[i, j])]
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]
    ]  # fmt: skip
    matrix = cells.astype(int).tolist() if len(cells) <= _MOST_CLASSES else None
    return {"classes": classes, "confusion": {"matrix": matrix, "most_confused": pairs}}


class _RowFile:
    """Rows of one shape, float64, on disk: memory does not grow with their number."""

    def __init__(self, path: Path) -> None:
        self._path, self._shape = path, path.with_suffix(".shape")
        self._row: tuple[int, ...] | None = None
        self._file: IO[bytes] | None = None

    def add(self, row: NDArray[Any]) -> None:
        if self._file is None:
            self._row, self._file = row.shape, self._path.open("wb")
            self._shape.write_text(" ".join(map(str, row.shape)))
        if row.shape != self._row:
            raise ModelError(
                f"outputs change their shape from sample to sample ({list(self._row or ())}, "
                f"{list(row.shape)}); this metric needs one shape"
            )
        self._file.write(np.ascontiguousarray(row, np.float64).tobytes())

    def array(self) -> Rows:
        """Mapped, first axis: samples."""
        if self._file is not None:
            self._file.close()
        shape = tuple(map(int, self._shape.read_text().split()))
        found: Rows = np.memmap(self._path, np.float64, "r").reshape(-1, *shape)
        return found


class _OutputStore:
    """The reference's outputs on disk: all of them for `cosine`, else the first few."""

    def __init__(self, folder: Path, *, everything: bool) -> None:
        self._folder, self._everything, self._bytes = folder, everything, 0

    def names(self, names: list[str]) -> None:
        file = self._folder / "names.txt"
        if not file.exists():
            file.write_text("\n".join(names))

    def add(self, position: int, outputs: Outputs) -> None:
        self._bytes += sum(v.nbytes for v in outputs.values())
        if self._everything or (position < 64 and self._bytes < _KEPT_OUTPUT_BYTES):
            with (self._folder / f"{position}.npz").open("wb") as file:
                np.savez(
                    file, allow_pickle=False, **{f"o{i}": v for i, v in enumerate(outputs.values())}
                )

    @staticmethod
    def load(base: Path, position: int) -> Outputs | None:
        file = base / f"{position}.npz"
        if not file.exists():
            return None
        names = (base / "names.txt").read_text().split("\n")
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[f"o{i}"] for i, name in enumerate(names)}
