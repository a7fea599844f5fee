"""TorchScript (`.pt`, `.jit`) -> ONNX (`torch.onnx.export(dynamo=False)`) and ncnn (pnnx).

A TorchScript file holds a program but no shapes: `--inputs` gives them. It may have parts with a
`forward` of their own; `--signature part.name` converts one of these.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit_converters import pnnx
from edgekit_converters.exported_program import (
    as_array,
    as_tensor,
    described,
    example,
    leaf_names,
    samples,
    single_thread,
)
from edgekit_converters.pickles import explain_pickle
from edgekit_runtime.arrays import write_npz
from edgekit_runtime.manifest import TensorSpec

__all__ = [
    "Script",
    "describe",
    "explain_pickle",
    "open_script",
    "run",
    "tensors",
    "to_ncnn",
    "to_onnx",
]


@dataclass(frozen=True)
class Script:
    """A module and its interface; `constants` fill the arguments that are no tensors."""

    module: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, Any]
    notes: tuple[str, ...]

    def call(self, feeds: list[Any]) -> list[Any]:
        """The outputs as a flat list."""
        from torch.utils import _pytree as pytree

        named = {s.name: f for s, f in zip(self.inputs, feeds, strict=True)}
        return list(pytree.tree_leaves(self.module(**named, **self.constants)))


def describe(source: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The interface of a TorchScript module, with its layers counted.

    Raises:
        UsageError: without `trust_source`; shapes are not given; the options do not fit.
        ModelError: it is no TorchScript, keeps state, or fails on inputs of these shapes.
    """
    import torch

    script = open_script(source, options)
    leaves = [m for m in script.module.modules() if not list(m.children())]
    facts = {
        "framework": f"TorchScript, read by PyTorch {torch.__version__}",
        "parameters": sum(p.numel() for p in script.module.parameters()),
        "layers": dict(Counter(m.original_name for m in leaves).most_common()),
        "notes": list(script.notes),
    }
    return described(script.inputs, script.outputs, facts)


def run(
    source: list[str],
    options: dict[str, Any],
    inputs: str,
    outputs: str,
    taps: list[str] | None = None,
) -> None:
    """Run the module on the samples; it has no taps."""
    script = open_script(source, options)
    results = {}
    with _calm(source[0]):
        for index, sample in samples(inputs, [spec.name for spec in script.inputs]):
            feeds = [as_tensor(sample[spec.name], spec) for spec in script.inputs]
            for spec, value in zip(script.outputs, script.call(feeds), strict=True):
                results[f"{index}/{spec.name}"] = as_array(value)
    write_npz(Path(outputs), results)


