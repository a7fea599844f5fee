"""The cache: whole entries or none."""

import threading
from pathlib import Path

import pytest

from edgekit.cache import Cache, content_key, write_atomically
from edgekit.errors import UsageError


def test_made_once_then_found(tmp_path) -> None:
    cache, calls = Cache(tmp_path), []

    def make(folder: Path) -> None:
        calls.append(1)
        (folder / "a").write_text("x")

    key = content_key(a=1)
    assert (cache.folder(key, make) / "a").read_text() == "x"
    assert (Cache(tmp_path).folder(key, make) / "a").read_text() == "x"
    assert len(calls) == 1


def test_key_depends_on_content_not_order() -> None:
    assert content_key(a=1, b=[2]) == content_key(b=[2], a=1)
    assert content_key(a=1) != content_key(a=2)


def test_failure_leaves_nothing(tmp_path) -> None:
    cache = Cache(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cache.folder(content_key(a="fails"), fail)
    assert cache.get(content_key(a="fails")) is None
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("damage", ["missing", "truncated", "unmarked"])
def test_damaged_entries_are_made_again(tmp_path, damage) -> None:
    cache = Cache(tmp_path)
    key = content_key(k=damage)
    folder = cache.folder(key, lambda f: (f / "a").write_text("long enough") and None)
    {
        "missing": lambda: (folder / "a").unlink(),
        "truncated": lambda: (folder / "a").write_text("x"),
        "unmarked": lambda: (folder / "entry.json").unlink(),
    }[damage]()
    assert cache.get(key) is None
    again = cache.folder(key, lambda f: (f / "a").write_text("new") and None)
    assert (again / "a").read_text() == "new"


def test_two_makers_of_one_entry_agree(tmp_path) -> None:
    cache, barrier, seen = Cache(tmp_path), threading.Barrier(2), []

    def make(folder: Path) -> None:
        (folder / "a").write_text("same")
        barrier.wait(timeout=10)

    threads = [
        threading.Thread(target=lambda: seen.append(cache.folder(content_key(a="two"), make)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1]
    assert (seen[0] / "a").read_text() == "same"
    assert not list(tmp_path.glob(".making-*"))


def test_trim_removes_the_least_recently_used(tmp_path) -> None:
    cache = Cache(tmp_path, limit_bytes=2500)
    keys = [content_key(n=i) for i in range(4)]
    for i, key in enumerate(keys):
        folder = cache.folder(key, lambda f: (f / "a").write_bytes(bytes(1000)) and None)
        import os

        os.utime(folder, (i, i))
    os.utime(tmp_path / keys[0][:2] / keys[0], (99, 99))
    cache.trim()
    left = [key in {p.name for p in tmp_path.glob("??/*")} for key in keys]
    assert left == [True, False, False, True]


def test_unwritable_root_says_what_to_do(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="EDGEKIT_CACHE"):
        Cache(tmp_path / "file" / "cache")


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path, monkeypatch) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, b"new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
