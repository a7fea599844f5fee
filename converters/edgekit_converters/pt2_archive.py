"""Reads a `.pt2` so that reading it cannot run code.

`torch.export.load` runs code from the file in seven ways (torch 2.13): it unpickles weights,
constants and sample inputs (with `weights_only=False` when the safe way fails), evaluates
symbolic expressions with `sympy.sympify`, compiles `guards_code` and the names of placeholders
into Python source, looks any `torch.a.b.c` up as an operator (`torch.os.system`), imports the
modules that a treespec names, and loads AOTInductor's shared libraries. Two operators write
files (`aten.save`, `aten.from_file`).

So the archive is checked first against a list of what an exported model needs, and what passed
is written into an archive of our own, which torch then reads: there can be no difference between
the file that was checked and the one that is loaded.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError, ModelError, UsageError, one_line, require

__all__ = ["EXTRA", "load_program"]

#: where `edgekit.export` and `factory_to_pt2` keep names that PyTorch drops
EXTRA = "edgekit.json"
_MAX_JSON_BYTES = 500_000_000

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NAME = re.compile(r"[\w.\-]*", re.ASCII)  # parameters ("0.conv-1.weight"), devices, layouts
_VERSION = re.compile(r"[\w.+<=\- ]*", re.ASCII)
_NAMESPACES = "aten|prims|prim|quantized|quantized_decomposed|torchvision"
_OPERATOR = re.compile(rf"torch\.ops\.(?:{_NAMESPACES})\.(\w+)(?:\.\w+)?", re.ASCII)
_CONTROL_FLOW = re.compile(
    r"torch\.ops\.higher_order\.(cond|while_loop|map_impl|map|scan|associative_scan"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast)"
)
_ARITHMETIC = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_"
    r"|lshift|rshift|getitem)|math\.(trunc|ceil|floor|sqrt)"
    r"|torch\.(sym_int|sym_float|sym_not|sym_max|sym_min|sym_ite|sym_sum|_sym_sqrt)"
)
#: operators that touch files
_FORBIDDEN = frozenset({"save", "load", "from_file"})
_FUNCTIONS = frozenset({
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "floor",
    "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "GreaterThan",
    "StrictGreaterThan", "LessThan", "StrictLessThan", "And", "Or", "Not", "FloorDiv",
    "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
    "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity",
})  # fmt: skip
_EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp, ast.USub,
    ast.UAdd, ast.Not, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod,
    ast.Pow, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_CONTAINERS = (
    None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict",
    "collections.namedtuple",
)  # fmt: skip
#: keys of the JSON whose strings are names in generated Python source
_GRAPH_NAMES = frozenset({"name", "as_name", "user_input_name"})


class _UnsafeError(Exception):
    """What in the file could run code."""


def load_program(path: Path, *, trusted: bool) -> tuple[Any, dict[str, Any], list[str]]:
    """The `ExportedProgram` of a `.pt2`, what EXTRA says, and notes for the user.

    Raises:
        ModelError: it is damaged, of an older format, or torch refuses it.
        UsageError: reading it could run code and `trusted` is false.
    """
    torch = require("torch", extra="torch")
    if not path.is_file():
        raise UsageError(f"no file {path}")
    if trusted:
        extra = {EXTRA: ""}
        try:
            program = torch.export.load(path, extra_files=extra)
        except Exception as error:
            raise ModelError(f"torch.export cannot read {path.name}: {one_line(error)}") from error
        return program, _parsed_extra(extra[EXTRA]), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.pt2"
        try:
            with zipfile.ZipFile(path) as archive:
                extra_text, notes = _write_checked(_Source(archive), copy)
        except _UnsafeError as error:
            raise UsageError(
                f"{path.name} {error}: reading it could run code from the file; if you trust "
                "whoever made it, add --trust-source"
            ) from None
        except EdgeKitError as error:
            raise type(error)(f"{path.name}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile,
                RecursionError, NotImplementedError, EOFError) as error:  # fmt: skip
            raise ModelError(f"{path.name} is damaged: {one_line(error)}") from error
        try:
            program = torch.export.load(copy)
        except Exception as error:
            reason = one_line(error.__cause__ or error)
            raise ModelError(f"torch.export cannot read {path.name}: {reason}") from error
    return program, _parsed_extra(extra_text), notes


class _Source:
    """The entries of the archive, without the folder they all are in."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        names = archive.namelist()
        root = names[0].split("/")[0] + "/" if names else ""
        self.names = {name.removeprefix(root): name for name in names if name.startswith(root)}
        if len(self.names) != len(names):
            raise ValueError("it has an entry twice, or outside of its folder")

    def read(self, name: str) -> bytes:
        if name not in self.names:
            raise ValueError(f"it has no {name}")
        return self._archive.read(self.names[name])

    def json(self, name: str) -> Any:
        if name in self.names and self._archive.getinfo(self.names[name]).file_size > (
            _MAX_JSON_BYTES
        ):
            raise ValueError(f"its {name} is larger than {_MAX_JSON_BYTES / 1e6:.0f} MB")
        return json.loads(self.read(name))


