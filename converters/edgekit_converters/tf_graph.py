"""A SavedModel's signature as one flat, frozen TensorFlow graph: the only way in for all edges.

It goes through `tf.compat.v1`: the object graph of a TF2 SavedModel is not needed for inference,
and `tf.saved_model.load` fails on files that are older than it (basic-pitch: `'_UserObject'
object has no attribute 'add_slot'`). TF1, Estimator and TF2 files come out alike: placeholders,
constants and operators, without variables and without function calls.

**What is run, and when `--trust-source` is needed.** Reading a SavedModel runs the part of its
graph that restores the variables; running it runs the part that computes the signature. Both parts
are collected beforehand, with every function they call. An operator may be in them if it keeps no
state (TensorFlow's own mark) and is not in `_REACHES_OUT`, or if it is in `_HARMLESS_STATE`
(variables, random numbers, control flow, lookup tables in memory). All others (ReadFile,
WriteFile, PyFunc, SaveV2, datasets, queues, XlaCallModule with its custom calls ...) reach
files, the network, Python or machine code, and are refused unless the source is trusted.
Initialisation code is never run: inference needs only the restored variables.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import InputError, ModelError, UsageError, one_line, require
from edgekit_runtime.arrays import read_npz

__all__ = [
    "EXTRA",
    "SIDE_FILE",
    "TO_NCHW",
    "TO_NHWC",
    "Frozen",
    "Port",
    "Reading",
    "accept_options",
    "fitted",
    "freeze",
    "read",
    "samples_of",
    "session",
]

EXTRA = "tensorflow"
#: what turns an NHWC array into an NCHW one, and back
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)

#: where `keras.save_live` notes what a SavedModel does not keep: the order of inputs and outputs,
#: and the names of free dimensions: {signature: {"inputs": {name: [size, ...]}, "outputs": ...}}
SIDE_FILE = Path("assets.extra") / "edgekit.json"
_SIZE_LIMIT_BYTES = 2**31 - 1  # of a protobuf message

_HARMLESS_STATE = re.compile(
    r"""(?x) (Variable(V2|Shape)?|VarHandleOp|VarIsInitializedOp|ReadVariableOp|DisableCopyOnRead
    |Assign(Add|Sub)?VariableOp|Resource(Gather|Scatter)\w*
    |StatefulPartitionedCall|If|While|Case|Assert|CheckNumerics(V2)?|Print|GuaranteeConst|Empty
    |Random\w+|TruncatedNormal|ParameterizedTruncatedNormal|Multinomial|Stateful\w+
    |StatelessRandomGetAlg|NonDeterministicInts|Rng\w+|Timestamp
    |TensorArray\w*|Stack\w*|TemporaryVariable
    |(Mutable)?(Dense)?HashTable\w*|LookupTable(Find|Size|Insert|Remove)V2|InitializeTableV2)"""
)
#: those without state that touch files, addresses or Python all the same
_REACHES_OUT = re.compile(
    r"(ReadFile|MatchingFiles|PyFunc\w*|InitializeTableFromTextFile|GenerateVocabRemapping"
    r"|LookupTable(Export|Import)\w*|ShardedFile\w+|\w*Dataset(V\d)?|Debug\w+|Copy|CopyHost|Xla\w+)"
)
_TABLES = re.compile(r"LookupTable\w+|\w*HashTable\w*")


@dataclass(frozen=True)
class Port:
    """An input or output: the signature's name for it, and the graph's tensor (`node:0`).

    `dtype` is numpy's name or `string`; `shape` as in `TensorSpec`, None if even its rank is open.
    """

    name: str
    tensor: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Reading:
    """A SavedModel's `MetaGraphDef` and what one of its signatures takes and gives."""

    folder: Path
    meta: Any
    signature: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Frozen:
    """The `GraphDef` of a signature. `outputs` are Identity nodes of their own, `unused` the names
    of inputs that have no influence on them.

    `layouts` holds, for an input whose layout was changed, the permutation that turns an array
    for the source into one for this graph.
    """

    graph: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    signature: str
    notes: tuple[str, ...]
    layouts: dict[str, list[int]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What an edge reports."""
        found: dict[str, Any] = {"signature": self.signature, "notes": list(self.notes)}
        return {**found, "layouts": self.layouts} if self.layouts else found


def accept_options(options: dict[str, Any], *accepted: str) -> None:
    """Refuse the options that are set and not in `accepted`; trust needs no use.

    Raises:
        UsageError: naming the first one.
    """
    for key, value in options.items():
        if (
            value not in (None, "", False)
            and value != {}
            and key not in (*accepted, "trust_source")
        ):
            known = ", ".join(accepted) or "none"
            raise UsageError(f"the option {key!r} means nothing for this model; it takes: {known}")


def read(folder: str, options: dict[str, Any]) -> Reading:
    """The signature that `options` choose, without running anything.

    Raises:
        ModelError: no SavedModel, a damaged one, or no shape for an input.
        UsageError: no such signature, or inputs that contradict it.
    """
    meta = _meta_graph(Path(folder))
    signature, notes = _choose_signature(meta, options.get("signature"))
    definition = meta.signature_def[signature]
    side = _side_file(Path(folder)).get(signature, {})
    inputs = tuple(
        _port(name, definition.inputs[name], side)
        for name in _ordered(definition.inputs, side.get("inputs", {}))
    )
    if not definition.outputs:
        raise ModelError(f"signature {signature!r} has no outputs; nothing to convert")
    outputs = tuple(
        _port(name, definition.outputs[name], side)
        for name in _ordered(definition.outputs, side.get("outputs", {}))
    )
    inputs = _with_given(inputs, options.get("inputs") or {})
    return Reading(Path(folder), meta, signature, inputs, outputs, tuple(notes))


def freeze(folder: str, options: dict[str, Any], *, layout: str | None = None) -> Frozen:
    """The signature's graph, flat and without variables, shapes as `options["inputs"]` say.

    Raises:
        ModelError: it takes strings, uses lookup tables, or cannot be read.
        UsageError: it would reach files, the network or Python, and is not trusted.
    """
    found = read(folder, options)
    _refuse_open_ranks(found)
    if not options.get("trust_source"):
        _refuse_reaching_out(found)
    tf = require("tensorflow", extra=EXTRA)
    for node in _all_nodes(found.meta.graph_def):
        node.device = ""
        # Kept as If and While: the converters know these, not TF1's Switch and Merge.
        node.attr.pop("_lower_using_switch_merge", None)
        node.attr.pop("_output_shapes", None)  # of the shapes before ours were set
        node.attr.pop("_class", None)  # colocation with nodes that may go
    try:
        graph = _frozen(tf, found)
    except (tf.errors.OpError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"TensorFlow cannot read {found.folder.name}: {one_line(error)}"
        ) from error
    present = {node.name for node in graph.node}
    unused = tuple(p.name for p in found.inputs if _node_of(p.tensor) not in present)
    graph, inputs, layouts, notes = _with_inputs(tf, graph, found, layout)
    graph, outputs = _with_outputs(tf, graph, found.outputs)
    if graph.ByteSize() > _SIZE_LIMIT_BYTES:
        raise ModelError(
            f"with its weights the graph has {graph.ByteSize() / 1e9:.1f} GB, and a TensorFlow "
            "graph holds 2 GB at most; convert the model in its training framework"
        )
    return Frozen(graph, inputs, outputs, found.signature, (*found.notes, *notes), layouts, unused)


@contextlib.contextmanager
def session(frozen: Frozen) -> Iterator[Any]:
    """A session on the graph: CPU, one thread, the same numbers each time."""
    tf = require("tensorflow", extra=EXTRA)
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=1, inter_op_parallelism_threads=1, device_count={"GPU": 0}
    )
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(frozen.graph, name="")
        with tf.compat.v1.Session(graph=graph, config=config) as opened:
            yield opened


def samples_of(inputs: str) -> dict[int, dict[str, np.ndarray]]:
    """The arrays `{i}/{name}` of an `.npz`, by sample and name.

    Raises:
        InputError: the file cannot be read, or names an array otherwise.
    """
    samples: dict[int, dict[str, np.ndarray]] = {}
    for key, array in read_npz(Path(inputs)).items():
        index, slash, name = key.partition("/")
        if not index.isdigit() or not slash:
            raise InputError(f"array {key!r} in {inputs}: wanted '0/name', '1/name' and so on")
        samples.setdefault(int(index), {})[name] = array
    return dict(sorted(samples.items()))


# --- reading ------------------------------------------------------------------------------------


def _meta_graph(folder: Path) -> Any:
    require("tensorflow", extra=EXTRA)
    text_format = require("google.protobuf.text_format", extra=EXTRA)
    message = require("google.protobuf.message", extra=EXTRA)
    from tensorflow.core.protobuf import saved_model_pb2

    binary, text = folder / "saved_model.pb", folder / "saved_model.pbtxt"
    if not binary.exists() and not text.exists():
        raise ModelError(f"{folder} is not a SavedModel: it has no saved_model.pb")
    model = saved_model_pb2.SavedModel()
    try:
        if binary.exists():
            model.ParseFromString(binary.read_bytes())
        else:
            text_format.Parse(text.read_text(), model)
    except (message.DecodeError, text_format.ParseError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder}: saved_model.pb is damaged: {one_line(error)}") from None
    tags = [sorted(meta.meta_info_def.tags) for meta in model.meta_graphs]
    for meta in model.meta_graphs:
        if list(meta.meta_info_def.tags) == ["serve"]:
            return meta
    raise ModelError(
        f"{folder} holds no graph for serving; wanted the tag 'serve', found {tags or 'none'}"
    )


def _choose_signature(meta: Any, wanted: str | None) -> tuple[str, list[str]]:
    known = sorted(name for name in meta.signature_def if not name.startswith("__"))
    listed = ", ".join(known) or "none"
    if wanted is not None:
        if wanted not in known:
            raise UsageError(f"the SavedModel has no signature {wanted!r}; it has: {listed}")
        return wanted, []
    if not known:
        raise ModelError(
            "the SavedModel has no signature, which says what goes in and out; save it with "
            "signatures={'serving_default': ...} or, from Keras, with model.export(folder)"
        )
    chosen = "serving_default" if "serving_default" in known else known[0]
    if chosen != "serving_default" and len(known) > 1:
        raise UsageError(f"the SavedModel has several signatures: {listed}; choose: --signature")
    others = [name for name in known if name != chosen]
    note = f"signature {chosen!r} was taken; the SavedModel also has: {', '.join(others)}"
    return chosen, [note] if others else []


def _side_file(folder: Path) -> dict[str, Any]:
    """See `SIDE_FILE`; empty where there is none, or nothing that can be used."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / SIDE_FILE).read_text())
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if isinstance(value, dict)}
    return {}


