"""PyTorch models that are code: `module.py:factory`, and a live `nn.Module`.

Both become an `ExportedProgram` here, the same way.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit_converters.exported_program import Program, as_tensor, leaf_names, program_of
from edgekit_converters.pickles import explain_pickle
from edgekit_runtime.manifest import TensorSpec

__all__ = [
    "LiveModel", "counts", "export_model", "live_model", "load_factory", "load_weights", "on_cpu",
]  # fmt: skip

#: what training frameworks wrap a state dict in
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
#: what they put before each name: DataParallel, torch.compile, Lightning
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class LiveModel:
    """A module in eval mode, and how to call it: `leaves` are all the arguments, flattened by
    `spec`; `slots` are the positions of the tensors, called `names`, among them."""

    module: Any
    leaves: tuple[Any, ...]
    spec: Any
    slots: tuple[int, ...]
    names: tuple[str, ...]
    free: dict[str, dict[int, str]]  # dimensions that --inputs left free: input, axis, name
    shaped: bool  # whether --inputs gave shapes
    notes: tuple[str, ...]

    def call(self, tensors: Sequence[Any]) -> Any:
        """The module's answer for the tensors, in the order of `names`."""
        args, kwargs = self.arguments(tensors)
        return self.module(*args, **kwargs)

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The tensors as positional and keyword arguments, as `forward` takes them."""
        from torch.utils import _pytree as pytree

        leaves = list(self.leaves)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    @property
    def tensors(self) -> list[Any]:
        """The example inputs that are tensors."""
        return [self.leaves[slot] for slot in self.slots]


def load_factory(source: list[str], options: dict[str, Any]) -> LiveModel:
    """Run `module.py:factory` and load `--weights` into what it returns.

    Raises:
        UsageError: without `trust_source`, or the source is not of that form.
        ModelError: the code fails, or returns something else than a model.
    """
    for name in ("signature", "layout"):
        if options.get(name):
            raise UsageError(f"--{name} does not go with module.py:factory: leave it out")
    path, _, name = source[0].rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UsageError(f"{source[0]} is not of the form module.py:function")
    if not options.get("trust_source"):
        raise UsageError(
            f"{Path(path).name} is a program, and converting it runs it; if you trust whoever "
            "wrote it, add --trust-source"
        )
    torch = require("torch", extra="torch")
    _seed(torch)
    made = _call(Path(path), name)
    model, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    notes: list[str] = []
    if options.get("weights"):
        if not isinstance(model, torch.nn.Module):
            raise UsageError("--weights goes with a factory that returns a PyTorch module")
        notes += load_weights(model, Path(options["weights"]))
    return live_model(model, examples, options, called=name, notes=notes)


def live_model(
    model: Any,
    examples: Any,
    options: dict[str, Any],
    *,
    called: str = "the model",
    notes: Sequence[str] = (),
) -> LiveModel:
    """Check a module and its example inputs; both stay as they are but for eval mode."""
    torch = require("torch", extra="torch")
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, torch.nn.Module):
        if type(model).__module__.partition(".")[0] in ("keras", "tf_keras"):
            raise ModelError(
                f"{called} returns a Keras model ({kind}): save it with model.save('m.keras') and "
                "convert that file, or pass the model to edgekit.export"
            )
        raise ModelError(
            f"{called} returns a {kind}; wanted (model, example_inputs), the model an nn.Module"
        )
    model.eval()
    wanted = options.get("inputs") or {}
    args, kwargs = _as_call(model, examples, wanted, called)
    from torch.utils import _pytree as pytree

    leaves, spec = pytree.tree_flatten((args, kwargs))
    names = _input_names(model, args, kwargs)
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if not slots:
        raise ModelError(f"{called} gives no example input that is a tensor")
    tensor_names = [names[i] for i in slots]
    renamed = _renamed(tensor_names, list(wanted))
    extra = []
    if renamed != tensor_names:
        pairs = ", ".join(f"{old} is {new}" for old, new in zip(tensor_names, renamed, strict=True))
        extra.append(f"inputs renamed in order: {pairs}")
    free: dict[str, dict[int, str]] = {}
    for slot, name in zip(slots, renamed, strict=True):
        leaves[slot], free[name] = _shaped(leaves[slot], wanted.get(name) or {}, name)
    return LiveModel(
        model, tuple(leaves), spec, tuple(slots), tuple(renamed), free, bool(wanted),
        (*notes, *extra),
    )  # fmt: skip


def export_model(live: LiveModel) -> Program:
    """`torch.export` it. The first axis is free where the module allows it, unless `--inputs`
    said otherwise.

    Raises:
        ModelError: torch.export cannot express the module; its reason in one line.
    """
    import torch

    notes = list(live.notes)
    if live.shaped:
        exported = _export(live, live.tensors, live.free)
    else:
        sizes = {t.shape[0] for t in live.tensors if t.dim()}
        scalars = any(not t.dim() for t in live.tensors)
        exported, reason = None, "its inputs differ in the first axis"
        if len(sizes) == 1 and not scalars:
            # torch.export takes a size of 1 for a constant: so the examples are doubled
            doubled = [torch.cat([t, t]) if len(t) == 1 else t for t in live.tensors]
            free = {name: {0: "N"} for name in live.names}
            try:
                exported = _export(live, doubled, free)
            except ModelError as error:
                reason = str(error).removeprefix(_FAILED)
        if exported is None:
            exported = _export(live, live.tensors, {})
            notes.append(
                f"the batch size is fixed to the example's: {reason}; a letter in --inputs makes "
                "a dimension free"
            )
        else:
            live = _freed(live)
    symbols = _symbols(exported, live)
    outputs = _result_names(exported)
    extra = {"inputs": list(live.names), "dims": symbols, "outputs": outputs}
    return program_of(exported, extra, notes)


_FAILED = "torch.export cannot express the model: "


def _freed(live: LiveModel) -> LiveModel:
    from dataclasses import replace

    return replace(live, free={name: {0: "N"} for name in live.names})


def _export(live: LiveModel, tensors: Sequence[Any], free: Mapping[str, dict[int, str]]) -> Any:
    import torch
    from torch.utils import _pytree as pytree

    args, kwargs = live.arguments(tensors)
    dims = {name: torch.export.Dim(name) for axes in free.values() for name in axes.values()}
    shapes: list[Any] = [None] * len(live.leaves)
    for slot, name in zip(live.slots, live.names, strict=True):
        shapes[slot] = {axis: dims[d] for axis, d in free.get(name, {}).items()} or None
    args_shapes, kwargs_shapes = pytree.tree_unflatten(shapes, live.spec)
    bound = inspect.signature(live.module.forward).bind(*args_shapes, **kwargs_shapes).arguments
    try:
        return torch.export.export(
            live.module, args, kwargs, dynamic_shapes=dict(bound) if dims else None, strict=False
        )
    except Exception as error:
        raise ModelError(_FAILED + _reason(error)) from error


def _reason(error: BaseException) -> str:
    """Torch's reason in one line, the line of the user's code, and what can be done."""
    text = str(error)
    frames = re.findall(r'File "([^"]+)", line (\d+)', text)
    own = [f"{Path(file).name}:{line}" for file, line in frames if "site-packages" not in file]
    where = f" at {own[-1]}" if own else ""
    first = next((line.strip() for line in text.splitlines() if line.strip()), str(type(error)))
    if "data-dependent" in text.lower() or "GuardOnDataDependent" in type(error).__name__:
        return (
            f"its control flow depends on the values of tensors{where} "
            f"({first.split(' (unhinted')[0]}): write that with torch.where or torch.cond, or "
            "leave it out of forward"
        )
    if "ConstraintViolation" in type(error).__name__ or "onstraints violated" in text:
        lines = [line.strip(" -\t") for line in text.splitlines()]
        fixes = [line for line in lines if re.match(r"\w+ = \S", line) and "Dim(" not in line]
        said = [line for line in lines if "specialized" in line or "not all values" in line.lower()]
        hint = "; ".join([*said[:1], *fixes[:3]]) or first
        return f"a dimension that was to be free is not ({hint}): give it a size with --inputs"
    return one_line(error) + where


def _symbols(exported: Any, live: LiveModel) -> dict[str, str]:
    """PyTorch's symbol for each dimension's name."""
    import torch

    found: dict[str, str] = {}
    values = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"]
    user = [v for v in values if isinstance(v, torch.Tensor)][-len(live.names) :]
    for value, name in zip(user, live.names, strict=True):
        for axis, dim in live.free.get(name, {}).items():
            if axis < value.dim() and isinstance(value.shape[axis], torch.SymInt):
                found[str(value.shape[axis])] = dim
    return found


def _result_names(exported: Any) -> list[str]:
    from torch.utils import _pytree as pytree

    spec = exported.call_spec.out_spec
    return leaf_names(pytree.tree_unflatten([0] * spec.num_leaves, spec), "output")


def _seed(torch: Any) -> None:
    """Weights drawn at random are the same in each of the processes that build the model."""
    import numpy as np

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _call(path: Path, name: str) -> Any:
    if not path.is_file():
        raise UsageError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"edgekit_source_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # what lies beside it can be imported
    sys.dont_write_bytecode = True  # nothing is written beside the user's code
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{path.name} needs the module {error.name!r}, which is not installed here"
        ) from error
    except Exception as error:
        raise ModelError(f"{path.name} fails: {type(error).__name__}: {one_line(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = inspect.getmembers(module, inspect.isfunction)
        found = [n for n, function in functions if function.__module__ == spec.name]
        raise UsageError(f"{path.name} has no function {name!r}; it has {', '.join(found)}")
    try:
        return factory()
    except Exception as error:
        raise ModelError(
            f"{path.name}:{name}() fails: {type(error).__name__}: {one_line(error)}"
        ) from error


def load_weights(model: Any, path: Path) -> list[str]:
    """Load a state dict, strictly; returns notes on what was unwrapped.

    Raises:
        UsageError: the file is not there, or holds code.
        ModelError: it does not fit the model; names what is missing or too much.
    """
    import torch

    if not path.is_file():
        raise UsageError(f"no file {path}")
    notes: list[str] = []
    if path.suffix == ".safetensors":
        try:
            state: Any = require("safetensors.torch", extra="torch").load_file(str(path))
        except Exception as error:
            raise ModelError(f"{path.name} is not read: {one_line(error)}") from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ModelError(
                f"--weights wants a state dict, torch.save(model.state_dict(), ...), and nothing "
                f"else is unpickled: {explain_pickle(str(path))}"
            ) from error
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            notes.append(f"weights taken from {key!r} in {path.name}")
            break
    if not isinstance(state, Mapping):
        raise ModelError(f"{path.name} holds a {type(state).__name__}; wanted a state dict")
    wanted = set(model.state_dict())
    for prefix in _PREFIXES:
        bare = {str(k).removeprefix(prefix): v for k, v in state.items()}
        if set(state) != wanted and all(str(k).startswith(prefix) for k in state):
            state = bare
            notes.append(f"{prefix!r} removed from the names of the weights")
    missing, surplus = sorted(wanted - set(state)), sorted(set(map(str, state)) - wanted)
    if missing or surplus:
        said = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names, what in ((missing, "missing"), (surplus, "not in the model"))
            if names
        ]
        raise ModelError(f"{path.name} does not fit the model: {'; '.join(said)}")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"{path.name} does not fit the model: {lines[-1]}") from error
    return notes


def _as_call(
    model: Any, examples: Any, wanted: dict[str, Any], called: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments, in the order of `forward`."""
    signature = inspect.signature(model.forward)
    if examples is None:
        if not wanted:
            first = next(iter(signature.parameters), "x")
            raise UsageError(
                f"{called} gives no example inputs: return (model, example_inputs), or add "
                f"--inputs {first}=1x3x224x224:float32"
            )
        # a symbol's size is a guess here: 2 on the first axis, 64 (32 times 2) on others
        made = [
            as_tensor(_noise(TensorSpec(name, (raw.get("dtype") or "float32"), tuple(
                d if isinstance(d, int) else (2 if axis == 0 else 64)
                for axis, d in enumerate(raw.get("shape") or ())))), TensorSpec(
                    name, raw.get("dtype") or "float32", ()))
            for name, raw in wanted.items()
        ]  # fmt: skip
        named = all(name in signature.parameters for name in wanted)
        examples = dict(zip(wanted, made, strict=True)) if named else tuple(made)
    examples = _to_tensors(examples)
    args, kwargs = (
        ((), dict(examples))
        if isinstance(examples, Mapping)
        else (tuple(examples), {})
        if isinstance(examples, tuple | list)
        else ((examples,), {})
    )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        given = list(kwargs) or len(args)
        raise ModelError(
            f"{called}'s example inputs ({given}) do not fit forward{signature}: {one_line(error)}"
        ) from error
    return bound.args, bound.kwargs


