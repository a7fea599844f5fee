"""Metrics with paired intervals: a candidate against the reference on the same samples.

A metric turns each sample's outputs into a short row of numbers (`digest`) and many rows into one
figure (`reduce`). Rows are kept, so any two models evaluated on the same samples can be compared
pairwise without running them again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset, load_function
from edgekit.errors import InputError, ModelError, UsageError, one_line
from edgekit.execute import outputs_of

__all__ = ["METRICS", "Metric", "evaluate", "metric_named", "paired_interval"]

Rows = NDArray[np.float64]
Outputs = dict[str, NDArray[Any]]

_BOOTSTRAP_RUNS = 1000
_BOOTSTRAP_BUDGET_S = 20.0
_KEPT_OUTPUT_BYTES = 256 << 20


@dataclass(frozen=True)
class Metric:
    """How good outputs are.

    `digest(outputs, reference_outputs)` gives one row per sample; `reduce(rows, labels)` one
    figure. `counts` says that the figure is the share of samples answered right.
    """

    name: str
    digest: Callable[[Outputs, Outputs | None], NDArray[Any]]
    reduce: Callable[[Rows, NDArray[Any] | None], float]
    higher_is_better: bool = True
    needs_labels: bool = True
    counts: bool = False

    def drop(self, value: float, reference: float) -> float:
        """How much worse than the reference, in the metric's units; positive is worse."""
        return reference - value if self.higher_is_better else value - reference


def paired_interval(
    metric: Metric, rows: Rows, reference: Rows, labels: NDArray[Any] | None, *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the drop, from paired samples; None when there are too few.

    For metrics that count samples: the adjusted Wald interval of a difference of paired
    proportions (Agresti and Min, Statistics in Medicine 24, 2005: half an observation added to
    each cell), honest also when no sample changed. For others: the percentile bootstrap over
    samples.
    """
    n = len(rows)
    if n < 8:
        return None
    if metric.counts and labels is not None:
        right, was = _hits(rows, labels), _hits(reference, labels)
        lost = float((was & ~right).sum()) + 0.5
        won = float((right & ~was).sum()) + 0.5
        total = n + 2.0
        middle = (lost - won) / total
        spread = 1.959964 * np.sqrt(lost + won - (lost - won) ** 2 / total) / total
        return middle - float(spread), middle + float(spread)
    rng = np.random.default_rng(seed)
    drops = []
    deadline = time.monotonic() + _BOOTSTRAP_BUDGET_S
    for _ in range(_BOOTSTRAP_RUNS):
        pick = rng.integers(0, n, n)
        some = None if labels is None else labels[pick]
        value, base = metric.reduce(rows[pick], some), metric.reduce(reference[pick], some)
        if np.isfinite(value) and np.isfinite(base):
            drops.append(metric.drop(value, base))
        if time.monotonic() > deadline:
            break
    if len(drops) < 50:
        return None
    low, high = np.quantile(drops, [0.025, 0.975])
    return float(low), float(high)


# --- the metrics --------------------------------------------------------------------------------


def _first(outputs: Outputs) -> NDArray[Any]:
    return np.asarray(next(iter(outputs.values())))


def _scores(outputs: Outputs) -> NDArray[Any]:
    """One sample's scores as a vector, from the first output."""
    return _first(outputs).astype(np.float64).reshape(-1)


def _top(count: int) -> Callable[[Outputs, Outputs | None], NDArray[Any]]:
    def digest(outputs: Outputs, _: Outputs | None) -> NDArray[Any]:
        scores = _scores(outputs)
        if len(scores) == 1:  # a single probability: class 1 from one half on
            return np.array([float(scores[0] >= 0.5)] + [-1.0] * (count - 1))
        best = np.argsort(-scores, kind="stable")[:count].astype(np.float64)
        return np.pad(best, (0, count - len(best)), constant_values=-1.0)

    return digest


def _integer(labels: NDArray[Any] | None) -> NDArray[Any]:
    if labels is None:
        raise UsageError("this metric needs labels, the data has none")
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise InputError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}; this metric wants one "
            "class number per sample"
        )
    return np.asarray(labels).astype(np.int64)


