"""How often the 95 % intervals of `edgekit eval` hold the truth.

For each metric, samples are drawn again and again from a model whose true figure is known, and the
intervals that hold it are counted; with 1,000 draws, 0.936 to 0.964 is chance. `misses` are those
wholly above and wholly below the truth. The table is in docs/evidence/evaluation.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.metrics import metric_named


@dataclass(frozen=True)
class Case:
    """A metric, what the samples are like, and how to draw `count` of them."""

    metric: str
    about: str
    count: int
    truth: float
    draw: Any


def confusions(classes: int, accuracy: float, least: float) -> NDArray[np.float64]:
    """Probabilities of (class, answer); `least`: how rare the last class is against the first."""
    rng = np.random.default_rng(classes)
    share = np.geomspace(1, least, classes)
    cells = np.zeros((classes, classes))
    for one in range(classes):
        others = np.arange(classes) != one
        cells[one, others] = rng.dirichlet(np.ones(classes - 1)) * (1 - accuracy)
        cells[one, one] = accuracy
    return cells * (share / share.sum())[:, None]


def true_figure(metric: str, cells: NDArray[np.float64]) -> float:
    """Of the probabilities, by the definitions."""
    what, _, average = metric.partition("-")
    right, actual, guessed = np.diag(cells), cells.sum(1), cells.sum(0)
    if what in ("top1", "accuracy") or average == "micro":
        return float(right.sum())
    each = {
        "precision": right / guessed, "recall": right / actual,
        "f1": 2 * right / (actual + guessed),
    }[what]  # fmt: skip
    if average == "":
        return float(each[1] if len(cells) == 2 else each.mean())
    if average.startswith("class"):
        return float(each[int(average.rpartition("-")[2])])
    return float(each @ actual if average == "weighted" else each.mean())


def counted(metric: str, classes: int, accuracy: float, least: float, count: int) -> Case:
    cells = confusions(classes, accuracy, least)

    def draw(rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        truth, guess = np.divmod(rng.choice(cells.size, count, p=cells.ravel()), classes)
        return guess[:, None].astype(float), truth

    about = f"{classes} classes, {accuracy:.1%} right, the rarest {least:g} of the first"
    return Case(metric, about, count, true_figure(metric, cells), draw)


def ranked(distance: float, classes: int, count: int) -> Case:
    """Normal scores, those of the right class higher by `distance` standard deviations."""

    def draw(rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        labels = np.arange(count) % classes
        scores = rng.normal(size=(count, 1 if classes == 2 else classes))
        scores[np.arange(count), 0 if classes == 2 else labels] += distance * (
            labels if classes == 2 else 1
        )
        return scores, labels

    truth = NormalDist().cdf(distance / math.sqrt(2))
    return Case("auc", f"{classes} classes, normal scores", count, truth, draw)


def measured(metric: str, count: int) -> Case:
    """Errors with an exponential tail (mae, rmse), a line with noise (r2)."""

    def draw(rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        if metric == "r2":
            labels = rng.normal(size=count)
            outputs = labels + 0.5 * rng.normal(size=count)
            return np.stack([outputs, labels], axis=1)[:, :, None], labels
        errors = rng.exponential(1.0, count)
        return (errors if metric == "mae" else errors**2)[:, None], errors

    truth = {"mae": 1.0, "rmse": math.sqrt(2), "r2": 0.75}[metric]
    about = {"r2": "normal noise"}.get(metric, "exponential errors")
    return Case(metric, about, count, truth, draw)


def cases() -> Iterator[Case]:
    for accuracy, count in ((0.5, 50), (0.9, 50), (0.99, 50), (0.9, 1000), (0.99, 1000)):
        yield counted("top1", 4, accuracy, 1.0, count)
    for metric in ("precision", "recall", "f1"):
        yield counted(metric, 2, 0.9, 0.3, 100)
        yield counted(f"{metric}-class-3", 10, 0.95, 1.0, 300)
        for average in ("macro", "weighted"):
            for classes, accuracy, least, count in (
                (2, 0.9, 0.3, 100), (3, 0.8, 0.5, 200), (10, 0.95, 1.0, 200), (10, 0.95, 0.3, 1000),
                (10, 0.995, 1.0, 1000), (40, 0.9, 1.0, 1000), (40, 0.9, 1.0, 200),
            ):  # fmt: skip
                yield counted(f"{metric}-{average}", classes, accuracy, least, count)
    for distance, classes, count in (
        (0.5, 2, 40), (1.5, 2, 40), (1.5, 2, 400), (3.0, 2, 100), (1.5, 5, 100), (3.0, 5, 300),
    ):  # fmt: skip
        yield ranked(distance, classes, count)
    for metric in ("mae", "rmse", "r2"):
        for count in (30, 100, 300):
            yield measured(metric, count)


def coverage(case: Case, draws: int, seed: int = 0) -> tuple[float, float, float]:
    """Shares of intervals that hold the truth, lie above it, and lie below it."""
    rng = np.random.default_rng(seed)
    metric = metric_named(case.metric)
    above = below = made = 0
    for number in range(draws):
        span = metric.interval_of(*case.draw(rng), seed=number)
        if span is not None:
            made += 1
            above += span.low > case.truth + 1e-12
            below += span.high < case.truth - 1e-12
    return 1 - (above + below) / made, above / made, below / made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--bootstrap-draws", type=int, default=300)
    arguments = parser.parse_args()
    print("| metric | samples like | n | truth | covered | misses above, below |")
    print("|---|---|---|---|---|---|")
    for case in cases():
        resampled = case.metric in ("mae", "rmse", "r2")
        draws = arguments.bootstrap_draws if resampled else arguments.draws
        held, above, below = coverage(case, draws)
        print(
            f"| {case.metric} | {case.about} | {case.count} | {case.truth:.4f} | **{held:.3f}** "
            f"| {above:.3f}, {below:.3f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
