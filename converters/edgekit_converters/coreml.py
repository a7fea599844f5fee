"""PyTorch and TensorFlow -> Core ML (`.mlpackage`, an ML program), by coremltools.

Core ML runs on Apple's systems only, so nothing here runs the result. Instead, the package is read
back as a file: an interface that is not the source's is an error, and it is counted which of the
source's weights are in it.

Weights and arithmetic are float32, as in the source.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import EdgeKitError, ModelError, UsageError, require
from edgekit_converters.exported_program import (
    Program,
    as_array,
    example,
    flat_module,
    open_program,
)
from edgekit_converters.mlpackage import Accounted, Package, accounted, read_package
from edgekit_converters.tf_graph import EXTRA as TENSORFLOW
from edgekit_converters.tf_graph import Frozen, freeze
from edgekit_converters.torch import batch_of_one, blame, check_straight, quiet
from edgekit_converters.torchscript import open_script
from edgekit_runtime.manifest import TensorSpec

__all__ = [
    "describe", "pt2_to_coreml", "run", "savedmodel_to_coreml", "tensors", "torchscript_to_coreml",
]  # fmt: skip

#: what Core ML's arrays may be, by the source's type; the second: what it becomes
_TYPES = {
    "float32": "float32", "float16": "float16", "int32": "int32",
    "int64": "int32", "float64": "float32",
}  # fmt: skip
#: a Core ML array has this many axes at most
_MOST_AXES = 5
_NOTE = (
    "float32: Core ML computes it on CPU or GPU, not on the Neural Engine, which takes float16 only"
)


def describe(source: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The interface of an `.mlpackage`, with its operators counted.

    Raises:
        ModelError: it is damaged, or no ML program.
    """
    found = read_package(Path(source[0]))
    facts = {
        "framework": f"Core ML, specification {found.version}",
        "parameters": sum(one.size for one in found.constants.values() if one.dtype.kind == "f"),
        "operators": dict(found.operators),
        "notes": [],
    }
    return {
        "inputs": [dataclasses.asdict(spec) for spec in found.inputs],
        "outputs": [dataclasses.asdict(spec) for spec in found.outputs],
        "facts": facts,
    }


def run(
    source: list[str],
    options: dict[str, Any],
    inputs: str,
    outputs: str,
    taps: list[str] | None = None,
) -> None:
    """Refuse, always.

    Raises:
        ModelError: Core ML models run on Apple's systems only.
    """
    raise ModelError(
        f"{Path(source[0]).name} is a Core ML model, which runs on Apple's systems only; compare "
        "it there (coremltools: MLModel.predict), or use what it was made from"
    )


