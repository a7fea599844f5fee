"""Writes bundles; the runtime reads them (`edgekit_runtime.bundle` defines the archive)."""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import sandbox
from edgekit.artifact import Artifact, TensorSpec
from edgekit.cache import write_atomically
from edgekit.errors import ModelError, UsageError
from edgekit.pipeline import Pipeline
from edgekit_runtime.arrays import read_npz, write_npz
from edgekit_runtime.bundle import MANIFEST, MAX_BUNDLE_BYTES, MAX_INFLATION, archive_entry
from edgekit_runtime.loading import load
from edgekit_runtime.machine import cpu_name
from edgekit_runtime.manifest import (
    SCHEMA,
    Deflated,
    FileEntry,
    Golden,
    Manifest,
    Tolerance,
    Variant,
)
from edgekit_runtime.worker import synthetic_inputs

__all__ = ["VariantSource", "latency_limits", "make_golden", "write_bundle"]

_GOLDEN_SAMPLES = 3
#: a model that deflates to at most this share of its bytes is stored so: sparse ones do, dense ones
#: do not (docs/evidence/pruning.md)
_WORTH_DEFLATING, _SMALL_BYTES, _LEVEL = 0.7, 1 << 12, 6


@dataclass(frozen=True)
class VariantSource:
    """A built candidate on its way into a bundle. `golden`: a folder with inputs.npz and
    outputs.npz of what no engine here runs. `macs` by operator, which `placement` has shares of;
    `on_misplacement` as in the manifest."""

    id: str
    engine: str
    artifact: Artifact
    scheme: str
    threads: int
    precision: str
    placement: Mapping[str, float]
    expected: Mapping[str, Any]
    memory_bytes: int | None = None
    golden: Path | None = None
    macs: Mapping[str, int] = field(default_factory=dict)
    on_misplacement: str = "refuse"