def _ordered(names: Any, order: Any) -> list[str]:
    """The noted order where it is about these names, else the natural one (a2 before a10)."""
    if isinstance(order, dict) and sorted(order) == sorted(names):
        return list(order)
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in _parts(name)])


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _port(name: str, info: Any, side: dict[str, Any]) -> Port:
    from tensorflow import dtypes

    if info.WhichOneof("encoding") != "name":
        raise ModelError(
            f"{name!r} is a sparse or composite tensor; wanted plain ones: "
            "save a signature that takes and gives dense tensors"
        )
    try:
        kind = dtypes.as_dtype(info.dtype)
    except TypeError:
        raise ModelError(f"{name!r} has a data type this TensorFlow does not know") from None
    noted = {**side.get("inputs", {}), **side.get("outputs", {})}.get(name)
    if info.tensor_shape.unknown_rank:
        return Port(name, info.name, kind.name, None)
    sizes = [dim.size for dim in info.tensor_shape.dim]
    free = noted if isinstance(noted, list) and len(noted) == len(sizes) else [None] * len(sizes)
    shape = tuple(
        size if size >= 0 else str(known or ("N" if axis == 0 else f"{name}_{axis}"))
        for axis, (size, known) in enumerate(zip(sizes, free, strict=True))
    )
    return Port(name, info.name, kind.name, shape)