def _hits(rows: Rows, labels: NDArray[Any] | None) -> NDArray[np.bool_]:
    return np.asarray((rows == _integer(labels)[:, None]).any(axis=1))


def _hit_rate(rows: Rows, labels: NDArray[Any] | None) -> float:
    return float(_hits(rows, labels).mean())


def _per_class(rows: Rows, labels: NDArray[Any] | None) -> NDArray[np.float64]:
    """(classes, 3): true positives, predicted, actual; two classes 0 and 1 give only class 1."""
    truth, guess = _integer(labels), rows[:, 0].astype(np.int64)
    classes = np.union1d(truth, guess)
    if set(classes.tolist()) <= {0, 1}:
        classes = np.array([1])
    return np.array(
        [
            [((guess == c) & (truth == c)).sum(), (guess == c).sum(), (truth == c).sum()]
            for c in classes
        ],
        np.float64,
    )


def _precision(rows: Rows, labels: NDArray[Any] | None) -> float:
    table = _per_class(rows, labels)
    return float(np.mean(table[:, 0] / np.maximum(table[:, 1], 1)))


def _recall(rows: Rows, labels: NDArray[Any] | None) -> float:
    table = _per_class(rows, labels)
    return float(np.mean(table[:, 0] / np.maximum(table[:, 2], 1)))


def _f1(rows: Rows, labels: NDArray[Any] | None) -> float:
    table = _per_class(rows, labels)
    return float(np.mean(2 * table[:, 0] / np.maximum(table[:, 1] + table[:, 2], 1)))


def _auc(rows: Rows, labels: NDArray[Any] | None) -> float:
    """Area under the ROC curve, by ranks (Mann-Whitney); more classes: mean of one-vs-rest."""
    truth = _integer(labels)
    if rows.shape[1] == 1:
        return _rank_auc(rows[:, 0], truth == 1)
    if rows.shape[1] == 2:
        return _rank_auc(rows[:, 1], truth == 1)
    found = [_rank_auc(rows[:, c], truth == c) for c in np.unique(truth) if c < rows.shape[1]]
    return float(np.mean(found))


def _rank_auc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return float("nan")
    _, inverse, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    ranks = (last - (sizes - 1) / 2.0)[inverse]
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def _error(power: int) -> Callable[[Rows, NDArray[Any] | None], float]:
    def reduce(rows: Rows, labels: NDArray[Any] | None) -> float:
        if labels is None:
            raise UsageError("this metric needs labels, the data has none")
        target = np.asarray(labels, np.float64).reshape(len(labels), -1)
        if target.shape != rows.shape:
            raise InputError(
                f"labels have {target.shape[1]} values per sample, the first output has "
                f"{rows.shape[1]}"
            )
        return float(np.mean(np.abs(rows - target) ** power) ** (1 / power))

    return reduce


def _cosine(outputs: Outputs, reference: Outputs | None) -> NDArray[Any]:
    if reference is None:
        return np.array([1.0])
    return np.array([min(_cosine_of(outputs[n], reference[n]) for n in reference)])


def _cosine_of(left: NDArray[Any], right: NDArray[Any]) -> float:
    a, b = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    if a.shape != b.shape:
        return float("nan")
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norm == 0.0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(a @ b) / norm


def _mean(rows: Rows, _: NDArray[Any] | None) -> float:
    return float(rows.mean())


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", _top(1), _hit_rate, counts=True),
        Metric("top5", _top(5), _hit_rate, counts=True),
        Metric("accuracy", _top(1), _hit_rate, counts=True),
        Metric("precision", _top(1), _precision),
        Metric("recall", _top(1), _recall),
        Metric("f1", _top(1), _f1),
        Metric("auc", lambda outputs, _: _scores(outputs), _auc),
        Metric("mae", lambda outputs, _: _scores(outputs), _error(1), higher_is_better=False),
        Metric("rmse", lambda outputs, _: _scores(outputs), _error(2), higher_is_better=False),
        Metric("cosine", _cosine, _mean, needs_labels=False),
    )
}


