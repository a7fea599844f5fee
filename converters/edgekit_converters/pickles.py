"""What is in a `.pt`, found without unpickling it: `pickletools` reads, it does not run."""

from __future__ import annotations

import io
import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.errors import ModelError, one_line

__all__ = ["explain_pickle"]

_MAX_PICKLE_BYTES = 200_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
_REBUILD = frozenset(
    f"torch._utils {name}"
    for name in ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter",
                 "_rebuild_parameter_with_state", "_rebuild_tensor_v3")
)  # fmt: skip
_PLAIN = (
    "collections",
    "torch",
    "torch._utils",
    "builtins",
    "__builtin__",
    "torch.serialization",
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "_codecs",
    "torch.storage",
)


@dataclass
class _Found:
    """What a pickle's opcodes say: classes it names, texts, and tensors it would rebuild."""

    classes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tensors: int = 0


def explain_pickle(path: str) -> str:
    """One sentence on what a `.pt`, `.pth` or `.ckpt` holds, and what to do with it.

    Raises:
        ModelError: the file is missing or unreadable.
    """
    file = Path(path)
    try:
        if zipfile.is_zipfile(file):
            return _explain_zip(file)
        with file.open("rb") as opened:
            data = opened.read(_MAX_PICKLE_BYTES)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ModelError(f"cannot read {file.name}: {one_line(error)}") from error
    return _explain_legacy(file.name, data)


def _explain_zip(file: Path) -> str:
    with zipfile.ZipFile(file) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in names and any(name.startswith("code/") for name in names):
            return f"{file.name} is TorchScript"
        if "archive_format" in names or "models/model.json" in names:
            return f"{file.name} is an exported program: give it the suffix .pt2"
        if "serialized_exported_program.json" in archive.namelist():
            return (
                f"{file.name} is an exported program of torch 2.7 or older: give it the suffix .pt2"
            )
        if "data.pkl" not in names:
            return f"{file.name} is a zip archive, but nothing that PyTorch wrote"
        if archive.getinfo(names["data.pkl"]).file_size > _MAX_PICKLE_BYTES:
            return f"{file.name} is a pickle of an unusual size; not looked into"
        return _explain(file.name, _read(archive.read(names["data.pkl"])))


def _explain_legacy(name: str, data: bytes) -> str:
    """torch.save before 1.6: magic number, protocol, system, then the object, one after another."""
    stream = io.BytesIO(data)
    try:
        first = [arg for op, arg, _ in pickletools.genops(stream) if arg is not None]
        if _LEGACY_MAGIC not in first:
            return _explain(name, _read(data))
        for _ in range(2):
            for _op in pickletools.genops(stream):
                pass
        return _explain(name, _read(stream.read()))
    except Exception:  # pickletools raises what it pleases on what is no pickle
        return f"{name} is neither a PyTorch file nor a pickle"


def _read(data: bytes) -> _Found:
    found = _Found()
    recent: list[str] = []
    memo: dict[int, str] = {}
    try:
        for op, arg, _ in pickletools.genops(data):
            if op.name == "GLOBAL":
                _name_class(found, str(arg))
            elif op.name == "STACK_GLOBAL" and len(recent) > 1:
                _name_class(found, f"{recent[-2]} {recent[-1]}")
            elif "UNICODE" in op.name or op.name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
                found.texts.append(str(arg))
                recent = [*recent[-1:], str(arg)]
            elif op.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT") and recent:
                memo[len(memo) if arg is None else int(arg)] = recent[-1]
            elif op.name in ("BINGET", "LONG_BINGET") and arg in memo:
                recent = [*recent[-1:], memo[int(arg)]]
            elif op.name == "BINPERSID":
                found.tensors += 1  # each tensor's storage
    except Exception:
        return found  # cut off: what was read so far
    return found


def _name_class(found: _Found, name: str) -> None:
    if name not in _REBUILD:
        found.classes.append(name)


def _explain(name: str, found: _Found) -> str:
    foreign = [c for c in found.classes if c.split(" ")[0] not in _PLAIN]
    modules = [c for c in foreign if not c.startswith(("torch.optim", "numpy"))]
    keys = [t for t in found.texts if t not in ("storage", "cpu", "cuda:0", "cuda")]
    checkpoint = [
        key for key in ("state_dict", "model_state_dict", "optimizer", "optimizer_state_dict",
                        "epoch", "hyper_parameters", "pytorch-lightning_version", "ema")
        if key in keys
    ]  # fmt: skip
    code = (
        f"give the code that builds the model: edgekit convert model.py:factory --weights {name} "
        "--trust-source"
    )
    if found.tensors and checkpoint:
        return (
            f"{name} is a training checkpoint ({', '.join(checkpoint[:4])}) with {found.tensors} "
            f"tensors: {code}"
        )
    if modules:
        first = modules[0].replace(" ", ".")
        return (
            f"{name} is a whole pickled object ({first}), which only its own code can read: save "
            f"it with torch.export.save, or {code.replace(f' --weights {name}', '')}"
        )
    if found.tensors:
        weights = [key for key in keys if not key.isdigit() and _is_parameter(key)]
        shown = ", ".join(list(dict.fromkeys(weights))[:3])
        return f"{name} is a state dict of {found.tensors} tensors ({shown}, ...): {code}"
    if found.classes:
        return f"{name} is a pickle of {found.classes[0].replace(' ', '.')}, not a PyTorch model"
    return f"{name} is neither a PyTorch file nor a pickle of a model"


def _is_parameter(key: str) -> bool:
    return "." in key or key in ("weight", "bias")