def tensors(source: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """None: the interpreter of TorchScript has no way to look at intermediate tensors."""
    return []


def to_onnx(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """ONNX by PyTorch's older exporter, which takes scripts."""
    import torch

    script = open_script(source, options)
    free = {
        spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in (*script.inputs, *script.outputs)
    }
    with _calm(source[0]):
        args = tuple(
            example(spec) if name not in script.constants else script.constants[name]
            for name, spec in _arguments(script)
        )
        try:
            torch.onnx.export(
                script.module,
                args,
                target,
                dynamo=False,
                opset_version=options.get("opset"),
                input_names=[spec.name for spec in script.inputs],
                output_names=[spec.name for spec in script.outputs],
                dynamic_axes={name: axes for name, axes in free.items() if axes},
            )
        except Exception as error:
            raise ModelError(f"torch.onnx cannot convert the model: {one_line(error)}") from error
    onnx = require("onnx", extra="onnx")
    made = onnx.load(target, load_external_data=False)
    missing = {spec.name for spec in script.inputs} - {value.name for value in made.graph.input}
    if missing:
        raise ModelError(f"no output depends on the input {missing.pop()!r}: convert without it")
    for value, spec in zip(made.graph.output, script.outputs, strict=True):
        _set_shape(value, spec)  # the exporter forgets some
    onnx.save(made, target)
    opset = next(one.version for one in made.opset_import if one.domain == "")
    return {"opset": opset, "notes": list(script.notes), "tools": _versions("torch")}


def to_ncnn(source: list[str], target: str, options: dict[str, Any]) -> dict[str, Any]:
    """ncnn by pnnx, which reads TorchScript itself."""
    import torch

    script = open_script(source, options)
    notes = list(script.notes)
    for spec in script.inputs:
        if any(isinstance(dim, str) for dim in spec.shape):
            raise UsageError(f"ncnn needs fixed sizes; --inputs leaves some free: {spec}")
    pnnx.check_types(script.inputs)
    if script.constants:
        raise ModelError(
            f"it takes {', '.join(script.constants)}, which is no tensor: ncnn has no such inputs"
        )
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder, _calm(source[0]):
        path = Path(folder) / "model.pt"
        torch.jit.save(script.module, str(path))
        try:
            made = pnnx.convert(path, Path(target), script.inputs, script.outputs)
        except ModelError as error:
            graph = script.module.inlined_graph
            inner = sorted({n.kind() for n in _all_nodes(graph) if [*n.blocks()]})
            if not inner:
                raise
            raise ModelError(
                f"pnnx cannot convert the model: it has control flow ({', '.join(inner)}), which "
                "ncnn has not; trace it (torch.jit.trace), or use another format"
            ) from error
    return {**made, "notes": [*notes, *made["notes"]], "tools": _versions("torch", "pnnx")}


def _set_shape(value: Any, spec: TensorSpec) -> None:
    del value.type.tensor_type.shape.dim[:]
    for dim in spec.shape:
        made = value.type.tensor_type.shape.dim.add()
        if isinstance(dim, int):
            made.dim_value = dim
        else:
            made.dim_param = dim


def _arguments(script: Script) -> Iterator[tuple[str, Any]]:
    specs = {spec.name: spec for spec in script.inputs}
    for argument in script.module.forward.schema.arguments[1:]:
        if argument.name in specs or argument.name in script.constants:
            yield argument.name, specs.get(argument.name)


def open_script(source: list[str], options: dict[str, Any]) -> Script:
    """Load it, and the interface that --inputs gives it.

    Raises:
        UsageError: without `trust_source`; shapes are not given; the options do not fit.
        ModelError: it is no TorchScript, keeps state, or fails on inputs of these shapes.
    """
    path = Path(source[0])
    for name in ("weights", "layout"):
        if options.get(name):
            raise UsageError(f"--{name} does not go with TorchScript: leave it out")
    if not path.is_file():
        raise UsageError(f"no file {path}")
    kind = explain_pickle(str(path))
    if not kind.endswith("is TorchScript"):
        raise ModelError(kind)
    if not options.get("trust_source"):
        raise UsageError(
            f"{path.name} is TorchScript, a program that can write files; if you trust whoever "
            "made it, add --trust-source"
        )
    torch = require("torch", extra="torch")
    with _calm(path.name):
        try:
            module = torch.jit.load(str(path), map_location="cpu").eval()
        except Exception as error:
            raise ModelError(f"{path.name} is damaged: {one_line(error)}") from error
        module = _part(module, options.get("signature"), path.name)
        return _interface(module, options.get("inputs") or {}, path.name)


def _part(module: Any, name: str | None, where: str) -> Any:
    """The module, or the part of it that --signature names; it must not keep state."""
    parts = {n: m for n, m in module.named_modules() if n and hasattr(m, "forward")}
    if name:
        if name not in parts:
            direct = [n for n in parts if "." not in n]
            raise UsageError(
                f"{where} has no part {name!r} for --signature; it has {', '.join(direct[:8])}"
            )
        module = parts[name]
    state = _state(module)
    if not state:
        return module
    better = [
        f"--signature {n} (takes {', '.join(a.name for a in m.forward.schema.arguments[1:])})"
        for n, m in parts.items()
        if "." not in n and not _state(m)
    ]
    hint = f": convert a part that takes its state as an input, {' or '.join(better[:2])}"
    raise ModelError(
        f"{where} changes its own attributes ({', '.join(state[:4])}) when it runs, which no other "
        f"format can{hint if better else ': let forward take and return its state'}"
    )


def _state(module: Any) -> list[str]:
    """Attributes that forward assigns to."""
    try:
        nodes = list(_all_nodes(module.inlined_graph))
    except RuntimeError:
        return []
    return list(dict.fromkeys(n.s("name") for n in nodes if n.kind() == "prim::SetAttr"))


def _all_nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _all_nodes(inner)


def _taken(
    module: Any, wanted: dict[str, Any], where: str
) -> tuple[list[TensorSpec], dict[str, Any], list[str]]:
    """The tensors that forward takes, in the shapes of --inputs, and its other arguments."""
    arguments = module.forward.schema.arguments[1:]
    tensors_in = [a for a in arguments if str(a.type) == "Tensor"]
    notes = []
    constants = {}
    for argument in arguments:
        if argument in tensors_in:
            continue
        if not argument.has_default_value():
            raise ModelError(
                f"{where} takes {argument.name!r}, a {argument.type}: only tensors can be inputs. "
                "Export it with that value fixed, or use --signature for a part of it"
            )
        constants[argument.name] = argument.default_value
        notes.append(f"{argument.name} is fixed to {argument.default_value!r}")
    names = [a.name for a in tensors_in]
    unknown = [name for name in wanted if name not in names]
    if unknown and len(wanted) != len(names):
        raise UsageError(f"--inputs names {unknown[0]!r}; {where} takes {', '.join(names)}")
    missing = [a.name for a in tensors_in if a.name not in wanted and not a.has_default_value()]
    if missing or not wanted:
        line = " ".join(f"{n}=1x3x224x224:float32" for n in names)
        raise UsageError(
            f"{where} does not say the shapes of its inputs: add --inputs {line} (with your sizes; "
            "a letter is a free dimension)"
        )
    inputs = []
    for name, raw in wanted.items():
        if raw.get("shape") is None:
            raise UsageError(f"--inputs gives no shape for {name!r}; TorchScript has none")
        inputs.append(TensorSpec(name, raw.get("dtype") or "float32", tuple(raw["shape"])))
    inputs.sort(key=lambda spec: names.index(spec.name))
    return inputs, constants, notes


def _interface(module: Any, wanted: dict[str, Any], where: str) -> Script:
    import torch
    from torch.utils import _pytree as pytree

    inputs, constants, notes = _taken(module, wanted, where)
    script = Script(module, tuple(inputs), (), constants, tuple(notes))
    symbols = sorted({d for spec in inputs for d in spec.shape if isinstance(d, str)})
    # Sizes that differ from one another and from usual ones, to find them again in the outputs;
    # small ones for a batch.
    batch = {spec.shape[0] for spec in inputs if spec.shape}
    first, second = (
        {d: (small if d in batch else large) + 8 * i for i, d in enumerate(symbols)}
        for small, large in ((3, 64), (5, 96))
    )
    sizes: list[list[list[int]]] = []
    found: Any = None
    given: list[TensorSpec] = []
    for chosen in (first, second):
        concrete = [
            replace(s, shape=tuple(chosen[d] if isinstance(d, str) else d for d in s.shape))
            for s in inputs
        ]
        try:
            raw_out = module(**{s.name: example(s) for s in concrete}, **constants)
        except Exception as error:
            shapes = ", ".join(map(str, concrete))
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ModelError(f"{where} fails on {shapes}: {lines[-1] if lines else error}") from (
                error
            )
        found, given = raw_out, concrete
        leaves = pytree.tree_leaves(raw_out)
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise ModelError(f"{where} returns something else than tensors")
        sizes.append([list(leaf.shape) for leaf in leaves])
    outputs = []
    leaves = pytree.tree_leaves(found)
    for i, (name, leaf) in enumerate(zip(leaf_names(found, "output"), leaves, strict=True)):
        pairs = [*zip(sizes[0][i], sizes[1][i], strict=True)]
        table = {(first[d], second[d]): d for d in symbols}
        shape = [a if a == b else table.get((a, b), f"D{i}_{k}") for k, (a, b) in enumerate(pairs)]
        dtype = str(leaf.dtype).removeprefix("torch.")
        outputs.append(TensorSpec(name, dtype, tuple(shape)))
    shaped = tuple(
        replace(spec, example=one.with_batch(1) if spec.shape != one.shape else None)
        for spec, one in zip(inputs, given, strict=True)
    )
    return replace(script, inputs=shaped, outputs=tuple(outputs))


def _versions(*distributions: str) -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in distributions}


@contextmanager
def _calm(where: str) -> Iterator[None]:
    """One thread, no gradients, no warnings; the interpreter's errors as ours."""
    with warnings.catch_warnings(), single_thread():
        warnings.simplefilter("ignore")
        yield
