"""Labelled samples for magika from a machine's own files: the label is the extension's type.

Each file becomes 2048 integers as magika's authors define them: 1024 bytes from its beginning
(leading white space stripped), 1024 from its end (trailing white space stripped), each taken from
at most 4096 bytes and padded with a token that is no byte.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import pickle
import py_compile
import random
import shutil
import sqlite3
import sysconfig
import tarfile
import time
import wave
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: folders of system files; a home folder is nobody's test data
ROOTS = ("/usr", "/etc", "/opt", "/var/lib", "/System/Library", "/Library")
#: extensions that say little about the content, seen on Debian: `.crt` holds PEM, `.ai` anything
UNRELIABLE = {"crt", "cer", "txt", "ai", "cat", "doc", "sgml", "vba", "sum", "def", "lock", "dat"}
MOST_PER_TYPE = 120
LEAST_FILES, LEAST_TYPES = 300, 12
SEARCH_S = 60.0


@dataclass(frozen=True)
class Config:
    """What the model was trained with: sizes, the padding token, its labels in order."""

    half: int
    block: int
    padding: int
    labels: list[str]
    type_of_extension: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Config:
        """From the package's own `config.json` and `types.json`."""
        raw = json.loads((folder / "config.json").read_text())
        labels = raw["target_labels_space"]
        types = defaultdict(set)
        for name, facts in json.loads((folder / "types.json").read_text()).items():
            for extension in facts["extensions"]:
                types[extension].add(name)
        unique = {e: next(iter(names)) for e, names in types.items() if len(names) == 1}
        known = {e: n for e, n in unique.items() if n in labels and e not in UNRELIABLE}
        return cls(raw["beg_size"], raw["block_size"], raw["padding_token"], labels, known)


def features(content_start: bytes, content_end: bytes, config: Config) -> NDArray[np.int32]:
    """int32 (2048,), 0..255 or the padding token, from a file's first and last block."""
    row = np.full(2 * config.half, config.padding, np.int32)
    start = content_start.lstrip()[: config.half]
    end = content_end.rstrip()[-config.half :]
    row[: len(start)] = np.frombuffer(start, np.uint8)
    if end:
        row[-len(end) :] = np.frombuffer(end, np.uint8)
    return row


def file_features(path: Path, config: Config) -> NDArray[np.int32]:
    """The features of a file on disk; reads at most its first and last block."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(config.block)
        file.seek(max(0, size - config.block))
        return features(start, file.read(config.block), config)


def save_folder(config: Config, target: Path, roots: tuple[str, ...] = ROOTS) -> str:
    """Write a folder of samples with `labels.csv`, and `steps.toml` beside it: what the model
    makes of a file, and what is made of its answer. Returns what was found, for people.

    Of each file only its first and last block are kept, all that the model looks at.
    """
    found, said = _enough(config, target.parent, roots)
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with (part / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label"])
        for name, paths in sorted(found.items()):
            for number, path in enumerate(paths):
                copy = f"{name}-{number}"
                (part / copy).write_bytes(b"".join(_blocks(path, config)))
                rows.writerow([copy, name])
    target.with_name("labels.txt").write_text("\n".join(config.labels) + "\n")
    target.with_name("steps.toml").write_text(
        'labels = "labels.txt"\n\n[inputs.bytes]\nsource = "bytes"\nsteps = [\n'
        f'  {{ op = "head-tail", head = {config.half}, tail = {config.half}, '
        f"block = {config.block}, strip = true, pad = {config.padding} }},\n]\n\n"
        '[[outputs]]\nop = "top-k"\nk = 3\n'
    )
    part.rename(target)
    return said


def save_samples(config: Config, target: Path, roots: tuple[str, ...] = ROOTS) -> str:
    """Write the model's inputs `bytes`, and `labels`, into an `.npz`; returns what was found."""
    found, said = _enough(config, target.parent, roots)
    rows, labels = [], []
    for name, paths in sorted(found.items()):
        rows += [file_features(path, config) for path in paths]
        labels += [config.labels.index(name)] * len(paths)
    part = target.with_suffix(".part.npz")
    np.savez(part, bytes=np.stack(rows), labels=np.array(labels, np.int64))
    part.rename(target)
    return said


def _enough(
    config: Config, folder: Path, roots: tuple[str, ...]
) -> tuple[dict[str, list[Path]], str]:
    """Files of this machine by type, or, where it has few, written ones; and which it was."""
    found = find(config, roots)
    files, types = sum(map(len, found.values())), len(found)
    said = f"found {files} files of {types} types under {', '.join(roots)}"
    if files < LEAST_FILES or types < LEAST_TYPES:
        found = written(folder / "written")
        files, types = sum(map(len, found.values())), len(found)
        said += (
            f"; at least {LEAST_FILES} of {LEAST_TYPES} types are needed, so {files} files of "
            f"{types} types were written from the standard library's own sources"
        )
    return found, said


