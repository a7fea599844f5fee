"""The never-worse rule and ties."""

import numpy as np
import pytest

from edgekit.choose import Allowed, Entrant, over_budget, rank, samples_to_tell
from edgekit.measure.benchmark import Measurement


def entrant(name: str, size: int, ms: float, *, jitter: float = 0.01, rounds: int = 12) -> Entrant:
    rng = np.random.default_rng(len(name))
    blocks = [[int(1e6 * ms * f)] * 3 for f in rng.normal(1.0, jitter, rounds)]
    return Entrant(name, size, Measurement(rounds_ns=blocks))


REFERENCE = entrant("fp32", 1000, 10.0)


def test_fastest_wins_and_order_follows() -> None:
    fast, faster = entrant("fast", 900, 7.0), entrant("faster", 900, 5.0)
    choice = rank([REFERENCE, fast, faster], REFERENCE, "latency")
    assert choice.order == ("faster", "fast", "fp32")
    assert not choice.dropped
    assert choice.why.startswith("0.5")


def test_neither_faster_nor_smaller_is_dropped_with_its_figures() -> None:
    choice = rank([REFERENCE, entrant("bad", 1000, 12.0)], REFERENCE, "latency")
    assert choice.order == ("fp32",)
    assert choice.dropped["bad"].startswith("neither faster (1.2")
    assert "nothing" in choice.why


def test_slower_but_smaller_is_kept_not_chosen_for_latency_chosen_for_size() -> None:
    small = entrant("small", 100, 20.0)
    assert rank([REFERENCE, small], REFERENCE, "latency").order[0] == "fp32"
    assert rank([REFERENCE, small], REFERENCE, "size").order[0] == "small"


def test_differences_inside_the_noise_do_not_decide_the_smaller_wins() -> None:
    large = entrant("large", 800, 5.0, jitter=0.1)
    small = entrant("small-one", 300, 5.02, jitter=0.1)
    choice = rank([REFERENCE, large, small], REFERENCE, "latency")
    assert choice.order[0] == "small-one"


def test_a_wide_interval_does_not_make_a_slower_candidate_level() -> None:
    reference = entrant("fp32", 1000, 10.0, jitter=0.4)
    slower = entrant("slower", 100, 13.0, jitter=0.4)
    assert rank([reference, slower], reference, "latency").order[0] == "fp32"


def test_clear_difference_beats_size() -> None:
    large, small = entrant("large", 800, 5.0), entrant("small-one", 300, 6.0)
    assert rank([REFERENCE, large, small], REFERENCE, "latency").order[0] == "large"


def test_too_few_rounds_never_call_a_slow_small_candidate_level() -> None:
    few = [
        entrant("fp32", 1000, 10.0, rounds=3),
        entrant("slow", 100, 40.0, rounds=3),
    ]
    assert rank(few, few[0], "latency").order[0] == "fp32"


@pytest.mark.parametrize(
    ("drop", "broken", "out"),
    [
        (0.01, 0, False),
        (1 - 0.99, 0, False),
        (0.0100001, 0, True),
        (-0.5, 0, False),
        (0.0, 1, True),
        (np.nan, 0, True),
    ],
)
def test_accuracy_budget(drop: float, broken: int, out: bool) -> None:
    found = {"drop": drop, "broken": broken, "samples": 100}
    assert (over_budget(found, Allowed(0.01)) is not None) is out


def test_the_worst_slice_may_rule_out_what_is_good_on_average() -> None:
    slices = [
        {"name": "class=0", "samples": 90, "metric": 1.0, "drop": 0.0},
        {"name": "class=1", "samples": 10, "metric": 0.4, "drop": 0.5},
        {"name": "class=2", "samples": 1, "metric": None, "drop": None},
    ]
    found = {"drop": 0.005, "broken": 0, "samples": 101, "slices": slices}
    assert over_budget(found, Allowed(0.01)) is None
    assert over_budget(found, Allowed(0.01, 0.5)) is None
    reason = over_budget(found, Allowed(0.01, 0.1))
    assert reason == (
        "slice class=1 (10 samples) loses 0.5000, more than the 0.1 allowed for a slice"
    )


def test_how_many_samples_would_tell() -> None:
    """Half the width goes with the root: for a tenth of it, a hundred times the samples."""
    found = {"drop": 0.02, "drop_interval": [-0.03, 0.07], "samples": 100}
    assert samples_to_tell(found, Allowed(0.025)) == pytest.approx(10_000, rel=0.001)
    assert samples_to_tell(found, Allowed(0.07)) is None  # the whole interval is within
    assert samples_to_tell(found, Allowed(-0.04)) is None  # the whole interval is beyond
    assert samples_to_tell({"drop": 0.0, "drop_interval": None, "samples": 9}, Allowed(0.1)) is None