def tensors(source: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """None: it is not run."""
    return []


def pt2_to_coreml(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """From a `.pt2`: the exported program itself; where coremltools lacks one of its operators,
    a trace of it, for which it knows others."""
    ct = _coremltools()
    program, notes = batch_of_one(open_program(Path(source[0]), options), options, source)
    check_straight(program, "Core ML")
    names = _Names(program.inputs, program.outputs)

    _check_passed_on(program)

    def exported() -> Any:
        return _convert(ct, program.exported.run_decompositions({}), outputs=names.ends(ct))

    def traced() -> Any:
        _mend_int()
        return _convert(
            ct, _trace(program), inputs=names.starts(ct), outputs=names.ends(ct),
            source="pytorch",
        )  # fmt: skip

    with quiet():
        made = _first_that_works((exported, traced))
    arrays = {**program.exported.state_dict, **program.exported.constants}
    weights = {name: as_array(one) for name, one in arrays.items() if hasattr(one, "detach")}
    return _finish(ct, made, target, names, weights, notes=notes, framework="torch")


def torchscript_to_coreml(
    source: list[str], target: str, options: dict[str, Any]
) -> dict[str, Any]:
    """From TorchScript, which coremltools reads itself; it may be a trace, or a script without
    control flow that depends on the data."""
    ct = _coremltools()
    script = open_script(source, options)
    _check_sizes(script.inputs)
    if script.constants:
        raise ModelError(
            f"it takes {', '.join(script.constants)}, which is no tensor: Core ML has no such input"
        )
    names = _Names(script.inputs, script.outputs)
    with quiet():
        _mend_int()
        made = _first_that_works(
            [lambda: _convert(ct, script.module, inputs=names.starts(ct), outputs=names.ends(ct))]
        )
    weights = {name: as_array(one) for name, one in script.module.state_dict().items()}
    return _finish(ct, made, target, names, weights, notes=list(script.notes), framework="torch")


def savedmodel_to_coreml(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """From a SavedModel's frozen graph."""
    tf = require("tensorflow", extra=TENSORFLOW)
    ct = _coremltools()
    frozen = freeze(source[0], options, layout=options.get("layout"))
    inputs, notes = _sized(frozen)
    names = _Names(inputs, [_spec(port) for port in frozen.outputs])
    graph = _renamed(tf, frozen, names)
    made = _first_that_works(
        [
            lambda: _convert(
                ct, graph, inputs=names.starts(ct), outputs=names.ends(ct), source="tensorflow"
            )
        ]
    )
    weights = {
        node.name: tf.make_ndarray(node.attr["value"].tensor)
        for node in frozen.graph.node
        if node.op == "Const"
    }
    facts = _finish(ct, made, target, names, weights, notes=notes, framework="tensorflow-cpu")
    whole = frozen.facts()
    return {**whole, **facts, "notes": [*whole["notes"], *facts["notes"]]}


# --- the interface ------------------------------------------------------------------------------


class _Names:
    """Inputs and outputs as Core ML has them: names of letters, digits and underscores, no two
    the same, and its types. `notes` say what that changed.

    Raises:
        ModelError: an input is of a type or has more axes than Core ML has.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.notes: list[str] = []
        self._taken: set[str] = set()
        self.inputs = [self._spec(spec) for spec in inputs]
        self.outputs = [self._spec(spec) for spec in outputs]

    def starts(self, ct: Any) -> list[Any]:
        return [
            ct.TensorType(name=spec.name, shape=spec.shape, dtype=np.dtype(spec.dtype).type)
            for spec in self.inputs
        ]

    def ends(self, ct: Any) -> list[Any]:
        return [ct.TensorType(name=spec.name) for spec in self.outputs]

    def _spec(self, spec: TensorSpec) -> TensorSpec:
        name = re.sub(r"\W", "_", spec.name, flags=re.ASCII)
        name = f"_{name}" if name[:1].isdigit() else name
        while name in self._taken:
            name += "_out"
        self._taken.add(name)
        if name != spec.name:
            self.notes.append(f"{spec.name!r} is called {name!r}")
        if spec.dtype not in _TYPES:
            raise ModelError(
                f"{spec.name!r} is {spec.dtype}; Core ML's arrays are {', '.join(_TYPES)}"
            )
        if len(spec.shape) > _MOST_AXES:
            raise ModelError(
                f"{spec.name!r} has {len(spec.shape)} axes; Core ML takes {_MOST_AXES} at most"
            )
        dtype = _TYPES[spec.dtype]
        if dtype != spec.dtype:
            self.notes.append(f"{name} is {dtype}, not {spec.dtype}, which Core ML has not")
        return dataclasses.replace(spec, name=name, dtype=dtype)


def _check_sizes(inputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        if any(isinstance(dim, str) for dim in spec.shape):
            raise UsageError(f"Core ML needs fixed sizes here; --inputs leaves some free: {spec}")


def _sized(frozen: Frozen) -> tuple[list[TensorSpec], list[str]]:
    """The inputs with a free batch of 1; others need --inputs."""
    found, notes = [], []
    for spec in map(_spec, frozen.inputs):
        if any(isinstance(dim, str) for dim in spec.shape[1:]):
            shown = "x".join(map(str, spec.shape))
            raise UsageError(
                f"Core ML needs fixed sizes here; {spec.name} is {shown}: add --inputs "
                f"{spec.name}=... with numbers"
            )
        one = dataclasses.replace(spec, shape=spec.with_batch(1))
        found.append(one)
        if one.shape != spec.shape:
            notes = ["the batch size is fixed to 1"]
    return found, notes


def _spec(port: Any) -> TensorSpec:
    return TensorSpec(port.name, port.dtype, port.shape if port.shape is not None else ())


def _check_passed_on(program: Program) -> None:
    signature = program.exported.graph_signature
    for slot, spec in zip(program.slots, program.inputs, strict=True):
        if signature.user_inputs[slot] in signature.user_outputs:
            raise ModelError(
                f"its input {spec.name!r} is an output, too, unchanged, which Core ML has not: "
                "leave that output out"
            )


def _renamed(tf: Any, frozen: Frozen, names: _Names) -> Any:
    """The graph from placeholders to identities that bear the names of the interface.

    Without control inputs: a frozen graph keeps no state, so they lead to assertions only, at
    which coremltools' folding of constants gives up.
    """
    bare = tf.compat.v1.GraphDef()
    bare.CopyFrom(frozen.graph)
    for node in bare.node:
        node.input[:] = [name for name in node.input if not name.startswith("^")]
    with tf.Graph().as_default() as graph:
        given = {
            port.tensor: tf.compat.v1.placeholder(port.dtype, spec.shape, name=spec.name)
            for port, spec in zip(frozen.inputs, names.inputs, strict=True)
        }
        ends = tf.graph_util.import_graph_def(
            bare, input_map=given, name="edgekit_source",
            return_elements=[port.tensor for port in frozen.outputs],
        )  # fmt: skip
        for end, spec in zip(ends, names.outputs, strict=True):
            tf.identity(end, name=spec.name)
    return graph.as_graph_def()


# --- coremltools --------------------------------------------------------------------------------


def _coremltools() -> Any:
    with quiet():  # it tells of every library that is newer than it
        return require("coremltools", extra="coreml")


def _mend_int() -> None:
    """Let coremltools 9.0 convert `aten::Int` beside NumPy 2.4, which makes no number of an array
    of one: github.com/apple/coremltools/pull/2632, in no release yet."""
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch import ops

    theirs = ops._int

    def _int(context: Any, node: Any) -> None:
        value = context[node.inputs[0]].val
        if value is None or np.ndim(value) == 0:
            theirs(context, node)
        else:
            context.add(Builder.const(val=int(np.asarray(value).item()), name=node.name))

    register_torch_op(_int, torch_alias=["int"], override=True)


def _convert(ct: Any, model: Any, **more: Any) -> Any:
    return ct.convert(
        model,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
        **more,
    )


def _first_that_works(ways: Sequence[Callable[[], Any]]) -> Any:
    reasons = []
    for way in ways:
        try:
            return way()
        except EdgeKitError:
            raise
        except Exception as error:
            reasons.append(blame(error))
    others = "".join(f"; from a trace of it: {one}" for one in reasons[1:])
    raise ModelError(f"coremltools cannot convert the model: {reasons[0]}{others}")


def _trace(program: Program) -> Any:
    import torch

    feeds = tuple(example(spec) for spec in program.inputs)
    trace: Any = torch.jit.trace
    return trace(flat_module(program), feeds, check_trace=False)


def _finish(
    ct: Any,
    made: Any,
    target: str,
    names: _Names,
    weights: Mapping[str, NDArray[Any]],
    *,
    notes: list[str],
    framework: str,
) -> dict[str, Any]:
    """Write the package, and check what is written against the source."""
    from importlib import metadata

    with quiet():
        spec = made.get_spec()
        for feature, wanted in zip(list(spec.description.input), names.inputs, strict=False):
            if feature.name != wanted.name:
                ct.utils.rename_feature(spec, feature.name, wanted.name, rename_outputs=False)
        with _package(ct, spec, made.weights_dir, Path(target)) as written:
            found = read_package(written)
            _check_interface(found, names)
            where = accounted(weights, found)
    return {
        "notes": [*notes, *names.notes, _NOTE, _said(where)],
        "checks": {
            "inputs": [str(one) for one in found.inputs],
            "outputs": [str(one) for one in found.outputs],
            "weights": where.to_json(),
        },
        "tools": {name: metadata.version(name) for name in ("coremltools", framework)},
    }  # fmt: skip


@contextmanager
def _package(ct: Any, spec: Any, weights: str, target: Path) -> Iterator[Path]:
    """The package as written, put at `target` when what is done with it raises nothing."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        path = Path(folder) / "model.mlpackage"
        ct.models.MLModel(spec, weights_dir=weights, skip_model_load=True).save(str(path))
        for extra in path.glob("executorch_*.json"):  # names of the source's nodes, for a debugger
            extra.unlink()
        yield path
        path.rename(target)


def _check_interface(found: Package, names: _Names) -> None:
    """Raise where what is written has another interface than the source."""
    for kind, wanted, have in (
        ("inputs", names.inputs, found.inputs),
        ("outputs", names.outputs, found.outputs),
    ):
        expected = [(one.name, one.dtype, tuple(one.shape)) for one in wanted]
        written = [(one.name, one.dtype, tuple(one.shape)) for one in have]
        fits = len(expected) == len(written) and all(
            a[:2] == b[:2] and _same_shape(a[2], b[2])
            for a, b in zip(expected, written, strict=True)
        )
        if not fits:
            raise ModelError(
                f"coremltools wrote other {kind} than the model's: {_shown(have)}; wanted "
                f"{_shown(wanted)}"
            )


def _same_shape(wanted: Sequence[int | str], have: Sequence[int | str]) -> bool:
    """A size that the source leaves open (an output's, where only the input's was fixed) may be
    any, and so may the shape of a scalar, which Core ML has not."""
    return not wanted or (
        len(wanted) == len(have)
        and all(isinstance(a, str) or a == b for a, b in zip(wanted, have, strict=True))
    )


def _shown(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs)) or "none"


def _said(where: Accounted) -> str:
    if not any((where.same, where.moved, where.scaled, where.elsewhere)):
        return "the model has no weights"
    parts = [
        f"{len(names)} {what}"
        for names, what in (
            (where.same, "bit for bit"), (where.moved, "in another order"),
            (where.scaled, "scaled channel by channel (folded batch normalization)"),
            (where.elsewhere, "not as such (folded, computed in advance, or not needed)"),
        )
        if names
    ]  # fmt: skip
    return f"{100 * where.share:.1f} % of the source's weights are in the file: {', '.join(parts)}"
