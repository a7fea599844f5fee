"""Which format a MODEL is in, told without a framework and without unpickling a byte.

The suffix says what it should be, the first bytes and an archive's names what it is. Where the two
differ, the content wins for sources that are only converted (a `.pt` that holds a `.pt2`); a model
that an engine loads by its suffix must be renamed by its owner.
"""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgeKitError, ModelError, UsageError, one_line

__all__ = ["READS", "Found", "detect"]

#: what is read, as people are told
READS = (
    ".onnx, .tflite, .xml (OpenVINO IR), .param (ncnn), .keras, .h5, a SavedModel folder, .pt2, "
    ".pt/.jit (TorchScript), module.py:factory, .joblib/.skops/.pkl (scikit-learn)"
)

_FORMAT_OF_SUFFIX = {
    ".onnx": "onnx", ".tflite": "tflite", ".xml": "openvino", ".param": "ncnn",
    ".keras": "keras", ".h5": "keras", ".hdf5": "keras",
    ".pt2": "torch-export",
    ".pt": "torchscript", ".pth": "torchscript", ".jit": "torchscript", ".ts": "torchscript",
    ".torchscript": "torchscript", ".ptl": "torchscript",
    ".joblib": "sklearn", ".skops": "sklearn", ".pkl": "sklearn", ".pickle": "sklearn",
}  # fmt: skip

#: formats whose readers choose by suffix, and the one they want
_BY_SUFFIX = {"onnx": ".onnx", "tflite": ".tflite", "openvino": ".xml", "ncnn": ".param"}
#: files that belong to one with this suffix: those that must be there, those that may
_COMPANIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "openvino": ((".bin",), ()),
    "ncnn": ((".bin",), (".json",)),  # without its .json, the engine says what to write into one
}

#: what content is called in errors, and the format it is
_KINDS: dict[str, tuple[str, str | None]] = {
    "keras zip": ("a Keras 3 archive", "keras"),
    "hdf5": ("an HDF5 file", "keras"),
    "pt2 zip": ("an archive of torch.export", "torch-export"),
    "torchscript zip": ("a TorchScript archive", "torchscript"),
    "skops zip": ("a skops archive", "sklearn"),
    "tflite": ("a TFLite model", "tflite"),
    "ncnn": ("an ncnn .param", "ncnn"),
    "torch pickle": ("a pickle of torch.save", None),
    "pickle": ("a pickle", None),
    "bundle": ("an EdgeKit bundle, not a model", None),
    "npz": ("an .npz of arrays, not a model", None),
    "zip": ("a zip archive: unpack it and give the model inside", None),
    "broken zip": ("a zip archive that is cut short or damaged: fetch it again", None),
    "empty zip": ("an empty zip archive", None),
    "aoti zip": ("compiled for one machine (AOTInductor): export it with torch.export.save", None),
    "html": ("a web page: the download was not the model", None),
    "lfs": ("a Git LFS pointer, not the model: run `git lfs pull`", None),
    "gguf": ("a GGUF language model, which EdgeKit does not read", None),
    "safetensors": (
        "safetensors: weights without a model; give the code that builds it: module.py:factory "
        "--weights FILE",
        None,
    ),
}
#: how files of a kind begin
_MAGIC = {
    "tflite": rb"(?s).{4}TFL3",  # the identifier of its FlatBuffers schema
    "ncnn": rb"7767517",
    # torch.save before 1.6 pickled this number first
    "torch pickle": rb"(?s)\x80[\x02-\x05]\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19",
    "pickle": rb"\x80[\x02-\x05]",  # the protocols that say which they are
    "empty zip": rb"PK\x05\x06",
    "gguf": rb"GGUF",
    "safetensors": rb'(?s).{5}\0\0\0\{"',  # the length of its JSON, and that JSON
    "lfs": rb"version https://git-lfs",
    "html": rb"(?i)\s*(<!doctype html|<html)",
}
#: the suffix of Core ML's folders
_PACKAGE = ".mlpackage"
#: content a suffix promises, where its readers tell it by that
_PROMISED = {
    "keras": ("keras zip", "hdf5"), "torch-export": ("pt2 zip",),
    "torchscript": ("torchscript zip",), "tflite": ("tflite",), "ncnn": ("ncnn",),
}  # fmt: skip

