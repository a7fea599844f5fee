"""Metrics: how good outputs are, as scikit-learn defines it, each with a 95 % interval.

A metric turns each sample's outputs into a short row of numbers (`digest`) and many rows into one
figure (`reduce`). Rows are kept, so any two models evaluated on the same samples can be compared
pairwise without running them again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import intervals
from edgekit.data import load_function
from edgekit.errors import InputError, UsageError, one_line
from edgekit.intervals import Interval, bootstrap

__all__ = [
    "METRICS", "ClassTable", "Labels", "Metric", "Outputs", "Rows", "answer_of", "class_table",
    "cosine_of", "metric_named", "scores_of",
]  # fmt: skip

Rows = NDArray[Any]
Labels = NDArray[Any] | None
Outputs = Mapping[str, NDArray[Any]]
Digest = Callable[[Outputs, Outputs | None, Any], NDArray[Any]]

_PER_CLASS = re.compile(r"(precision|recall|f1)-class-(\d+)")


@dataclass(frozen=True)
class Metric:
    """How good outputs are.

    `digest(outputs, reference outputs, label)` gives one row per sample; `reduce(rows, labels)`
    one figure. `hits` says which samples were answered right, where the figure is their share.
    `interval(rows, labels)` is a closed form, where there is one.
    """

    name: str
    digest: Digest
    reduce: Callable[[Rows, Labels], float]
    higher_is_better: bool = True
    needs_labels: bool = True
    needs_reference: bool = False
    hits: Callable[[Rows, Labels], NDArray[np.bool_]] | None = None
    interval: Callable[[Rows, Labels], Interval | None] | None = None
    classes: bool = False

    @property
    def counts(self) -> bool:
        """Whether the figure is the share of samples that are answered as labelled."""
        return self.hits is not None and self.needs_labels

    def drop(self, value: float, reference: float) -> float:
        """How much worse than the reference, in the metric's units; positive is worse."""
        return reference - value if self.higher_is_better else value - reference

    def interval_of(
        self, rows: Rows, labels: Labels, *, seed: int = 0, budget_s: float = 10.0
    ) -> Interval | None:
        """The 95 % interval of `reduce(rows, labels)`; None where there is no telling."""
        if self.hits is not None:
            right = self.hits(rows, labels)
            low, high = intervals.wilson(float(right.sum()), float(len(right)))
            return Interval(float(low), float(high), "wilson")
        if self.interval is not None:
            return self.interval(rows, labels)

        def figure(pick: NDArray[np.int64]) -> float:
            return self.reduce(rows[pick], None if labels is None else labels[pick])

        return bootstrap(figure, len(rows), seed=seed, budget_s=budget_s)


# --- what a classifier answers ------------------------------------------------------------------


def scores_of(outputs: Outputs) -> NDArray[np.float64]:
    """One sample's scores as a vector: the first output; where that is one class number or a text
    (scikit-learn's `label`), the next that holds numbers.

    Raises:
        InputError: no output holds numbers.
    """
    arrays = [np.asarray(one) for one in outputs.values()]
    numbers = [one for one in arrays if one.dtype.kind in "fiub"]
    if not numbers:
        raise InputError(f"the outputs {', '.join(outputs)} hold no numbers")
    told = len(numbers) > 1 and _is_class(arrays[0])
    return numbers[1 if told else 0].astype(np.float64).reshape(-1)


def answer_of(outputs: Outputs) -> int:
    """The class that one sample's outputs name, or score highest; of a single probability class 1
    from one half on."""
    first = np.asarray(next(iter(outputs.values())))
    if _is_class(first) and first.dtype.kind in "iu":
        return int(first.reshape(-1)[0])
    scores = scores_of(outputs)
    if len(scores) == 1:
        return int(scores[0] >= 0.5)
    return int(np.argmax(np.where(np.isnan(scores), -np.inf, scores)))


def _is_class(array: NDArray[Any]) -> bool:
    """int8 is a quantized score."""
    return array.size == 1 and (array.dtype.kind in "iu" and array.dtype.itemsize >= 4)


def _answer(outputs: Outputs, _: Outputs | None, __: Any) -> NDArray[Any]:
    return np.array([answer_of(outputs)], np.float64)