def _write_checked(source: _Source, copy: Path) -> tuple[str, list[str]]:
    """Check the archive and write what passed to `copy`; returns the text of EXTRA, and notes."""
    import torch

    if "serialized_exported_program.json" in source.names or "version" in source.names:
        raise ModelError(
            "it is in the format of torch 2.7 and older: load it with that version, save it "
            "again with torch 2.9 or newer, or add --trust-source"
        )
    models = [name for name in source.names if name.startswith("models/")]
    if models != ["models/model.json"]:
        if any(name.startswith("data/aotinductor/") for name in source.names):
            raise ModelError(
                "it holds a program that AOTInductor compiled for one machine, which cannot be "
                "converted; save the model with torch.export.save"
            )
        raise ModelError(f"it holds {models or 'no models'}; wanted one model called 'model'")
    checker = _Checker()
    program = checker.program(source.json("models/model.json"))
    writer = torch._C.PyTorchFileWriter(str(copy))

    def write(name: str, data: bytes) -> None:
        writer.write_record(name, data, len(data))

    writer.set_min_version(6)  # as torch.export.save does
    write("archive_format", b"pt2")
    write("archive_version", source.read("archive_version"))
    write("models/model.json", json.dumps(program).encode())
    write("data/sample_inputs/model.pt", b"")  # a pickle, and nothing here needs it
    for kind in ("weights", "constants"):
        folder = f"data/{kind}/"
        if folder + "model.pt" in source.names:  # torch 2.8: one pickle
            data = source.read(folder + "model.pt")
            _check_pickle(data, kind)
            write(folder + "model.pt", data)
            continue
        config = source.json(f"{folder}model_{kind}_config.json")
        config, payloads = checker.payloads(config)
        write(f"{folder}model_{kind}_config.json", json.dumps(config).encode())
        for name in payloads:
            write(folder + name, source.read(folder + name))
    writer.write_end_of_file()
    notes = []
    if checker.devices:
        found = ", ".join(sorted(checker.devices))
        notes.append(f"it was exported on {found}; read for the CPU")
    extra = f"extra/{EXTRA}"
    return (source.read(extra).decode() if extra in source.names else ""), notes


def _check_pickle(data: bytes, kind: str) -> None:
    """torch falls back to plain unpickling where the safe way fails: so it must not fail."""
    import torch

    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception:
        raise _UnsafeError(f"has {kind} that are pickled Python objects") from None


