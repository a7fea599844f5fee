"""PyTorch -> everything: `module.py:factory`, live modules and `.pt2` (torch.export).

A factory and a live module become a `.pt2`; from there native edges lead to ONNX
(`torch.onnx.export(dynamo=True)`), TFLite (litert-torch) and ncnn (pnnx).

Names of intermediate tensors are those of the `.pt2`'s fx nodes (`conv2d_3`, `batch_norm_3`).
PyTorch's exporter decomposes the program and numbers some nodes anew (`getitem_9`, `add_140`);
`pt2_to_onnx` gives the ONNX tensors the names of the nodes they come from, so that the names
`tensors` lists and those of the ONNX file are the same wherever the tensor still exists.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit_converters import pnnx
from edgekit_converters.exported_program import (
    Program,
    as_array,
    as_tensor,
    described,
    example,
    flat_module,
    leaf_names,
    open_program,
    samples,
    save_program,
    single_thread,
    tensor_spec,
)
from edgekit_converters.torch_source import counts, export_model, live_model, load_factory, on_cpu
from edgekit_runtime.arrays import write_npz

__all__ = [
    "batch_of_one",
    "blame",
    "check_straight",
    "describe",
    "describe_factory",
    "factory_to_pt2",
    "pt2_to_ncnn",
    "pt2_to_onnx",
    "pt2_to_tflite",
    "quiet",
    "run",
    "run_factory",
    "save_live",
    "tensors",
    "tensors_factory",
]

#: protobuf ends at 2 GB; above this, weights go into a file beside the ONNX file
_MAX_INLINE_BYTES = 1_800_000_000
#: what the exporter writes about a node that names files of the author's machine
_PRIVATE = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


# --- module.py:factory, and live modules ----------------------------------------------------------


def describe_factory(source: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The interface of the model that a factory builds; it is exported to know it."""
    live = load_factory(source, options)
    with single_thread():
        program = export_model(live)
    return described(program.inputs, program.outputs, _facts(live.module, program))


def run_factory(
    source: list[str],
    options: dict[str, Any],
    inputs: str,
    outputs: str,
    taps: list[str] | None = None,
) -> None:
    """Run the module itself, as Python; it has no taps (see `tensors_factory`)."""
    from torch.utils import _pytree as pytree

    live = load_factory(source, options)
    results = {}
    with single_thread():
        for index, sample in samples(inputs, live.names):
            feeds = [
                as_tensor(sample[name], tensor_spec(name, tensor))
                for name, tensor in zip(live.names, live.tensors, strict=True)
            ]
            try:
                found = live.call(feeds)
            except Exception as error:
                raise ModelError(f"the model fails: {one_line(error)}") from error
            for name, value in zip(
                leaf_names(found, "output"), pytree.tree_leaves(found), strict=True
            ):
                results[f"{index}/{name}"] = as_array(value)
    write_npz(Path(outputs), results)


