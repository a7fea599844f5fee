"""Which candidates are repaired: those that could still win, by what repairs have cost so far."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from edgekit.compress.scheme import parse_scheme
from edgekit.control import Tried
from edgekit.observer import Observer
from edgekit.outcome import Row
from edgekit.plan import Candidate
from edgekit.repairs import Repairs, forbidden


def row(engine: str, scheme: str, cost: float, drop: float = 0.0) -> Row:
    found = Row(Candidate(f"{engine}-{scheme}", engine, "onnx", parse_scheme(scheme), 1))
    found.quick, found.evaluation = cost, {"drop": drop}
    if drop:
        found.lost = True
        found.end("dropped", "loses")
    return found


class Control:
    """Repairs what `cures` names; what it is asked for is in `asked`."""

    def __init__(self, cures: dict[str, float]) -> None:
        self.cures, self.asked, self.named, self.known = cures, [], [], set()

    def sensitivity(self, candidate: Candidate) -> None:
        self.named.append(candidate.id)

    def repair(self, candidate: Candidate, drop: float) -> Iterator[Tried]:
        self.asked.append(candidate.id)
        within = candidate.id in self.cures
        made = Candidate(f"{candidate.id}+1-float", candidate.engine, "onnx", candidate.scheme, 1)
        yield Tried(made, None, {"drop": 0.0}, screened=False, within=within, reason="")


def repaired(rows: list[Row], cures: dict[str, float]) -> list[str]:
    control = Control(cures)

    def look(found: Row) -> None:
        found.quick = cures[found.repairs]

    job: Any = SimpleNamespace(fit=None)
    Repairs(job, control, Observer(), lambda one: one.quick, look).run(
        rows, [one for one in rows if one.lost]
    )  # type: ignore[arg-type]
    assert sorted(control.named) == sorted(one.candidate.id for one in rows if one.lost)
    return control.asked


@pytest.mark.parametrize(
    ("cures", "asked"),
    [
        # the first repair takes all that it would win: the others of that engine lost no less
        ({"ort-int8-static": 0.95}, ["ort-int8-static", "ov-int8-static"]),
        # it is still fast then: the next one may be as well, and is not after all
        ({"ort-int8-static": 0.5}, ["ort-int8-static"]),
        # given up: that says nothing of the others
        ({}, ["ort-int8-static", "ov-int8-static", "ort-int8-static:matmul"]),
    ],
)
def test_what_a_repair_cost_stands_for_the_others_of_that_engine(
    cures: dict[str, float], asked: list[str]
) -> None:
    rows = [
        row("ort", "fp32", 1.0), row("ort", "int8-static", 0.5, 0.2),
        row("ort", "int8-static:matmul", 0.6, 0.2), row("ov", "int8-static", 0.55, 0.2),
    ]  # fmt: skip
    assert repaired(rows, cures) == asked
    assert all("not repaired" in one.reason for one in rows if one.lost and
               one.candidate.id not in asked)  # fmt: skip


def test_what_lost_much_less_is_repaired_all_the_same() -> None:
    rows = [
        row("ort", "fp32", 1.0), row("ort", "int8-static", 0.5, 0.9),
        row("ort", "int8-static:matmul", 0.6, 0.02),
    ]  # fmt: skip
    cures = {"ort-int8-static:matmul": 0.65}
    assert repaired(rows, cures) == ["ort-int8-static", "ort-int8-static:matmul"]


def test_nothing_is_repaired_that_is_no_faster_than_the_best() -> None:
    rows = [row("ort", "fp32", 1.0), row("ov", "fp32", 0.5), row("ort", "int8-static", 0.49, 0.2)]
    assert repaired(rows, {}) == []
    assert "even so it would not beat ov-fp32" in rows[2].reason


def test_what_cannot_be_read_back_is_no_candidate(tmp_path) -> None:
    (tmp_path / "made.onnx").write_bytes(b"no model")
    made: Any = SimpleNamespace(format="onnx", path=tmp_path / "made.onnx", inputs=())
    job: Any = SimpleNamespace(fit=object(), profile=None)
    said = forbidden(job, row("ort", "int8-static", 1.0).candidate, made)
    assert said.startswith("made, but it cannot be read back")
