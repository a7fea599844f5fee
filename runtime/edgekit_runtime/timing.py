"""Takes latency samples and summarises them. Samples are what is kept; a summary is a view."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, List, Sequence, Union

import numpy as np

__all__ = ["pack_ns", "percentile_ns", "sample", "summary", "unpack_ns"]


def sample(call: Callable[[], Any], count: int) -> List[int]:
    """Call `count` times; nanoseconds of each call (monotonic clock)."""
    clock = time.perf_counter_ns
    taken = []
    for _ in range(count):
        start = clock()
        call()
        taken.append(clock() - start)
    return taken


def pack_ns(samples: Sequence[int]) -> Dict[str, Any]:
    """Samples for a result file, a third of their length as text: 64-bit integers, their first
    bytes, then their second ones ... (of which most are alike), deflated, in base64."""
    import base64
    import zlib

    planes = np.asarray(samples, "<i8").reshape(-1, 1).view(np.uint8).T.tobytes()
    text = base64.b64encode(zlib.compress(planes, 9)).decode()
    return {"encoding": "i8-planes-zlib-base64", "count": len(samples), "data": text}


def unpack_ns(packed: Union[Dict[str, Any], List[int]]) -> List[int]:
    """What `pack_ns` packed; a plain list as it is.

    Raises:
        ValueError: it is damaged, or packed in another way.
    """
    if isinstance(packed, list):
        return [int(ns) for ns in packed]
    import base64
    import zlib

    if packed.get("encoding") != "i8-planes-zlib-base64":
        raise ValueError(f"samples packed as {packed.get('encoding')!r}")
    count = int(packed["count"])
    try:
        planes = zlib.decompressobj().decompress(base64.b64decode(packed["data"]), 8 * count + 1)
    except zlib.error as error:
        raise ValueError(f"samples are damaged: {error}") from None
    if len(planes) != 8 * count:
        raise ValueError(f"{len(planes)} bytes for {count} samples")
    columns = np.frombuffer(planes, np.uint8).reshape(8, count).T
    found: List[int] = np.ascontiguousarray(columns).view("<i8").ravel().tolist()
    return found


def percentile_ns(samples: Sequence[int], percent: float) -> int:
    """The smallest sample that at least `percent` % of all samples do not exceed.

    The nearest-rank definition (Hyndman and Fan 1996, definition 1): always a value that was
    really measured. `percent` in 0..100.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.int64))
    rank = max(1, int(np.ceil(percent * len(ordered) / 100)))
    return int(ordered[rank - 1])


def summary(samples: Sequence[int], *, label: str = "measured") -> Dict[str, Any]:
    """`{p50, p90, min, samples, label}` in nanoseconds, and `p99`.

    p90 is None below 36 samples, p99 below 368: fewer give no 95 % interval for them (0.9**36 and
    0.99**368 are 0.025; Hahn and Meeker, Statistical Intervals, 5.3).
    """
    count = len(samples)
    return {
        "p50": percentile_ns(samples, 50),
        "p90": percentile_ns(samples, 90) if count >= 36 else None,
        "p99": percentile_ns(samples, 99) if count >= 368 else None,
        "min": int(min(samples)),
        "samples": count,
        "label": label,
    }