def tensors_factory(source: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """None: intermediate tensors of Python code have no names. The `.pt2` made of it has."""
    return []


def factory_to_pt2(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Build the model, load `--weights` into it, and export it."""
    return _save(load_factory(source, options), target)


def save_live(
    model: Any, example_inputs: Any, path: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Export a live module to a `.pt2`, in the user's own process; the module stays as it is.

    `example_inputs` is a tensor, a tuple, or a dict of tensors by argument name.

    Raises:
        ModelError: torch.export cannot express it, or it is no module.
    """
    for name in ("weights", "signature", "layout"):
        if options.get(name):
            raise UsageError(f"{name} does not go with a live PyTorch model: leave it out")
    torch = require("torch", extra="torch")
    if not isinstance(model, torch.nn.Module):
        live_model(model, example_inputs, options)  # says what it is
    with on_cpu(model) as module:
        examples = _on_cpu(example_inputs)
        return _save(live_model(module, examples, options), path)


def _on_cpu(examples: Any) -> Any:
    import torch
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, examples)


def _save(live: Any, target: str) -> dict[str, Any]:
    with single_thread(), quiet():
        program = export_model(live)
        save_program(program, target)
    return {"notes": list(program.notes), **_versions("torch")}


def _facts(module: Any, program: Program) -> dict[str, Any]:
    import torch

    return {
        "framework": f"PyTorch {torch.__version__}",
        "class": f"{type(module).__module__}.{type(module).__qualname__}".removeprefix(
            "edgekit_source_"
        ),
        "parameters": sum(p.numel() for p in module.parameters()),
        "layers": counts(module),
        "notes": list(program.notes),
    }


# --- .pt2 -----------------------------------------------------------------------------------------


def describe(source: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The interface of a `.pt2`, with its operators counted."""
    import torch

    program = open_program(Path(source[0]), options)
    state = program.exported.state_dict
    trained = program.exported.graph_signature.parameters
    facts = {
        "framework": f"PyTorch {torch.__version__}",
        "parameters": sum(state[name].numel() for name in trained if name in state),
        "layers": dict(Counter(map(_operator, _calls(program))).most_common()),
        "notes": list(program.notes),
    }
    return described(program.inputs, program.outputs, facts)


def run(
    source: list[str],
    options: dict[str, Any],
    inputs: str,
    outputs: str,
    taps: list[str] | None = None,
) -> None:
    """Run a `.pt2` on the samples; `taps` are names from `tensors`."""
    import torch

    program = open_program(Path(source[0]), options)
    labels = [spec.name for spec in program.outputs]
    names = _tensor_names(program)
    wanted = {node for node, name in names.items() if name in set(taps or [])}
    results: dict[str, Any] = {}

    class Tapped(torch.fx.Interpreter):
        def run_node(self, node: Any) -> Any:
            value = super().run_node(node)
            if node.name in wanted and isinstance(value, torch.Tensor):
                results[f"{index}/{names[node.name]}"] = as_array(value).copy()
            return value

    with single_thread():
        for index, sample in samples(inputs, [s.name for s in program.inputs]):
            feeds = [as_tensor(sample[spec.name], spec) for spec in program.inputs]
            try:
                model = flat_module(program)  # anew: a program may change its buffers
                if wanted:
                    tapped = Tapped(model.inner)
                    found = tapped.run(*program.filled(feeds), enable_io_processing=False)
                else:
                    found = model(*feeds)
            except Exception as error:
                raise ModelError(f"{Path(source[0]).name} fails: {one_line(error)}") from error
            for label, value in zip(labels, found, strict=True):
                results[f"{index}/{label}"] = as_array(value)
    write_npz(Path(outputs), results)


def tensors(source: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The tensors that `run` can deliver, in order; what is an output bears the output's name."""
    import torch

    program = open_program(Path(source[0]), options)
    names = _tensor_names(program)
    interface_names = _input_nodes(program)
    origin: dict[str, list[str]] = {}
    listed = []
    for node in program.exported.graph.nodes:
        if node.op == "placeholder":
            origin[node.name] = [interface_names[node.name]] if node.name in interface_names else []
        if node.op != "call_function":
            continue
        feeds = [name for arg in node.all_input_nodes for name in origin.get(arg.name, [])]
        feeds = list(dict.fromkeys(feeds))
        if not isinstance(node.meta.get("val"), torch.Tensor):
            origin[node.name] = feeds  # a size, or a tuple that getitem takes apart
            continue
        origin[node.name] = [names[node.name]]
        listed.append(
            {"name": names[node.name], "node": f"{_where(node)} ({_kind(node)})", "inputs": feeds}
        )
    return listed


def pt2_to_onnx(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """ONNX by PyTorch's exporter, with the names of the `.pt2`."""
    torch = require("torch", extra="torch")
    require("onnxscript", extra="torch")
    program = open_program(Path(source[0]), options)
    opset = options.get("opset")
    with single_thread(), quiet():
        try:
            made = torch.onnx.export(
                program.exported,
                dynamo=True,
                input_names=[spec.name for spec in program.inputs],
                output_names=[spec.name for spec in program.outputs],
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:
            raise ModelError(f"torch.onnx cannot convert the model: {blame(error)}") from error
        found = int(made.model.opset_imports[""])
        if opset and found != opset:
            raise ModelError(
                f"torch.onnx made opset {found}, and cannot lower it to {opset}: use --opset "
                f"{found}"
            )
        _name_values(made, program)
        size = sum(value.const_value.nbytes for value in made.model.graph.initializers.values())
        made.save(target, external_data=size > _MAX_INLINE_BYTES)
    return {"opset": found, "notes": list(program.notes), **_versions("torch", "onnxscript")}


def pt2_to_tflite(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """TFLite by litert-torch, one signature `serving_default` with the names of the `.pt2`."""
    require("torch", extra="torch")
    program, notes = batch_of_one(open_program(Path(source[0]), options), options, source)
    check_straight(program, "TFLite by litert-torch")
    wide = [s for s in (*program.inputs, *program.outputs) if s.dtype in ("int64", "float64")]
    if wide:
        # by default it makes them 32 bits wide, which would be another interface
        notes.append(f"{', '.join(s.name for s in wide)}: kept 64 bits wide")
    with single_thread(), quiet():
        litert = require("litert_torch", extra="torch")
        feeds = {spec.name: example(spec) for spec in program.inputs}
        try:
            made = litert.convert(
                flat_module(program, named=True), sample_kwargs=feeds, enable_x64=bool(wide)
            )
            made.export(target)
        except Exception as error:
            raise ModelError(f"litert-torch cannot convert the model: {blame(error)}") from error
    return {"notes": notes, **_versions("torch", "litert-torch", "litert-converter")}


def pt2_to_ncnn(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """ncnn by pnnx, from a trace of the program: it has no control flow that a trace could lose."""
    torch = require("torch", extra="torch")
    program, notes = batch_of_one(open_program(Path(source[0]), options), options, source)
    pnnx.check_types(program.inputs)
    check_straight(program, "ncnn")
    feeds = tuple(example(spec) for spec in program.inputs)
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder, single_thread(), quiet():
        path = Path(folder) / "model.pt"
        try:
            traced = torch.jit.trace(flat_module(program), feeds, check_trace=False)
            torch.jit.save(traced, str(path))
        except Exception as error:
            raise ModelError(f"torch.jit cannot trace the model: {one_line(error)}") from error
        made = pnnx.convert(path, Path(target), program.inputs, program.outputs)
    return {"notes": [*notes, *made["notes"]], **_versions("torch", "pnnx")}


# --- shared ---------------------------------------------------------------------------------------


def _name_values(made: Any, program: Program) -> None:
    """Give the ONNX tensors the names of the nodes they come from, and the free dimensions theirs.

    A node of the decomposed program knows the node it was made from; of several made from one,
    the last tensor is its result.
    """
    import torch

    nodes = {node.name for node in _calls(program)}
    ours = _tensor_names(program)
    source: dict[str, str] = {}
    for node in made.exported_program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        origin = _origin(node)
        part = node.args[1] if _operator(node) == "getitem" else 0
        if origin in nodes and (part == 0 or origin == node.name):
            source[origin] = node.name
    target = {new: ours[old] for old, new in source.items()}
    fixed = {spec.name for spec in (*program.inputs, *program.outputs)}
    values = [v for node in made.model.graph for v in node.outputs if v.name not in fixed]
    taken = {*fixed, *target.values()}
    for value in values:
        name = target.get(value.name)
        if name is None or name in fixed:
            name = value.name
            while name in taken:  # another node of the program is called like that
                name = f"{name}_onnx"
        value.name = name
        taken.add(name)
    for value in (*made.model.graph.inputs, *made.model.graph.outputs, *values):
        if value.shape is not None:
            _name_dims(value.shape, program.dims)
    for node in made.model.graph.all_nodes():
        for key in _PRIVATE:
            node.metadata_props.pop(key, None)


def _origin(node: Any) -> str:
    """The name that the node had in the program that was given to the exporter."""
    chain = node.meta.get("from_node")
    name = str(node.name)
    while chain:
        name, chain = chain[-1].name, chain[-1].from_node
    return name


def _name_dims(shape: Any, dims: dict[str, str]) -> None:
    import onnx_ir

    for axis, dim in enumerate(shape):
        text = getattr(dim, "value", None)
        if isinstance(text, str):
            named = re.sub(r"[a-z]+\d+", lambda m: dims.get(m[0], m[0]), text)
            shape[axis] = onnx_ir.SymbolicDim(named)


def batch_of_one(
    program: Program, options: dict[str, Any], source: list[str]
) -> tuple[Program, list[str]]:
    """The program with every size fixed: a free first axis is 1, others need --inputs."""
    notes = list(program.notes)
    open_axes = [
        spec for spec in program.inputs if any(isinstance(dim, str) for dim in spec.shape[1:])
    ]
    if open_axes:
        line = " ".join(_inputs_line(spec) for spec in program.inputs)
        raise UsageError(
            f"this format needs fixed sizes; the model has {open_axes[0]}: add "
            f"--inputs {line} (with your sizes)"
        )
    if any(isinstance(dim, str) for spec in program.inputs for dim in spec.shape):
        wanted = {s.name: {"shape": list(s.with_batch(1))} for s in program.inputs}
        program = open_program(Path(source[0]), {**options, "inputs": wanted})
        notes.append("the batch size is fixed to 1")
    return program, notes


def check_straight(program: Program, target: str) -> None:
    """Refuse torch.cond and its like, which only ONNX has."""
    import torch

    inner = {
        str(node.target)
        for node in _calls(program)
        if isinstance(node.target, torch._ops.HigherOrderOperator)
        and any(arg.op == "get_attr" for arg in node.all_input_nodes)
    }
    if inner:
        raise ModelError(
            f"the model has control flow ({', '.join(sorted(inner))}), which {target} has not: "
            "export it without, or convert it to ONNX"
        )


def _inputs_line(spec: Any) -> str:
    sizes = [str(d) if isinstance(d, int) else ("1" if i == 0 else "224")
             for i, d in enumerate(spec.shape)]  # fmt: skip
    return f"{spec.name}={'x'.join(sizes)}:{spec.dtype}"


def _calls(program: Program) -> list[Any]:
    return [node for node in program.exported.graph.nodes if node.op == "call_function"]


def _operator(node: Any) -> str:
    """`conv2d` of `aten.conv2d.default`."""
    text = str(getattr(node.target, "__name__", node.target))
    return text.split(".", maxsplit=1)[0]


def _where(node: Any) -> str:
    """The module that made it, as the user calls it (`features.3.conv`), or the node's name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return str(path) or str(node.name)


def _kind(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = str(getattr(stack[-1][1], "__name__", stack[-1][1])) if stack else ""
    known = stack and "torch.nn." in str(stack[-1][1])
    return kind.rpartition(".")[2] if known and stack[-1][0] else _operator(node)


def _input_nodes(program: Program) -> dict[str, str]:
    """Our input name by the name of its placeholder."""
    from torch.export.graph_signature import InputKind

    signature = program.exported.graph_signature
    user = [s.arg.name for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
    return {user[slot]: spec.name for slot, spec in zip(program.slots, program.inputs, strict=True)}


def _tensor_names(program: Program) -> dict[str, str]:
    """The name of each node's tensor: its own, or that of the output it is."""
    names = {node.name: node.name for node in _calls(program)}
    user = program.exported.graph_signature.user_outputs
    for node, spec in reversed(list(zip(user, program.outputs, strict=True))):
        if node in names:
            names[node] = spec.name
    return names


def blame(error: BaseException) -> str:
    """The last reason in a chain of errors, which names the operator."""
    reason = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    said = one_line(ValueError(str(reason).partition("While executing")[0]))
    return f"{type(reason).__name__}: {said}"


def _versions(*distributions: str) -> dict[str, Any]:
    from importlib import metadata

    return {"tools": {name: metadata.version(name) for name in distributions}}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of frameworks in the user's own process."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
