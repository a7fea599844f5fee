"""The result store: one SQLite file with every run, failures included.

The document of a run is kept whole (deflated JSON) beside the columns that lists are made of. The
file says which version of the schema it has (`PRAGMA user_version`); older ones are migrated in a
transaction, newer ones refused and left as they are.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgekit.errors import InputError, OutOfSpaceError, UsageError, one_line

__all__ = ["Run", "Store", "default_store"]

_FILE = "results.sqlite"


def default_store() -> Path:
    """`$EDGEKIT_STORE`, or `edgekit` in the user's data folder (`~/.local/share`)."""
    named = os.environ.get("EDGEKIT_STORE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "edgekit"


@dataclass(frozen=True)
class Run:
    """A row of the list. `status` is `done`, `partial` or `failed`; `p50_ns` None without samples;
    `created` is UTC, ISO 8601."""

    id: int
    created: str
    kind: str
    model: str
    engine: str | None
    status: str
    p50_ns: int | None
    note: str


def _first(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE runs (id INTEGER PRIMARY KEY, created TEXT NOT NULL, kind TEXT NOT NULL, "
        "model TEXT NOT NULL, engine TEXT, p50_ns INTEGER, document BLOB NOT NULL)"
    )


def _with_status(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE runs ADD COLUMN status TEXT NOT NULL DEFAULT 'done'")
    db.execute("ALTER TABLE runs ADD COLUMN note TEXT NOT NULL DEFAULT ''")
    db.execute("CREATE INDEX runs_by_model ON runs (model, created)")


#: step n brings a file from version n to n + 1
_MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_first, _with_status)


class Store:
    """An open store; a context. `folder` is made if need be.

    Raises:
        UsageError: the folder cannot be made.
        InputError: the file is no store, or of a newer EdgeKit.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or default_store()) / _FILE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--store {self.path.parent}: {error.strerror}; wanted a folder"
            ) from None
        try:
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        except sqlite3.Error as error:
            raise UsageError(f"{self.path}: {one_line(error)}") from None
        with self._explained():
            self._migrate()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    def add(self, document: dict[str, Any], *, status: str = "done", note: str = "") -> int:
        """Keep a document with a `schema`; returns the run's number.

        Raises:
            OutOfSpaceError: the disk is full; the store is as it was.
        """
        kind = str(document["schema"]).partition("/")[0].removeprefix("edgekit.")
        latency = document.get("latency_ns") or {}
        blob = zlib.compress(json.dumps(document).encode(), 6)
        created = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        model = str(document.get("model") or document.get("new") or "")
        with self._explained(), self._transaction():
            cursor = self._db.execute(
                "INSERT INTO runs (created, kind, model, engine, p50_ns, document, status, note) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (created, kind, model, document.get("engine"), latency.get("p50"), blob, status,
                 note),
            )  # fmt: skip
            return int(cursor.lastrowid or 0)

    def list(self, *, model: str | None = None, limit: int | None = None) -> list[Run]:
        """The newest first; those whose model's path contains `model`."""
        with self._explained():
            rows = self._db.execute(
                "SELECT id, created, kind, model, engine, status, p50_ns, note FROM runs "
                "WHERE instr(model, ?) > 0 OR ? = '' ORDER BY id DESC LIMIT ?",
                (model or "", model or "", -1 if limit is None else limit),
            ).fetchall()
        return [Run(*row) for row in rows]

    def document(self, number: int) -> dict[str, Any]:
        """The whole document of a run.

        Raises:
            UsageError: there is no such run.
        """
        with self._explained():
            row = self._db.execute("SELECT document FROM runs WHERE id = ?", (number,)).fetchone()
        if row is None:
            newest = self.list(limit=1)
            known = f"the newest is {newest[0].id}" if newest else "it is empty"
            raise UsageError(f"no run {number} in {self.path}; {known}")
        try:
            found: dict[str, Any] = json.loads(zlib.decompress(row[0]))
        except (zlib.error, ValueError) as error:
            raise InputError(f"run {number} in {self.path} is damaged: {error}") from None
        return found

    def _migrate(self) -> None:
        version = self._version()
        if version > len(_MIGRATIONS):
            raise InputError(
                f"{self.path} is of a newer EdgeKit (schema {version}; this one knows up to "
                f"{len(_MIGRATIONS)}): update EdgeKit, or name another folder with --store"
            )
        while version < len(_MIGRATIONS):
            with self._transaction():
                version = self._version()  # another process may have been faster
                if version < len(_MIGRATIONS):
                    _MIGRATIONS[version](self._db)
                    version += 1
                    self._db.execute(f"PRAGMA user_version = {version}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._full(error) or UsageError(f"{self.path}: {one_line(error)}") from None
        except sqlite3.DatabaseError as error:
            raise self._full(error) or InputError(
                f"{self.path} is no result store: {one_line(error)}; move it away, or name another "
                "folder with --store"
            ) from None

    def _full(self, error: sqlite3.Error) -> OutOfSpaceError | None:
        if "full" not in str(error):
            return None
        return OutOfSpaceError(f"the disk is full, writing {self.path}")