def _to_tensors(tree: Any) -> Any:
    import numpy as np
    import torch
    from torch.utils import _pytree as pytree

    def one(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return torch.from_numpy(leaf.copy())
        return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(one, tree)


def _noise(spec: TensorSpec) -> Any:
    import numpy as np

    shape = spec.with_batch(1)
    if spec.dtype.startswith("float"):
        return np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)


def _input_names(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name per leaf: the argument of `forward`, and the keys within it."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    tree: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            tree.update(value)
        else:
            tree[name] = value
    from torch.utils import _pytree as pytree

    # the order of leaf_names is that of the flattened call: arguments in the signature's order
    positional = {k: tree[k] for k in tree if k not in kwargs}
    keywords = {k: kwargs[k] for k in kwargs}
    names = [*leaf_names(positional, ""), *leaf_names(keywords, "")]
    count = len(pytree.tree_leaves((args, kwargs)))
    return names if len(names) == count else [f"input_{i}" for i in range(count)]


def _renamed(names: list[str], wanted: list[str]) -> list[str]:
    """Names that --inputs gives: the same ones, or as many others, in order."""
    if not wanted or all(name in names for name in wanted):
        return names
    if len(wanted) == len(names):
        return list(wanted)
    unknown = next(name for name in wanted if name not in names)
    raise UsageError(
        f"--inputs names {unknown!r}; the model takes {', '.join(names)}: use these names, or "
        "give as many others to rename them in order"
    )


def _shaped(tensor: Any, wanted: dict[str, Any], name: str) -> tuple[Any, dict[int, str]]:
    """An example of the wanted shape, and the axes that stay free."""
    shape, dtype = wanted.get("shape"), wanted.get("dtype")
    if shape is None:
        return tensor if dtype is None else tensor.to(_dtype(dtype, name)), {}
    if len(shape) != tensor.dim():
        raise UsageError(
            f"--inputs gives {name!r} {len(shape)} dimensions; the example has {[*tensor.shape]}"
        )
    sizes = tuple(
        want if isinstance(want, int) else max(2, have)
        for want, have in zip(shape, tensor.shape, strict=True)
    )
    free = {axis: want for axis, want in enumerate(shape) if isinstance(want, str)}
    kind = dtype or str(tensor.dtype).removeprefix("torch.")
    if sizes != tuple(tensor.shape):
        tensor = as_tensor(_noise(TensorSpec(name, kind, sizes)), TensorSpec(name, kind, sizes))
    return tensor.to(_dtype(kind, name)), free


def _dtype(name: str, of: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"--inputs gives {of!r} the dtype {name!r}, which PyTorch has not")
    return found


@contextlib.contextmanager
def on_cpu(model: Any) -> Iterator[Any]:
    """The module in eval mode on the CPU; the user's own is as it was afterwards."""
    if any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
        yield copy.deepcopy(model).cpu().eval()
        return
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


def counts(model: Any) -> dict[str, int]:
    """How many layers there are of each type, containers left out."""
    leaves = [m for m in model.modules() if not list(m.children())]
    return dict(Counter(type(m).__name__ for m in leaves).most_common())
