"""Verdicts against simulation, series from files, and result files that cannot be true."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import InputError, UsageError
from edgekit.measure.compare import Ratio, ratio_of_series, verdict
from edgekit.measure.record import read_record, record_of, sound
from edgekit.measure.statistics import median_interval
from edgekit_runtime.timing import pack_ns, unpack_ns


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Ratio(1.05, 1.04, 1.06), "slower"),
        (Ratio(0.95, 0.94, 0.96), "faster"),
        (Ratio(1.0, 0.99, 1.01), "no difference"),
        (Ratio(1.008, 1.006, 1.01), "no difference"),  # sure, but too small to mean anything
        (Ratio(1.0, 0.9, 1.1), "not enough data"),
        (Ratio(1.03, 0.99, 1.2), "not enough data"),
        (Ratio(1.2, -math.inf, math.inf), "not enough data"),
        (Ratio(math.nan, -math.inf, math.inf), "not enough data"),
    ],
)
def test_the_verdict(ratio: Ratio, said: str) -> None:
    assert verdict(ratio) == said


def test_verdicts_of_simulated_starts() -> None:
    """Starts that differ by 0.5 %: the same is the same, 2 % is found."""
    rng = np.random.default_rng(1)

    def said(truth: float) -> str:
        ratios = (truth * rng.lognormal(0, 0.005, 6)).tolist()
        return verdict(Ratio(*median_interval(ratios)))

    assert sum(said(1.0) == "no difference" for _ in range(500)) >= 490
    assert sum(said(1.02) == "slower" for _ in range(500)) >= 490
    assert sum(said(1 / 1.05) == "faster" for _ in range(500)) == 500


def test_the_ratio_of_two_series_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        base = rng.lognormal(13, 0.2, 300).astype(int).tolist()
        new = (1.1 * rng.lognormal(13, 0.2, 200)).astype(int).tolist()
        found = ratio_of_series(base, new)
        hits += found.low <= 1.1 <= found.high
    assert hits >= 285
    assert math.isinf(ratio_of_series([5, 6, 7], [5, 6, 7]).high)
    assert math.isnan(ratio_of_series([], [1]).value)


@given(st.lists(st.integers(-(2**62), 2**62), max_size=200))
def test_samples_are_packed_without_loss(samples: list[int]) -> None:
    assert unpack_ns(json.loads(json.dumps(pack_ns(samples)))) == samples


def test_a_hundred_thousand_samples_stay_under_two_megabytes() -> None:
    rng = np.random.default_rng(3)
    packed = pack_ns(rng.lognormal(15, 0.3, 100_000).astype(int).tolist())
    assert len(json.dumps(packed)) < 600_000


def test_damaged_samples_are_refused() -> None:
    good = pack_ns([1, 2, 3])
    for bad in ({"encoding": "x"}, {**good, "count": 4}, {**good, "count": 2},
                {**good, "data": "AAAA"}):  # fmt: skip
        with pytest.raises(InputError, match="samples cannot be read"):
            record_of({"schema": "edgekit.bench/1", "samples_ns": bad}, "here")


def test_samples_that_cannot_be_true_are_left_out_and_said() -> None:
    kept, notes = sound([5, 0, -3, 7])
    assert kept == [5, 7]
    assert "clock went backwards" in notes[0]
    assert "too coarse" in notes[1]


def test_result_files(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    slow_start = [9000] * 30 + [1000 + i % 7 for i in range(300)]
    path.write_text(json.dumps({"schema": "edgekit.bench/1", "samples_ns": slow_start}))
    record = read_record(path)
    assert record.warm_up == 30
    assert max(record.warm_ns) < 2000
    for text, says in (
        ('{"schema": "edgekit.bench/2"}', "newer EdgeKit .edgekit.bench/2"),
        ('{"schema": "edgekit.check/1"}', "wanted edgekit.bench/1, edgekit.measure/1"),
        ("[]", "no schema"),
        ("{", "no result file"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            read_record(path)
    with pytest.raises(UsageError, match="no file"):
        read_record(tmp_path / "missing.json")
