"""Metrics against scikit-learn, intervals against simulation."""

import warnings

import eval_coverage
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from edgekit import intervals
from edgekit.errors import InputError, UsageError
from edgekit.metrics import METRICS, class_table, metric_named

RNG = np.random.default_rng(0)


def rows_of(name: str, scores: np.ndarray, labels=None) -> np.ndarray:
    metric = metric_named(name)
    return np.array(
        [
            metric.digest({"y": row[None]}, None, None if labels is None else labels[i])
            for i, row in enumerate(scores)
        ],
        np.float64,
    )


def value(name: str, scores: np.ndarray, labels: np.ndarray) -> float:
    return metric_named(name).reduce(rows_of(name, scores, labels), labels)


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
    for name, wanted in expected.items():
        assert value(name, scores, labels) == pytest.approx(wanted, abs=1e-9), name


def _cases() -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    rng = np.random.default_rng(1)
    return {
        "many": (rng.integers(0, 9, 400), rng.integers(0, 9, 400), 9),
        "skewed": (*np.minimum(rng.geometric(0.4, (2, 300)), 6), 7),
        "a class never answered": (rng.integers(0, 4, 60), rng.integers(0, 3, 60), 4),
        "a class never labelled": (rng.integers(0, 3, 60), rng.integers(0, 4, 60), 5),
        "one class only": (np.ones(20, int) * 2, np.ones(20, int) * 2, 3),
        "one class, all wrong": (np.full(20, 2), np.full(20, 1), 3),
        "only class 0": (np.zeros(9, int), np.zeros(9, int), 2),
        "one sample": (np.array([1]), np.array([0]), 3),
    }  # fmt: skip


@pytest.mark.parametrize("case", _cases())
def test_averages_equal_sklearn_at_the_edges(case: str) -> None:
    labels, guess, classes = _cases()[case]
    scores = np.eye(classes)[guess]
    functions = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}
    for what, function in functions.items():
        for average in ("macro", "micro", "weighted"):
            wanted = function(labels, guess, average=average, zero_division=0)
            found = value(f"{what}-{average}", scores, labels)
            assert found == pytest.approx(wanted, abs=1e-9), (what, average)
        each = function(labels, guess, average=None, labels=range(classes), zero_division=0)
        for number in range(classes):
            found = value(f"{what}-class-{number}", scores, labels)
            assert found == pytest.approx(each[number], abs=1e-9), (what, number)
        binary = set(labels) | set(guess) <= {0, 1}
        wanted = function(labels, guess, average="binary" if binary else "macro", zero_division=0)
        assert value(what, scores, labels) == pytest.approx(wanted, abs=1e-9)
    table = class_table(rows_of("f1", scores), labels)
    if len(table.classes) == 1:  # scikit-learn warns of those
        return
    wanted = sk.confusion_matrix(labels, guess)
    np.testing.assert_array_equal(table.confusion, wanted)


def test_auc_with_ties_and_missing_classes() -> None:
    labels = RNG.integers(0, 4, 200)
    scores = np.round(RNG.random((200, 4)) + 0.5 * np.eye(4)[labels], 1)  # many ties
    wanted = np.mean([sk.roc_auc_score(labels == c, scores[:, c]) for c in range(4)])
    assert value("auc", scores, labels) == pytest.approx(wanted, abs=1e-9)
    some = labels != 2
    wanted = np.mean([sk.roc_auc_score(labels[some] == c, scores[some, c]) for c in (0, 1, 3)])
    assert value("auc", scores[some], labels[some]) == pytest.approx(wanted, abs=1e-9)
    assert np.isnan(value("auc", scores[:, :2], np.zeros(200, int)))
    assert np.isnan(value("auc", np.full((200, 4), np.nan), labels))