def _with_given(inputs: tuple[Port, ...], given: dict[str, Any]) -> tuple[Port, ...]:
    """The inputs with the shapes the user gave."""
    names = [port.name for port in inputs]
    for name in given:
        if name not in names:
            raise UsageError(f"the signature has no input {name!r}; it has: {', '.join(names)}")
    return tuple(
        replace(port, shape=fitted(port.name, port.dtype, port.shape, given.get(port.name) or {}))
        for port in inputs
    )


def fitted(
    name: str, dtype: str, shape: tuple[int | str, ...] | None, given: dict[str, Any]
) -> tuple[int | str, ...] | None:
    """An input's shape with what the user gave for it in place of what was free.

    Raises:
        UsageError: it contradicts the model.
    """
    if given.get("dtype") not in (None, dtype):
        raise UsageError(f"input {name!r} is {dtype}, not {given['dtype']}; leave its type out")
    wanted = given.get("shape")
    if wanted is None:
        return shape
    if shape is not None and (
        len(wanted) != len(shape)
        or any(isinstance(a, int) and a != b for a, b in zip(shape, wanted, strict=True))
    ):
        raise UsageError(f"input {name!r} is {list(shape)}; {list(wanted)} does not fit")
    return tuple(wanted)


def _refuse_open_ranks(found: Reading) -> None:
    for port in found.inputs:
        if port.shape is None:
            raise ModelError(
                f"input {port.name!r} has no shape in the SavedModel; "
                f"give one: --inputs {port.name}=1x224x224x3:{port.dtype}"
            )


