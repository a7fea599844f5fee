"""What every ONNX quantizer wants of a model first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit.graph import Graph, read_graph
from edgekit.precision import quantized_already

__all__ = ["MATRIX_OPERATORS", "Prepared", "float_session", "prepare_onnx", "save_onnx"]

#: what `COMPUTE_OPERATORS` of a scheme are in ONNX
MATRIX_OPERATORS = ("Conv", "MatMul", "Gemm")
#: protobuf ends at 2 GiB
_MOST_BYTES = 1_800_000_000


@dataclass
class Prepared:
    """A cleaned model: opset 13 or newer, weights as initializers of the outermost graph, all nodes
    named.

    kept: names of the nodes that stay float. notes: what the user should know. names: the tensors
    it has before anything is quantized.
    """

    proto: Any
    kept: list[str]
    notes: list[str] = field(default_factory=list)
    names: set[str] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.proto.graph
        made = {name for node in graph.node for name in node.output}
        self.names = made | {tensor.name for tensor in graph.initializer}


def prepare_onnx(
    source: str, folder: str, keep: Sequence[str], opset: int | None = None
) -> Prepared:
    """Clean the model up (in `folder`), upgraded to `opset` if it is older.

    Without that, models as they come give invalid QDQ graphs (per-channel DequantizeLinear below
    opset 13), or hide their weights in Constant nodes. onnxruntime's own `quant_pre_process` raises
    on models whose shapes its symbolic inference does not follow.

    Raises:
        ModelError: the model is quantized already, damaged, or cannot be upgraded.
        UsageError: no operator makes a tensor of `keep`.
    """
    onnx = require("onnx", extra="onnx")
    clean_up = require("edgekit_converters.onnx", extra="onnx").clean_up
    graph = read_graph(Path(source))
    found = quantized_already(graph)
    if found:
        raise ModelError(f"the model is quantized already: {found}; quantize the float model")
    path = str(Path(folder) / "prepared.onnx")
    clean_up([source], path, {})
    if opset and _opset(onnx.load(path, load_external_data=False)) < opset:
        newer = str(Path(folder) / "upgraded.onnx")
        clean_up([path], newer, {"opset": opset})
        path = newer
    model = onnx.load(path)
    inside = sum(_count(node) for node in model.graph.node)
    notes = [f"{inside} operators inside If, Loop or Scan stay float"] if inside else []
    _name(model)
    kept = dict.fromkeys([*_kept(model, graph, keep), *_readers_of_outputs(model)])
    return Prepared(model, list(kept), notes)


def save_onnx(model: Any, target: str) -> None:
    """Write the model into one file.

    Raises:
        ModelError: it does not fit.
    """
    onnx = require("onnx", extra="onnx")
    try:
        onnx.save(model, target)
    except Exception as error:  # protobuf's own class for too big messages
        if isinstance(error, OSError):
            raise
        raise ModelError(f"the quantized model cannot be written: {one_line(error)}") from error


def _opset(model: Any) -> int:
    return max(
        (int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0
    )


def _count(node: Any) -> int:
    """Operators inside its subgraphs."""
    graphs = [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    return sum(1 + _count(inner) for graph in graphs for inner in graph.node)


def _name(model: Any) -> None:
    """Quantizers pick nodes by names, which models may lack or have twice."""
    taken: set[str] = set()
    for place, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{place}"
        while name in taken:
            name = f"{name}_{place}"
        taken.add(name)
        node.name = name


def _readers_of_outputs(model: Any) -> list[str]:
    """Nodes with a weight that is an output of the model, too, which must come out as it is."""
    stored = {tensor.name for tensor in model.graph.initializer}
    shown = {one.name for one in model.graph.output} & stored
    return [node.name for node in model.graph.node if shown & set(node.input)]


def _kept(model: Any, graph: Graph, keep: Sequence[str]) -> list[str]:
    """The nodes whose first outputs are called so; where cleaning put an operator into its reader,
    that one."""
    names = {node.output[0]: node.name for node in model.graph.node if node.output}
    readers = {name: one for one in reversed(graph.operators) for name in one.inputs}
    known = {one.outputs[0] for one in graph.operators if one.outputs}
    found = []
    for wanted in keep:
        if wanted not in known | set(names):
            raise UsageError(f"no operator's first output is {wanted!r}, which is to stay float")
        name = wanted
        while name not in names and name in readers and readers[name].outputs:
            name = readers[name].outputs[0]
        if name in names:
            found.append(names[name])
    return found


def float_session(model: str | bytes) -> Any:
    """An ONNX Runtime session that computes a model operator by operator, nothing fused, on all
    processors: for looking inside."""
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # Between two operators of a small net, threads that spin cost more than they save.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
