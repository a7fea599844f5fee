"""`edgekit inspect`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from edgekit.artifact import FORMAT_NAMES, TensorSpec, format_files, open_model
from edgekit.cache import file_sha256
from edgekit.cli.console import AnsweredError, print_json, size, stdout, times
from edgekit.cli.inspect_fit import show_fit
from edgekit.errors import ModelError, UsageError
from edgekit.fit import Fit, judge
from edgekit.graph import read_graph, with_batch_one
from edgekit.profiles import load_profile
from edgekit_runtime.bundle import Bundle, is_bundle

__all__ = ["input_shapes", "inspect"]


def inspect(
    model: Path,
    /,
    *,
    profile: Annotated[str | None, Parameter(name="--for")] = None,
    inputs: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    every: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show what is in a bundle or a model. A bundle's every file is verified first.

    With --for, every operator of a model is judged: where it runs on that device, or why not, and
    whether the model fits its memory. Exit code 1 if the device cannot run it.

    Parameters
    ----------
    model
        A bundle (.edgekit) or a plain model (.onnx, .tflite, .xml).
    profile
        Judge the model for this device: a profile's id, or a .toml file.
    inputs
        Shapes of inputs with free dimensions: NAME=1x3x224x224. A free batch is 1 by itself.
    every
        Show every operator, not one line per type.
    json
        One JSON object on stdout (schema edgekit.inspect/1), always with every operator.
    """
    if not model.exists():
        raise ModelError(f"no file {model}")
    if profile is None and (inputs or every):
        raise UsageError("--inputs and --every go with --for")
    if is_bundle(model):
        if profile is not None:
            raise UsageError(f"{model} is a bundle; --for judges models: give the model it is of")
        document = _bundle(model)
    elif profile is not None:
        return _inspect_for(model, _fit(model, profile, inputs), every=every, json=json)
    else:
        artifact = open_model(model)
        document = _model(model, artifact.format, artifact.inputs, artifact.outputs)
    if json:
        print_json(document)
    else:
        _show(document)
    return None


def _inspect_for(model: Path, fit: Fit, *, every: bool, json: bool) -> None:
    """The judgement; no engine loads the model for it, so it may be one that none here can."""
    if json:
        graph = fit.graph
        inputs, outputs = (
            [
                TensorSpec(name, graph.tensors[name].dtype or "", graph.tensors[name].shape or ())
                for name in names
            ]
            for names in (graph.inputs, graph.outputs)
        )
        print_json({**_model(model, graph.format, inputs, outputs), "fit": fit.to_json()})
    else:
        show_fit(fit, str(model), every=every)
    if fit.hopeless:
        raise AnsweredError(f"{model} does not fit {fit.profile.id}: {fit.hopeless[0]}", 1)


def _model(
    path: Path, fmt: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> dict[str, Any]:
    files = format_files(path, fmt)
    return {
        "schema": "edgekit.inspect/1",
        "kind": "model",
        "path": str(path),
        "format": fmt,
        "sha256": file_sha256(*files),
        "size_bytes": sum(file.stat().st_size for file in files),
        "inputs": [dataclasses.asdict(spec) for spec in inputs],
        "outputs": [dataclasses.asdict(spec) for spec in outputs],
    }


def _fit(model: Path, profile: str, inputs: list[str] | None) -> Fit:
    found = load_profile(profile)
    shapes = input_shapes(inputs or [])
    if not shapes:
        free = read_graph(model)
        shapes = with_batch_one(free.tensors[name] for name in free.inputs)
        return judge(read_graph(model, shapes=shapes) if shapes else free, found)
    return judge(read_graph(model, shapes=shapes), found)


def input_shapes(inputs: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by input name from `NAME=1x3x224x224`; a type after a colon is not looked at.

    Raises:
        UsageError: not of that form, or an input given twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    for one in inputs:
        name, equals, rest = one.rpartition("=")
        dims = rest.partition(":")[0].lower().split("x")
        if (
            not equals
            or not name
            or not all(re.fullmatch(r"0*[1-9][0-9]{0,11}", dim) for dim in dims)
        ):
            raise UsageError(f"--inputs {one!r}; wanted NAME=1x3x224x224, numbers from 1 on")
        if name in found:
            raise UsageError(f"--inputs: {name!r} is given twice")
        found[name] = tuple(int(dim) for dim in dims)
    return found


def _bundle(path: Path) -> dict[str, Any]:
    with Bundle(path) as bundle:
        bundle.verify()
        return {
            "schema": "edgekit.inspect/1",
            "kind": "bundle",
            "path": str(path),
            "size_bytes": path.stat().st_size,
            **{
                ("bundle_schema" if key == "schema" else key): value
                for key, value in dataclasses.asdict(bundle.manifest).items()
            },
        }


def _show(document: dict[str, Any]) -> None:
    head = f"[bold]{document['path']}[/bold]  {size(document['size_bytes'])}"
    if document["kind"] == "model":
        stdout.print(f"{head}  {FORMAT_NAMES[document['format']]}  sha256 {document['sha256']}")
    else:
        stdout.print(
            f"{head}  bundle {document['bundle_id']}, made {document['created']} for "
            f"{', '.join(document['profiles'])}; every file verified, "
            f"{'signed' if document['signature'] else 'not signed'}",
            soft_wrap=True,
        )
    for kind in ("inputs", "outputs"):
        for spec in document[kind]:
            shape = ", ".join(map(str, spec["shape"]))
            stdout.print(f"{kind[:-1]:<7} {spec['name']}: {spec['dtype']} [{shape}]", markup=False)
    if document["kind"] == "bundle":
        _show_variants(document)
        for step in document["provenance"].get("steps", []):
            tools = ", ".join(f"{k} {v}" for k, v in step.get("tools", {}).items())
            stdout.print(
                f"step    {step.get('step')} {step.get('to', '')} with {tools}", markup=False
            )


def _show_variants(document: dict[str, Any]) -> None:
    sizes = {entry["path"]: entry["size_bytes"] for entry in document["files"]}
    for one in document["variants"]:
        files = sum(sizes[path] for path in one["files"])
        placement = ", ".join(f"{100 * v:.0f} % {k}" for k, v in one["placement"].items())
        stdout.print(
            f"variant {one['id']}: {one['engine']}, {one['scheme']}, {one['threads']} threads, "
            f"{size(files)}, {placement}, p50 {times(one['expected'].get('latency_ns'))} when made",
            markup=False, soft_wrap=True,
        )  # fmt: skip
