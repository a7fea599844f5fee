"""A MODEL on the command line as something that can be measured."""

from __future__ import annotations

from pathlib import Path

from edgekit.artifact import FORMAT_NAMES, open_model
from edgekit.cache import Cache
from edgekit.conversion import convert_with_proof
from edgekit.device import DeviceProfile
from edgekit.errors import LimitError, UsageError
from edgekit.facts import this_machine
from edgekit.formats import detect
from edgekit.measure.site import HERE, Site
from edgekit.measure.worker import Contender
from edgekit.observer import Observer
from edgekit.reading import Reading
from edgekit_runtime.bundle import Bundle, is_bundle
from edgekit_runtime.engines import ENGINE_OF_FORMAT, ENGINES, check_engine
from edgekit_runtime.engines.accelerators import split_engine

__all__ = ["contender", "engine_of", "model_bytes", "parts"]


def contender(
    model: str, *, engine: str | None, threads: int | None, reading: Reading, observer: Observer,
    name: str | None = None, machine: DeviceProfile | None = None, variant: str | None = None,
) -> Contender:  # fmt: skip
    """The contender of a bundle (or one `variant` of it), or of a model of any format, converted if
    need be; with the threads that suit `machine` (this one without).

    Raises:
        UsageError: an option that does not fit.
        LimitError: converted, it computes something else.
        EdgeKitError: it cannot be read or converted.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}; wanted at least 1")
    if engine is not None:
        check_engine(engine)
    path = Path(model)
    if path.is_file() and is_bundle(path):
        if engine is not None:
            raise UsageError("--engine is for models; a bundle's variants name theirs")
        with Bundle(path) as opened:
            opened.verify()
            found = opened.manifest.variant(variant)
        return Contender(
            name or path.name, path, threads or found.threads, variant=variant
        )  # fmt: skip
    if variant is not None:
        raise UsageError(f"--variant is for bundles (.edgekit); {model} is a model")
    path, engine = _loadable(model, engine, reading, observer)
    usual = (machine or this_machine()).threads
    return Contender(name or Path(model).name, path, threads or usual, engine)


def engine_of(one: Contender, site: Site = HERE) -> str:
    """The engine that will run it: of a bundle, that of the first variant whose engine the site
    has; of the first where it has none."""
    if one.engine is not None:
        return one.engine
    with Bundle(one.path) as opened:
        manifest = opened.manifest
    variants = manifest.variants if one.variant is None else [manifest.variant(one.variant)]
    able = (found.engine for found in variants if site.fault_of(found.engine) is None)
    return next(able, variants[0].engine)


def parts(path: Path) -> list[Path]:
    """The model's files: its weights, too, where they are in a file of their own."""
    weights = path.with_suffix(".bin")
    return [path, *([weights] if path.suffix in (".xml", ".param") and weights.is_file() else [])]


def model_bytes(path: Path) -> int:
    """The size of all its files."""
    return sum(one.stat().st_size for one in parts(path))


def _loadable(
    model: str, engine: str | None, reading: Reading, observer: Observer
) -> tuple[Path, str]:
    """A file that the engine loads: the model, or what it becomes, proven to compute the same."""
    fmt = detect(model).format
    wanted = engine or ENGINE_OF_FORMAT.get(fmt, "onnxruntime")
    formats = ENGINES[split_engine(wanted)[0]].formats
    if fmt in formats and not reading.inputs:
        return Path(model), wanted
    artifact = open_model(model, reading=reading)
    target = formats[0]
    found = convert_with_proof(artifact, target, cache=Cache(), observer=observer)
    if not found.passed:
        reason = next(line for line in found.ledger if not line.passed).reason()
        raise LimitError(f"as {FORMAT_NAMES[target]} it computes something else: {reason}")
    return found.artifact.path, wanted
