"""The main job for devices that run firmware: TensorFlow Lite Micro, and Arm's Ethos-U beside it.

Nothing is measured there. Candidates are int8 TFLite, evaluated on this machine by LiteRT's
kernels without XNNPACK, which rounds otherwise and moves a small network by points. Memory is what
TensorFlow Lite Micro's interpreter takes, latency what Arm's compiler (vela) estimates, where
there is an Ethos-U. Every figure says which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Artifact, TensorSpec
from edgekit.bundle import VariantSource, write_bundle
from edgekit.choose import Choice
from edgekit.errors import EdgeKitError
from edgekit.firmware.needs import OnDevice, needs_of
from edgekit.firmware.ports import Port, integer_ports
from edgekit.firmware.reference import reference_outputs
from edgekit.firmware.tflm import interpret
from edgekit.firmware_plan import ETHOS_U
from edgekit.optimize import Run
from edgekit.outcome import Row
from edgekit.pipeline import Pipeline
from edgekit.sandbox import Limits
from edgekit_runtime import __version__
from edgekit_runtime.arrays import write_npz

__all__ = ["FirmwareRun"]

_GOLDEN = 3
#: samples on which the interpreter's answers are compared with LiteRT's, and how far they may be
#: apart, of the outputs' root mean square: kernels round differently, by a step here and there
_COMPARED, _APART = 16, 0.05
#: ns a byte: whatever takes a kilobyte stands behind an estimate of a quarter of an hour
_FAR_BEHIND = 1e9


class FirmwareRun(Run):
    """Builds, evaluates, repairs and confirms as for any device; what is measured elsewhere is
    compiled and interpreted here."""

    # --- what is measured elsewhere ---------------------------------------------------------------

    def _quick_look(self, rows: list[Row]) -> None:
        for row in rows:
            if row.artifact is None or not row.evaluation or row.candidate.reference_only:
                continue
            if row.firmware is None and row.status in ("planned", "dropped"):
                self._look(row)

    def _measure_all(self, rows: list[Row]) -> None:
        self._quick_look(rows)

    def _look(self, row: Row) -> None:
        assert row.artifact is not None  # noqa: S101  (only built ones are looked at)
        try:
            found = self._on_device(row.artifact, row.candidate.target)
        except EdgeKitError as error:
            return row.end("failed", str(error))
        row.firmware, row.quick = found, self._price(found)
        broken = self._too_much(found) or self._fallback(found)
        if broken and row.status == "planned":
            row.end("dropped", broken)
        told = f"arena {found.arena_bytes / 1e3:.1f} kB, flash {found.flash_bytes / 1e3:.1f} kB"
        if found.compiled is not None:
            told += (
                f"; estimated {found.compiled.latency_ns / 1e6:.3g} ms, "
                f"{100 * found.share:.4g} % of the MACs on {found.accelerator}"
            )
        self.observer.row(row.candidate.id, broken or told)
        return None

    def _on_device(self, artifact: Artifact, target: str) -> OnDevice:
        known = self._accelerators() if target == ETHOS_U else {}
        name = next(iter(known), "")
        return needs_of(
            artifact.path.read_bytes(), self.work, accelerator=name,
            compiler_target=known.get(name, ""),
            limits=Limits(timeout_s=300.0, cancel=self.cancel),
        )  # fmt: skip

    def _accelerators(self) -> dict[str, str]:
        return {
            name: one.compiler_target for name, one in self.job.profile.accelerators.items()
            if one.engine == ETHOS_U and one.compiler_target
        }  # fmt: skip

    def _too_much(self, found: OnDevice) -> str | None:
        memory = self.job.profile.memory
        for what, need, most in (
            ("the tensor arena", found.arena_bytes, memory.sram_bytes),
            ("the model", found.flash_bytes, memory.flash_bytes),
        ):
            if most is not None and need > most:
                room = "SRAM" if most == memory.sram_bytes else "flash"
                return (
                    f"{what} takes {need / 1e3:.0f} kB, the {room} of {self.job.profile.id} has "
                    f"{most / 1e3:.0f} kB"
                )
        return None

    def _fallback(self, found: OnDevice) -> str | None:
        """Why the contract is broken: all multiply-accumulates were to be on the accelerator."""
        if self.request.allow_fallback or found.share >= 1 or not self._accelerators():
            return None
        if found.compiled is None:
            names = ", ".join(self._accelerators())
            return f"runs on the CPU alone, not on {names}; --allow-fallback takes it as it is"
        named = [f"{kind} {name} ({why})" for name, kind, why in found.left]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return (
            f"only {100 * found.share:.3g} % of the MACs are on {found.accelerator}: "
            f"{'; '.join(named[:3])}{more}; --allow-fallback takes it as it is"
        )

    def _price(self, found: OnDevice) -> float:
        """Estimated time in ns; beside that, what nobody estimates stands behind, by its memory.
        Ratios of prices are looked at, too: nothing may be added to them."""
        memory = float(found.arena_bytes + found.flash_bytes)
        if self.request.minimize == "size" or not self._accelerators():
            return memory
        return _FAR_BEHIND * memory if found.latency_ns is None else float(found.latency_ns)

    def _cost(self, row: Row) -> float:
        return row.quick

    # --- choose -----------------------------------------------------------------------------------

    def _save_best(self, rows: list[Row]) -> None:
        able = [row for row in rows if row.status == "planned" and row.firmware]
        if able and not self.cancel.is_set():
            self._write_bundle(min(able, key=self._cost), ["the best so far of a search"])
            self.saved = True

    def _ranked(self, rows: list[Row], *, eligible: bool) -> Choice:
        able = sorted(
            (row for row in rows if row.status == "planned" and row.firmware), key=self._cost
        )
        return Choice(tuple(row.candidate.id for row in able), {}, _why(able[0]) if able else "")

    def _why_next(self, row: Row, reference: Row) -> str:
        return f"{_why(row)}; the best of those that did not lose too much when they were confirmed"

    def _why_kept(self, row: Row, chosen: Row, reference: Row) -> str:
        return "good, but not the least"

    def _differs_there(self, row: Row) -> str | None:
        """Why TensorFlow Lite Micro does not answer as LiteRT's reference kernels do."""
        assert row.firmware is not None and row.artifact is not None  # noqa: S101
        samples = [
            self.job.data.sample(int(number), row.artifact.inputs)
            for number in self.job.split.selection[:_COMPARED]
        ]
        content, ports = integer_ports(row.artifact.path.read_bytes())
        model = self.work / "compared.tflite"
        model.write_bytes(content)
        steps = [
            {name: _quantized(x, ports.inputs[name]) for name, x in one.items()} for one in samples
        ]
        limits = Limits(timeout_s=600.0, cancel=self.cancel)
        found = interpret(model, steps, limits=limits)
        wanted = reference_outputs(model, steps, limits=limits)
        for name, port in ports.outputs.items():
            ours = np.stack([_real(one[name], port) for one in found.outputs])
            theirs = np.stack([_real(one[name], port) for one in wanted])
            off = float(np.sqrt(np.mean((ours - theirs) ** 2)))
            size = float(np.sqrt(np.mean(theirs**2)))
            if not off <= _APART * size:
                return (
                    f"TensorFlow Lite Micro computes something else than LiteRT: output {name!r} "
                    f"is off by {off / (size or 1.0):.3g} of its size"
                )
        return None

    # --- bundle -----------------------------------------------------------------------------------

    def _remember(self, rows: list[Row]) -> None:
        """Nothing: what is good here says nothing of LiteRT on a processor."""

    def _write_bundle(self, chosen: Row, incomplete: list[str], path: Path | None = None) -> None:
        job, request, found = self.job, self.request, chosen.firmware
        assert found is not None and chosen.artifact is not None  # noqa: S101
        candidate = chosen.candidate
        inputs, outputs = (_specs(one) for one in (found.ports.inputs, found.ports.outputs))
        artifact = replace(
            chosen.artifact, files=(found.model,), inputs=inputs, outputs=outputs,
            sha256=hashlib.sha256(found.model.read_bytes()).hexdigest(),
        )  # fmt: skip
        source = VariantSource(
            candidate.id, candidate.target, artifact, str(candidate.scheme), 1, "float32",
            found.placement,
            {
                "latency_ns": found.latency(), "firmware": found.to_json(),
                "metric": {job.metric: chosen.evaluation["metric"]},
                "contract": {"macs": 1.0 if not request.allow_fallback else found.share},
            },
            found.arena_bytes, golden=self._golden(chosen),
        )  # fmt: skip
        write_bundle(
            path or request.out / "model.edgekit", (source,), name=request.model.stem,
            inputs=inputs, outputs=outputs, pipeline=Pipeline(labels=job.pipeline.labels),
            profile=job.profile.id,
            provenance={
                "edgekit": __version__, "command": request.command,
                "model_sha256": job.source.sha256, "data_sha256": job.data.sha256,
                "steps": list(chosen.artifact.provenance), "incomplete": incomplete,
                "latency": {"label": (found.latency() or {}).get("label"), "where": "host"},
            },
            work=self.work,
        )  # fmt: skip

    def _golden(self, chosen: Row) -> Path:
        """Seeded noise and what TensorFlow Lite Micro's interpreter makes of it, as files."""
        assert chosen.artifact is not None  # noqa: S101
        content, ports = integer_ports(chosen.artifact.path.read_bytes())
        folder = self.work / f"firmware-golden-{hashlib.sha256(content).hexdigest()[:16]}"
        if folder.is_dir():
            return folder
        model = self.work / "golden.tflite"
        model.write_bytes(content)
        rng = np.random.default_rng(0)
        samples = [
            {name: _noise(one, rng) for name, one in ports.inputs.items()} for _ in range(_GOLDEN)
        ]
        answers = interpret(model, samples, limits=Limits(timeout_s=300.0, cancel=self.cancel))
        folder.mkdir()
        for name, rows in (("inputs", samples), ("outputs", answers.outputs)):
            write_npz(
                folder / f"{name}.npz",
                {key: np.stack([one[key] for one in rows]) for key in rows[0]},
            )
        return folder