def _blocks(path: Path, config: Config) -> tuple[bytes, bytes]:
    """All of a small file; the first and the last block of another, which read the same."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(config.block)
        file.seek(max(config.block, size - config.block))
        return start, file.read()


def find(config: Config, roots: tuple[str, ...]) -> dict[str, list[Path]]:
    """Files with distinct samples by type, at most `MOST_PER_TYPE` each, drawn evenly."""
    paths = defaultdict(list)
    for path in _walk(roots):
        name = config.type_of_extension.get(path.suffix[1:].lower())
        if name is not None:
            paths[name].append(path)
    draw = random.Random(0)  # noqa: S311  (a repeatable sample, no secret)
    found: dict[str, list[Path]] = {}
    for name, candidates in sorted(paths.items()):
        draw.shuffle(candidates)
        samples = _distinct(candidates, config)
        if samples:
            found[name] = samples
    return found


def _walk(roots: tuple[str, ...]) -> Iterator[Path]:
    deadline = time.monotonic() + SEARCH_S
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders.sort()
            if time.monotonic() > deadline:
                return
            for name in sorted(names):
                yield Path(folder, name)


def _distinct(paths: list[Path], config: Config) -> list[Path]:
    seen: dict[bytes, Path] = {}
    for path in paths:
        if len(seen) == MOST_PER_TYPE:
            break
        try:
            if path.is_symlink() or path.stat().st_size < 64:
                continue
            row = file_features(path, config)
        except OSError:
            continue  # unreadable files are not data
        if (row != config.padding).sum() >= 64:
            seen.setdefault(row.tobytes(), path)
    return list(seen.values())


def written(folder: Path) -> dict[str, list[Path]]:
    """A small set of many types, each file made from one standard library module's source."""
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(p for p in library.glob("*.py") if p.stat().st_size > 4096)[:40]
    found: dict[str, list[Path]] = defaultdict(list)
    for number, source in enumerate(sources):
        text = source.read_text(errors="replace")
        for name, write in _WRITERS.items():
            path = folder / f"{number}.{name}"
            write(path, text, source)
            found[name].append(path)
    return dict(found)


def _sqlite(path: Path, text: str, _: Path) -> None:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        database.execute("create table lines (number integer, line text)")
        database.executemany("insert into lines values (?, ?)", enumerate(text.splitlines()))
    database.close()


def _zip(path: Path, text: str, source: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(source.name, text)


def _tar(path: Path, text: str, source: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(source, source.name)


def _wave(path: Path, text: str, _: Path) -> None:
    tone = np.cumsum(np.frombuffer(text.encode()[:4000], np.uint8)) / 40.0
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes((8000 * np.sin(tone)).astype("<i2").tobytes())


def _html(path: Path, text: str, source: Path) -> None:
    lines = [line.replace("&", "&amp;").replace("<", "&lt;") for line in text.splitlines()]
    rows = "\n".join(
        f'<p class="line"><a name="l{i}">{i}</a> {line}</p>' for i, line in enumerate(lines)
    )
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{source.name}</title>\n<style>p {{ margin: 0 }}</style>\n</head>\n<body>\n"
        f"<h1>{source.name}</h1>\n<div>\n{rows}\n</div>\n</body>\n</html>\n"
    )


def _xml(path: Path, text: str, source: Path) -> None:
    lines = [line.replace("&", "&amp;").replace("<", "&lt;") for line in text.splitlines()]
    rows = "\n".join(f'  <line number="{i}">{line}</line>' for i, line in enumerate(lines))
    path.write_text(f'<?xml version="1.0"?>\n<module name="{source.stem}">\n{rows}\n</module>\n')


def _json(path: Path, text: str, source: Path) -> None:
    rows = [{"line": i, "length": len(one)} for i, one in enumerate(text.splitlines())]
    path.write_text(json.dumps({"module": source.stem, "size": len(text), "lines": rows}, indent=1))


def _npz(path: Path, text: str, _: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, lengths=np.array([len(line) for line in text.splitlines()]))


def _npy(path: Path, text: str, _: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([len(line) for line in text.splitlines()]))


_WRITERS: dict[str, Callable[[Path, str, Path], object]] = {
    "python": lambda path, text, _: path.write_text(text),
    "pythonbytecode": lambda path, _, source: py_compile.compile(str(source), cfile=str(path)),
    "gzip": lambda path, text, _: path.write_bytes(gzip.compress(text.encode())),
    "bzip": lambda path, text, _: path.write_bytes(bz2.compress(text.encode())),
    "xz": lambda path, text, _: path.write_bytes(lzma.compress(text.encode())),
    "pickle": lambda path, text, _: path.write_bytes(pickle.dumps(text.splitlines())),
    "json": _json, "html": _html, "xml": _xml, "sqlite": _sqlite, "zip": _zip, "tar": _tar,
    "wav": _wave, "npz": _npz, "npy": _npy,
}  # fmt: skip
