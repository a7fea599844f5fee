"""The trial of a bundle on the device it is to serve: right answers, right place, in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

from .bundle import Bundle
from .errors import BundleError, EdgeKitError, LimitError, UsageError, one_line
from .golden import check
from .loading import load
from .machine import peak_rss_bytes, rss_bytes
from .manifest import same_interface
from .source import processing
from .timing import sample, summary
from .worker import synthetic_inputs

__all__ = ["accept"]

_RUNS = 20
_SECONDS_NS = 3_000_000_000
#: `memory_bytes` was measured of a whole process on another machine, with other page sizes
_MEMORY_SLACK = 1.5


def accept(
    path: Path, *, active: Optional[Path] = None, latency_ns: Optional[int] = None
) -> Dict[str, Any]:
    """What a sound bundle does here: `{"ok": True, "latency_ns", "memory_bytes", ...}`, and
    `{"ok": False, "why"}` for one that must not be activated.

    Limits are those of the chosen variant: `expected["limits"]["latency_ns"]` for the median,
    1.5 times `memory_bytes` for what this process grew by; `latency_ns` is one of the user.
    """
    try:
        return _accept(path, active, latency_ns)
    except EdgeKitError as error:
        return {"ok": False, "why": one_line(error).replace(f"{path}: ", "")}


def _accept(path: Path, active: Optional[Path], limit_ns: Optional[int]) -> Dict[str, Any]:
    with Bundle(path) as bundle:
        bundle.verify()
        manifest = bundle.manifest
        processing(manifest)
    if active is not None:
        _same_interface(manifest, active)
    before = rss_bytes() or 0
    bad = [one for one in check(path) if not one.ok]
    if bad:
        off = bad[0].note or f"off by {bad[0].worst:.3g} times what is allowed"
        raise LimitError(f"golden output {bad[0].output!r}: {off}")
    with load(path) as session:
        variant = session.variant
        assert variant is not None  # noqa: S101  (sessions on bundles have one)
        inputs = synthetic_inputs(session)
        taken = sample(lambda: session.run(inputs), 2)
        count = max(3, min(_RUNS, _SECONDS_NS // max(1, taken[-1])))
        latency = summary(sample(lambda: session.run(inputs), int(count)))
        placement = str(session.placement)
    grown = (peak_rss_bytes() or 0) - before
    promised = variant.expected.get("limits")
    promise = promised.get("latency_ns") if isinstance(promised, dict) else None
    for limit, of in ((limit_ns, "--max-latency"), (promise, "the bundle's limit")):
        if isinstance(limit, (int, float)) and limit > 0 and latency["p50"] > limit:
            raise LimitError(
                f"p50 is {latency['p50'] / 1e6:.2f} ms, {of} is {float(limit) / 1e6:.2f} ms"
            )
    if variant.memory_bytes is not None and grown > _MEMORY_SLACK * variant.memory_bytes:
        raise LimitError(
            f"it takes {grown / 1e6:.0f} MB of memory, the bundle says "
            f"{variant.memory_bytes / 1e6:.0f} MB"
        )
    return {
        "ok": True, "variant": variant.id, "latency_ns": latency, "memory_bytes": grown,
        "placement": placement,
    }  # fmt: skip


def _same_interface(manifest: Any, active: Path) -> None:
    try:
        with Bundle(active) as old:
            theirs = old.manifest
    except BundleError:
        return  # what is active is damaged: this is the cure
    if not same_interface(
        (manifest.inputs, manifest.outputs), (theirs.inputs, theirs.outputs)
    ):  # programs in the field would stumble over it
        raise UsageError(
            "it has other inputs or outputs than the version that is active; install it under "
            "another name"
        )
