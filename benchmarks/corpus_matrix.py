"""Each public model into each format, and the claims of the converters as checks.

    python benchmarks/corpus_matrix.py [--small] [--only NAME] [--json FILE] [--work FOLDER]

A cell is what `edgekit convert MODEL --to FORMAT` makes of a model: `same` (the worst error of the
way, and what was allowed), `refused` with the reason, `DIFFERS`, or `CRASH` (a child that died or
ran over a limit). Prints Markdown, then a line `MUST ...` for each claim; exits with 1 if a cell is
not as `corpus.py` expects it or a claim does not hold. Rows are kept in the work folder and made
anew when the code of the converters changed; `--keep` makes only those anew that were wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import corpus
from corpus import MODELS, ROOT, Model
from corpus_cell import Cell, convert_cell, words
from corpus_claims import CLAIMS, Claim, Desk

from edgekit.artifact import FORMAT_NAMES
from edgekit.cache import Cache, file_sha256, write_atomically
from edgekit.errors import EdgeKitError

__all__ = ["SMALL_CLAIMS", "cells_of", "claims", "main"]

#: those that are quick
SMALL_CLAIMS = (
    "digits", "profanity", "live-keras", "live-torch", "string-input", "planted-fault",
)  # fmt: skip


def cells_of(model: Model, targets: Sequence[str], work: Path, rows: Rows) -> list[Cell]:
    """Cells of a model: those kept, the others made, one after another, in a fresh cache."""
    wanted = [target for target in targets if (model.name, target) not in rows.kept]
    if wanted:
        with tempfile.TemporaryDirectory(dir=work, prefix="cell-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            ready = model.prepare(folder)
            cache = Cache(Path(scratch) / "cache")
            for target in wanted:
                cell, _ = convert_cell(model, ready, target, cache)
                _say(cell)
                rows.add(cell)
    return [rows.kept[model.name, target] for target in targets]


def _say(cell: Cell) -> None:
    mark = "" if cell.as_expected() else "  <-- not expected"
    print(
        f"{cell.model} -> {cell.target}: {words(cell)} [{cell.seconds:.0f} s]{mark}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def code_of_today() -> str:
    """A hash of the code that converts."""
    parts = [
        path for folder in ("edgekit", "converters", "runtime")
        for path in (ROOT / folder).rglob("*.py")
    ]  # fmt: skip
    return file_sha256(*sorted(parts))[:16]


class Rows:
    """The rows on disk, written after every model."""

    def __init__(self, file: Path, code: str, *, keep: bool) -> None:
        self.file, self.code = file, code
        raw = json.loads(file.read_text()) if file.exists() else []
        every = [Cell(**one | {k: tuple(one[k]) for k in ("path", "notes")}) for one in raw]
        names = {(model.name, target) for model in MODELS for target in model.targets}
        self.old = {
            (one.model, one.target): one for one in every if (one.model, one.target) in names
        }
        self.kept = {
            key: one for key, one in self.old.items()
            if one.code == code or (keep and one.as_expected())
        }  # fmt: skip

    def add(self, cell: Cell) -> None:
        """Keep this, too."""
        key = cell.model, cell.target
        self.kept[key] = self.old[key] = replace(cell, code=self.code)
        write_atomically(
            self.file, json.dumps([asdict(one) for one in self.old.values()], indent=1).encode()
        )


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a row for each model, a column for each format; the reasons below."""
    targets = list(dict.fromkeys(cell.target for model in MODELS for cell in cells
                                 if cell.model == model.name))  # fmt: skip
    targets = [one for one in corpus.TARGETS if one in targets]
    by_place = {(cell.model, cell.target): cell for cell in cells}
    reasons: dict[str, int] = {}
    lines = [
        "| model | " + " | ".join(FORMAT_NAMES[one] for one in targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for name in dict.fromkeys(cell.model for cell in cells):
        row = [_entry(by_place.get((name, target)), reasons) for target in targets]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


def _entry(cell: Cell | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return "-"
    if cell.outcome == "same":
        return f"{cell.relative:.0e}" if cell.relative else "0"
    number = reasons.setdefault(words(cell).partition(": ")[2], len(reasons) + 1)
    return f"{cell.outcome} ({number})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and print it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="what every run of the tests does")
    parser.add_argument("--only", action="append", default=[], help="models whose name holds this")
    parser.add_argument("--to", action="append", default=[], help="these formats")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "corpus")
    parser.add_argument("--keep", action="store_true", help="keep good rows of older code")
    parser.add_argument("--claim", action="append", default=[], choices=[*CLAIMS, "none"],
                        help="only these claims, and no table; none: only the table")  # fmt: skip
    asked = parser.parse_args(arguments)
    asked.work.mkdir(parents=True, exist_ok=True)
    code = code_of_today()
    rows = Rows(asked.work / "rows.json", code, keep=asked.keep)
    table_wanted = not asked.claim or asked.claim == ["none"]
    chosen = [
        model for model in MODELS
        if table_wanted and (model.small or not asked.small)
        and (not asked.only or any(one in model.name for one in asked.only))
    ]  # fmt: skip
    cells: list[Cell] = []
    for model in chosen:
        every = model.small if asked.small else model.targets
        targets = [one for one in every if not asked.to or one in asked.to]
        cells += cells_of(model, targets, asked.work, rows)
    if cells:
        print(table(cells), flush=True)
    if asked.json:
        write_atomically(asked.json, json.dumps([asdict(one) for one in cells], indent=1).encode())
    wrong = [cell for cell in cells if not cell.as_expected()]
    for cell in wrong:
        wanted = corpus.by_name(cell.model).expected_refusal(cell.target)
        said = "same" if wanted is None else f"refused, {wanted!r}"
        print(f"NOT AS EXPECTED ({said}): {cell.command}: {words(cell)}")
    names = asked.claim or (SMALL_CLAIMS if asked.small else list(CLAIMS))
    made = [] if asked.claim == ["none"] else claims(names, asked.work, rows)
    return 1 if wrong or not all(one.holds for one in made) else 0


def claims(names: Sequence[str], work: Path, rows: Rows) -> list[Claim]:
    """Check and print these, one after another."""

    def cell(name: str, target: str) -> Cell:
        return cells_of(corpus.by_name(name), (target,), work, rows)[0]

    made: list[Claim] = []
    for name in names:
        with tempfile.TemporaryDirectory(dir=work, prefix="claim-") as scratch:
            try:
                for one in CLAIMS[name](Desk(Path(scratch), cell)):
                    made.append(one)
                    print(one, flush=True)
            except (AssertionError, EdgeKitError, RuntimeError) as error:
                made.append(Claim(name, str(error), False))
                print(made[-1], flush=True)
    return made


if __name__ == "__main__":
    sys.exit(main())
