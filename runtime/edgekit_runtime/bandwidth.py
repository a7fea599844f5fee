"""How fast this device moves bytes between its processors and its memory."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from .errors import UsageError
from .machine import free_memory_bytes

__all__ = ["largest_cache_bytes", "memory_bandwidth"]

_LEAST_BYTES = 32 << 20
_ENOUGH_NS = 500_000_000  # a PC makes dozens of copies meanwhile,
_LEAST_COPIES = 4  # a slow board these
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def memory_bandwidth(*, threads: int = 1) -> Dict[str, Any]:
    """Copy a buffer too big for the caches, by one thread and by `threads` at once in turn; the
    best of all.

    The bytes counted are those read and those written, as in STREAM's Copy (McCalpin 1995): what
    the caches fetch on their own before a write is not. The buffer has four times the size of the
    largest cache, as STREAM asks for, at least 32 MiB; both buffers together take a quarter of the
    free memory at most. `threads` of the answer is who was best.

    Raises:
        UsageError: no thread at all.
    """
    if threads < 1:
        raise UsageError(f"--threads is {threads}; wanted at least 1")
    cache = largest_cache_bytes()
    size = max(_LEAST_BYTES, 4 * (cache or 0))
    free = free_memory_bytes()
    if free is not None:
        size = min(size, free // 8)
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    target[:] = 1  # zeros are pages that nobody has touched

    def copy(part: slice) -> None:
        np.copyto(target[part], source[part])  # without the interpreter's lock

    taken: List[Tuple[int, int]] = []
    begin = time.perf_counter_ns()
    with ThreadPoolExecutor(threads) as pool:
        for count in itertools.cycle(sorted({1, threads})):
            edges = [size * part // count for part in range(count + 1)]
            parts = [slice(first, last) for first, last in zip(edges, edges[1:])]
            start = time.perf_counter_ns()
            list(pool.map(copy, parts))
            now = time.perf_counter_ns()
            taken.append((now - start, count))
            if len(taken) >= _LEAST_COPIES and now - begin > _ENOUGH_NS:
                break
    best_ns, count = min(taken)
    return {
        "bytes_per_s": 2 * size * 1e9 / best_ns,
        "buffer_bytes": size,
        "cache_bytes": cache,
        "threads": count,
        "label": "measured",
    }


def largest_cache_bytes(root: str = "/sys/devices/system/cpu") -> Optional[int]:
    """All caches of the outermost level together; None where Linux does not say.

    A cache that several processors share is counted once; clusters and chiplets have one each.
    """
    found: Dict[int, Dict[str, int]] = {}
    for folder in Path(root).glob("cpu[0-9]*/cache/index[0-9]*"):
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            if (folder / "type").read_text().strip() == "Instruction":
                continue
            number, unit = re.match(r"(\d+)([KMG]?)", (folder / "size").read_text()).groups()  # type: ignore[union-attr]
            level = int((folder / "level").read_text())
            shared = (folder / "shared_cpu_list").read_text().strip()
            found.setdefault(level, {})[shared] = int(number) * _UNITS[unit]
    return sum(found[max(found)].values()) if found else None
