"""`edgekit convert`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.cli.console import AnsweredError, TerminalObserver, print_json, size, stdout
from edgekit.cli.ledger import show_ledger
from edgekit.cli.source import SourceOptions
from edgekit.conversion import (
    Conversion,
    Given,
    check_target,
    convert_with_proof,
    default_name,
    made_by_edgekit,
    write_result,
)
from edgekit.convert import install_line, missing_extra, paths_for
from edgekit.data import open_dataset
from edgekit.errors import UsageError
from edgekit.formats import detect
from edgekit.reading import Layout, parse_values
from edgekit.sandbox import Limits

__all__ = ["convert"]


def convert(
    model: str,
    /,
    *,
    to: Literal["onnx", "tflite", "openvino", "ncnn", "coreml"],
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    source: SourceOptions | None = None,
    set_: Annotated[
        list[str] | None, Parameter(name="--set", consume_multiple=True, negative="")
    ] = None,
    layout: Layout | None = None,
    opset: int | None = None,
    data: str | None = None,
    explain: Annotated[bool, Parameter(negative="")] = False,
    timeout: float = 900.0,
    memory_gb: float | None = None,
    keep: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Convert a model, and prove at every hop that it computes the same as before.

    The shortest way is taken; where it fails or gives other numbers, the next one is. The ledger
    (what went in, how far each output is off, and what was allowed) is printed and written beside
    the result as FILE.provenance.json. Exit code 1, and no model, if no way gives the same numbers.

    Parameters
    ----------
    model
        .onnx, .tflite, .xml, .keras, .h5, a SavedModel folder, .pt2, .pt/.jit (TorchScript),
        module.py:factory, .joblib/.skops/.pkl (scikit-learn).
    to
        The format wanted. ONNX to ONNX cleans the model up. A Core ML model (.mlpackage) is not
        run here: its result is labelled unverified.
    out
        The file to write; the model's name with the format's suffix otherwise.
    source
        How to read the model.
    set_
        Inputs that are always the same, NAME=NUMBER: they become constants of the result, and
        branches that they decide go (silero-vad: sr=16000).
    layout
        The layout of the result's image inputs, whatever the model's own is.
    opset
        The ONNX opset on the way or of the result.
    data
        Real samples to check with (as for optimize); seeded noise otherwise.
    explain
        Show the ways there are, and what they need, and stop.
    timeout
        Seconds that any one step may take.
    memory_gb
        Gigabytes that any one step may use; most of this machine's otherwise.
    keep
        Write the result even if it does not compute the same.
    json
        One JSON object on stdout (schema edgekit.convert/1).
    """
    reading = (source or SourceOptions()).reading(layout, opset)
    reading = replace(reading, values=parse_values(set_ or []))
    if explain:
        return _explain(model, to, reading, json=json)
    for name, value in (("--timeout", timeout), ("--memory-gb", memory_gb), ("--opset", opset)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} is {value}; wanted a number above 0")
    cache = Cache()
    limits = Limits(timeout_s=timeout, memory_bytes=int(memory_gb * 1e9) if memory_gb else None)
    with TerminalObserver() as observer:
        observer.phase("read the model")
        artifact = open_model(model, reading=reading)
        target = out or Path(default_name(artifact, to))
        if target.resolve() in {path.resolve() for path in artifact.files}:
            raise UsageError(f"-o {target} is the model itself; choose another name")
        check_target(target, to)
        if out is None and target.exists() and not made_by_edgekit(target):
            raise UsageError(
                f"{target} exists, and EdgeKit did not make it: say with -o where to write"
            )
        samples = open_dataset(data, artifact.inputs, cache) if data else None
        found = convert_with_proof(
            artifact,
            to,
            cache=cache,
            given=Given.of(samples, artifact.inputs),
            limits=limits,
            observer=observer,
        )
    written = write_result(found, target, keep=keep)
    cache.trim()
    if json:
        print_json(_document(artifact.name, found, written))
    else:
        titles = [*map(str, found.steps), "end to end"][: len(found.ledger)]
        show_ledger(found.ledger, titles, found.inputs)
        if found.not_compared:
            stdout.print(
                f"UNVERIFIED: {found.not_compared}", style="bold red", markup=False,
                soft_wrap=True,
            )  # fmt: skip
        for path in written:
            stdout.print(f"{path}  {size(_bytes_of(path))}", markup=False, soft_wrap=True)
    if found.wrong:
        line = next(line for line in found.ledger if not line.passed)
        kept = "" if keep else ", so it was not written (--keep writes it all the same)"
        raise AnsweredError(f"the result does not compute the same{kept}: {line.reason()}", 1)
    return None


def _explain(model: str, to: str, reading: Any, *, json: bool) -> None:
    ways = paths_for(detect(model).format, to, reading)
    if json:
        paths = [
            [{"step": str(step), "missing": missing_extra(step.edge)} for step in way]
            for way in ways
        ]
        print_json({"schema": "edgekit.convert/1", "model": model, "paths": paths})
        return
    for number, way in enumerate(ways, start=1):
        stdout.print(f"way {number}" if len(ways) > 1 else "the way", style="bold")
        for place, step in enumerate(way, start=1):
            missing = missing_extra(step.edge)
            needs = f"  needs {missing}: {install_line(step.edge)}" if missing else ""
            options = {k: v for k, v in step.reading.to_json().items() if k != "trust_source"}
            said = f"  with {', '.join(options)}" if options else ""
            stdout.print(
                f"  [{place}/{len(way)}] {step}{said}{needs}", markup=False, soft_wrap=True
            )
    if len(ways) > 1:
        stdout.print("the first that gives a model with the same outputs is taken")


def _bytes_of(path: Path) -> int:
    inside = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in inside if one.is_file())


def _document(model: str, found: Conversion, written: list[Path]) -> dict[str, Any]:
    return {
        "schema": "edgekit.convert/1",
        "model": model,
        "format": found.artifact.format,
        "label": found.label,
        "files": [str(path) for path in written],
        "path": [str(step) for step in found.steps],
        "ledger": found.ledger_json(),
        **({"checks": found.checks} if found.checks else {}),
        "provenance": list(found.artifact.provenance),
    }
