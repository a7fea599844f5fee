"""`edgekit inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from edgekit.artifact import FORMAT_NAMES, SOURCES, TensorSpec, open_model
from edgekit.cache import Cache, file_sha256
from edgekit.cli.console import AnsweredError, print_json, size, stdout, times
from edgekit.cli.inspect_fit import show_fit
from edgekit.cli.source import SourceOptions
from edgekit.device import DeviceProfile
from edgekit.errors import UsageError
from edgekit.fit import Fit, judge
from edgekit.formats import detect
from edgekit.graph import read_graph, with_batch_one
from edgekit.inspection import engine_form, inspect_model
from edgekit.profiles import load_profile
from edgekit.reading import Reading
from edgekit_runtime.bundle import Bundle, is_bundle

__all__ = ["inspect"]


def inspect(
    model: str,
    /,
    *,
    profile: Annotated[str | None, Parameter(name="--for")] = None,
    source: SourceOptions | None = None,
    every: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show what is in a bundle or a model. A bundle's every file is verified first.

    Operators and multiply-accumulates of a Keras, PyTorch or scikit-learn model are those of the
    ONNX model it becomes.

    With --for, every operator of a model is judged: where it runs on that device, or why not, and
    whether the model fits its memory. Exit code 1 if the device cannot run it.

    Parameters
    ----------
    model
        A bundle (.edgekit) or a model of any format that edgekit convert reads.
    profile
        Judge the model for this device: a profile's id, or a .toml file.
    source
        How to read the model.
    every
        Show every operator, not one line per type; goes with --for.
    json
        One JSON object on stdout (schema edgekit.inspect/1), always with every operator.
    """
    if profile is None and every:
        raise UsageError("--every goes with --for")
    if Path(model).is_file() and is_bundle(Path(model)):
        if profile is not None:
            raise UsageError(f"{model} is a bundle; --for judges models: give the model it is of")
        document = _bundle(Path(model))
    else:
        reading = (source or SourceOptions()).reading()
        if profile is not None:
            return _inspect_for(model, reading, profile, every=every, json=json)
        document = inspect_model(open_model(model, reading=reading), Cache())
    if json:
        print_json(document)
    else:
        _show(document)
    return None


def _inspect_for(model: str, reading: Reading, profile: str, *, every: bool, json: bool) -> None:
    """The judgement; no engine loads the model for it, so it may be one that none here can."""
    found = load_profile(profile)
    on_disk = detect(model)
    files, fmt = on_disk.files, on_disk.format
    path = files[0]
    if fmt in SOURCES:
        path = engine_form(open_model(model, reading=reading), Cache()).path
    fit = _fit(path, found, reading)
    if json:
        graph = fit.graph
        inputs, outputs = (
            [
                dataclasses.asdict(
                    TensorSpec(
                        name, graph.tensors[name].dtype or "", graph.tensors[name].shape or ()
                    )
                )
                for name in names
            ]
            for names in (graph.inputs, graph.outputs)
        )
        document = {
            "schema": "edgekit.inspect/1", "kind": "model", "path": model, "format": fmt,
            "sha256": file_sha256(*files), "size_bytes": sum(one.stat().st_size for one in files),
            "inputs": inputs, "outputs": outputs, "fit": fit.to_json(),
        }  # fmt: skip
        print_json(document)
    else:
        show_fit(fit, model, every=every)
    if fit.hopeless:
        raise AnsweredError(f"{model} does not fit {fit.profile.id}: {fit.hopeless[0]}", 1)


def _fit(path: Path, profile: DeviceProfile, reading: Reading) -> Fit:
    shapes = {}
    for name, declared in reading.inputs.items():
        if not all(isinstance(dim, int) for dim in declared.shape):
            raise UsageError(f"--inputs {name}: --for judges one size; give numbers, no letters")
        shapes[name] = tuple(int(dim) for dim in declared.shape)
    if not shapes:
        free = read_graph(path)
        shapes = with_batch_one(free.tensors[name] for name in free.inputs)
        return judge(read_graph(path, shapes=shapes) if shapes else free, profile)
    return judge(read_graph(path, shapes=shapes), profile)


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
        stdout.print(
            f"{head}  {FORMAT_NAMES[document['format']]}  sha256 {document['sha256']}",
            soft_wrap=True,
        )
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
    if document["kind"] == "model":
        _show_model(document)
    if document["kind"] == "bundle":
        _show_variants(document)
        for step in document["provenance"].get("steps", []):
            tools = ", ".join(f"{k} {v}" for k, v in step.get("tools", {}).items())
            what = " ".join(filter(None, (step.get("step"), step.get("to"))))
            stdout.print(f"step    {what}{f' with {tools}' if tools else ''}", markup=False)


def _show_model(document: dict[str, Any]) -> None:
    def line(text: str) -> None:
        stdout.print(text, markup=False, soft_wrap=True)

    for name, other in document["states"].items():
        line(f"state   {other} seems meant to be fed back to {name}")
    facts = dict(document["facts"])
    for note in facts.pop("notes", []):
        line(f"note: {note}")
    layers = facts.pop("layers", {})
    for name, value in facts.items():
        if value not in (None, [], {}):
            line(f"{name.replace('_', ' ')}: {value}")
    if layers:
        line("layers: " + ", ".join(f"{count} {kind}" for kind, count in layers.items()))
    if document["graph_of"] is None:
        line(f"no graph: {document['graph_missing']}")
        return
    if document["graph_of"] != document["format"]:
        line(f"as {FORMAT_NAMES[document['graph_of']]}:")
    macs = document["macs"]
    line(
        (f"opset {document['opset']}, " if document["opset"] else "")
        + f"{document['parameters']:,} parameters in {size(document['weight_bytes'])}, "
        + ("an unknown number of" if macs is None else f"{macs / 1e6:.4g} M")
        + " multiply-accumulates"
    )
    types = document["dtypes"]
    weights = ", ".join(f"{kind} {size(count)}" for kind, count in types["weights_bytes"].items())
    line(
        (f"types: weights {weights}; " if weights else "types: ")
        + "activations "
        + ", ".join(f"{count} {kind}" for kind, count in types["activations"].items())
    )
    if document["free_dimensions"]:
        line(f"free dimensions: {', '.join(document['free_dimensions'])}")
    kinds = document["operators"]
    line(f"{sum(kinds.values())} operators: " + ", ".join(f"{n} {k}" for k, n in kinds.items()))
    if document["custom_operators"]:
        line(f"not of the standard: {', '.join(document['custom_operators'])}")


def _show_variants(document: dict[str, Any]) -> None:
    sizes = {entry["path"]: entry["size_bytes"] for entry in document["files"]}
    for one in document["variants"]:
        files = sum(sizes[path] for path in one["files"])
        placement = ", ".join(f"{100 * v:.0f} % {k}" for k, v in one["placement"].items())
        stdout.print(
            f"variant {one['id']}: {one['engine']}, {one['scheme']}, {one['threads']} threads, "
            f"{size(files)}, {placement}{_when_made(one['expected'].get('latency_ns'))}",
            markup=False, soft_wrap=True,
        )  # fmt: skip


def _when_made(latency: dict[str, Any] | None) -> str:
    if not latency:
        return ""
    label = latency.get("label", "measured")
    return f", p50 {times(latency)} when made" + (f", {label}" if label != "measured" else "")