def latency_limits(
    latency: Mapping[str, Any], conditions: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a device that tries the bundle refuses it for: `{"limits": {"latency_ns", "rule",
    "arch", "cpu"}}`, five times the measured p50 and 0.1 ms.

    A hot board runs at a third of its clock, a busy one shares it; what is ten times slower is
    something else. Empty for what was not measured, or on a processor nobody named: a limit holds
    for the kind of processor that it was measured on. `conditions` of another machine than this say
    `arch` and `cpu_id` (`edgekit_runtime.machine.cpu_name` there).
    """
    cpu = cpu_name() if conditions.get("target") == "local" else conditions.get("cpu_id")
    if latency.get("label") != "measured" or not cpu or not latency.get("p50"):
        return {}
    return {
        "limits": {
            "latency_ns": 5 * int(latency["p50"]) + 100_000, "rule": "5 x p50 + 0.1 ms",
            "arch": conditions["arch"], "cpu": cpu,
        }
    }  # fmt: skip


def write_bundle(
    path: Path,
    sources: tuple[VariantSource, ...],
    *,
    name: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    profile: str,
    provenance: Mapping[str, Any],
    work: Path,
    pipeline: Pipeline | None = None,
) -> Manifest:
    """Make golden outputs with each variant, hash everything, write the archive atomically.

    `work` is a folder for scratch files. Golden inputs are seeded noise in the ranges that
    `inputs` state, never the user's data.

    Raises:
        ModelError: a variant gives NaN for the golden inputs.
        UsageError: the bundle would be over 4 GiB.
    """
    around = pipeline or Pipeline()
    contents: dict[str, bytes] = {}
    variants = []
    for source in sources:
        base = f"variants/{source.id}"
        files = tuple(f"{base}/{file.name}" for file in source.artifact.files)
        for entry, file in zip(files, source.artifact.files, strict=True):
            contents[entry] = file.read_bytes()
        names_in = tuple(s.name for s in _ordered(inputs, source.artifact.inputs))
        names_out = tuple(s.name for s in _ordered(outputs, source.artifact.outputs))
        ours = {
            "inputs": dict(zip(names_in, (s.name for s in inputs), strict=True)),
            "outputs": dict(zip(names_out, (s.name for s in outputs), strict=True)),
        }
        golden, arrays = _golden(source, inputs, ours, work)
        contents |= arrays
        variants.append(
            Variant(
                source.id, source.engine, source.artifact.format, files, source.scheme,
                source.threads, source.precision, names_in, names_out,
                dict(source.placement), golden, dict(source.expected),
                on_misplacement=source.on_misplacement, memory_bytes=source.memory_bytes,
                macs=dict(source.macs),
            )
        )  # fmt: skip
    models = {path for one in variants for path in one.files}
    entries = tuple(
        FileEntry(
            entry, hashlib.sha256(data).hexdigest(), len(data), zlib.crc32(data),
            _deflated(data) if entry in models else None,
        )
        for entry, data in sorted(contents.items())
    )  # fmt: skip
    bundle_id = hashlib.sha256("".join(e.path + e.sha256 for e in entries).encode()).hexdigest()
    manifest = Manifest(
        SCHEMA, bundle_id[:32], int(time.time()), name,
        datetime.now(UTC).isoformat(timespec="seconds"), (profile,),
        inputs, outputs, tuple(variants), entries, around.labels, around.states,
        around.preprocess, around.postprocess, dict(provenance),
    )  # fmt: skip
    write_atomically(path, _archive(manifest, contents))
    return manifest


def _archive(manifest: Manifest, contents: Mapping[str, bytes]) -> bytes:
    text = manifest.to_json().encode()
    total = len(text) + sum(map(len, contents.values()))
    if total > MAX_BUNDLE_BYTES:
        raise UsageError(f"the bundle would have {total / 1e9:.1f} GB, at most 4.2 are possible")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        archive.writestr(archive_entry(MANIFEST, len(text)), text)
        for entry in manifest.files:
            packed = entry.deflated is not None
            head = archive_entry(entry.path, entry.size_bytes, deflated=packed)
            archive.writestr(head, contents[entry.path], compresslevel=_LEVEL)
    return out.getvalue()


def _deflated(data: bytes) -> Deflated | None:
    """How a file lies in the archive, if it is worth compressing: what `zipfile` makes of it."""
    if len(data) < _SMALL_BYTES:
        return None
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(data) + packer.flush()
    if not 1 / MAX_INFLATION <= len(packed) / len(data) <= _WORTH_DEFLATING:
        return None
    return Deflated(len(packed), hashlib.sha256(packed).hexdigest())


def _ordered(
    ours: tuple[TensorSpec, ...], engines: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """The engine's specs in our order. A single one may have been renamed by a converter.

    Raises:
        ModelError: several were renamed, so that their order is anybody's guess.
    """
    by_name = {spec.name: spec for spec in engines}
    if set(by_name) == {spec.name for spec in ours}:
        return tuple(by_name[spec.name] for spec in ours)
    if len(ours) == len(engines) == 1:
        return engines
    found, wanted = ", ".join(by_name), ", ".join(spec.name for spec in ours)
    raise ModelError(f"conversion renamed inputs or outputs: {wanted} became {found}")


def _golden(
    source: VariantSource,
    inputs: tuple[TensorSpec, ...],
    ours: dict[str, dict[str, str]],
    work: Path,
) -> tuple[Golden, dict[str, bytes]]:
    facts = {spec.name: {"range": spec.range, "example": spec.example} for spec in inputs}
    folder = source.golden or work / f"golden-{source.id}"
    if source.golden is None:
        folder.mkdir(parents=True, exist_ok=True)
        sandbox.call(
            "edgekit.bundle:make_golden",
            {
                "model": str(source.artifact.path),
                "options": {
                    "engine": source.engine,
                    "threads": source.threads,
                    "precision": source.precision,
                },
                "facts": facts,
                "names": ours,
                "folder": str(folder),
            },
            what=f"golden outputs of {source.id}",
        )
    arrays = {
        f"golden/{source.id}/{name}": (folder / name).read_bytes()
        for name in ("inputs.npz", "outputs.npz")
    }
    tolerance = {
        name: _tolerance(output, quantized=source.scheme != "fp32")
        for name, output in read_npz(folder / "outputs.npz").items()
    }
    inputs_path, outputs_path = arrays
    golden = Golden(inputs_path, outputs_path, _GOLDEN_SAMPLES, tolerance)
    return golden, arrays


def _tolerance(output: np.ndarray[Any, Any], *, quantized: bool) -> Tolerance:
    """What another CPU may differ by: sums in another order for float32, which shifts values by
    whole steps of their grid (1/255 of the range) where something is quantized."""
    top = float(np.max(np.abs(output.astype(np.float64)), initial=0.0))
    share = 0.05 if quantized else 1e-3
    return Tolerance(atol=max(share * top, 1e-6), rtol=share)


def _tuple(value: list[Any] | None) -> tuple[Any, ...] | None:
    return None if value is None else tuple(value)  # JSON has no tuples


def make_golden(
    model: str,
    options: dict[str, Any],
    facts: dict[str, Any],
    names: dict[str, dict[str, str]],
    folder: str,
) -> None:
    """Runs in the child: seeded inputs, the variant's outputs for them, both as `.npz`.

    `facts` holds the range and the example shape of our inputs; `names` maps the engine's names
    of `inputs` and `outputs` to ours, which the files use.
    """
    import dataclasses

    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    with load(model, **options) as session:
        session.inputs = tuple(
            dataclasses.replace(s, range=_tuple(known["range"]), example=_tuple(known["example"]))
            for s, known in ((s, facts[names["inputs"][s.name]]) for s in session.inputs)
        )
        for seed in range(_GOLDEN_SAMPLES):
            rows.append(synthetic_inputs(session, seed=seed))
            answers.append(session.run(rows[-1]))
    for kind, row in (("inputs", rows), ("outputs", answers)):
        stacked = {names[kind][key]: np.stack([one[key] for one in row]) for key in row[0]}
        bad = [k for k, v in stacked.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
        if bad:
            raise ModelError(f"{kind} {bad[0]!r} hold NaN or Inf for plain random inputs")
        write_npz(Path(folder) / f"{kind}.npz", stacked)