def _best_five(outputs: Outputs, _: Outputs | None, __: Any) -> NDArray[Any]:
    scores = scores_of(outputs)
    if len(scores) == 1:
        return np.array([float(scores[0] >= 0.5)] + [-1.0] * 4)
    best = np.argsort(-scores, kind="stable")[:5].astype(np.float64)
    return np.pad(best, (0, 5 - len(best)), constant_values=-1.0)


def _integer(labels: Labels) -> NDArray[np.int64]:
    if labels is None:
        raise UsageError("this metric needs labels, the data has none")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 1 and labels.dtype.kind in "US":
        raise InputError(
            f"labels are text ({str(labels[0])!r}, ...); say which class each name is: labels = "
            "[...] in the --preprocess file, in the order of the model's scores"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise InputError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}; this metric wants one "
            "class number per sample"
        )
    return np.asarray(labels).astype(np.int64)


def _hits(rows: Rows, labels: Labels) -> NDArray[np.bool_]:
    return np.asarray((rows == _integer(labels)[:, None]).any(axis=1))


def _share(hits: Callable[[Rows, Labels], NDArray[np.bool_]]) -> Callable[[Rows, Labels], float]:
    return lambda rows, labels: float(hits(rows, labels).mean())


# --- precision, recall, F1 ----------------------------------------------------------------------


