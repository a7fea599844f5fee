"""Ranges from calibration against numpy on all values at once, closed forms and a search."""

import numpy as np
import pytest

from edgekit.compress.ranges import METHODS, PERCENTILE, RangeFinder
from edgekit.errors import InputError, UsageError

RNG = np.random.default_rng(3)
GAUSS = RNG.normal(0, 1, (40, 2000)).astype(np.float32)
SKEWED = RNG.normal(0.8, 0.5, (40, 2000)).astype(np.float32)
RELU = np.maximum(GAUSS, 0)
SPIKE = RELU.copy()
SPIKE[7, 11] = 60.0

several = pytest.mark.parametrize(
    "rows", [GAUSS, SKEWED, RELU, SPIKE], ids=["gauss", "skewed", "relu", "spike"]
)


def find(method, rows, **options):
    return RangeFinder(method).find(lambda: ({"x": row} for row in rows), **options)["x"]


def squared_error(values, low, high):
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = np.clip(np.round(values / step) + zero, 0, 255)
    return np.mean((values - (rounded - zero) * step) ** 2)


def test_minmax_is_what_was_seen_and_zero() -> None:
    assert find("minmax", GAUSS) == (GAUSS.min(), GAUSS.max())
    assert find("minmax", RELU) == (0, RELU.max())
    assert find("minmax", GAUSS + 10) == (0, (GAUSS + 10).max())
    end = np.abs(GAUSS).max()
    assert find("minmax", GAUSS, symmetric=True) == (-end, end)


@pytest.mark.parametrize(
    "rows", [GAUSS, SKEWED, RELU, SPIKE], ids=["gauss", "skewed", "relu", "spike"]
)
def test_percentile_is_numpys(rows) -> None:
    bin_width = np.abs(rows).max() / 2048
    tail = (100 - PERCENTILE) / 2
    wanted = np.percentile(rows.ravel(), [tail, 100 - tail])
    assert np.allclose(find("percentile", rows), wanted, atol=1.01 * bin_width)
    end = np.percentile(np.abs(rows), PERCENTILE)
    low, high = find("percentile", rows, symmetric=True)
    assert low == -high
    assert high == pytest.approx(end, abs=float(1.01 * bin_width))


@pytest.mark.parametrize(
    "rows", [GAUSS, SKEWED, RELU, SPIKE], ids=["gauss", "skewed", "relu", "spike"]
)
def test_mse_is_as_good_as_a_search_over_the_values_themselves(rows) -> None:
    values = rows.ravel()[:20_000].astype(np.float64)
    low, high = find("mse", values.reshape(10, -1))
    shares = np.linspace(0.1, 1, 46)
    ends = [(values.min() * a, values.max() * b) for a in shares for b in shares]
    best = min(squared_error(values, *one) for one in ends if one[0] < one[1])
    assert squared_error(values, low, high) <= 1.02 * best


def test_mse_of_a_gaussian_is_banner_and_others() -> None:
    """Banner et al., 2019 (ACIQ), table 1: 8 bits, standard deviation 1: clip at 3.92."""
    many = np.random.default_rng(0).normal(0, 1, (60, 20_000))
    low, high = find("mse", many, symmetric=True)
    assert low == -high
    assert high == pytest.approx(3.92, rel=0.05)


def test_entropy_cuts_a_lonely_outlier_and_keeps_an_even_distribution() -> None:
    assert find("entropy", SPIKE)[1] < 10
    even = np.random.default_rng(1).uniform(0, 3, (20, 5000))
    assert find("entropy", even)[1] == pytest.approx(3, rel=0.02)
    both = np.random.default_rng(1).uniform(-3, 3, (20, 5000))
    assert np.allclose(find("entropy", both), (-3, 3), rtol=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_neither_order_nor_division_into_samples_matters(method, symmetric) -> None:
    wanted = find(method, SKEWED, symmetric=symmetric)
    assert find(method, SKEWED[::-1], symmetric=symmetric) == wanted
    assert find(method, SKEWED.reshape(8, -1), symmetric=symmetric) == wanted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30, 1e30])
def test_a_constant_has_a_range_that_holds_it(method, symmetric, value) -> None:
    low, high = find(method, np.full((3, 10), value, np.float32), symmetric=symmetric)
    value = float(np.float32(value))
    assert low <= min(0, value) <= max(0, value) <= high
    assert low < high
    assert (low == -high) is symmetric


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_left_out_and_other_tensors_are_independent(method) -> None:
    dirty = np.concatenate([GAUSS, np.full((40, 3), -np.inf, np.float32)], axis=1)
    dirty[:, -1] = np.finfo(np.float32).min
    assert find(method, dirty) == find(method, GAUSS)
    rows = [{"x": row} | ({"now and then": row[:4] * 9} if i % 2 else {})
            for i, row in enumerate(GAUSS)]  # fmt: skip
    rows += [{"empty": np.zeros((0, 3), np.float32)}]
    found = RangeFinder(method).find(lambda: iter(rows))
    assert found["x"] == find(method, GAUSS)
    assert found["now and then"] == find(method, GAUSS[1::2, :4] * 9)
    assert found["empty"] == (0, 1)


def test_passes_are_as_many_as_needed() -> None:
    calls = []

    def passes():
        calls.append(1)
        return iter([{"x": GAUSS[0]}])

    RangeFinder("minmax").find(passes)
    assert len(calls) == 1
    RangeFinder("entropy").find(passes)
    assert len(calls) == 3


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match="known: minmax, percentile, entropy, mse"):
        RangeFinder("average")


def test_nan_and_no_samples_are_refused() -> None:
    rows = GAUSS.copy()
    rows[3, 5] = np.nan
    with pytest.raises(InputError, match="sample 3: the float model computes NaN in 'x'"):
        find("minmax", rows)
    with pytest.raises(InputError, match="no samples"):
        find("minmax", [])
