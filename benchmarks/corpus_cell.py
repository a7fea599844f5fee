"""What `edgekit convert` makes of one model of the corpus in one format."""

from __future__ import annotations

import shlex
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus import Model, Ready, by_name

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.conversion import Conversion, convert_with_proof
from edgekit.errors import ChildError, EdgeKitError
from edgekit.observer import Observer
from edgekit.sandbox import Limits

__all__ = ["Cell", "convert_cell", "words"]

TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Cell:
    """A model in a format. `relative` is the worst output's error as a share of its greatest value,
    over the whole way, `allowed` what it may be there; `text` the reason where it is not the same;
    `notes` what the user was told."""

    model: str
    target: str
    outcome: str
    text: str = ""
    path: tuple[str, ...] = ()
    relative: float | None = None
    allowed: float | None = None
    inputs: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    command: str = ""
    code: str = ""

    def as_expected(self) -> bool:
        """Whether corpus.py says so."""
        wanted = by_name(self.model).expected_refusal(self.target)
        if wanted is None:
            return self.outcome == "same"
        return self.outcome in ("refused", "DIFFERS") and wanted in self.text


class _Notes(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def convert_cell(
    model: Model, ready: Ready, target: str, cache: Cache
) -> tuple[Cell, Conversion | None]:
    """What `edgekit convert` makes of it, and the conversion itself if there was one."""
    notes, start = _Notes(), time.monotonic()
    found: Conversion | None = None
    made: dict[str, Any] = {}
    try:
        artifact = open_model(ready.model, reading=ready.reading_for(target))
        found = convert_with_proof(
            artifact, target, cache=cache, given=ready.given,
            limits=Limits(timeout_s=TIMEOUT_S), observer=notes,
        )  # fmt: skip
        made = {"outcome": "same" if found.passed else "DIFFERS"} | _figures(found)
    except ChildError as error:
        made = {"outcome": "CRASH", "text": str(error)}
    except EdgeKitError as error:
        made = {"outcome": "refused", "text": str(error)}
    except Exception:
        made = {"outcome": "CRASH", "text": traceback.format_exc()}
    folder = str(Path(ready.model).parent) + "/"
    command = shlex.join(["edgekit", *ready.arguments(target)]).replace(folder, "")
    made["text"] = made.get("text", "").replace(folder, "")
    seconds = round(time.monotonic() - start, 1)
    cell = Cell(
        model.name, target, seconds=seconds, notes=tuple(notes.said), command=command, **made
    )
    return cell, found


def _figures(found: Conversion) -> dict[str, Any]:
    last = found.ledger[-1]
    wrong = next((line for line in found.ledger if not line.passed), None)
    return {
        "text": "" if wrong is None else f"{wrong.reason()} {wrong.note}".strip(),
        "path": tuple(map(str, found.steps)),
        "relative": last.worst.max_relative,
        "allowed": last.tolerance.relative,
        "inputs": found.inputs,
    }


def words(cell: Cell) -> str:
    """The outcome in one line."""
    if cell.outcome == "same":
        dull = "; DULL" if "all give the same outputs" in cell.inputs else ""
        return f"same ({cell.relative:.1e} of {cell.allowed:.1e}{dull})"
    return f"{cell.outcome}: {cell.text.strip().splitlines()[-1] if cell.text else ''}"
