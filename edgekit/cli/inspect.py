"""`edgekit inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from edgekit.artifact import FORMAT_NAMES, open_model
from edgekit.cli.console import print_json, size, stdout, times
from edgekit.errors import ModelError
from edgekit_runtime.bundle import Bundle, is_bundle

__all__ = ["inspect"]


def inspect(model: Path, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Show what is in a bundle or a model. A bundle's every file is verified first.

    Parameters
    ----------
    model
        A bundle (.edgekit) or a plain model (.onnx, .tflite, .xml).
    json
        One JSON object on stdout (schema edgekit.inspect/1).
    """
    if not model.exists():
        raise ModelError(f"no file {model}")
    if is_bundle(model):
        document = _bundle(model)
    else:
        artifact = open_model(model)
        document = {
            "schema": "edgekit.inspect/1",
            "kind": "model",
            "path": str(model),
            "format": artifact.format,
            "sha256": artifact.sha256,
            "size_bytes": artifact.size_bytes,
            "inputs": [dataclasses.asdict(spec) for spec in artifact.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in artifact.outputs],
        }
    if json:
        print_json(document)
    else:
        _show(document)


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