def test_single_probability_output() -> None:
    labels = RNG.integers(0, 2, 300)
    scores = np.round(np.clip(0.5 + 0.3 * (labels - 0.5) + RNG.normal(0, 0.3, 300), 0, 1), 1)
    for name, wanted in {
        "accuracy": sk.accuracy_score(labels, scores >= 0.5),
        "auc": sk.roc_auc_score(labels, scores),  # many ties
        "f1": sk.f1_score(labels, scores >= 0.5),
    }.items():
        assert value(name, scores[:, None], labels) == pytest.approx(wanted, abs=1e-9), name


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3)])
def test_error_metrics_equal_sklearn(shape: tuple[int, ...]) -> None:
    labels, outputs = RNG.random(shape), RNG.random((50, *shape[1:]))
    outputs = outputs.reshape(50, -1)
    for name, wanted in {
        "rmse": np.sqrt(sk.mean_squared_error(labels, outputs)),
        "mae": sk.mean_absolute_error(labels, outputs),
        "r2": sk.r2_score(labels, outputs),
    }.items():
        assert value(name, outputs, labels) == pytest.approx(wanted, abs=1e-9), name


@pytest.mark.parametrize("right", [True, False])
def test_r2_of_labels_that_are_all_equal(right: bool) -> None:
    labels = np.tile([1.0, 2.0], (6, 1))
    outputs = labels if right else labels + RNG.random((6, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = sk.r2_score(labels, outputs)
    assert value("r2", outputs, labels) == pytest.approx(wanted, abs=1e-9)


def test_errors_count_up_as_worse() -> None:
    assert METRICS["mae"].drop(0.3, 0.2) == pytest.approx(0.1)
    assert METRICS["top1"].drop(0.3, 0.2) == pytest.approx(-0.1)


def test_a_class_number_among_the_outputs_is_the_answer() -> None:
    outputs = {"label": np.array([7]), "probabilities": np.array([[0.2, 0.5, 0.3]])}
    assert METRICS["top1"].digest(outputs, None, None) == [7]
    np.testing.assert_array_equal(METRICS["auc"].digest(outputs, None, None), [0.2, 0.5, 0.3])
    outputs["label"] = np.array(["cat"])
    assert METRICS["top1"].digest(outputs, None, None) == [1]


def test_against_a_reference() -> None:
    reference = {"a": np.array([[1.0, 0.0]]), "b": np.array([[1.0, 1.0]])}
    outputs = {"a": np.array([[2.0, 0.0]]), "b": np.array([[1.0, 0.0]])}
    (found,) = METRICS["cosine"].digest(outputs, reference, None)
    assert found == pytest.approx(np.sqrt(0.5))  # the worst output
    row = METRICS["sqnr"].digest(outputs, reference, None)
    assert METRICS["sqnr"].reduce(row[None], None) == pytest.approx(0.0)  # a: signal 1, noise 1
    assert METRICS["agreement"].digest(outputs, reference, None) == [1.0]
    swapped = {"a": np.array([[0.0, 1.0]]), "b": outputs["b"]}
    assert METRICS["agreement"].digest(swapped, reference, None) == [0.0]


def test_wilson_equals_scipy() -> None:
    for hits, count in ((0, 5), (3, 7), (50, 50), (990, 1000)):
        wanted = stats.binomtest(hits, count).proportion_ci(method="wilson")
        found = intervals.wilson(float(hits), float(count))
        np.testing.assert_allclose(found, [wanted.low, wanted.high], atol=1e-9)
    assert tuple(map(float, intervals.wilson(0.0, 0.0))) == (0.0, 1.0)


def test_bootstrap_is_near_scipy_and_seeded() -> None:
    values = RNG.exponential(1.0, 200)
    found = intervals.bootstrap(lambda pick: float(values[pick].mean()), 200, seed=3)
    again = intervals.bootstrap(lambda pick: float(values[pick].mean()), 200, seed=3)
    wanted = stats.bootstrap((values,), np.mean, method="BCa", rng=0).confidence_interval
    assert found == again
    assert found.low == pytest.approx(wanted.low, abs=0.02)
    assert found.high == pytest.approx(wanted.high, abs=0.02)
    assert intervals.bootstrap(lambda pick: 1.0, 200) is None, "nothing varies"
    assert intervals.bootstrap(lambda pick: float(values[pick].mean()), 7) is None


@pytest.mark.parametrize(
    "case",
    [
        eval_coverage.counted("top1", 4, 0.9, 1.0, 200),
        eval_coverage.counted("f1", 2, 0.9, 0.3, 100),
        eval_coverage.counted("f1-macro", 10, 0.95, 1.0, 200),
        eval_coverage.counted("precision-weighted", 3, 0.8, 0.5, 200),
        eval_coverage.ranked(1.5, 2, 60),
        eval_coverage.ranked(3.0, 5, 200),
    ],
    ids=lambda case: f"{case.metric}-{case.count}",
)
def test_intervals_hold_the_truth_as_often_as_they_say(case: eval_coverage.Case) -> None:
    held, _, _ = eval_coverage.coverage(case, 400, seed=5)
    assert 0.92 <= held <= 0.985


def test_bootstrap_holds_the_truth_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(6), 0
    for number in range(150):
        values = rng.exponential(1.0, 60)

        def mean(pick, values=values):
            return float(values[pick].mean())

        found = intervals.bootstrap(mean, 60, seed=number, runs=400)
        held += found.low <= 1.0 <= found.high
    assert held / 150 >= 0.9


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.classes or n == "auc"])
def test_no_mistake_is_no_certainty(name: str) -> None:
    labels = np.arange(60) % 3
    found = metric_named(name).interval_of(rows_of(name, np.eye(3)[labels]), labels)
    assert found.low < 0.97
    assert found.high == pytest.approx(1.0)


