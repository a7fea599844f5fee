"""The bisection, on graphs whose values are known."""

import math

import numpy as np
import pytest

from edgekit.divergence import (
    error_between,
    matched,
    runs_at_most,
    search,
    search_by_value,
)
from edgekit.taps import Tap


def chain(length: int) -> list[Tap]:
    return [Tap(f"t{i}", f"node{i}", (f"t{i - 1}",) if i else ()) for i in range(length)]


def with_fault(taps: list[Tap], fault: str, asked: list[list[str]]):
    """Tensors that come after `fault` are off."""
    off = {fault}
    for tap in taps:
        if off & set(tap.inputs):
            off.add(tap.name)

    def values_of(names):
        asked.append(list(names))
        one = np.ones(3)
        return {name: (one, one * (1.5 if name in off else 1)) for name in names}

    return values_of


@pytest.mark.parametrize("place", [0, 1, 49, 50, 98, 99])
def test_fault_in_a_chain_of_100(place) -> None:
    taps, asked = chain(100), []
    same = {tap.name: tap.name for tap in taps}
    found = search(taps, same, "t99", with_fault(taps, f"t{place}", asked), 1e-4)
    assert found is not None
    assert (found.tensor, found.node) == (f"t{place}", f"node{place}")
    assert found.agree == ((f"t{place - 1}",) if place else ())
    assert found.relative_error == pytest.approx(0.5)
    assert found.runs == len(asked) <= runs_at_most(100) == 9


def test_every_fault_in_random_graphs_is_found_within_the_promised_runs() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 7, 30, 101):
        taps = [
            Tap(f"t{i}", f"n{i}", tuple(f"t{j}" for j in set(rng.integers(0, i, min(i, 3)))))
            for i in range(size)
        ]
        same = {tap.name: tap.name for tap in taps}
        leads = {f"t{size - 1}"}
        for tap in reversed(taps):
            if tap.name in leads:
                leads |= set(tap.inputs)
        for fault in sorted(leads):
            asked: list[list[str]] = []
            found = search(taps, same, f"t{size - 1}", with_fault(taps, fault, asked), 1e-4)
            assert found is not None and found.tensor == fault
            assert len(asked) <= runs_at_most(len(leads))


def test_tensors_only_one_side_has_are_stepped_over() -> None:
    taps, asked = chain(20), []
    common = {f"t{i}": f"t{i}" for i in range(20) if i % 3 == 1}
    found = search(taps, common, "t19", with_fault(taps, "t9", asked), 1e-4)
    assert found is not None and found.tensor == "t10"  # the first after it that both have
    assert found.agree == ("t7",)


def test_a_branch_that_does_not_lead_to_the_output_is_not_searched() -> None:
    taps = [*chain(5), Tap("side", "side", ("t1",)), Tap("out", "out", ("t4",))]
    same, asked = {tap.name: tap.name for tap in taps}, []
    search(taps, same, "out", with_fault(taps, "t3", asked), 1e-4)
    assert all("side" not in names for names in asked)


def test_error_is_relative_to_the_greatest_value() -> None:
    assert error_between(np.array([0.0, 4.0]), np.array([0.2, 4.0])) == pytest.approx(0.05)
    assert error_between(np.zeros(3), np.zeros(3)) == 0
    assert error_between(np.ones(3), np.ones(4)) == math.inf
    assert error_between(np.array([np.nan, 1]), np.array([np.nan, 1])) == 0
    assert error_between(np.array([1.0, 1]), np.array([np.nan, 1])) == math.inf


def test_other_orders_of_axes_are_seen_through() -> None:
    nchw = np.random.default_rng(0).normal(size=(1, 3, 4, 5))
    assert error_between(nchw, nchw.transpose(0, 2, 3, 1)) == 0
    assert error_between(nchw, nchw.reshape(1, 4, 5, 3)) > 0.1


def test_names_are_matched_without_what_converters_add() -> None:
    ours = [
        Tap("model/conv/Relu:0", "", ()),
        Tap("model/dense/BiasAdd:0", "", ()),
        Tap("x", "", ()),
    ]
    theirs = [
        Tap("model/conv/Relu;model/conv/BiasAdd;model/conv/Conv2D", "", ()),
        Tap("StatefulPartitionedCall/model/dense/BiasAdd", "", ()), Tap("y", "", ()),
    ]  # fmt: skip
    assert matched(ours, theirs) == {
        "model/conv/Relu:0": "model/conv/Relu;model/conv/BiasAdd;model/conv/Conv2D",
        "model/dense/BiasAdd:0": "StatefulPartitionedCall/model/dense/BiasAdd",
    }


def test_without_names_the_values_tell() -> None:
    rng = np.random.default_rng(0)
    taps = [
        Tap("a", "conv", ()), Tap("b", "relu", ("a",)), Tap("c", "up", ("b",)),
        Tap("side", "pool", ("b",)), Tap("d", "add", ("c", "side")), Tap("e", "out", ("d",)),
    ]  # fmt: skip
    ours = {tap.name: rng.normal(size=(1, 4, 3, 5)) for tap in taps}
    theirs = {  # "a" was fused into "b", "c" is wrong and all that follows from it
        "t1": ours["b"].transpose(0, 2, 3, 1), "t2": rng.normal(size=60), "t3": ours["side"],
        "t4": rng.normal(size=60), "t5": rng.normal(size=60),
    }  # fmt: skip
    found = search_by_value(taps, "e", ours, theirs, 1e-6)
    assert found is not None
    assert (found.tensor, found.node, found.agree) == ("c", "up", ("b",))
