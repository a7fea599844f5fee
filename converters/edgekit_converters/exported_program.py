"""What every converter needs to know of a PyTorch program: its tensors by name, in flat order.

PyTorch names placeholders, but neither outputs nor free dimensions; the names given to
`torch.export` are lost when it is saved. Here they are: those in the archive's EXTRA when EdgeKit
wrote it, otherwise made from the program itself.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line
from edgekit_converters.pt2_archive import EXTRA, load_program
from edgekit_runtime.arrays import read_npz
from edgekit_runtime.manifest import TensorSpec

__all__ = [
    "Program",
    "as_array",
    "as_tensor",
    "described",
    "example",
    "flat_module",
    "leaf_names",
    "matched",
    "open_program",
    "program_of",
    "samples",
    "save_program",
    "single_thread",
    "tensor_spec",
]


@dataclass(frozen=True)
class Program:
    """An `ExportedProgram` and its interface.

    `slots` are the positions of `inputs` among all the leaves of the call; the others are the
    constants in `leaves`. `dims` maps PyTorch's symbols to the names of free dimensions.
    """

    exported: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slots: tuple[int, ...]
    leaves: tuple[Any, ...]
    dims: dict[str, str]
    notes: tuple[str, ...] = ()

    def filled(self, tensors: Sequence[Any]) -> list[Any]:
        """All the leaves of a call, with the tensors in their places."""
        leaves = list(self.leaves)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            leaves[slot] = tensor
        return leaves


def open_program(path: Path, options: dict[str, Any]) -> Program:
    """Read a `.pt2`; `options["inputs"]` may give its free dimensions a size.

    Raises:
        ModelError: it is damaged, or has inputs or outputs other than tensors.
        UsageError: it could run code, or the options do not fit it.
    """
    for name in ("weights", "signature", "layout"):
        if options.get(name):
            raise UsageError(f"--{name} does not go with a .pt2: leave it out")
    exported, extra, notes = load_program(path, trusted=bool(options.get("trust_source")))
    program = program_of(exported, extra, notes)
    return _with_shapes(program, options.get("inputs") or {}, path.name)


def program_of(exported: Any, extra: dict[str, Any], notes: Sequence[str] = ()) -> Program:
    """The interface of an `ExportedProgram`; `extra` holds the names of a saved one."""
    import torch
    from torch.export.graph_signature import InputKind, OutputKind

    signature = exported.graph_signature
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    arguments = [s.arg for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
    slots = [i for i, a in enumerate(arguments) if isinstance(values.get(a.name), torch.Tensor)]
    for i, argument in enumerate(arguments):
        if i not in slots and not hasattr(argument, "value"):
            raise ModelError(
                f"its input {argument.name!r} is not a tensor: export it as a constant"
            )
    results = [s.arg for s in signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    for argument in results:
        if not isinstance(values.get(getattr(argument, "name", "")), torch.Tensor):
            raise ModelError("one of its outputs is not a tensor: return tensors only")
    taken, given = [values[arguments[i].name] for i in slots], [values[a.name] for a in results]
    if not slots or not results:
        raise ModelError(f"it has {len(slots)} inputs and {len(results)} outputs that are tensors")
    dims = _dim_names(taken, _texts(extra.get("dims"), None) or {})
    names_in = _texts(extra.get("inputs"), len(slots)) or [arguments[i].name for i in slots]
    names_out = _texts(extra.get("outputs"), len(given)) or _output_names(exported, len(given))
    return Program(
        exported,
        tuple(tensor_spec(name, v, dims) for name, v in zip(names_in, taken, strict=True)),
        tuple(tensor_spec(name, v, dims) for name, v in zip(names_out, given, strict=True)),
        tuple(slots),
        tuple(getattr(argument, "value", None) for argument in arguments),
        dims,
        tuple(notes),
    )


def save_program(program: Program, target: str) -> None:
    """Write a `.pt2` that keeps the names of inputs, outputs and free dimensions."""
    import torch

    names = {
        "inputs": [spec.name for spec in program.inputs],
        "outputs": [spec.name for spec in program.outputs],
        "dims": program.dims,
    }
    torch.export.save(program.exported, target, extra_files={EXTRA: json.dumps(names)})


def flat_module(program: Program, *, named: bool = False) -> Any:
    """An `nn.Module` that takes the program's tensors alone, in order (`named`: by name), and
    returns its outputs as a tuple (`named`: as a dict)."""
    import torch
    from torch.utils import _pytree as pytree

    inner = program.exported.module(check_guards=False)
    spec = program.exported.call_spec.in_spec
    names = [one.name for one in program.inputs]
    labels = [one.name for one in program.outputs]

    def call(tensors: Sequence[Any]) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(program.filled(tensors), spec)
        return list(pytree.tree_leaves(inner(*args, **kwargs)))

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.training = False  # .eval() would ask the exported module, which refuses

    class Flat(Base):
        def forward(self, *tensors: Any) -> Any:
            return tuple(call(tensors))

    class Named(Base):
        def forward(self, **tensors: Any) -> Any:
            return dict(zip(labels, call([tensors[name] for name in names]), strict=True))

    return Named() if named else Flat()


def example(spec: TensorSpec, seed: int = 0) -> Any:
    """A tensor of the spec's dtype and `usual_shape`: seeded noise, zeros for integers."""
    import torch

    dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        return torch.zeros(spec.usual_shape(), dtype=dtype)
    noise = torch.randn(spec.usual_shape(), generator=torch.Generator().manual_seed(seed))
    return noise.to(dtype)