# --- the user's function ------------------------------------------------------------------------


def test_users_function_sees_outputs_by_name(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(outputs, labels):\n    return float((outputs['y'][:, 0] == labels).mean())\n"
    )
    metric = metric_named(f"{file}:score")
    rows = np.array([metric.digest({"y": np.array([[v, 9.0]])}, None, None) for v in (0, 1, 1)])
    assert metric.reduce(rows, np.array([0, 1, 0])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no\\nway')", "fails: ValueError: no way"),
        ("return 1.0 / min(outputs['y'][:, 0])", "fails at sample 2: ZeroDivisionError"),
        ("return float('nan')", "returns nan$"),
        ("return float(outputs['y'][:, 1].sum())", "returns nan at sample 1"),
        ("return 'good'", "could not convert"),
    ],
)
def test_users_function_that_goes_wrong_is_named_with_the_sample(tmp_path, body, said) -> None:
    file = tmp_path / "mine.py"
    body = body.replace("[:, 0]", "[:, 0].tolist()")
    file.write_text(f"def score(outputs, labels):\n    {body}\n")
    metric = metric_named(f"{file}:score")
    values = [[1.0, 2.0], [3.0, np.nan], [0.0, 1.0]]
    rows = np.array([metric.digest({"y": np.array([v])}, None, None) for v in values])
    with pytest.raises(UsageError, match=said):
        metric.reduce(rows, None)


@pytest.mark.parametrize("name", ["nope", "missing.py:f", "f1-class-cat"])
def test_unknown_metric_lists_the_known(name: str) -> None:
    with pytest.raises(UsageError, match="top1|no file"):
        metric_named(name)


def test_labels_of_another_kind_are_refused() -> None:
    rows = np.zeros((4, 1))
    with pytest.raises(InputError, match="one class number per sample"):
        METRICS["top1"].reduce(rows, np.zeros((4, 2)))
    with pytest.raises(InputError, match="labels are text"):
        METRICS["top1"].reduce(rows, np.array(["a", "b", "a", "b"]))
    with pytest.raises(UsageError, match="needs labels"):
        METRICS["top1"].reduce(rows, None)
    with pytest.raises(InputError, match="labels have 2 values per sample"):
        METRICS["mae"].digest({"y": np.zeros((1, 3))}, None, np.zeros(2))
