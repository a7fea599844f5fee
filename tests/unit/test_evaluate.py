"""Metrics against scikit-learn, intervals against simulation."""

import numpy as np
import pytest
from sklearn import metrics as sk

from edgekit.errors import InputError, UsageError
from edgekit.evaluate import METRICS, metric_named, paired_interval

RNG = np.random.default_rng(0)


def rows_of(name: str, scores: np.ndarray) -> np.ndarray:
    return np.array([METRICS[name].digest({"y": row[None]}, None) for row in scores], np.float64)


@pytest.mark.parametrize("classes", [2, 7])
def test_classification_metrics_equal_sklearn(classes: int) -> None:
    labels = RNG.integers(0, classes, 500)
    scores = RNG.random((500, classes)) + 0.7 * np.eye(classes)[labels]
    scores /= scores.sum(1, keepdims=True)
    guess = scores.argmax(1)
    average = "binary" if classes == 2 else "macro"
    expected = {
        "top1": sk.accuracy_score(labels, guess),
        "accuracy": sk.accuracy_score(labels, guess),
        "precision": sk.precision_score(labels, guess, average=average),
        "recall": sk.recall_score(labels, guess, average=average),
        "f1": sk.f1_score(labels, guess, average=average),
        "auc": sk.roc_auc_score(labels, scores[:, 1])
        if classes == 2
        else sk.roc_auc_score(labels, scores, multi_class="ovr"),
    }
    if classes > 5:
        expected["top5"] = sk.top_k_accuracy_score(labels, scores, k=5)
    for name, value in expected.items():
        found = METRICS[name].reduce(rows_of(name, scores), labels)
        assert found == pytest.approx(value, abs=1e-9), name


def test_single_probability_output() -> None:
    labels = RNG.integers(0, 2, 300)
    scores = np.round(np.clip(0.5 + 0.3 * (labels - 0.5) + RNG.normal(0, 0.3, 300), 0, 1), 1)
    for name, value in {
        "accuracy": sk.accuracy_score(labels, scores >= 0.5),
        "auc": sk.roc_auc_score(labels, scores),  # many ties
        "f1": sk.f1_score(labels, scores >= 0.5),
    }.items():
        found = METRICS[name].reduce(rows_of(name, scores[:, None]), labels)
        assert found == pytest.approx(value, abs=1e-9), name


def test_error_metrics_equal_sklearn_and_count_up_as_worse() -> None:
    labels, outputs = RNG.random((50, 3)), RNG.random((50, 3))
    found = METRICS["rmse"].reduce(rows_of("rmse", outputs), labels)
    assert found == pytest.approx(np.sqrt(sk.mean_squared_error(labels, outputs)), abs=1e-9)
    found = METRICS["mae"].reduce(rows_of("mae", outputs), labels)
    assert found == pytest.approx(sk.mean_absolute_error(labels, outputs), abs=1e-9)
    assert METRICS["mae"].drop(0.3, 0.2) == pytest.approx(0.1)
    assert METRICS["top1"].drop(0.3, 0.2) == pytest.approx(-0.1)


def test_cosine_is_the_worst_output_against_the_reference() -> None:
    reference = {"a": np.array([[1.0, 0.0]]), "b": np.array([[1.0, 1.0]])}
    outputs = {"a": np.array([[2.0, 0.0]]), "b": np.array([[1.0, 0.0]])}
    (found,) = METRICS["cosine"].digest(outputs, reference)
    assert found == pytest.approx(np.sqrt(0.5))


def test_paired_interval_of_a_proportion_covers_the_truth() -> None:
    """Candidate wrong where the reference is right with 3 %, the other way round with 1 %."""
    rng = np.random.default_rng(3)
    hits = runs = 0
    for _ in range(1000):
        kind = rng.choice(3, 300, p=[0.96, 0.03, 0.01])
        labels = np.zeros(300, np.int64)
        was = np.where(kind == 2, 1.0, 0.0)[:, None]
        now = np.where(kind == 1, 1.0, 0.0)[:, None]
        low, high = paired_interval(METRICS["top1"], now, was, labels) or (1.0, 0.0)
        runs += 1
        hits += low <= 0.02 <= high
    assert 0.93 <= hits / runs <= 0.98


def test_interval_is_honest_when_no_sample_changed() -> None:
    rows, labels = np.zeros((100, 1)), np.zeros(100, np.int64)
    low, high = paired_interval(METRICS["top1"], rows, rows, labels) or (0.0, 0.0)
    assert low < -0.01 < 0.01 < high  # 100 samples cannot show less than a point


def test_bootstrap_interval_covers_for_errors() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(60):
        labels = np.zeros((80, 1))
        before = rng.exponential(1.0, (80, 1))
        after = before + rng.exponential(0.2, (80, 1))
        low, high = paired_interval(METRICS["mae"], after, before, labels) or (1.0, 0.0)
        hits += low <= 0.2 <= high
    assert hits / 60 >= 0.85


def test_too_few_samples_give_no_interval() -> None:
    rows = np.zeros((7, 1))
    assert paired_interval(METRICS["top1"], rows, rows, np.zeros(7, np.int64)) is None


def test_users_function_sees_outputs_by_name(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(outputs, labels):\n    return float((outputs['y'][:, 0] == labels).mean())\n"
    )
    metric = metric_named(f"{file}:score")
    rows = np.array([metric.digest({"y": np.array([[v, 9.0]])}, None) for v in (0, 1, 1)])
    assert metric.reduce(rows, np.array([0, 1, 0])) == pytest.approx(2 / 3)


def test_users_function_that_raises_is_one_line(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(outputs, labels):\n    raise ValueError('no\\nway')\n")
    metric = metric_named(f"{file}:score")
    rows = np.array([metric.digest({"y": np.zeros((1, 2))}, None)])
    with pytest.raises(UsageError, match="fails: no way"):
        metric.reduce(rows, None)


@pytest.mark.parametrize("name", ["nope", "missing.py:f"])
def test_unknown_metric_lists_the_known(name: str) -> None:
    with pytest.raises(UsageError, match="top1|no file"):
        metric_named(name)


def test_labels_of_another_kind_are_refused() -> None:
    rows = np.zeros((4, 1))
    with pytest.raises(InputError, match="one class number per sample"):
        METRICS["top1"].reduce(rows, np.zeros((4, 2)))
    with pytest.raises(UsageError, match="needs labels"):
        METRICS["top1"].reduce(rows, None)
