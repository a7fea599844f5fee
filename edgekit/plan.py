"""What will be tried: engines x schemes that the profile allows, printable before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import util

from edgekit.artifact import FORMAT_NAMES
from edgekit.compress.quantize import QUANTIZERS
from edgekit.compress.scheme import Scheme, schemes_for
from edgekit.convert import EDGES, missing_extra, path_between
from edgekit.device import DeviceProfile
from edgekit_runtime.engines import ENGINES

__all__ = ["Candidate", "make_plan"]


@dataclass(frozen=True)
class Candidate:
    """One thing to build, evaluate and measure. `skip` says why it will not be, if so."""

    id: str
    engine: str
    format: str
    scheme: Scheme
    threads: int
    skip: str | None = None


def make_plan(
    source_format: str,
    profile: DeviceProfile,
    *,
    threads: int,
    engine_faults: Mapping[str, str | None],
) -> tuple[Candidate, ...]:
    """Candidates in the order they are built, most promising first.

    The first is always the reference: the model as it came, in its own format's engine.
    `engine_faults` holds why an engine cannot be used here (None: its probe ran).
    """
    schemes = schemes_for(
        reduce_range=profile.quantization.reduce_range,
        per_channel=profile.quantization.per_channel,
    )
    found = []
    for engine in profile.engines:
        if engine not in ENGINES:
            continue
        fmt = ENGINES[engine].formats[0]
        if fmt != source_format and all(edge.target != fmt for edge in EDGES):
            continue  # nothing makes its files in this version
        for scheme in schemes:
            base = Candidate(f"{engine}-{scheme.id}", engine, fmt, scheme, threads)
            skip = _why_not(base, source_format, engine_faults.get(engine))
            found.append(replace(base, skip=skip))
    # By scheme first: fp32 everywhere tells early which engines work at all.
    rank = {scheme.id: number for number, scheme in enumerate(schemes)}
    native = next(e for e, row in ENGINES.items() if row.formats[0] == source_format)
    found.sort(key=lambda c: (rank[c.scheme.id], c.engine != native))
    if not found or found[0].engine != native:
        # The profile's device lacks the engine: it still is what the others are compared with.
        reference = Candidate(f"{native}-fp32", native, source_format, Scheme("fp32"), threads)
        found.insert(0, replace(reference, skip=engine_faults.get(native)))
    return tuple(found)


def _why_not(candidate: Candidate, source_format: str, fault: str | None) -> str | None:
    if fault is not None:
        return f"{candidate.engine}: {fault}"
    path = path_between(source_format, candidate.format)
    if path is None:
        return (
            f"no way from {FORMAT_NAMES[source_format]} to {FORMAT_NAMES[candidate.format]} "
            "in this version"
        )
    for edge in path:
        missing = missing_extra(edge)
        if missing:
            return f"converting needs {missing}: pip install -e '.[{edge.extra}]'"
    if candidate.scheme.kind != "fp32":
        _, module, extra, _ = QUANTIZERS[candidate.format]
        if util.find_spec(module) is None:
            return f"quantizing needs {module}: pip install -e '.[{extra}]'"
    return None
