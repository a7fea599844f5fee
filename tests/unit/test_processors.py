"""Contenders run on the same processors, the fastest of the device."""

import os

import pytest

from edgekit.measure import worker


@pytest.mark.parametrize(
    ("capacities", "threads", "turn", "found"),
    [
        ([0, 0], 1, 0, [0]),
        ([0, 0], 1, 1, [1]),
        ([0, 0], 2, 0, None),  # all are needed
        ([400, 400, 400, 400, 1024, 1024, 1024], 1, 0, [4]),  # not a little core
        ([400, 400, 400, 400, 1024, 1024, 1024], 2, 1, [6, 4]),
        ([400, 400, 1024, 1024], 2, 0, None),
        ([0], 1, 0, None),
    ],
)
def test_processors_are_the_fastest_in_turn(
    capacities: list[int], threads: int, turn: int, found: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(capacities))))
    monkeypatch.setattr(worker, "_capacity", capacities.__getitem__)
    assert worker.processors(threads, turn) == found