@dataclass(frozen=True)
class ClassTable:
    """`classes` are the numbers that labels or answers hold, ascending; `confusion[i, j]` counts
    samples of class i that were taken for class j."""

    classes: NDArray[np.int64]
    confusion: NDArray[np.float64]

    def each(self, what: str) -> NDArray[np.float64]:
        """Precision, recall or F1 of each class; 0 where nothing is counted."""
        return _each(self.confusion, what)

    def limits(self, what: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The lower and upper ends of their 95 % intervals."""
        right, actual, guessed = _margins(self.confusion)
        if what == "f1":
            return intervals.f_score(right, actual + guessed - 2 * right)
        return intervals.wilson(right, guessed if what == "precision" else actual)

    def mean(self, what: str, average: str) -> float:
        """Macro, micro or weighted, as scikit-learn's `average`."""
        if average == "micro":
            return float(np.trace(self.confusion) / self.confusion.sum())
        return float(self._weights(average) @ self.each(what))

    def mean_interval(self, what: str, average: str) -> Interval | None:
        """Of `mean`. The variance comes from what one sample more in a cell of the confusion
        matrix would change (the delta method), with one error more than was seen, in all cells
        alike: without one, nothing would vary."""
        if average == "micro":
            low, high = intervals.wilson(np.trace(self.confusion), self.confusion.sum())
            return Interval(float(low), float(high), "wilson")
        count, several = len(self.classes), len(self.classes) > 1
        weights = self._weights(average)
        more = (1 - np.eye(count)) / (count * (count - 1)) if several else np.ones((1, 1))
        cells = self.confusion + more
        each = _each(cells, what)
        middle = float(weights @ each)
        change = _changes(cells, what, weights, each)
        if average == "weighted":
            change += ((each - middle) / self.confusion.sum())[:, None]
        return intervals.effective(
            self.mean(what, average), middle, float(np.sum(cells * change**2))
        )

    def _weights(self, average: str) -> NDArray[np.float64]:
        count = len(self.classes)
        if average == "macro":
            return np.full(count, 1 / count)
        return np.asarray(self.confusion.sum(axis=1) / self.confusion.sum())


def _margins(cells: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return np.diag(cells), cells.sum(axis=1), cells.sum(axis=0)


def _each(cells: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    right, actual, guessed = _margins(cells)
    if what == "f1":
        return np.asarray(_ratio(2 * right, actual + guessed))
    return np.asarray(_ratio(right, guessed if what == "precision" else actual))


def _ratio(over: NDArray[Any], under: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.divide(over, under, out=np.zeros(len(over)), where=under > 0))


def _changes(
    cells: NDArray[np.float64], what: str, weights: NDArray[np.float64], each: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What one sample more in each cell adds to the weighted mean of the classes' figures."""
    _, actual, guessed = _margins(cells)
    under = {"f1": actual + guessed, "precision": guessed, "recall": actual}[what]
    step = _ratio(weights, under)
    lost = -step * each
    rows = lost[:, None] if what != "precision" else 0.0
    columns = lost[None, :] if what != "recall" else 0.0
    change = np.zeros(cells.shape) + rows + columns
    gain = step * (2 - 2 * each) if what == "f1" else step * (1 - each)
    np.fill_diagonal(change, gain)
    return np.asarray(change)


def class_table(rows: Rows, labels: Labels) -> ClassTable:
    """The confusion matrix of answers (in the rows' first column) and class numbers.

    Raises:
        InputError: labels are no class numbers.
    """
    truth, guess = _integer(labels), rows[:, 0].astype(np.int64)
    classes, place = np.unique(np.concatenate([truth, guess]), return_inverse=True)
    count = len(classes)
    cells = np.bincount(place[: len(truth)] * count + place[len(truth) :], minlength=count**2)
    return ClassTable(classes, cells.astype(np.float64).reshape(count, count))


def _by_class(name: str, what: str, average: str) -> Metric:
    """`average`: macro, micro, weighted, a class number, or "" for scikit-learn's default with two
    classes (that of class 1) and the macro average with more."""

    def one_of(table: ClassTable) -> int | None:
        if average.isdigit():
            return int(average)
        return 1 if average == "" and set(table.classes.tolist()) <= {0, 1} else None

    def reduce(rows: Rows, labels: Labels) -> float:
        table = class_table(rows, labels)
        one = one_of(table)
        if one is None:
            return table.mean(what, average or "macro")
        return float(table.each(what)[table.classes == one].sum())

    def interval(rows: Rows, labels: Labels) -> Interval | None:
        table = class_table(rows, labels)
        one = one_of(table)
        if one is None:
            return table.mean_interval(what, average or "macro")
        low, high = (ends[table.classes == one] for ends in table.limits(what))
        return Interval(float(low[0]), float(high[0]), "wilson") if len(low) else None

    return Metric(name, _answer, reduce, interval=interval, classes=True)


# --- area under the ROC curve -------------------------------------------------------------------


def _scores_row(outputs: Outputs, _: Outputs | None, __: Any) -> NDArray[Any]:
    return scores_of(outputs)


def _curves(rows: Rows, labels: Labels) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """Scores and which samples are positive: of class 1 where there are two, else of each class
    that the labels hold."""
    truth = _integer(labels)
    if rows.shape[1] <= 2:
        return [(np.asarray(rows[:, -1]), truth == 1)]
    return [(np.asarray(rows[:, c]), truth == c) for c in np.unique(truth) if c < rows.shape[1]]


def _auc(rows: Rows, labels: Labels) -> float:
    """By ranks (Mann-Whitney); more classes: the mean of one-vs-rest."""
    return float(np.mean([_rank_auc(*one) for one in _curves(rows, labels)]))


def _auc_interval(rows: Rows, labels: Labels) -> Interval | None:
    curves = _curves(rows, labels)
    areas = np.array([_rank_auc(*one) for one in curves])
    if not len(areas) or not np.isfinite(areas).all():
        return None
    ends = np.array(
        [intervals.auc(float(area), int(is_one.sum()), int((~is_one).sum()))
         for area, (_, is_one) in zip(areas, curves, strict=True)]
    )  # fmt: skip
    low, high = ends.mean(axis=0)
    if len(curves) == 1:
        return Interval(float(low), float(high), "newcombe")
    change = np.mean([_placements(*one) for one in curves], axis=0)
    # Classes without an overlap vary as little as Newcombe's interval allows, not at all.
    least = (
        float(np.sum(((areas - ends[:, 0]) / intervals.Z) ** 2 * (areas == 1))) / len(areas) ** 2
    )
    middle = float(np.mean(np.where(areas == 1, (1 + ends[:, 0]) / 2, areas)))
    return intervals.effective(float(areas.mean()), middle, float(np.sum(change**2)) + least)


def _rank_auc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others or np.isnan(scores).any():
        return math.nan
    ranks = _ranks(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def _ranks(scores: NDArray[Any]) -> NDArray[np.float64]:
    """1 for the least; ties share the mean of theirs."""
    _, inverse, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(sizes) - (sizes - 1) / 2.0)[inverse])


def _placements(scores: NDArray[Any], positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What each sample adds to the area (DeLong et al., Biometrics 44, 1988)."""
    ranks = _ranks(scores)
    count, others = int(positive.sum()), int((~positive).sum())
    found = np.empty(len(scores))
    found[positive] = (ranks[positive] - _ranks(scores[positive])) / others
    found[~positive] = 1 - (ranks[~positive] - _ranks(scores[~positive])) / count
    found[positive] = (found[positive] - found[positive].mean()) / count
    found[~positive] = (found[~positive] - found[~positive].mean()) / others
    return found


# --- numbers ------------------------------------------------------------------------------------


def _errors(outputs: Outputs, label: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first output and the label, as vectors of one length."""
    if label is None:
        raise UsageError("this metric needs labels, the data has none")
    found, wanted = scores_of(outputs), np.asarray(label)
    if wanted.dtype.kind not in "fiub":
        raise InputError(f"labels are {wanted.dtype}; this metric wants numbers")
    target = wanted.astype(np.float64).reshape(-1)
    if target.shape != found.shape:
        raise InputError(
            f"labels have {len(target)} values per sample, the first output has {len(found)}"
        )
    return found, target


def _absolute(outputs: Outputs, _: Outputs | None, label: Any) -> NDArray[Any]:
    found, target = _errors(outputs, label)
    return np.array([np.mean(np.abs(found - target))])


def _squared(outputs: Outputs, _: Outputs | None, label: Any) -> NDArray[Any]:
    found, target = _errors(outputs, label)
    return np.array([np.mean((found - target) ** 2)])


def _both(outputs: Outputs, _: Outputs | None, label: Any) -> NDArray[Any]:
    return np.stack(_errors(outputs, label))


def _mean(rows: Rows, _: Labels) -> float:
    return float(np.mean(rows))


def _root(rows: Rows, _: Labels) -> float:
    return float(np.sqrt(np.mean(rows)))


def _determination(rows: Rows, _: Labels) -> float:
    """R2, the mean over the outputs; rows are (N, 2, D): outputs and labels. As scikit-learn, 1
    for an output that is right where the labels are all equal, 0 where it is not."""
    found, target = rows[:, 0], rows[:, 1]
    if len(rows) < 2:
        return math.nan
    left = np.sum((target - found) ** 2, axis=0)
    spread = np.sum((target - target.mean(axis=0)) ** 2, axis=0)
    share = np.divide(left, spread, out=(left > 0).astype(np.float64), where=spread > 0)
    return float(np.mean(1 - share))


# --- against a reference ------------------------------------------------------------------------


def _cosine(outputs: Outputs, reference: Outputs | None, _: Any) -> NDArray[Any]:
    if reference is None:
        return np.array([1.0])
    return np.array([cosine_of(outputs, reference)])


def cosine_of(outputs: Outputs, reference: Outputs) -> float:
    """Of the output that differs most; NaN where shapes differ."""
    return min(_cosine_between(outputs[name], reference[name]) for name in reference)


def _cosine_between(left: NDArray[Any], right: NDArray[Any]) -> float:
    a, b = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    if a.shape != b.shape:
        return math.nan
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norm == 0.0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(a @ b) / norm


def _noise(outputs: Outputs, reference: Outputs | None, _: Any) -> NDArray[Any]:
    """(outputs, 2): the energy of the reference and of the difference."""
    if reference is None:
        return np.array([[1.0, 0.0]])
    found = []
    for name, wanted in reference.items():
        a, b = wanted.astype(np.float64), outputs[name].astype(np.float64)
        if a.shape != b.shape:
            raise InputError(f"{name!r} has shape {list(b.shape)}, the reference's {list(a.shape)}")
        found.append([np.sum(a * a), np.sum((a - b) ** 2)])
    return np.array(found)


def _decibels(rows: Rows, _: Labels) -> float:
    """Of the output with the most noise; infinite where outputs are equal."""
    signal, noise = rows.sum(axis=0).T
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(noise > 0, 10 * np.log10(signal / noise), np.inf)
    return float(found.min())


def _agreement(outputs: Outputs, reference: Outputs | None, _: Any) -> NDArray[Any]:
    return np.array([reference is None or answer_of(outputs) == answer_of(reference)], np.float64)


def _agreeing(rows: Rows, _: Labels) -> NDArray[np.bool_]:
    return np.asarray(rows[:, 0] == 1.0)


def _counted(name: str, digest: Digest, *, classes: bool = True) -> Metric:
    return Metric(name, digest, _share(_hits), hits=_hits, classes=classes)


def _against(name: str, digest: Digest, reduce: Callable[[Rows, Labels], float]) -> Metric:
    return Metric(name, digest, reduce, needs_labels=False, needs_reference=True)


METRICS = {
    metric.name: metric
    for metric in (
        _counted("top1", _answer),
        _counted("top5", _best_five),
        _counted("accuracy", _answer),
        *(
            _by_class(f"{what}-{average}" if average else what, what, average)
            for what in ("precision", "recall", "f1")
            for average in ("", "macro", "micro", "weighted")
        ),
        Metric("auc", _scores_row, _auc, interval=_auc_interval),
        Metric("mae", _absolute, _mean, higher_is_better=False),
        Metric("rmse", _squared, _root, higher_is_better=False),
        Metric("r2", _both, _determination),
        _against("cosine", _cosine, _mean),
        _against("sqnr", _noise, _decibels),
        Metric(
            "agreement", _agreement, _share(_agreeing), hits=_agreeing, needs_labels=False,
            needs_reference=True,
        ),
    )
}  # fmt: skip


def metric_named(name: str) -> Metric:
    """A metric by name (`f1-class-3` and the like included), or the user's
    `module.py:function(outputs, labels) -> float`.

    Raises:
        UsageError: unknown name, or the user's function cannot be loaded.
    """
    if name in METRICS:
        return METRICS[name]
    per_class = _PER_CLASS.fullmatch(name)
    if per_class:
        return _by_class(name, per_class[1], str(int(per_class[2])))
    if ".py:" not in name:
        raise UsageError(
            f"no metric {name!r}; known: {', '.join(METRICS)}, f1-class-N, or module.py:function"
        )
    return _users_metric(name)


def _users_metric(name: str) -> Metric:
    function = load_function(name, what="--metric")
    layout: list[tuple[str, tuple[int, ...], int]] = []

    def digest(outputs: Outputs, _: Outputs | None, __: Any) -> NDArray[Any]:
        layout[:] = [(k, v.shape, v.size) for k, v in outputs.items()]
        return np.concatenate([v.astype(np.float64).ravel() for v in outputs.values()])

    def call(rows: Rows, labels: Labels) -> float:
        outputs, start = {}, 0
        for key, shape, size in layout:
            part = np.asarray(rows[:, start : start + size])
            outputs[key] = part.reshape(len(rows), *(shape[1:] if shape[:1] == (1,) else shape))
            start += size
        return float(function(outputs, labels))

    def where(rows: Rows, labels: Labels) -> str:
        """The first sample alone that it fails on, if it does not fail on all."""
        failing = []
        for i in range(len(rows)):
            try:
                sound = math.isfinite(call(rows[i : i + 1], _slice(labels, i)))
            except Exception:
                sound = False
            failing.append(not sound)
        return f" at sample {failing.index(True)}" if any(failing) and not all(failing) else ""

    def reduce(rows: Rows, labels: Labels) -> float:
        try:
            value = call(rows, labels)
        except Exception as error:
            kind = type(error).__name__
            raise UsageError(
                f"--metric {name} fails{where(rows, labels)}: {kind}: {one_line(error)}"
            ) from error
        if not math.isfinite(value):
            raise UsageError(f"--metric {name} returns {value}{where(rows, labels)}")
        return value

    def figure(rows: Rows, labels: Labels) -> float:
        try:
            return call(rows, labels)
        except Exception:  # some draws leave out what it needs
            return math.nan

    def interval(rows: Rows, labels: Labels) -> Interval | None:
        def drawn(pick: NDArray[np.int64]) -> float:
            return figure(rows[pick], None if labels is None else labels[pick])

        return bootstrap(drawn, len(rows))

    return Metric(name, digest, reduce, needs_labels=False, interval=interval)


def _slice(labels: Labels, i: int) -> Labels:
    return None if labels is None else labels[i : i + 1]
