"""Cuts a file at places its content chooses, so that an insertion moves no cut but the next.

A cut is where the last 8 bytes, multiplied as a number by an odd one, begin with 16 zeros of 64
bits: once in 64 KiB on average (content-defined chunking, as of LBFS, SOSP 2001).
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
_WINDOW = 8
_BLOCK = 1 << 20
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio (Knuth, TAOCP 3, 6.4)
_BELOW = np.uint64(1 << 48)


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
    held, offset = b"", 0  # of the chunk that has begun: no cut is near its start
    while block := file.read(_BLOCK):
        data, start = held + block, 0
        for end in _ends(_cuts(data, max(0, len(held) - _WINDOW)), len(data)):
            yield _chunk(data[start:end], offset + start)
            start = end
        held, offset = data[start:], offset + start
    if held:
        yield _chunk(held, offset)


def _chunk(data: bytes, offset: int) -> tuple[Chunk, bytes]:
    return Chunk(hashlib.sha256(data).hexdigest(), offset, len(data)), data


def _ends(cuts: list[int], known: int) -> Iterator[int]:
    """Where chunks end, of a file that is known so far and begins with one."""
    start = 0
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


def _cuts(data: bytes, start: int) -> list[int]:
    """Where cuts are after `start`, in the bytes that are all in `data`."""
    count = max(0, len(data) - start - _WINDOW + 1)
    # overlapping numbers, little-endian wherever this runs: the device compares hashes only
    numbers: NDArray[np.uint64] = np.ndarray((count,), "<u8", data, start, (1,))
    found: list[int] = (np.flatnonzero(numbers * _ODD < _BELOW) + (start + _WINDOW)).tolist()
    return found
