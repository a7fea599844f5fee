"""Cuts a file at places its content chooses, so that an insertion moves no cut but the next.

A cut is where the sum of random weights of the last 64 bytes, multiplied and shifted, is zero in 16
bits: once in 64 KiB on average (content-defined chunking, as of LBFS, SOSP 2001).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["LARGEST", "SMALLEST", "Chunk", "chunks_of"]

SMALLEST, LARGEST = 16 << 10, 256 << 10
_WINDOW, _BLOCK = 64, 8 << 20
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio (Knuth, TAOCP 3, 6.4)
_WEIGHTS = np.random.default_rng(9).integers(0, 1 << 63, 256, dtype=np.uint64)


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: where it is, and the SHA-256 of what it holds."""

    sha256: str
    offset: int
    size_bytes: int


def chunks_of(path: Path) -> list[Chunk]:
    """The chunks of a file, in order and without gaps, each of at most 256 KiB."""
    data = path.read_bytes()
    found, start = [], 0
    for end in _ends(data):
        piece = data[start:end]
        found.append(Chunk(hashlib.sha256(piece).hexdigest(), start, len(piece)))
        start = end
    return found


def _ends(data: bytes) -> Iterator[int]:
    start = 0
    for cut in [*_cuts(data), len(data)]:
        while cut - start > LARGEST:
            start += LARGEST
            yield start
        if cut - start >= SMALLEST or (cut == len(data) and cut > start):
            start = cut
            yield start


def _cuts(data: bytes) -> list[int]:
    whole = np.frombuffer(data, np.uint8)
    found: list[int] = []
    for start in range(0, len(whole), _BLOCK):
        before = max(0, start - _WINDOW)
        sums = np.cumsum(_WEIGHTS[whole[before : start + _BLOCK]], dtype=np.uint64)
        if len(sums) <= _WINDOW:
            continue
        last = sums[_WINDOW:] - sums[:-_WINDOW]
        hits = np.flatnonzero((last * _ODD) >> np.uint64(48) == 0)
        found += (hits + (before + _WINDOW + 1)).tolist()
    return found
