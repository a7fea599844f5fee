"""`edgekit bench`."""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from edgekit.artifact import FORMAT_NAMES, open_model
from edgekit.cache import Cache, default_root, file_sha256, write_atomically
from edgekit.cli.console import TerminalObserver, print_json, seconds, size, stdout
from edgekit.cli.source import SourceOptions
from edgekit.conversion import convert_with_proof
from edgekit.errors import ChildError, LimitError, ModelError, UsageError
from edgekit.facts import this_machine
from edgekit.formats import detect
from edgekit.measure.benchmark import Contender, Measurement, Rounds, cold_starts, measure
from edgekit.measure.conditions import conditions
from edgekit.observer import Observer
from edgekit_runtime.bundle import Bundle, is_bundle
from edgekit_runtime.engines import ENGINE_OF_FORMAT, ENGINES

__all__ = ["bench"]

_COLD_STARTS = 3


def bench(
    model: str,
    /,
    *,
    engine: str | None = None,
    source: SourceOptions | None = None,
    threads: int | None = None,
    input_: Annotated[Path | None, Parameter(name="--input")] = None,
    on: str = "local",
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Time a model or bundle: cold start in fresh processes, then warm runs in rounds.

    Parameters
    ----------
    model
        A bundle (.edgekit) or a model of any format that edgekit convert reads.
    engine
        For a model: onnxruntime, openvino, litert or ncnn, for which it is converted if need be;
        its format's own otherwise, and onnxruntime where no engine loads it as it is.
    source
        How to read the model.
    threads
        Threads for the engine; the bundle's own number, or this machine's, otherwise.
    input_
        An .npz with samples to run; seeded noise otherwise.
    on
        Where to measure: local.
    out
        File for the raw samples and all conditions (JSON); in the cache folder otherwise.
    json
        One JSON object on stdout (schema edgekit.bench/1), raw samples included.
    """
    if on != "local":
        raise UsageError(f"the target {on!r} is not known; this version has: local")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}; wanted at least 1")
    if input_ is not None and not input_.is_file():
        raise UsageError(f"no file {input_}")
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}; known: {', '.join(ENGINES)}")
    path = Path(model)
    bundled = path.is_file() and is_bundle(path)
    with TerminalObserver() as observer:
        if bundled:
            if engine is not None:
                raise UsageError("--engine is for models; a bundle's variants name theirs")
            with Bundle(path) as opened:
                opened.verify()
                variant = opened.manifest.variant()
            engine, used = variant.engine, threads or variant.threads
        else:
            path, engine = _loadable(model, engine, source or SourceOptions(), observer)
            used = threads or this_machine().threads
        contender = Contender(path.name, path, used, None if bundled else engine)
        observer.phase("[1/2] cold start")
        cold = cold_starts(contender, times=_COLD_STARTS)
        observer.phase("[2/2] warm runs")
        taken = measure(
            [contender], contender.id, inputs=input_, rounds=Rounds(least=20, most=20),
            progress=lambda done, total: observer.progress("measuring", done, total),
        )[contender.id]  # fmt: skip
    if taken.failure:
        raise (ModelError if taken.failure_code == 2 else ChildError)(taken.failure)
    document = _document(model, path, engine=engine, threads=used, cold=cold, taken=taken)
    file = out or default_root() / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{path.stem}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json_module.dumps(document).encode())
    if json:
        print_json(document)
        return
    _show(document, file)


def _loadable(
    model: str, engine: str | None, source: SourceOptions, observer: Observer
) -> tuple[Path, str]:
    """A file that the engine loads: the model, or what it becomes, proven to compute the same."""
    fmt = detect(model).format
    wanted = engine or ENGINE_OF_FORMAT.get(fmt, "onnxruntime")
    if fmt in ENGINES[wanted].formats and not source.inputs:
        return Path(model), wanted
    artifact = open_model(model, reading=source.reading())
    target = ENGINES[wanted].formats[0]
    found = convert_with_proof(artifact, target, cache=Cache(), observer=observer)
    if not found.passed:
        reason = next(line for line in found.ledger if not line.passed).reason()
        raise LimitError(f"as {FORMAT_NAMES[target]} it computes something else: {reason}")
    return found.artifact.path, wanted


def _size(path: Path) -> int:
    """With its weights, where these are in a file of their own."""
    weights = path.with_suffix(".bin")
    beside = path.suffix in (".xml", ".param") and weights.is_file()
    return path.stat().st_size + (weights.stat().st_size if beside else 0)


def _document(
    model: str,
    path: Path,
    *,
    engine: str,
    threads: int,
    cold: list[dict[str, int]],
    taken: Measurement,
) -> dict[str, Any]:
    return {
        "schema": "edgekit.bench/1",
        "model": str(model),
        "sha256": file_sha256(path),
        "size_bytes": _size(path),
        "engine": engine,
        "engine_version": taken.engine_version,
        "threads": threads,
        "placement": taken.placement,
        "cold": cold,
        "latency_ns": taken.latency(),
        "peak_rss_bytes": taken.peak_rss_bytes,
        "rounds_ns": taken.rounds_ns,
        "conditions": conditions(),
    }


def _show(document: dict[str, Any], file: Path) -> None:
    latency, cold = document["latency_ns"], document["cold"]
    stdout.print(
        f"[bold]{document['model']}[/bold]  {document['engine']} {document['engine_version']}, "
        f"{document['threads']} threads, {size(document['size_bytes'])}"
    )
    placement = document["placement"]
    shares = ", ".join(f"{100 * v:.0f} % {k}" for k, v in placement["shares"].items())
    stdout.print(f"ran on {shares} ({placement['delegate']}, {placement['precision']})")
    for key, name in (("import_ns", "import"), ("load_ns", "load"), ("first_run_ns", "first run")):
        values = sorted(one[key] for one in cold)
        stdout.print(
            f"cold  {name:<10} {seconds(values[len(values) // 2]):>8}  "
            f"({seconds(values[0])} to {seconds(values[-1])}, {len(values)} fresh processes)"
        )
    for key in ("p50", "p90", "p99"):
        if key in latency:
            stdout.print(f"warm  {key:<10} {seconds(latency[key]):>8}")
    stdout.print(f"peak memory      {size(document['peak_rss_bytes']):>8}")
    where = document["conditions"]["cpu"] or document["conditions"]["arch"]
    stdout.print(f"{latency['samples']} samples, measured on {where}", markup=False)
    stdout.print(f"raw samples and conditions: {file}", markup=False, soft_wrap=True)