def as_tensor(array: Any, spec: TensorSpec) -> Any:
    """The array as a tensor of the spec's dtype."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(array)).to(getattr(torch, spec.dtype))


def as_array(tensor: Any) -> Any:
    """The tensor as an array; what numpy has no type for becomes float32."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16 or "float8" in str(tensor.dtype):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Deterministic, without gradients: sums are split by the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def leaf_names(tree: Any, root: str) -> list[str]:
    """A name for each leaf: its keys joined by `_`, under `root` where the tree names nothing."""
    from torch.utils import _pytree as pytree

    leaves, _ = pytree.tree_flatten_with_path(tree)
    names = []
    for path, _leaf in leaves:
        parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        named = bool(path) and not hasattr(path[0], "idx")
        names.append("_".join(parts if named else [root, *parts]))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ModelError(f"two of its inputs or outputs would be called {twice[0]!r}: rename one")
    return names


def _output_names(exported: Any, count: int) -> list[str]:
    from torch.utils import _pytree as pytree

    spec = exported.call_spec.out_spec
    names = leaf_names(pytree.tree_unflatten([0] * spec.num_leaves, spec), "output")
    return names if len(names) == count else [f"output_{i}" for i in range(count)]


def tensor_spec(name: str, value: Any, dims: dict[str, str] | None = None) -> TensorSpec:
    """The spec of a tensor; its symbolic sizes get the names in `dims`."""
    import torch

    dtype = str(value.dtype).removeprefix("torch.")
    if dtype in ("bfloat16", "complex32") or dtype.startswith("float8"):
        raise ModelError(
            f"{name!r} is {dtype}, which the other formats' tools do not take: convert the model "
            "with .float() before exporting it"
        )
    shape: list[int | str] = []
    for size in value.shape:
        if isinstance(size, torch.SymInt) and not str(size).isdigit():
            shape.append(re.sub(r"[a-z]+\d+", lambda m: (dims or {}).get(m[0], m[0]), str(size)))
        else:
            shape.append(int(size))
    seen = None
    if any(isinstance(dim, str) for dim in shape[1:]):
        # sizes of 1 rarely work for other axes than the batch: show those it was exported with
        hints = [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]
        if all(isinstance(hint, int) for hint in hints):
            seen = (1, *hints[1:]) if isinstance(shape[0], str) else tuple(hints)
    return TensorSpec(name, dtype, tuple(shape), example=seen)


def _dim_names(values: Sequence[Any], given: dict[str, str]) -> dict[str, str]:
    """Names for the symbols in the inputs' shapes: N for the first axis, then D1, D2 ..."""
    import torch

    names = dict(given)
    for value in values:
        for axis, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt):
                continue
            for symbol in re.findall(r"[a-z]+\d+", str(size)):
                if symbol in names:
                    continue
                wanted = "N" if axis == 0 else f"D{axis}"
                while wanted in names.values():
                    wanted += "_"
                names[symbol] = wanted
    return names


