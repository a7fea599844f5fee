"""What earlier runs came to, on networks of the same operators and the same engine.

It says what is tried first, never what is chosen: everything is built and evaluated again.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgekit.graph import Graph

__all__ = ["Experience", "Outcome", "operator_counts"]

_FILE, _MOST = "experience.jsonl", 4000
#: cosine of the operator counts from which on networks are of the same kind
_ALIKE = 0.9


@dataclass(frozen=True)
class Outcome:
    """A scheme on an engine: `good` if it stayed within the accuracy budget and, where it was
    measured, was faster or smaller than fp32; `repair`: tried to win back accuracy."""

    engine: str
    scheme: str
    good: bool
    repair: bool = False
    isa: str = ""
    operators: Mapping[str, int] = field(default_factory=dict)


def operator_counts(graph: Graph) -> dict[str, int]:
    """How often each operator type stands in a model, by its format-free name."""
    return dict(Counter(one.canonical or one.type for one in graph.operators))


class Experience:
    """Outcomes of earlier runs on networks like one with these operators, read from and added to a
    file in the cache folder (the last 4,000). `isa`: the CPU features, since they decide speed."""

    def __init__(self, root: Path, operators: Mapping[str, int], isa: Iterable[str]) -> None:
        self._path, self._operators = root / _FILE, dict(operators)
        self._isa = " ".join(sorted(isa))
        self._like = [
            one for one in _read(self._path)
            if one.isa == self._isa and _cosine(one.operators, self._operators) >= _ALIKE
        ]  # fmt: skip

    def tally(self, engine: str, scheme: str, *, repair: bool = False) -> tuple[int, int]:
        """(good, tried) of a scheme on an engine."""
        found = [
            one.good for one in self._like
            if (one.engine, one.scheme, one.repair) == (engine, scheme, repair)
        ]  # fmt: skip
        return sum(found), len(found)

    def promise(self, engine: str, scheme: str, *, repair: bool = False) -> float:
        """Share of good outcomes, with one good and one bad assumed before any was seen (Laplace's
        rule of succession): 0.5 for what was never tried."""
        good, tried = self.tally(engine, scheme, repair=repair)
        return (1 + good) / (2 + tried)

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Note what a run came to. A disk that is full or read-only loses it, and nothing else."""
        known = {"isa": self._isa, "operators": self._operators}
        lines = [json.dumps({**asdict(one), **known}) for one in outcomes]
        if not lines:
            return
        with suppress(OSError):
            # One write to a file opened for appending: runs side by side do not mix their lines.
            with self._path.open("ab") as file:
                file.write(("\n".join(lines) + "\n").encode())
            kept = self._path.read_bytes().splitlines(keepends=True)
            if len(kept) > 2 * _MOST:
                fresh = self._path.with_suffix(f".{os.getpid()}")
                fresh.write_bytes(b"".join(kept[-_MOST:]))
                fresh.replace(self._path)


def _read(path: Path) -> list[Outcome]:
    """What can be read: lines that a crash cut or another version wrote are passed over."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines[-_MOST:]:
        with suppress(ValueError, TypeError):
            raw: dict[str, Any] = json.loads(line)
            found.append(Outcome(**raw))
    return found


def _cosine(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    product = sum(count * other.get(name, 0) for name, count in one.items())
    lengths = math.hypot(*one.values()) * math.hypot(*other.values())
    return product / lengths if lengths else 0.0