# --- what it would run --------------------------------------------------------------------------


def _all_nodes(graph: Any) -> Iterator[Any]:
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def _refuse_reaching_out(found: Reading) -> None:
    saver = found.meta.saver_def
    computed = _executed(found.meta.graph_def, [port.tensor for port in found.outputs])
    restored = _executed(found.meta.graph_def, [saver.restore_op_name])
    for node in computed:
        _refuse_node(node)
    for node in restored:
        if node.op != "RestoreV2":  # which reads tensors from a checkpoint, and nothing else
            _refuse_node(node)


def _refuse_node(node: Any) -> None:
    from tensorflow.python.framework import op_def_registry

    known = op_def_registry.get(node.op)
    if known is None:
        raise ModelError(
            f"it uses the operator {node.op} ({node.name}), which TensorFlow does not have: a "
            "custom operator; replace it by standard ones and save the model again"
        )
    writes = node.op == "PrintV2" and node.attr["output_stream"].s not in (b"stdout", b"stderr")
    harmless = _HARMLESS_STATE.fullmatch(node.op) or node.op == "PrintV2" or not known.is_stateful
    if writes or not harmless or _REACHES_OUT.fullmatch(node.op):
        raise UsageError(
            f"running it would run {node.op} ({node.name}), which can reach files, the network, "
            "Python or machine code; if you trust its author: --trust-source"
        )


def _executed(graph: Any, roots: list[str]) -> list[Any]:
    """Every node that computing `roots` can run, in the graph and in the functions it calls."""
    nodes = {node.name: node for node in graph.node}
    functions = {one.signature.name: one for one in graph.library.function}
    waiting = [_node_of(root) for root in roots]
    seen: set[str] = set()
    executed: list[Any] = []
    while waiting:
        name = waiting.pop()
        if name not in seen and name in nodes:
            seen.add(name)
            executed.append(nodes[name])
            waiting += [_node_of(one) for one in nodes[name].input]
    called: set[str] = set()
    for node in executed:  # grows while it is walked
        for name in _functions_of(node):
            if name in functions and name not in called:
                called.add(name)
                executed += functions[name].node_def
    return [node for node in executed if node.op not in functions]


def _functions_of(node: Any) -> Iterator[str]:
    yield node.op  # TF1 calls a function by an operator of its name
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        for one in value.list.func:
            yield one.name


def _node_of(tensor: str) -> str:
    return tensor.removeprefix("^").partition(":")[0]


# --- freezing -----------------------------------------------------------------------------------


def _frozen(tf: Any, found: Reading) -> Any:
    ends = [_node_of(port.tensor) for port in found.outputs]
    starts = [_node_of(port.tensor) for port in found.inputs]
    flat = _inlined(tf, found.meta.graph_def, starts + ends)
    _refuse_strings(tf, flat, found, ends)
    saver = found.meta.saver_def
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(found.meta.graph_def, name="")
        with tf.compat.v1.Session(graph=graph) as opened:
            if saver.restore_op_name:
                path = str(found.folder / "variables" / "variables")
                opened.run(saver.restore_op_name, {saver.filename_tensor_name: path})
            frozen = tf.compat.v1.graph_util.convert_variables_to_constants(opened, flat, ends)
    return _inlined(tf, frozen, starts + ends) if frozen.library.function else frozen


def _inlined(tf: Any, graph: Any, keep: list[str]) -> Any:
    """The graph with the bodies of functions in place of their calls."""
    from tensorflow.core.protobuf import config_pb2, meta_graph_pb2, rewriter_config_pb2
    from tensorflow.python.grappler import tf_optimizer

    config = config_pb2.ConfigProto()
    rewrite = config.graph_options.rewrite_options
    rewrite.optimizers[:] = ["function"]
    rewrite.min_graph_nodes = -1  # it leaves small graphs alone otherwise
    rewrite.fail_on_optimizer_errors = True
    rewrite.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.ONE
    with tf.Graph().as_default():
        tf.graph_util.import_graph_def(graph, name="")
        meta = tf.compat.v1.train.export_meta_graph(graph_def=graph, clear_devices=True)
    kept = meta_graph_pb2.CollectionDef()
    kept.node_list.value.extend(sorted(set(keep)))
    meta.collection_def["train_op"].CopyFrom(kept)
    return tf_optimizer.OptimizeGraph(config, meta)