def _texts(raw: Any, count: int | None) -> Any:
    """A list of `count` texts, or (None) an object of texts, as EXTRA should hold; else None."""
    if count is None:
        plain = isinstance(raw, dict) and all(isinstance(v, str) for v in raw.values())
        return raw if plain else None
    plain = isinstance(raw, list) and all(isinstance(v, str) and v for v in raw)
    return raw if plain and len({*raw}) == count == len(raw) else None


def _with_shapes(program: Program, wanted: dict[str, Any], where: str) -> Program:
    """The program with the free dimensions that `wanted` gives a size made fixed."""
    if not wanted:
        return program
    specs = list(matched(program.inputs, wanted, where))
    if [s.shape for s in specs] == [s.shape for s in program.inputs]:
        return replace(program, inputs=tuple(specs))
    import torch

    named = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)}
    dims = {name: torch.export.Dim(name) for name in named}
    free = [{i: dims[d] for i, d in enumerate(s.shape) if isinstance(d, str)} for s in specs]
    # torch.export takes a size of 1 for a constant
    sized = [
        replace(spec, example=tuple(max(2, n) if i in axes else n for i, n in enumerate(shape)))
        for spec, axes, shape in zip(specs, free, map(TensorSpec.usual_shape, specs), strict=True)
    ]
    try:
        exported = torch.export.export(
            flat_module(program),
            tuple(example(spec) for spec in sized),
            dynamic_shapes={"tensors": tuple(axes or None for axes in free)},
            strict=False,
        )
    except Exception as error:
        shapes = ", ".join(map(str, specs))
        raise ModelError(f"{where} does not take {shapes}: {one_line(error)}") from error
    values = [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"][-len(specs) :]
    symbols = {
        str(value.shape[i]): str(spec.shape[i])
        for value, spec, axes in zip(values, specs, free, strict=True)
        for i in axes
    }
    outputs = [s.name for s in program.outputs]
    names = {"inputs": [s.name for s in specs], "outputs": outputs, "dims": symbols}
    return program_of(exported, names, program.notes)


def matched(
    specs: Sequence[TensorSpec], wanted: dict[str, Any], where: str
) -> Iterator[TensorSpec]:
    """The specs with the shapes of `--inputs`.

    Raises:
        UsageError: a name, a rank, a fixed size or a dtype does not fit.
    """
    names = [spec.name for spec in specs]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UsageError(f"--inputs names {unknown[0]!r}; {where} has {', '.join(names)}")
    for spec in specs:
        shape = (wanted.get(spec.name) or {}).get("shape")
        dtype = (wanted.get(spec.name) or {}).get("dtype") or spec.dtype
        if shape is None:
            shape = list(spec.shape)
        fits = len(shape) == len(spec.shape) and all(
            isinstance(have, str) or isinstance(want, str) or have == want
            for have, want in zip(spec.shape, shape, strict=True)
        )
        if not fits or dtype != spec.dtype:
            raise UsageError(
                f"--inputs wants {spec.name}: {dtype} {shape}, but {where} was exported for "
                f"{spec}; export it again from its code for another shape"
            )
        sizes = [
            want if isinstance(want, int) and isinstance(have, str) else have
            for have, want in zip(spec.shape, shape, strict=True)
        ]
        seen = spec.example and tuple(
            size if isinstance(size, int) else had
            for size, had in zip(sizes, spec.example, strict=True)
        )
        yield replace(spec, shape=tuple(sizes), example=seen)


def described(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], facts: dict[str, Any]
) -> dict[str, Any]:
    """What `describe` returns."""
    return {
        "inputs": [asdict(spec) for spec in inputs],
        "outputs": [asdict(spec) for spec in outputs],
        "facts": facts,
    }


def samples(path: str, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The samples of an .npz with arrays named "{i}/{input}", each with all of `names`."""
    grouped: dict[int, dict[str, Any]] = {}
    for key, array in read_npz(Path(path)).items():
        index, _, name = key.partition("/")
        grouped.setdefault(int(index), {})[name] = array
    for number, sample in sorted(grouped.items()):
        missing = [name for name in names if name not in sample]
        if missing:
            raise UsageError(f"the samples have no {missing[0]!r}; they have {', '.join(sample)}")
        yield number, sample
