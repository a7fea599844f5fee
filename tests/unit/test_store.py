"""The result store: kept, listed, migrated, refused."""

import json
import sqlite3
import threading
import zlib
from pathlib import Path

import pytest

from edgekit.errors import InputError, OutOfSpaceError, UsageError
from edgekit.measure import store as module
from edgekit.measure.store import Store, default_store

RUN = {"schema": "edgekit.bench/1", "model": "m.onnx", "engine": "e", "latency_ns": {"p50": 5}}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    with Store(tmp_path / "new" / "folder") as store:
        number = store.add(RUN)
        failed = store.add({**RUN, "latency_ns": None}, status="failed", note="it crashed")
        assert store.document(number) == RUN
        newest, oldest = store.list()
    assert (newest.id, newest.status, newest.note, newest.p50_ns) == (
        failed, "failed", "it crashed", None,
    )  # fmt: skip
    assert (oldest.kind, oldest.model, oldest.engine, oldest.p50_ns) == ("bench", "m.onnx", "e", 5)


def test_lists_are_filtered_and_limited(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for name in ("a_1", "b%", "a_2"):
            store.add({**RUN, "model": name})
        assert [one.model for one in store.list(model="a_")] == ["a_2", "a_1"]
        assert [one.model for one in store.list(model="%")] == ["b%"]
        assert [one.model for one in store.list(limit=1)] == ["a_2"]


def test_an_old_file_is_migrated_and_keeps_its_runs(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "results.sqlite")
    module._MIGRATIONS[0](db)
    db.execute("PRAGMA user_version = 1")
    blob = zlib.compress(json.dumps(RUN).encode())
    db.execute("INSERT INTO runs VALUES (7, '2026-01-01', 'bench', 'm', 'e', 5, ?)", (blob,))
    db.commit()
    db.close()
    with Store(tmp_path) as store:
        (run,) = store.list()
        assert (run.id, run.status, run.note) == (7, "done", "")
        assert store.document(7) == RUN
        assert store.add(RUN) == 8


def test_a_newer_file_is_refused_and_untouched(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "results.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = (tmp_path / "results.sqlite").read_bytes()
    with pytest.raises(InputError, match="newer EdgeKit.*schema 99.*--store"):
        Store(tmp_path)
    assert (tmp_path / "results.sqlite").read_bytes() == before


def test_what_is_no_store_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").write_text("a text that is no database, long enough to be read")
    with pytest.raises(InputError, match="no result store"):
        Store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="wanted a folder"):
        Store(tmp_path / "file" / "below")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(RUN)
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutOfSpaceError, match="disk is full"):
            store.add({**RUN, "text": "".join(map(str, range(20_000)))})
        assert len(store.list()) == 1
    with Store(tmp_path) as store:
        assert store.document(1) == RUN


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(UsageError, match="no run 3 .*empty"):
            store.document(3)
        store.add(RUN)
        with pytest.raises(UsageError, match="the newest is 1"):
            store.document(3)


def test_two_writers_at_once(tmp_path: Path) -> None:
    def write() -> None:
        with Store(tmp_path) as store:
            for _ in range(20):
                store.add(RUN)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    with Store(tmp_path) as store:
        assert sorted(one.id for one in store.list()) == list(range(1, 81))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEKIT_STORE", str(tmp_path / "a"))
    assert default_store() == tmp_path / "a"
    monkeypatch.delenv("EDGEKIT_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_store() == tmp_path / "edgekit"
