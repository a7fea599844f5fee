"""Intervals against closed forms and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from edgekit.measure.statistics import median_interval, ratio_interval


@pytest.mark.parametrize("n", [6, 9, 20, 51])
def test_median_interval_takes_the_ranks_of_the_binomial(n: int) -> None:
    values = list(range(1, n + 1))
    _, low, high = median_interval(values)
    rank = int(low)
    assert high == n + 1 - rank
    covered = 1 - 2 * stats.binom.cdf(rank - 1, n, 0.5)
    narrower = 1 - 2 * stats.binom.cdf(rank, n, 0.5)
    assert covered >= 0.95 > narrower


def test_five_values_give_no_interval() -> None:
    middle, low, high = median_interval([3.0, 1.0, 2.0, 5.0, 4.0])
    assert middle == 3.0
    assert math.isinf(low)
    assert math.isinf(high)


def test_median_interval_covers_a_skewed_distribution() -> None:
    rng = np.random.default_rng(1)
    truth = math.exp(0.0)  # median of a log-normal
    hits = 0
    for _ in range(2000):
        _, low, high = median_interval(rng.lognormal(0.0, 1.0, 15).tolist())
        hits += low <= truth <= high
    assert 0.95 <= hits / 2000 <= 0.99  # the ranks of n = 15 cover 96.5 %


def test_ratio_is_paired_so_common_noise_cancels() -> None:
    rng = np.random.default_rng(2)
    noise = rng.lognormal(0.0, 1.0, 20)
    middle, low, high = ratio_interval((2.0 * noise).tolist(), noise.tolist())
    assert (middle, low, high) == pytest.approx((2.0, 2.0, 2.0))
