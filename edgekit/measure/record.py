"""Result files: what `edgekit bench`, `edgekit-runtime bench` and `session.measure()` leave behind.

A record is a JSON document with a schema and raw samples. Nothing is thrown away when one is read:
samples that cannot be true stay in the file, are left out of figures, and a note says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import InputError, UsageError
from edgekit.measure.series import warm_up
from edgekit_runtime.timing import unpack_ns

__all__ = [
    "SCHEMAS", "Record", "checked_schema", "read_document", "read_record", "record_of", "sound",
]  # fmt: skip

#: the newest version of each schema that is read
SCHEMAS = {
    "edgekit.bench": 1, "edgekit.measure": 1, "edgekit.compare": 1, "edgekit.trace": 1,
    "edgekit.optimize": 1, "edgekit.prune": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A result with its samples unpacked, in the order taken.

    `warm_up` of them come before the model was at its speed. `notes` say what was left out.
    """

    document: dict[str, Any]
    samples_ns: list[int]
    warm_up: int
    notes: tuple[str, ...]

    @property
    def warm_ns(self) -> list[int]:
        """The samples after warming up."""
        return self.samples_ns[self.warm_up :]

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.document.get("model") or "?")


def sound(samples: list[int]) -> tuple[list[int], tuple[str, ...]]:
    """The samples that can be true, and notes on the others.

    A duration below zero means that the clock went backwards; of zero, that it is too coarse for
    this model. Zeros are left out as well: they would pull the median below any true duration.
    """
    kept = [ns for ns in samples if ns > 0]
    notes = []
    backwards = sum(ns < 0 for ns in samples)
    if backwards:
        notes.append(f"{backwards} samples below 0 ns left out: the clock went backwards")
    zeros = sum(ns == 0 for ns in samples)
    if zeros:
        notes.append(f"{zeros} samples of 0 ns left out: the clock is too coarse for this model")
    return kept, tuple(notes)


def checked_schema(document: Any, where: str, *, kinds: tuple[str, ...] = tuple(SCHEMAS)) -> str:
    """The document's kind, `edgekit.bench` say.

    Raises:
        InputError: it has no schema of ours, or one of a newer version.
    """
    schema = document.get("schema") if isinstance(document, dict) else None
    kind, _, version = str(schema).partition("/")
    if kind not in kinds or not version.isdigit():
        wanted = ", ".join(f"{one}/{SCHEMAS[one]}" for one in kinds)
        found = f"schema {schema!r}" if schema else "no schema"
        raise InputError(f"{where}: {found}; wanted {wanted}")
    if int(version) > SCHEMAS[kind]:
        raise InputError(
            f"{where}: written by a newer EdgeKit ({schema}; this one reads up to "
            f"{kind}/{SCHEMAS[kind]}): update EdgeKit, the file is unchanged"
        )
    return kind


def read_document(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        UsageError: there is no such file.
        InputError: it is not JSON.
    """
    if not path.is_file():
        raise UsageError(f"no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no result file: {error}") from None


def read_record(path: Path) -> Record:
    """A bench result, or calls that an application measured.

    Raises:
        UsageError: there is no such file.
        InputError: it is damaged, not a result, or of a newer schema.
    """
    return record_of(read_document(path), str(path))


def record_of(document: Any, where: str) -> Record:
    """A Record of a document that is already in memory; `where` it came from, for messages.

    Raises:
        InputError: as `read_record`.
    """
    checked_schema(document, where, kinds=("edgekit.bench", "edgekit.measure"))
    try:
        samples = unpack_ns(document.get("samples_ns") or [])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: its samples cannot be read: {error}") from None
    kept, notes = sound(samples)
    known = document.get("warm_up_samples")
    cut = known if isinstance(known, int) and len(kept) == len(samples) else warm_up(kept)
    return Record(document, kept, min(cut, max(0, len(kept) - 1)), notes)