def _parsed_extra(text: str) -> dict[str, Any]:
    """What `factory_to_pt2` wrote; a file made by others has none."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class _Checker:
    """Walks the JSON: returns a copy without what is not needed, or raises _UnsafeError."""

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def program(self, raw: Any) -> Any:
        module = raw["graph_module"]
        module["metadata"] = {}
        raw["guards_code"] = []  # Python source; what it asserts, the shapes say as well
        return self._walk(raw, "")

    def payloads(self, raw: Any) -> tuple[Any, list[str]]:
        """The checked table of weights or constants, and the files it names."""
        names = []
        for key, meta in raw["config"].items():
            file = meta["path_name"]
            if meta.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", file):
                raise _UnsafeError(f"has a pickled object, {key!r}")
            names.append(file)
        return self._walk(raw, ""), list(dict.fromkeys(names))

    def _walk(self, value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return self._object(value, key)
        if isinstance(value, list):
            return [self._walk(one, key) for one in value]
        if isinstance(value, str):
            self._text(value, key)
        elif isinstance(value, float) and not math.isfinite(value):
            return value  # infinities are legal arguments, and json writes them as it reads them
        return value

    def _object(self, value: dict[str, Any], key: str) -> dict[str, Any]:
        if key == "metadata":  # only what names a node; the rest holds the author's source code
            kept = ("nn_module_stack", "torch_fn")
            return {k: str(value[k]) for k in kept if k in value}
        if "as_custom_obj" in value or value.get("custom_obj_values"):
            raise _UnsafeError("holds a custom object")
        if "target" in value and "inputs" in value:
            for one in value["inputs"]:
                if "file" in one.get("name", ""):
                    raise _UnsafeError(f"calls {str(value['target'])[:60]!r} on a file")
        if key == "device" or set(value) == {"type", "index"}:
            return self._device(value)
        for name in value:
            if not _NAME.fullmatch(name) and key != "as_string_to_argument":
                raise _UnsafeError(f"has the odd name {name[:60]!r}")
        return {k: self._walk(v, k) for k, v in value.items()}

    def _device(self, value: dict[str, Any]) -> dict[str, Any]:
        kind = value.get("type")
        if kind not in ("cpu", "meta"):
            self.devices.add(str(kind)[:20])
        return {"type": "cpu", "index": None}

    def _text(self, value: str, key: str) -> None:
        if key in ("target", "as_operator"):
            _check_operator(value)
        elif key == "expr_str":
            _check_expression(value)
        elif key in ("in_spec", "out_spec"):
            _check_treespec(json.loads(value))
        elif key in ("as_string", "as_strings"):
            return  # arguments of operators: written into source as literals only
        elif key in _GRAPH_NAMES:
            if value and not _IDENTIFIER.fullmatch(value):
                raise _UnsafeError(f"has the odd name {value[:60]!r}")
        elif not (_VERSION if key == "torch_version" else _NAME).fullmatch(value):
            raise _UnsafeError(f"has the odd {key or 'text'} {value[:60]!r}")


def _check_operator(target: str) -> None:
    import torch

    if _CONTROL_FLOW.fullmatch(target) or _ARITHMETIC.fullmatch(target):
        return
    found = _OPERATOR.fullmatch(target)
    if not found:
        raise _UnsafeError(f"calls {target[:60]!r}, which is no operator of PyTorch's own")
    if found[1] in _FORBIDDEN:
        raise _UnsafeError(f"calls {target[:60]!r}, which works on files")
    resolved: Any = torch
    for name in target.split(".")[1:]:
        resolved = getattr(resolved, name, None)
    if resolved is None:
        raise ModelError(
            f"it calls the operator {target[:60]!r}, which this PyTorch ({torch.__version__}) "
            "does not have"
        )
    if not isinstance(resolved, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        raise _UnsafeError(f"calls {target[:60]!r}, which is no operator of PyTorch's own")


def _check_expression(text: str) -> None:
    """Only what torch's printer of symbolic sizes writes: `sympify` evaluates it as Python."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError):
        raise _UnsafeError(f"has the odd expression {text[:60]!r}") from None
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        fine = isinstance(node, _EXPRESSION_NODES)
        if isinstance(node, ast.Name):
            plain = re.fullmatch(r"[a-z]{1,4}\d+|oo|int_oo|true|false", node.id)
            fine = node.id in _FUNCTIONS if id(node) in called else plain is not None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # the name in Symbol('s77'), and Float('0.5')
            fine = re.fullmatch(r"[a-z]\w{0,60}|-?[\d.e+\-]{1,60}", node.value) is not None
        if not fine:
            raise _UnsafeError(f"has the odd expression {text[:60]!r}")


def _check_treespec(value: Any) -> None:
    """How arguments are nested: `[1, {"type": "builtins.tuple", "context": "null", ...}]`."""
    _, tree = value
    pending = [tree]
    while pending:
        node = pending.pop()
        kind, context = node["type"], node["context"]
        if kind not in _CONTAINERS:
            raise ModelError(
                f"its inputs or outputs are in a {str(kind)[:60]}; export a model that takes and "
                "returns tensors, tuples, lists or dicts"
            )
        if context is not None and not _is_plain(json.loads(context)):
            raise _UnsafeError(f"has the odd context {str(context)[:60]!r}")
        pending.extend(node["children_spec"])


def _is_plain(value: Any) -> bool:
    """Names of fields, which get into Python source; not an object, which names a class."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int) or _is_name(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None
