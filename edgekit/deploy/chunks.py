"""Cuts a file at places its content chooses, so that an insertion moves no cut but the next.

A cut is where the sum of random weights of the last 64 bytes, multiplied by an odd number, begins
with 16 zeros of its 32 bits: once in 64 KiB on average (content-defined chunking, as of LBFS, SOSP
2001).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "SMALLEST", "Chunk", "chunks_in", "chunks_of"]

SMALLEST, LARGEST = 16 << 10, 256 << 10
_WINDOW = 64
_BLOCK = 1 << 16  # what the processor's cache holds the sums of
_ODD = np.uint32(0x9E3779B1)  # 2^32 over the golden ratio (Knuth, TAOCP 3, 6.4)
_WEIGHTS = np.random.default_rng(9).integers(0, 1 << 32, 256, dtype=np.uint32)


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: where it is, and the SHA-256 of what it holds."""

    sha256: str
    offset: int
    size_bytes: int


def chunks_of(path: Path) -> list[Chunk]:
    """The chunks of a file, in order and without gaps, each of at most 256 KiB."""
    with path.open("rb") as file:
        return [chunk for chunk, _ in chunks_in(file)]


def chunks_in(file: BinaryIO) -> Iterator[tuple[Chunk, bytes]]:
    """The chunks of an open file from its beginning, with what they hold."""
    held, start, last = bytearray(), 0, b""
    while block := file.read(_BLOCK):
        cuts = _cuts(last + block) + (start + len(held) - len(last))
        held += block
        last = (last + block)[-_WINDOW:]
        for end in _ends(cuts.tolist(), start, start + len(held)):
            yield _chunk(held, start, end)
            del held[: end - start]
            start = end
    if held:
        yield _chunk(held, start, start + len(held))


def _chunk(held: bytearray, start: int, end: int) -> tuple[Chunk, bytes]:
    data = bytes(held[: end - start])
    return Chunk(hashlib.sha256(data).hexdigest(), start, end - start), data


def _ends(cuts: list[int], start: int, known: int) -> Iterator[int]:
    """Where chunks end, as far as the file is known."""
    for cut in cuts:
        while cut - start > LARGEST:
            start += LARGEST
            yield start
        if cut - start >= SMALLEST:
            start = cut
            yield start
    while known - start > LARGEST:
        start += LARGEST
        yield start


def _cuts(data: bytes) -> NDArray[np.int64]:
    """Offsets of cuts after the first 64 bytes."""
    sums = np.cumsum(_WEIGHTS[np.frombuffer(data, np.uint8)], dtype=np.uint32)
    last = sums[_WINDOW:] - sums[:-_WINDOW]
    hits: NDArray[np.int64] = np.flatnonzero(last * _ODD < np.uint32(1 << 16))
    return hits + (_WINDOW + 1)
