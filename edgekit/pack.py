"""A bundle of a model as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgekit.artifact import open_model
from edgekit.bundle import VariantSource, write_bundle
from edgekit.cache import file_sha256
from edgekit.errors import UsageError
from edgekit.graph import read_graph
from edgekit.measure.worker import Contender
from edgekit.pipeline import read_pipeline
from edgekit.precision import quantized_already
from edgekit_runtime import __version__

__all__ = ["pack"]


def pack(
    contender: Contender, path: Path, *, name: str = "", profile: str = "any",
    preprocess: Path | None = None, command: str = "",
) -> None:  # fmt: skip
    """Write a bundle of a model that an engine loads, with golden outputs that this machine
    computes now and the steps before and after it, if any; nothing is measured or promised of its
    latency. `profile` is the id of the only one it may be deployed to, or `any`.

    Raises:
        UsageError: it is a bundle, or for an accelerator; the steps do not fit the model.
        EdgeKitError: it does not run here, or not to numbers.
    """
    if contender.engine is None:
        raise UsageError(f"{contender.path} is a bundle already")
    if ":" in contender.engine:
        raise UsageError(
            f"{contender.engine}: what runs on an accelerator is proven by edgekit optimize "
            "--accelerator, which writes the bundle"
        )
    artifact = open_model(str(contender.path))
    around = read_pipeline(preprocess, artifact.inputs, artifact.outputs) if preprocess else None
    scheme = "int8" if quantized_already(read_graph(contender.path)) else "fp32"
    source = VariantSource(
        "model", contender.engine, artifact, scheme, contender.threads, contender.precision,
        {"CPU": 1.0}, {},
    )  # fmt: skip
    provenance = {
        "edgekit": __version__, "command": command, "model_sha256": file_sha256(contender.path),
        "steps": list(artifact.provenance),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
        write_bundle(
            path, (source,), name=name or contender.path.stem, inputs=artifact.inputs,
            outputs=artifact.outputs, profile=profile, provenance=provenance, work=Path(work),
            pipeline=around,
        )  # fmt: skip
