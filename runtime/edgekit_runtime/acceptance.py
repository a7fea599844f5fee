"""The trial of a bundle on the device it is to serve: right answers, right place, in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

from .bundle import Bundle
from .errors import BundleError, EdgeKitError, LimitError, UsageError, one_line
from .golden import check_session
from .machine import cpu_name, machine_name, peak_rss_bytes, rss_bytes
from .manifest import Manifest, Variant, same_interface
from .session import Session
from .source import Source, processing
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
    `{"ok": False, "why", "code"}` for one that must not be activated (3: for want of an engine).

    Limits are those of the chosen variant: `expected["limits"]["latency_ns"]` for the median, if it
    was measured on this kind of processor (`unused_limits` says so where it was not), 1.5 times
    `memory_bytes` for what this process grew by; `latency_ns` is one of the user. `passed_over` has
    the variants before the chosen one, and why.
    """
    try:
        return _accept(path, active, latency_ns)
    except EdgeKitError as error:
        why = one_line(error).replace(f"{path}: ", "")
        return {"ok": False, "why": why, "code": error.exit_code}


def _accept(path: Path, active: Optional[Path], limit_ns: Optional[int]) -> Dict[str, Any]:
    source = Source(path)
    before = rss_bytes() or 0
    with Bundle(path) as bundle:
        processing(bundle.manifest)
        if active is not None:
            bundle.verify()  # what is damaged has no interface to speak of
            _same_interface(bundle.manifest, active)
        with Session(source, source.open(bundle)) as session:
            variant = session.variant
            assert variant is not None  # noqa: S101  (sessions on bundles have one)
            passed = "; not ".join(session.fallbacks)
            _right(session, bundle)
            latency, placement = _latency(session), str(session.placement)
    grown = (peak_rss_bytes() or 0) - before
    promise, unused = _promised(variant)
    for limit, of in ((limit_ns, "--max-latency"), (promise, "the bundle's limit")):
        if limit is not None and latency["p50"] > limit:
            raise LimitError(f"p50 is {latency['p50'] / 1e6:.2f} ms, {of} is {limit / 1e6:.2f} ms")
    if variant.memory_bytes is not None and grown > _MEMORY_SLACK * variant.memory_bytes:
        raise LimitError(
            f"it takes {grown / 1e6:.0f} MB of memory, the bundle says "
            f"{variant.memory_bytes / 1e6:.0f} MB"
        )
    return {
        "ok": True, "variant": variant.id, "latency_ns": latency, "memory_bytes": grown,
        "placement": placement, **({"unused_limits": unused} if unused else {}),
        **({"passed_over": passed} if passed else {}),
    }  # fmt: skip


def _right(session: Session, bundle: Bundle) -> None:
    bad = [one for one in check_session(session, bundle) if not one.ok]
    if bad:
        off = bad[0].note or f"off by {bad[0].worst:.3g} times what is allowed"
        raise LimitError(f"golden output {bad[0].output!r}: {off}")


def _latency(session: Session) -> Dict[str, Any]:
    inputs = synthetic_inputs(session)
    taken = sample(lambda: session.run(inputs), 2)
    count = max(3, min(_RUNS, _SECONDS_NS // max(1, taken[-1])))
    label = "simulated" if session.placement.simulated else "measured"
    return summary(sample(lambda: session.run(inputs), int(count)), label=label)


def _promised(variant: Variant) -> Tuple[Optional[float], str]:
    """The bundle's limit in nanoseconds, and why it is not one here."""
    limits = variant.expected.get("limits")
    limit = limits.get("latency_ns") if isinstance(limits, dict) else None
    if not isinstance(limits, dict) or not isinstance(limit, (int, float)) or limit <= 0:
        return None, ""
    other = ", ".join(_others(limits))
    return (None, f"latency: measured on {other}") if other else (limit, "")


def _others(limits: Dict[str, Any]) -> Iterator[str]:
    """What the processor of the limits is called, where it is not this one."""
    for key, here in (("arch", machine_name()), ("cpu", cpu_name())):
        named = limits.get(key)
        if named is not None and named != here:
            yield str(named)[:80]


def _same_interface(manifest: Manifest, active: Path) -> None:
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
