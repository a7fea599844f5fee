"""TensorFlow SavedModels (TF2, TF1, Estimator): described, run, and converted.

Every edge starts from the frozen graph of one signature (`tf_graph`), under the signature's names.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import EdgeKitError, ModelError, one_line, require
from edgekit_converters.tf2onnx import checked_opset, finish
from edgekit_converters.tf_graph import (
    EXTRA,
    Frozen,
    Port,
    accept_options,
    freeze,
    read,
    samples_of,
    session,
)
from edgekit_runtime.arrays import write_npz
from edgekit_runtime.manifest import TensorSpec

__all__ = ["describe", "run", "tensors", "tflite_of", "to_onnx", "to_openvino", "to_tflite"]

_OLDEST_OPSET = 9  # where tf2onnx stops covering Keras' common layers
_SHAPING = ("inputs", "signature", "trust_source", "layout")


def describe(source: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The signature's inputs and outputs, and what `edgekit inspect` shows. Runs nothing.

    Raises:
        ModelError: it is damaged or no SavedModel.
        UsageError: there is no such signature.
    """
    accept_options(options, *_SHAPING)
    found = read(source[0], options)
    graph = found.meta.graph_def
    operators = Counter(node.op for node in graph.node)
    for function in graph.library.function:
        operators.update(node.op for node in function.node_def)
    names = sorted(name for name in found.meta.signature_def if not name.startswith("__"))
    return {
        "inputs": [dataclasses.asdict(_spec(port)) for port in found.inputs],
        "outputs": [dataclasses.asdict(_spec(port)) for port in found.outputs],
        "facts": {
            "framework": f"TensorFlow {found.meta.meta_info_def.tensorflow_version or '?'}",
            "signature": found.signature,
            "signatures": names,
            "parameters": _parameters(found.folder),
            "operators": dict(operators.most_common()),
            "notes": list(found.notes),
        },
    }


def run(
    source: list[str],
    options: dict[str, Any],
    inputs: str,
    outputs: str,
    taps: list[str] | None = None,
) -> None:
    """Run the signature on each sample of `inputs`; `taps` are names out of `tensors`.

    Arrays are in the source's own layout, whatever `options["layout"]` asks of the result.

    Raises:
        ModelError: TensorFlow fails on it, or it cannot be frozen (see `tf_graph`).
    """
    accept_options(options, *_SHAPING)
    tf = require("tensorflow", extra=EXTRA)
    frozen = freeze(source[0], options)
    samples = samples_of(inputs)
    fetched = {port.name: port.tensor for port in frozen.outputs} | {
        name: name for name in taps or []
    }
    results: dict[str, np.ndarray] = {}
    with session(frozen) as opened:
        for index, arrays in samples.items():
            feed = {port.tensor: arrays[port.name] for port in frozen.inputs}
            try:
                got = opened.run(fetched, feed)
            except (tf.errors.OpError, ValueError, KeyError) as error:
                raise ModelError(
                    f"TensorFlow cannot run sample {index}: {one_line(error)}"
                ) from error
            results |= {f"{index}/{name}": np.asarray(array) for name, array in got.items()}
    write_npz(Path(outputs), results)


