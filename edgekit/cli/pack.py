"""`edgekit pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from edgekit.cli.console import TerminalObserver, command_line, print_json, size, stdout
from edgekit.cli.contender import contender
from edgekit.cli.source import SourceOptions
from edgekit.errors import UsageError
from edgekit.pack import pack as write
from edgekit.profiles import load_profile
from edgekit_runtime.bundle import Bundle

__all__ = ["pack"]


def pack(
    model: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    engine: str | None = None,
    threads: int | None = None,
    preprocess: Path | None = None,
    for_: Annotated[str | None, Parameter(name="--for")] = None,
    name: str = "",
    source: SourceOptions | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Bundle a model as it is: nothing is measured, and nothing changed but its format, if need be.
    For one that is good already, so that it can be deployed, checked and gone back on.

    Parameters
    ----------
    model
        A model of any format that edgekit convert reads.
    out
        The bundle; the model's name with .edgekit otherwise.
    engine
        onnxruntime, openvino, litert or ncnn, for which it is converted if need be; its format's
        own otherwise.
    threads
        Threads for the engine there; the profile's, or this machine's, otherwise.
    preprocess
        A .toml file with the steps from raw samples to inputs and behind the outputs
        (docs/how-to/preprocess.md).
    for_
        The only device profile it may be deployed to; any otherwise.
    name
        What the bundle calls itself; the model's file name otherwise.
    source
        How to read the model.
    json
        One JSON object on stdout (schema edgekit.pack/1).
    """
    path = out or Path(f"{Path(model.partition(':')[0]).stem}.edgekit")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"-o {path}: cannot write there; wanted a file in a folder that exists")
    profile = load_profile(for_) if for_ else None
    if profile is not None and profile.kind == "microcontroller":
        raise UsageError(
            f"{profile.id} runs firmware: edgekit optimize --for {profile.id} makes it"
        )
    with TerminalObserver() as observer:
        observer.phase("read the model")
        one = contender(
            model, engine=engine, threads=threads, reading=(source or SourceOptions()).reading(),
            observer=observer, machine=profile,
        )  # fmt: skip
        observer.phase("compute golden outputs")
        write(
            one, path, name=name or Path(model.partition(":")[0]).stem,
            profile=profile.id if profile else "any", preprocess=preprocess,
            command=command_line(),
        )  # fmt: skip
    with Bundle(path) as opened:
        manifest = opened.manifest
    written = path.stat().st_size
    if json:
        print_json(
            {"schema": "edgekit.pack/1", "bundle": str(path), "id": manifest.bundle_id,
             "engine": one.engine, "threads": one.threads, "size_bytes": written}
        )  # fmt: skip
        return
    stdout.print(f"{path}  {size(written)}, {one.engine}, {one.threads} threads", markup=False)