def _why(row: Row) -> str:
    found = row.firmware
    assert found is not None  # noqa: S101
    memory = f"arena {found.arena_bytes / 1e3:.1f} kB, flash {found.flash_bytes / 1e3:.1f} kB"
    if found.compiled is None:
        return f"the least memory within the accuracy budget ({memory})"
    part = "" if found.share >= 1 else " (the NPU's part alone)"
    return (
        f"{found.compiled.latency_ns / 1e6:.3g} ms{part} at {found.compiled.clock_hz / 1e6:g} MHz, "
        f"estimated by vela {found.compiled.version}; {memory}; {100 * found.share:.4g} % of the "
        f"MACs on {found.accelerator}"
    )


def _real(stored: NDArray[Any], port: Port) -> NDArray[np.float64]:
    real = stored.astype(np.float64)
    if port.scale is None:
        return real
    found: NDArray[np.float64] = (real - (port.zero_point or 0)) * port.scale
    return found


def _quantized(values: NDArray[Any], port: Port) -> NDArray[Any]:
    """As the QUANTIZE operator that was at the input does it."""
    if port.scale is None:
        return values.astype(port.dtype)
    info = np.iinfo(port.dtype)
    steps = np.round(values.astype(np.float32) / np.float32(port.scale)) + (port.zero_point or 0)
    found: NDArray[Any] = np.clip(steps, info.min, info.max).astype(port.dtype)
    return found


def _noise(port: Port, rng: np.random.Generator) -> NDArray[Any]:
    kind = np.dtype(port.dtype)
    if kind.kind == "f":
        return rng.uniform(-1, 1, port.shape).astype(kind)
    info = np.iinfo(kind)
    return rng.integers(info.min, info.max + 1, port.shape).astype(kind)


def _specs(ports: Mapping[str, Port]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, one.dtype, tuple(one.shape)) for name, one in ports.items())