def tensors(source: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """What `run` can deliver besides the outputs, in execution order.

    Names are those of the frozen graph (`StatefulPartitionedCall/model/conv1/BiasAdd:0`). tf2onnx
    keeps them for the tensors it keeps; a convolution's tensors may have become NCHW under
    their old name, so compare shapes and transpose before comparing values. TFLite and OpenVINO
    fuse operators: their tensors carry the name of the last one fused (TFLite: several, joined by
    `;`), with `StatefulPartitionedCall/` in front and without the `:0`.
    """
    accept_options(options, *_SHAPING)
    tf = require("tensorflow", extra=EXTRA)
    frozen = freeze(source[0], options)
    names = {port.tensor: port.name for port in frozen.inputs}
    ends = {port.tensor for port in frozen.outputs}
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(frozen.graph, name="")
    live: dict[str, str] = dict(names)
    found = []
    for op in _in_order(graph):
        used = [live[one.name] for one in op.inputs if one.name in live]
        if not used:  # a constant, or made of constants only
            continue
        if op.type in ("Identity", "IdentityN") and len(used) == len(op.inputs):
            live |= {made.name: name for made, name in zip(op.outputs, used, strict=True)}
            continue
        for made in op.outputs:
            live[made.name] = made.name
            if made.dtype.is_numpy_compatible and made.dtype != tf.string and made.name not in ends:
                found.append(
                    {"name": made.name, "node": _called(op), "inputs": list(dict.fromkeys(used))}
                )
    return found


def to_onnx(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write an ONNX model, by tf2onnx, with the signature's names and free dimensions.

    Raises:
        ModelError: an operator has no counterpart; it is named.
    """
    accept_options(options, *_SHAPING, "opset")
    tf = require("tensorflow", extra=EXTRA)
    convert = require("tf2onnx.convert", extra=EXTRA)
    opset = checked_opset(options.get("opset"), _OLDEST_OPSET)
    frozen = _distinct(freeze(source[0], options, layout=options.get("layout")))
    ports = (*frozen.inputs, *frozen.outputs)
    try:
        model, _ = convert.from_graph_def(
            _without_erfc(tf, frozen.graph),
            name=frozen.signature,
            input_names=[port.tensor for port in frozen.inputs],
            output_names=[port.tensor for port in frozen.outputs],
            tensors_to_rename={port.tensor: port.name for port in ports},
            opset=opset,
        )
    except Exception as error:
        raise ModelError(f"tf2onnx cannot convert the model: {one_line(error)}") from error
    finish(
        model,
        target,
        {port.name: port.shape for port in frozen.inputs},
        {port.name: port.shape for port in frozen.outputs},
        {port.name: port.dtype for port in frozen.inputs if port.name in frozen.unused},
    )
    return {**frozen.facts(), "opset": opset}


def to_tflite(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write a float32 TFLite model, by TensorFlow's converter; signature `serving_default`.

    Raises:
        ModelError: an operator is not among TFLite's; it is named.
    """
    accept_options(options, *_SHAPING)
    made, frozen = tflite_of(source[0], options, Path(target).parent)
    Path(target).write_bytes(made)
    return frozen.facts()


def tflite_of(
    folder: str,
    options: dict[str, Any],
    work: Path,
    configure: Callable[[Any, Any], None] | None = None,
) -> tuple[bytes, Frozen]:
    """A TFLite model and the graph it was made of; `configure(tensorflow, converter)` sets what
    else TensorFlow's converter is to do. Files of the way go into `work`.

    Raises:
        ModelError: an operator is not among TFLite's; it is named.
    """
    tf = require("tensorflow", extra=EXTRA)
    frozen = freeze(folder, options, layout=options.get("layout"))
    with tempfile.TemporaryDirectory(dir=work) as inner:
        saved = str(Path(inner) / "saved")
        _save_frozen(tf, frozen, saved)
        # From a SavedModel: from_concrete_functions leaves READ_VARIABLE in Keras 3 models.
        converter = tf.lite.TFLiteConverter.from_saved_model(
            saved, signature_keys=["serving_default"]
        )
        if configure is not None:
            configure(tf, converter)
        try:
            return converter.convert(), frozen
        except EdgeKitError:
            raise
        except Exception as error:
            raise ModelError(_tflite_blame(error)) from error


def to_openvino(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write an IR with float32 weights, by OpenVINO's TensorFlow front end.

    Raises:
        ModelError: an operator has no counterpart; it is named.
    """
    accept_options(options, *_SHAPING)
    ov = require("openvino", extra="openvino")
    frozen = _distinct(freeze(source[0], options, layout=options.get("layout")))
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
        path = Path(folder) / "frozen.pb"
        path.write_bytes(frozen.graph.SerializeToString())
        try:
            model = ov.Core().read_model(path)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot convert the model: {one_line(error)}") from error
        model = _named(ov, model, frozen)
        ov.save_model(model, target, compress_to_fp16=False)
    return frozen.facts()


# --- describing and running ---------------------------------------------------------------------


def _spec(port: Port) -> TensorSpec:
    shape = port.shape if port.shape is not None else ()
    return TensorSpec(port.name, port.dtype, shape, "NHWC" if len(shape) == 4 else None)


def _parameters(folder: Path) -> int:
    """The numbers in the checkpoint, without counters and optimizer slots."""
    tf = require("tensorflow", extra=EXTRA)
    prefix = folder / "variables" / "variables"
    if not prefix.with_suffix(".index").exists():
        return 0
    try:
        shapes = tf.train.load_checkpoint(str(prefix)).get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError) as error:
        raise ModelError(f"the variables are damaged: {one_line(error)}") from error
    skip = ("save_counter", "_CHECKPOINTABLE_OBJECT_GRAPH", "/.OPTIMIZER_SLOT/", "optimizer/")
    return sum(
        int(np.prod(shape)) for name, shape in shapes.items() if not any(s in name for s in skip)
    )


def _in_order(graph: Any) -> list[Any]:
    """The operations, each after those it reads from. Without recursion: graphs are deep."""
    waiting = {op.name: {one.op.name for one in op.inputs} for op in graph.get_operations()}
    readers: dict[str, list[str]] = {}
    for name, needs in waiting.items():
        for need in needs:
            readers.setdefault(need, []).append(name)
    ready = [name for name, needs in waiting.items() if not needs]
    for name in ready:  # grows while it is walked
        for reader in readers.get(name, []):
            waiting[reader].discard(name)
            if not waiting[reader]:
                ready.append(reader)
    return [graph.get_operation_by_name(name) for name in ready]


def _called(op: Any) -> str:
    parts = [part for part in op.name.split("/") if not part.startswith("StatefulPartitionedCall")]
    return f"{'/'.join(parts) or op.name} ({op.type})"


# --- ONNX ---------------------------------------------------------------------------------------


def _distinct(frozen: Frozen) -> Frozen:
    """ONNX and IR have one space of names: an output called like an input gets another one."""
    taken = {port.name for port in frozen.inputs}
    outputs, notes = [], []
    for port in frozen.outputs:
        name = port.name
        while name in taken:
            name += "_out"
        if name != port.name:
            notes.append(f"output {port.name!r} is called {name!r}: an input has its name")
        taken.add(name)
        outputs.append(dataclasses.replace(port, name=name))
    return dataclasses.replace(frozen, outputs=tuple(outputs), notes=(*frozen.notes, *notes))


def _without_erfc(tf: Any, graph: Any) -> Any:
    """`Erfc(x)` as `1 - Erf(x)`: Keras writes GELU with it, and tf2onnx knows only the other."""
    for node in [one for one in graph.node if one.op == "Erfc"]:
        kind = node.attr["T"].type
        erf = graph.node.add(name=f"{node.name}/Erf", op="Erf", input=list(node.input))
        one = graph.node.add(name=f"{node.name}/one", op="Const")
        one.attr["dtype"].type = kind
        one.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(1.0, kind))
        erf.attr["T"].type = kind
        node.op = "Sub"
        del node.input[:]
        node.input.extend([one.name, erf.name])
    return graph


# --- TFLite -------------------------------------------------------------------------------------


def _save_frozen(tf: Any, frozen: Frozen, folder: str) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(frozen.graph, name="")
        ends = [
            {port.name: graph.get_tensor_by_name(port.tensor) for port in ports}
            for ports in (frozen.inputs, frozen.outputs)
        ]
        with v1.Session(graph=graph) as opened:
            builder = v1.saved_model.Builder(folder)
            signature = v1.saved_model.predict_signature_def(*ends)
            builder.add_meta_graph_and_variables(
                opened, ["serve"], signature_def_map={"serving_default": signature}
            )
            builder.save()


def _tflite_blame(error: Exception) -> str:
    """The operators it names, out of pages of text."""
    text = str(error)
    if "TensorListReserve" in text:
        return (
            "TFLite needs fixed shapes, batch included, for recurrent layers: fix them "
            "when the SavedModel is made (from Keras: --inputs NAME=1x...), or choose ONNX"
        )
    flex = re.search(r"Flex ops: ([^\n]+)", text)
    custom = re.search(r"Custom ops: ([^\n]+)", text)
    names = ", ".join(m[1].strip() for m in (flex, custom) if m)
    if names:
        return f"TFLite has no operator for {names}; replace them in the model, or choose ONNX"
    return f"TensorFlow's TFLite converter cannot convert the model: {one_line(error)}"


# --- OpenVINO -----------------------------------------------------------------------------------


def _named(ov: Any, model: Any, frozen: Frozen) -> Any:
    """The model with the signature's names, in its order."""
    parameters = {one.get_friendly_name().partition(":")[0]: one for one in model.get_parameters()}
    ends = {one.get_friendly_name(): one for one in model.get_results()}
    taken, inputs, results = set(), [], []
    for port in frozen.inputs:
        parameter = parameters[port.tensor.partition(":")[0]]
        parameter.set_friendly_name(port.name)
        parameter.output(0).get_tensor().set_names({port.name})
        taken.add(parameter.output(0))
        inputs.append(parameter)
    for port in frozen.outputs:
        made = ends[port.tensor].input_value(0)
        if made in taken:  # an input, or another output: names belong to tensors
            made = ov.opset13.convert(made, made.get_element_type().to_string()).output(0)
        taken.add(made)
        made.get_tensor().set_names({port.name})
        results.append(ov.opset13.result(made))
    named = ov.Model(results, inputs, frozen.signature)
    named.validate_nodes_and_infer_types()
    return named