#: what people bring that is not read, by suffix: what it is and what to do
_NOT_READ = {
    ".caffemodel": "a Caffe model, which a later version will read: convert it to ONNX",
    ".prototxt": "a Caffe model, which a later version will read: convert it to ONNX",
    ".mlmodel": "a Core ML model: convert what it was made from",
    ".mlpackage": "a Core ML package without its Manifest.json: copy it again, whole",
    ".mlmodelc": "a compiled Core ML model: convert what it was made from",
    ".engine": "a TensorRT engine, built for one GPU: convert what it was built from",
    ".plan": "a TensorRT engine, built for one GPU: convert what it was built from",
    ".trt": "a TensorRT engine, built for one GPU: convert what it was built from",
    ".gguf": "a GGUF language model, which EdgeKit does not read",
    ".safetensors": "weights without a model: give the code that builds it, "
    "module.py:factory --weights FILE",
    ".ckpt": "a checkpoint, weights without a model: save the model (Keras: model.export(folder); "
    "PyTorch: module.py:factory --weights FILE)",
    ".index": "a TensorFlow checkpoint, weights without a model: save it with model.export(folder)",
    ".meta": "a TensorFlow 1 graph: save it as a SavedModel (tf.compat.v1.saved_model.simple_save)",
    ".pb": "a frozen TensorFlow graph: save it as a SavedModel, or convert it with "
    "`python -m tf2onnx.convert --graphdef FILE --inputs ... --outputs ... --output m.onnx`",
    ".pte": "an ExecuTorch program: give the .pt2 it was lowered from",
    ".ort": "ONNX Runtime's own format: give the .onnx it was made from",
    ".mnn": "an MNN model: give what it was converted from",
    ".rknn": "built for a Rockchip NPU: give what it was built from",
    ".dlc": "built for a Qualcomm chip: give what it was built from",
    ".hef": "built for a Hailo chip: give what it was built from",
    ".blob": "built for one device: give what it was built from",
    ".pdmodel": "a PaddlePaddle model: convert it with paddle2onnx",
    ".pdiparams": "weights of a PaddlePaddle model: convert it with paddle2onnx",
    ".weights": "weights of a Darknet model: convert it to ONNX",
    ".bin": "weights; give the .xml (OpenVINO IR) or .param (ncnn) beside it",
    ".data": "weights that an .onnx refers to; give that .onnx",
    ".ubj": "an XGBoost model: convert it with onnxmltools",
    ".npz": "arrays, not a model",
    ".npy": "an array, not a model",
    ".edgekit": "a bundle; a model was wanted",
    ".json": "JSON, not a model; a TensorFlow.js model: convert what it was made from",
    ".ipynb": "a notebook: call edgekit.export(model, ...) in it",
    ".zip": "an archive: unpack it and give the model inside",
    ".tar": "an archive: unpack it and give the model inside",
    ".tgz": "an archive: unpack it and give the model inside",
    ".gz": "compressed: unpack it and give the model inside",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A model on disk: its format and its files, the main one first.

    `folder` is a SavedModel's or an ML package's, `function` the name after the colon of
    `module.py:factory`. An ONNX model may refer to more files (external data); only a reader of
    ONNX can tell.
    """

    format: str
    files: tuple[Path, ...]
    folder: Path | None = None
    function: str | None = None

    @property
    def source(self) -> list[str]:
        """What converters take as `source`."""
        if self.folder is not None:
            return [str(self.folder)]
        if self.function is not None:
            return [f"{self.files[0]}:{self.function}"]
        return [str(path) for path in self.files]


def detect(path_or_spec: str) -> Found:
    """The format and files of what a user brings as MODEL: a path, or `module.py:factory`.

    Formats: onnx, tflite, openvino, ncnn, keras, savedmodel, torch-export, torchscript, torch,
    sklearn, coreml (which is only described).

    Raises:
        ModelError: it is missing, empty, cannot be read, damaged, or of a format that is not read.
        UsageError: `module.py` comes without a function's name.
    """
    if not path_or_spec:
        raise UsageError(f"no model given; read are {READS}")
    path = Path(path_or_spec)
    mode = _mode(path)
    # The last `.py:`, so that colons elsewhere (`C:\...`) stay parts of the path.
    spec = re.fullmatch(r"(?is)(.*\.py):(.*)", path_or_spec)
    if mode is None and spec:
        return _factory(Path(spec[1]), spec[2])
    if mode is None:
        raise ModelError(f"no file {path}")
    if stat.S_ISDIR(mode):
        return _folder(path)
    if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
        raise ModelError(f"{path} is a device or a pipe; wanted a model file")
    return _file(path)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"cannot read {str(path)!r}: {reason}") from None


def _factory(path: Path, function: str) -> Found:
    if not function.isidentifier():
        raise UsageError(
            f"{function!r} is not the name of a function; wanted {path}:factory, where factory() "
            "returns the model and example inputs"
        )
    mode = _mode(path)
    if mode is None or not stat.S_ISREG(mode):
        raise ModelError(f"no file {path}")
    return Found("torch", (path,), function=function)


def _folder(path: Path) -> Found:
    try:
        names = sorted(one.name for one in path.iterdir())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    main = next((path / n for n in ("saved_model.pb", "saved_model.pbtxt") if n in names), None)
    if path.suffix.lower() == _PACKAGE and "Manifest.json" in names:
        return _package(path)
    if main is not None:
        if main.stat().st_size == 0:
            raise ModelError(f"{main} is empty")
        rest = sorted(p for p in path.rglob("*") if p.is_file() and p != main)
        return Found("savedmodel", (main, *rest), folder=path)
    raise ModelError(f"{path} is a folder without saved_model.pb, so no SavedModel; {_hint(path)}")


def _package(path: Path) -> Found:
    """An ML package; its specification is the main file."""
    files = sorted(one for one in path.rglob("*") if one.is_file())
    main = next((one for one in files if one.suffix == ".mlmodel"), None)
    if main is None:
        raise ModelError(f"{path} is damaged: an .mlpackage without an .mlmodel in it")
    return Found("coreml", (main, *(one for one in files if one != main)), folder=path)


def _hint(path: Path) -> str:
    """What a folder that is no SavedModel seems to be instead."""
    names = {one.name for one in path.iterdir()}
    inside = sorted(p.parent for p in path.glob("*/saved_model.pb*"))
    models = sorted(n for n in names if Path(n).suffix.lower() in _FORMAT_OF_SUFFIX)
    called = _NOT_READ.get(path.suffix.lower())
    kinds = (
        # TensorFlow Serving's folders of versions, among others
        (inside, f"{inside[0]} is one: give that" if inside else ""),
        (
            {"config.json", "model.weights.h5"} <= names,
            "it is a .keras archive unpacked: zip its files to a .keras",
        ),
        (called, f"it is {called}"),
        (
            "checkpoint" in names or any(n.endswith(".index") for n in names),
            "it is a TensorFlow checkpoint: save the model with model.export(folder)",
        ),
        (models, f"give the model in it: {path / models[0]}" if models else ""),
        (
            any(n.endswith(".safetensors") for n in names),
            "its .safetensors are weights without a model: give module.py:factory --weights FILE",
        ),
        (not names, "it is empty"),
    )
    return next((hint for is_it, hint in kinds if is_it), f"read are {READS}")


def _file(path: Path) -> Found:
    suffix = path.suffix.lower()
    if path.name.lower() in ("saved_model.pb", "saved_model.pbtxt"):
        raise ModelError(f"{path} is part of a SavedModel; give its folder {path.parent}")
    if suffix == ".py":
        raise UsageError(
            f"{path} is Python code; say which function builds the model: {path}:factory"
        )
    if suffix in _NOT_READ:
        raise ModelError(f"{path} is {_NOT_READ[suffix]}")
    wanted = _FORMAT_OF_SUFFIX.get(suffix)
    kind = _kind(path)
    if wanted is None:
        called, really = _KINDS[kind] if kind else ("", None)
        if really is None:
            hint = f"it is {called}" if kind else f"read are {READS}"
        else:
            hint = f"it is {called}: rename it to {path.stem}{_usual_suffix(really, kind)}"
        raise ModelError(f"{path} is not a model by its suffix {suffix!r}; {hint}")
    fmt = _agreed(path, wanted, kind)
    return Found(fmt, (path, *_beside(path, fmt)))


def _agreed(path: Path, wanted: str, kind: str | None) -> str:
    """The format on which suffix and content agree, or which the content alone decides."""
    if wanted == "sklearn" and kind == "pickle":  # a .joblib may be compressed, so need not be one
        return wanted
    if kind is None:
        if wanted not in _PROMISED:
            return wanted
        names = " or ".join(_KINDS[one][0] for one in _PROMISED[wanted])
        raise ModelError(f"{path} is damaged or something else: it is not {names}")
    called, really = _KINDS[kind]
    if kind in ("torch pickle", "pickle") and wanted in ("torchscript", "torch-export", "sklearn"):
        raise ModelError(_explained(path))
    if really is None:
        raise ModelError(f"{path} is {called}")
    if really != wanted and (really in _BY_SUFFIX or wanted in _BY_SUFFIX):
        new = path.with_suffix(_usual_suffix(really, kind)).name
        raise ModelError(f"{path} is {called} by its content; rename it to {new}")
    return really


def _usual_suffix(fmt: str, kind: str | None) -> str:
    usual = {"hdf5": ".h5", "keras zip": ".keras", "pt2 zip": ".pt2", "skops zip": ".skops"}
    return _BY_SUFFIX.get(fmt) or usual.get(kind or "", ".pt")


def _beside(path: Path, fmt: str) -> tuple[Path, ...]:
    must, may = _COMPANIONS.get(fmt, ((), ()))
    for suffix in must:
        mode = _mode(path.with_suffix(suffix))
        if mode is None or not stat.S_ISREG(mode):
            raise ModelError(
                f"no file {path.with_suffix(suffix)}; the weights of {path.name} belong beside it"
            )
    found = [path.with_suffix(s) for s in (*must, *may)]
    return tuple(one for one in found if one.suffix in must or one.exists())


def _kind(path: Path) -> str | None:
    """What the content is, a key of `_KINDS`; None where it does not say.

    Raises:
        ModelError: the file is empty or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            if not head:
                raise ModelError(f"{path} is empty")
            if _is_hdf5(head):
                return "hdf5"
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    return next((kind for kind, magic in _MAGIC.items() if re.match(magic, head)), None)


def _is_hdf5(head: bytes) -> bool:
    """Its signature is at 0, or after a user block of 512, 1024 or 2048 bytes."""
    return any(head[at : at + 8] == b"\x89HDF\r\n\x1a\n" for at in (0, 512, 1024, 2048))


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile lets through struct.error, UnicodeDecodeError and others
        return "broken zip"
    return _kind_of_names(names)


def _kind_of_names(names: Iterable[str]) -> str:
    every = set(names)
    # PyTorch puts all into a folder named after the file.
    tails = {name.partition("/")[2] for name in every}
    kinds = {
        "empty zip": not every,
        "keras zip": {"config.json", "model.weights.h5"} <= every,
        "skops zip": "schema.json" in every,
        "bundle": "manifest.json" in every,
        # before torch 2.8, the archive of torch.export was flat
        "pt2 zip": "serialized_exported_program.json" in every
        or any(re.fullmatch(r"models/[^/]+\.json", tail) for tail in tails),
        "aoti zip": any(tail.startswith("data/aotinductor/") for tail in tails),
        "torchscript zip": "constants.pkl" in tails and any(t.startswith("code/") for t in tails),
        "torch pickle": "data.pkl" in tails,
        "npz": all(name.endswith(".npy") for name in every),
    }
    return next((kind for kind, is_it in kinds.items() if is_it), "zip")


def _explained(path: Path) -> str:
    """What a pickle of PyTorch holds and what to do, told by the converters, in a child."""
    from edgekit import sandbox

    try:
        return str(
            sandbox.call(
                "edgekit_converters.torchscript:explain_pickle",
                {"path": str(path)},
                limits=sandbox.Limits(timeout_s=60),
                what=f"reading {path}",
            )
        )
    except EdgeKitError as error:
        return (
            f"{path} is a pickle of torch.save, weights or Python objects without a model "
            f"({one_line(error, limit=80)}); give the code that builds it: "
            "module.py:factory --weights FILE"
        )