def metric_named(name: str) -> Metric:
    """A metric by name, or the user's `module.py:function(outputs, labels) -> float`.

    Raises:
        UsageError: unknown name, or the user's function cannot be loaded.
    """
    if name in METRICS:
        return METRICS[name]
    if ".py:" not in name:
        raise UsageError(f"no metric {name!r}; known: {', '.join(METRICS)}, or module.py:function")
    return _users_metric(name)


def _users_metric(name: str) -> Metric:
    function = load_function(name, what="--metric")
    layout: list[tuple[str, tuple[int, ...], int]] = []

    def digest(outputs: Outputs, _: Outputs | None) -> NDArray[Any]:
        layout[:] = [(k, v.shape, v.size) for k, v in outputs.items()]
        return np.concatenate([v.astype(np.float64).ravel() for v in outputs.values()])

    def reduce(rows: Rows, labels: NDArray[Any] | None) -> float:
        outputs, start = {}, 0
        for key, shape, size in layout:
            part = rows[:, start : start + size]
            outputs[key] = part.reshape(len(rows), *(shape[1:] if shape[:1] == (1,) else shape))
            start += size
        try:
            return float(function(outputs, labels))
        except Exception as error:
            raise UsageError(f"--metric {name} fails: {one_line(error)}") from error

    return Metric(name, digest, reduce, needs_labels=False)


# --- in the child -------------------------------------------------------------------------------


def evaluate(
    model: str,
    options: dict[str, Any],
    data: dict[str, str],
    indices: str,
    *,
    metric: str,
    folder: str,
    reference: str | None = None,
) -> dict[str, Any]:
    """Run a model over samples; returns its figure and, given a reference, the paired drop.

    `folder` receives the rows and, for a reference, outputs to compare others with.
    `reference` is the folder an earlier call made for the reference model on the same samples.
    """
    chosen = metric_named(metric)
    samples = np.load(indices)
    dataset = Dataset(Path(data["folder"]), data["sha256"], data["source"])
    labels = None if dataset.labels is None else np.asarray(dataset.labels[samples])
    if chosen.needs_labels and labels is None:
        raise UsageError(f"--metric {metric} needs labels; {dataset.source} has no array 'labels'")
    base = Path(reference) if reference else None
    store = None if base else _OutputStore(Path(folder), everything=metric == "cosine")
    rows, cosines, broken = [], [], 0
    for position, outputs in enumerate(outputs_of(Path(model), options, dataset, samples)):
        named = _canonical(outputs, base, store)
        broken += not all(np.isfinite(v).all() for v in named.values() if v.dtype.kind == "f")
        kept = _OutputStore.load(base, position) if base else None
        rows.append(chosen.digest(named, kept))
        if kept is not None:
            cosines.append(float(_cosine(named, kept)[0]))
        if store is not None:
            store.add(position, named)
    table = np.asarray(rows, np.float64)
    np.save(Path(folder) / "rows.npy", table)
    _check_labels(chosen, labels, table, dataset.source, next(iter(named.values())))
    value = chosen.reduce(table, labels)
    result: dict[str, Any] = {"metric": value, "samples": len(table), "broken": int(broken)}
    if base is not None:
        before = np.load(base / "rows.npy")
        was = chosen.reduce(before, labels)
        result |= {
            "drop": chosen.drop(value, was),
            "drop_interval": paired_interval(chosen, table, before, labels),
            "cosine": float(np.min(cosines)) if cosines else None,
        }
    return result


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


def _check_labels(
    metric: Metric,
    labels: NDArray[Any] | None,
    rows: Rows,
    source: str,
    output: NDArray[Any],
) -> None:
    """Class numbers must be ones the model can answer."""
    if labels is None or metric.name not in (
        "top1",
        "top5",
        "accuracy",
        "precision",
        "recall",
        "f1",
    ):
        return
    numbers = _integer(labels)
    classes = max(2, output.size)
    if numbers.min() < 0 or numbers.max() >= classes:
        raise InputError(
            f"{source}: labels go from {numbers.min()} to {numbers.max()}; the model's first "
            f"output has {classes} classes (0 to {classes - 1})"
        )


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
