"""Intervals of a drop, against simulation."""

import numpy as np

from edgekit.evaluate import METRICS, paired_interval


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
