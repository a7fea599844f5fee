"""`edgekit run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from edgekit.cli.console import TerminalObserver, print_json, stdout
from edgekit.cli.contender import contender, engine_of
from edgekit.cli.source import SourceOptions
from edgekit.cli.target import TargetOptions
from edgekit.errors import InputError, UsageError
from edgekit.measure.site import HERE
from edgekit.measure.target import open_site

__all__ = ["run"]

_SHOWN = 10


def run(
    model: str,
    /,
    *,
    input_: Annotated[list[str], Parameter(name="--input", negative="")],
    tensors: Annotated[bool, Parameter(negative="")] = False,
    output: Path | None = None,
    engine: str | None = None,
    variant: str | None = None,
    threads: int | None = None,
    source: SourceOptions | None = None,
    target: TargetOptions | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Run a model or bundle on one sample, here or on a target, and show the answer.

    Parameters
    ----------
    model
        A bundle (.edgekit) or a model of any format that edgekit convert reads.
    input_
        [NAME=]FILE, once per input: an image, .wav, text or any file the bundle's preprocessing
        takes, .npy, or .npz with arrays named as the inputs.
    tensors
        The file holds the model's inputs as they are: no preprocessing.
    output
        Save the model's outputs as .npz (on this machine only).
    engine
        For a model: onnxruntime, openvino, litert or ncnn, with an accelerator or without.
    variant
        Of a bundle, by id; the first that runs there otherwise.
    threads
        Threads for the engine.
    source
        How to read the model.
    target
        How to reach the target.
    json
        One JSON object on stdout (schema edgekit.run/1).
    """
    inputs = [_named(one) for one in input_]
    where = target or TargetOptions()
    options = ["--tensors"] if tensors else []
    if output is not None:
        if where.on != "local":
            raise UsageError("--output saves what this machine computes; take --json with --on")
        if output.is_dir() or not output.parent.is_dir():
            raise UsageError(f"--output {output}: wanted a file in a folder that exists")
        options += ["--output", str(output)]
    with TerminalObserver() as observer:
        site = open_site(where.target(), observer)
        one = contender(
            model, engine=engine, threads=threads, reading=(source or SourceOptions()).reading(),
            observer=observer, machine=site.profile, variant=variant,
        )  # fmt: skip
        site.need([engine_of(one, site)], observer)
        with site.session():
            done = site.call("run", one, inputs, options)
        if done.code == 0 and done.warning:
            observer.note(done.warning)
    found = done.document(one.id)
    if json:
        on = None if site is HERE else site.name
        print_json({**found, "model": model, "target": site.target, "device": on})
        return
    for name, value in found["outputs"].items():
        _show(name, value)


def _named(text: str) -> tuple[str, Path]:
    """`[NAME=]FILE`, as the runtime reads it."""
    name, separator, rest = text.partition("=")
    name, path = (name, Path(rest)) if separator and not Path(text).exists() else ("", Path(text))
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"--input {path}: {why}; wanted a sample: NAME=FILE or FILE")
    return name, path


def _show(name: str, value: Any) -> None:
    rows = value if isinstance(value, list) else [value]
    if rows and all(isinstance(row, dict) for row in rows):  # as a postprocessing step gives them
        lines = ["  ".join(f"{key} {_cell(cell)}" for key, cell in row.items()) for row in rows]
    else:
        array = np.asarray(value)
        with np.printoptions(threshold=_SHOWN * _SHOWN, edgeitems=3, precision=6):
            lines = [f"{list(array.shape)}", *str(array).splitlines()]
    stdout.print(name, *lines, sep="\n", markup=False, soft_wrap=True)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
