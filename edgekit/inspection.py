"""What is in a model: everything `edgekit inspect` shows of one, of any format."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from edgekit.artifact import SOURCES, Artifact, TensorSpec
from edgekit.cache import Cache
from edgekit.convert import convert
from edgekit.errors import EdgeKitError, ModelError, UsageError
from edgekit.graph import Graph, read_graph, with_batch_one

__all__ = ["engine_form", "inspect_model", "recognized_states"]

#: what an input that carries state over to the next run is called, less what it is called after
_STATE_MARKS = re.compile(
    r"(?i)_?(input|output|in|out|next|new|prev|past|present|n)$|^(past|present|new|prev|next|in|out)_"
)


def engine_form(artifact: Artifact, cache: Cache) -> Artifact:
    """The artifact itself if an engine loads it; what it becomes in ONNX otherwise.

    Raises:
        EdgeKitError: it cannot be converted.
    """
    return convert(artifact, "onnx", cache=cache) if artifact.format in SOURCES else artifact


def inspect_model(artifact: Artifact, cache: Cache) -> dict[str, Any]:
    """The document `edgekit.inspect/1` of a model.

    What a source framework says of it is under `facts`. `operators`, `parameters`, `macs` and
    `dtypes` are of the graph: its own, or that of the ONNX model it becomes (`graph_of`);
    `graph_missing` says why there is none. `macs` is for a batch of one, and None where a free
    dimension decides it.
    """
    document = {
        "schema": "edgekit.inspect/1",
        "kind": "model",
        "path": artifact.location or str(artifact.path),
        "format": artifact.format,
        "sha256": artifact.sha256,
        "size_bytes": artifact.size_bytes,
        "inputs": [dataclasses.asdict(spec) for spec in artifact.inputs],
        "outputs": [dataclasses.asdict(spec) for spec in artifact.outputs],
        "free_dimensions": sorted(
            {dim for spec in artifact.inputs for dim in spec.shape if isinstance(dim, str)}
        ),
        "states": recognized_states(artifact.inputs, artifact.outputs),
        "facts": dict(artifact.facts),
        "provenance": list(artifact.provenance),
    }
    try:
        form = engine_form(artifact, cache)
        graph = read_graph(form.path, shapes=_shapes(form, artifact))
    except EdgeKitError as error:
        if isinstance(error, UsageError) and not isinstance(error, ModelError):
            raise
        return document | {"graph_of": None, "graph_missing": str(error)}
    return document | {"graph_of": form.format} | _graph_facts(graph)


def _shapes(form: Artifact, asked: Artifact) -> dict[str, tuple[int, ...]]:
    shapes = with_batch_one(form.inputs)
    known = {spec.name for spec in form.inputs}
    for name, declared in asked.reading.inputs.items():
        if name not in known:
            raise UsageError(f"no input {name!r}; inputs: {', '.join(sorted(known))}")
        if all(isinstance(dim, int) for dim in declared.shape):
            shapes[name] = tuple(int(dim) for dim in declared.shape)
    return shapes


def _graph_facts(graph: Graph) -> dict[str, Any]:
    run = [one for one in graph.operators if not graph.folded(one)]
    made = {name for one in graph.operators for name in one.outputs}
    weights = [one for one in graph.tensors.values() if one.constant and one.name not in made]
    parameters = 0
    stored: Counter[str] = Counter()
    for tensor in weights:
        count = 1
        for dim in tensor.shape or ():
            count *= dim if isinstance(dim, int) else 0
        if "float" in (tensor.dtype or "") or tensor.quantized:
            parameters += count
        stored[tensor.dtype or "?"] += tensor.size_bytes or 0
    computed = Counter(
        graph.tensors[name].dtype or "?" for one in run for name in one.outputs if name
    )
    return {
        "opset": graph.opset,
        "opsets": dict(graph.opsets),
        "operators": dict(Counter(one.type for one in run).most_common()),
        "custom_operators": sorted({one.type for one in run if one.custom}),
        "parameters": parameters,
        "weight_bytes": graph.weight_bytes,
        "macs": graph.macs,
        "dtypes": {"weights_bytes": dict(stored.most_common()),
                   "activations": dict(computed.most_common())},
    }  # fmt: skip


def recognized_states(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> dict[str, str]:
    """Outputs that seem meant to be fed back, each by the input it goes to: equal types and
    shapes, and names that are equal but for `_in`/`_out`, `past_`/`present_`, `n` and the like."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for spec in inputs:
        for other in outputs:
            if other.name in taken or other.dtype != spec.dtype or not _alike(spec, other):
                continue
            if spec.shape and _stem(spec.name) == _stem(other.name):
                found[spec.name] = other.name
                taken.add(other.name)
                break
    return found


def _stem(name: str) -> str:
    return _STATE_MARKS.sub("", name) or name


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    return len(one.shape) == len(other.shape) and all(
        a == b or isinstance(a, str) or isinstance(b, str)
        for a, b in zip(one.shape, other.shape, strict=True)
    )
