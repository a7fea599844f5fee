"""Percentiles against numpy's, and by their definition."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit_runtime.timing import percentile_ns, sample, summary

samples_ns = st.lists(st.integers(0, 10**12), min_size=1, max_size=300)


@settings(deadline=None)
@given(samples_ns, st.sampled_from([0, 1, 10, 25, 50, 75, 90, 95, 99, 100]))
def test_percentiles_are_numpys_inverted_cdf(samples: list[int], percent: int) -> None:
    wanted = np.percentile(samples, percent, method="inverted_cdf")
    assert percentile_ns(samples, percent) == wanted


@settings(deadline=None)
@given(samples_ns, st.integers(0, 100))
def test_a_percentile_is_the_smallest_sample_that_covers_enough(
    samples: list[int], percent: int
) -> None:
    def covered(value: int) -> Fraction:
        return Fraction(sum(s <= value for s in samples), len(samples))

    found = percentile_ns(samples, percent)
    assert found in samples
    assert covered(found) >= Fraction(percent, 100)
    smaller = [s for s in samples if s < found]
    assert not smaller or covered(max(smaller)) < Fraction(percent, 100)


def test_rounding_does_not_skip_a_sample() -> None:
    # 7 / 100 * 100 is 7.000000000000001: rank 8 if one divides first
    assert percentile_ns(range(1, 101), 7) == 7
    assert percentile_ns(range(1, 1001), 99.9) == 999


def test_the_samples_are_left_as_they_were() -> None:
    samples = [3, 1, 2]
    assert percentile_ns(samples, 50) == 2
    assert samples == [3, 1, 2]


def test_summary_has_the_fields_every_report_shows() -> None:
    samples = [5, 1, 4, 2, 3, 9, 8, 7, 6, 10]
    known = {"p50": 5, "p90": None, "p99": None, "min": 1, "samples": 10, "label": "measured"}
    assert summary(samples) == known
    assert summary(samples, label="simulated")["label"] == "simulated"


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(35, None, None), (36, 33, None), (367, 331, None), (368, 332, 365)]
)
def test_percentiles_need_samples_beyond_them(count: int, p90: int | None, p99: int | None) -> None:
    found = summary(range(1, count + 1))
    assert (found["p90"], found["p99"]) == (p90, p99)


def test_sample_times_each_call() -> None:
    calls = []
    taken = sample(lambda: calls.append(sum(range(20_000))), 5)
    assert len(calls) == len(taken) == 5
    assert all(isinstance(ns, int) and ns > 10_000 for ns in taken)