def _refuse_strings(tf: Any, flat: Any, found: Reading, ends: list[str]) -> None:
    needed = _executed(flat, ends)
    texts = [port.name for port in found.inputs if port.dtype == "string"]
    if texts:
        where = _where_numbers_begin(tf, flat, {node.name for node in needed})
        hint = f" (numbers begin at {', '.join(where)})" if where else ""
        raise ModelError(
            f"input {texts[0]!r} takes strings, which no engine on a device reads; save a "
            f"signature that starts behind the decoding{hint} and decode in the application"
        )
    tables = [node for node in needed if _TABLES.fullmatch(node.op)]
    if tables:
        raise ModelError(
            f"it looks values up in a table ({tables[0].op} {tables[0].name}), which no other "
            "format has; save a signature that starts behind the lookup, or ends before it"
        )
    given = [port.name for port in found.outputs if port.dtype == "string"]
    if given:
        raise ModelError(
            f"output {given[0]!r} gives strings, which no engine on a device makes; save a "
            "signature with the numbers they are made from (scores, class indices)"
        )


def _where_numbers_begin(tf: Any, flat: Any, names: set[str]) -> list[str]:
    """The tensors made of strings that are numbers, up to four."""
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(flat, name="")
    return [
        f"{op.outputs[0].name} ({op.type})"
        for op in graph.get_operations()
        if op.name in names
        and any(one.dtype == tf.string for one in op.inputs)
        and op.outputs
        and op.outputs[0].dtype not in (tf.string, tf.resource, tf.variant)
        and op.type not in ("Shape", "Size", "Equal", "NotEqual", "StringLength")
    ][:4]


def _with_inputs(
    tf: Any, graph: Any, found: Reading, layout: str | None
) -> tuple[Any, tuple[Port, ...], dict[str, list[int]], list[str]]:
    """Every input as a placeholder of its shape; those to be NCHW with a transpose behind."""
    nodes = {node.name: node for node in graph.node}
    ports, layouts, notes = [], {}, []
    for port in found.inputs:
        assert port.shape is not None  # noqa: S101  (refused before)
        name = _node_of(port.tensor)
        node = nodes.get(name)
        if node is None:
            notes.append(f"input {port.name!r} has no influence on the outputs")
            node = graph.node.add(name=name)
        kind = tf.dtypes.as_dtype(port.dtype).as_datatype_enum
        _placeholder(node, kind, port.shape)
        if layout == "nchw" and len(port.shape) == len(TO_NCHW):
            given = graph.node.add(name=f"{name}/nchw")
            _placeholder(given, kind, tuple(port.shape[axis] for axis in TO_NCHW))
            _transpose(tf, graph, node, given.name, kind)
            port = replace(  # noqa: PLW2901
                port, tensor=f"{given.name}:0", shape=tuple(port.shape[axis] for axis in TO_NCHW)
            )
            layouts[port.name] = list(TO_NCHW)
            notes.append(f"input {port.name!r} is NCHW now, with a transpose to NHWC behind it")
        ports.append(port)
    return graph, tuple(ports), layouts, notes


def _placeholder(node: Any, kind: int, shape: tuple[int | str, ...]) -> None:
    node.op = "Placeholder"
    node.ClearField("input")
    node.ClearField("attr")
    node.attr["dtype"].type = kind
    for size in shape:
        node.attr["shape"].shape.dim.add(size=size if isinstance(size, int) else -1)
    node.attr["shape"].shape.unknown_rank = False


def _transpose(tf: Any, graph: Any, node: Any, given: str, kind: int) -> None:
    order = graph.node.add(name=f"{node.name}/to_nhwc", op="Const")
    order.attr["dtype"].type = tf.int32.as_datatype_enum
    order.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(TO_NHWC, tf.int32))
    node.op = "Transpose"
    node.ClearField("attr")
    node.input.extend([given, order.name])
    node.attr["T"].type = kind
    node.attr["Tperm"].type = tf.int32.as_datatype_enum


def _with_outputs(tf: Any, graph: Any, outputs: tuple[Port, ...]) -> tuple[Any, tuple[Port, ...]]:
    """Each output as a node of its own: two may be one tensor, or an input."""
    taken = {node.name for node in graph.node}
    ports = []
    for index, port in enumerate(outputs):
        name = f"edgekit_output_{index}"
        while name in taken:
            name += "_"
        node = graph.node.add(name=name, op="Identity", input=[port.tensor])
        node.attr["T"].type = tf.dtypes.as_dtype(port.dtype).as_datatype_enum
        ports.append(replace(port, tensor=f"{name}:0"))
    return graph, tuple(ports)
