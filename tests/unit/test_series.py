"""Series of samples: closed forms of the binomial, simulation of autocorrelation and warm-up."""

import math

import numpy as np
import pytest
from scipy import stats

from edgekit.measure.series import (
    effective_size,
    latency_summary,
    least_count,
    onset,
    quantile_interval,
    warm_up,
    width,
)


def _ar1(rng: np.random.Generator, n: int, phi: float) -> np.ndarray:
    noise = rng.standard_normal(n) * math.sqrt(1 - phi * phi)
    out = np.empty(n)
    out[0] = rng.standard_normal()
    for i in range(1, n):
        out[i] = phi * out[i - 1] + noise[i]
    return out


@pytest.mark.parametrize(("share", "count"), [(0.5, 6), (0.9, 36), (0.99, 368), (0.999, 3688)])
def test_the_least_count_is_the_first_with_an_interval(share: float, count: int) -> None:
    assert least_count(share) == count
    assert math.isinf(quantile_interval(range(count - 1), share)[1])
    assert quantile_interval(range(count), share)[1] == count - 1


@pytest.mark.parametrize("n", [40, 377, 5000])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_ranks_cover_what_scipys_binomial_says(n: int, share: float) -> None:
    low, high = quantile_interval(range(1, n + 1), share)
    below = stats.binom.cdf(np.arange(-1, n + 1), n, share)  # below[k] = P(B < k)
    assert below[int(low)] <= 0.025 < below[int(low) + 1]
    assert 1 - below[int(high)] <= 0.025 < 1 - below[int(high) - 1]


def test_an_interval_of_p90_covers_a_skewed_distribution() -> None:
    rng = np.random.default_rng(3)
    truth = stats.lognorm.ppf(0.9, 0.5)
    hits = 0
    for _ in range(1000):
        low, high = quantile_interval(rng.lognormal(0, 0.5, 200).tolist(), 0.9)
        hits += low <= truth <= high
    assert 940 <= hits <= 990


def test_independent_samples_count_in_full() -> None:
    rng = np.random.default_rng(4)
    found = [effective_size(rng.lognormal(0, 1, 2000).tolist()) for _ in range(40)]
    assert np.mean(found) > 1700
    assert max(found) <= 2000


@pytest.mark.parametrize("phi", [0.5, 0.9])
def test_an_ar1_counts_as_its_closed_form_says(phi: float) -> None:
    """The sign of a Gaussian AR(1) has autocorrelation (2 / pi) arcsin(phi**k)."""
    lags = np.arange(1, 400)
    time = 1 + 2 * np.sum(2 / np.pi * np.arcsin(phi**lags))
    rng = np.random.default_rng(5)
    found = np.mean([effective_size(_ar1(rng, 4000, phi).tolist()) for _ in range(40)])
    assert found == pytest.approx(4000 / time, rel=0.12)


def test_the_medians_interval_holds_under_autocorrelation() -> None:
    """Where the plain interval, which takes every sample for news, does not."""
    rng = np.random.default_rng(6)
    plain = aware = 0
    for _ in range(400):
        values = _ar1(rng, 1000, 0.9).tolist()
        low, high = quantile_interval(values, 0.5)
        plain += low <= 0 <= high
        low, high = quantile_interval(values, 0.5, count=effective_size(values))
        aware += low <= 0 <= high
    assert plain < 280
    assert aware > 360


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_a_steady_series_has_hardly_ever_a_warm_up(phi: float) -> None:
    rng = np.random.default_rng(7)
    cut = [warm_up(np.exp(13 + 0.05 * _ar1(rng, 400, phi)).tolist()) > 0 for _ in range(200)]
    assert sum(cut) <= 10


def test_a_slow_beginning_is_cut_where_it_ends() -> None:
    rng = np.random.default_rng(8)
    off = []
    for _ in range(100):
        values = rng.lognormal(13, 0.05, 500)
        values[:40] *= 1.25
        off.append(abs(warm_up(values.tolist()) - 40))
    assert sum(one <= 3 for one in off) >= 95


def test_a_decay_is_cut_until_little_of_it_is_left() -> None:
    rng = np.random.default_rng(9)
    for _ in range(50):
        extra = 2.0 * np.exp(-np.arange(600) / 20)
        cut = warm_up((rng.lognormal(13, 0.03, 600) * (1 + extra)).tolist())
        assert 40 <= cut <= 160
        assert extra[cut] < 0.27


def test_interruptions_and_faster_beginnings_are_no_warm_up() -> None:
    rng = np.random.default_rng(10)
    values = rng.lognormal(13, 0.03, 400)
    values[[30, 31, 90, 300]] *= 20
    assert warm_up(values.tolist()) == 0
    throttled = rng.lognormal(13, 0.03, 400)
    throttled[100:] *= 1.5
    assert warm_up(throttled.tolist()) == 0
    assert warm_up([1000] * 400) == 0
    assert warm_up([5, 4, 3]) == 0


def test_the_summary_shows_what_the_samples_support() -> None:
    few = latency_summary([30, 10, 20])
    assert (few["p50"], few["p90"], few["p99"], few["p99.9"]) == (20, None, None, None)
    assert (few["min"], few["samples"], few["intervals"]) == (10, 3, {})
    rng = np.random.default_rng(11)
    many = latency_summary(rng.permutation(np.arange(1, 1001)).tolist())
    assert (many["p50"], many["p90"], many["p99"], many["p99.9"]) == (500, 900, 990, None)
    low, high = many["intervals"]["p50"]
    assert 440 < low < 500 < high < 560
    assert many["label"] == "measured"
    stuck = latency_summary(np.repeat([100, 200, 100, 200, 100], 200).tolist())
    assert stuck["effective_samples"] < 36
    assert stuck["p99"] is None


def test_the_width_shrinks_with_independent_samples() -> None:
    rng = np.random.default_rng(12)
    assert math.isinf(width([1, 2, 3]))
    wide, narrow = (width(rng.lognormal(13, 0.1, n).tolist()) for n in (30, 3000))
    assert narrow < 0.01 < wide < 0.1


def test_a_machine_that_comes_and_goes_is_not_warming_up() -> None:
    rng = np.random.default_rng(13)
    cut = []
    for _ in range(50):
        levels = np.repeat(rng.choice([1.0, 1.5], 20), 50)
        cut.append(warm_up((rng.lognormal(13, 0.03, 1000) * levels).tolist()))
    assert sum(one > 0 for one in cut) <= 3


@pytest.mark.parametrize("slower", [1.1, 1.5, 2.0])
def test_the_onset_of_throttling_is_found(slower: float) -> None:
    rng = np.random.default_rng(14)
    for _ in range(30):
        values = rng.lognormal(13, 0.03, 300)
        values[120:] *= slower
        found = onset(values.tolist())
        assert found is not None
        assert abs(found - 120) <= 2


def test_no_onset_without_throttling() -> None:
    rng = np.random.default_rng(15)
    steady = [onset(rng.lognormal(13, 0.1, 300).tolist()) for _ in range(100)]
    assert sum(one is not None for one in steady) <= 1
    recovering = rng.lognormal(13, 0.03, 300)
    recovering[:50] *= 1.4
    assert onset(recovering.tolist()) is None
    assert onset([1.0, 2.0]) is None
