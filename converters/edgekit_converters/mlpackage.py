"""What is written in an ML package (`.mlpackage`), read without Core ML: its interface, its
operators and its numbers, and which of a source's weights are among them.

The program is a protobuf, parsed by coremltools' own message classes; the weights' file is read
here, as MILBlob's `StorageFormat.hpp` describes it: at the offset that the program names there are
64 bytes (0xDEADBEEF, type, size in bytes, offset of the data), all little-endian.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError, require
from edgekit_runtime.manifest import TensorSpec

__all__ = ["Accounted", "Package", "accounted", "read_package"]

_BLOB = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
#: types in weights' files, by their numbers there
_BLOB_TYPES = {1: "float16", 2: "float32", 3: "uint8", 4: "int8"}
_MODEL_PATH = "@model_path/"
#: of a channel's greatest weight: folding multiplies in float32, so two roundings and some room
_ONE_SCALE = 1e-6


@dataclass(frozen=True)
class Package:
    """An ML program: what goes in and out, its operators counted, and its constants by name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: Mapping[str, int]
    constants: Mapping[str, NDArray[Any]]
    #: of the specification: 7 is Core ML 6, of iOS 16 and macOS 13
    version: int


@dataclass(frozen=True)
class Accounted:
    """The source's weights (arrays of floats, more than one number each), by what became of them.

    `same` are in the file bit for bit, `moved` in another order (a transposition), `scaled` with
    a factor for each output channel, as folding a batch normalization does. `elsewhere` are not
    found: folded into others, computed with in advance, or not needed. `share` is that of the
    numbers that are found.
    """

    same: tuple[str, ...]
    moved: tuple[str, ...]
    scaled: tuple[str, ...]
    elsewhere: tuple[str, ...]
    share: float

    def to_json(self) -> dict[str, Any]:
        """For provenance and `--json`."""
        return {
            "same": len(self.same), "moved": len(self.moved), "scaled": len(self.scaled),
            "elsewhere": list(self.elsewhere), "share": self.share,
        }  # fmt: skip


def read_package(folder: Path) -> Package:
    """Read an `.mlpackage`.

    Raises:
        ModelError: it is damaged, or holds something else than one ML program.
        MissingExtraError: coremltools is not installed.
    """
    require("coremltools", extra="coreml")
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    try:
        main = _main_file(folder)
        spec = Model_pb2.Model()
        spec.ParseFromString(main.read_bytes())
        if spec.WhichOneof("Type") != "mlProgram" or "main" not in spec.mlProgram.functions:
            kind = spec.WhichOneof("Type") or "nothing"
            raise ModelError(f"{folder.name} holds {kind}; wanted an ML program with a main")
        function = spec.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        types = {one.name: one.type for one in function.inputs}
        types |= {one.name: one.type for op in block.operations for one in op.outputs}
        constants = dict(_constants(block, main.parent))
    except (OSError, ValueError, KeyError, struct.error, DecodeError) as error:
        raise ModelError(f"{folder.name} is damaged: {type(error).__name__} {error}") from error
    counted = Counter(op.type for op in block.operations if op.type != "const")
    return Package(
        tuple(_spec(feature, types) for feature in spec.description.input),
        tuple(_spec(feature, types) for feature in spec.description.output),
        dict(counted.most_common()),
        constants,
        spec.specificationVersion,
    )


def accounted(weights: Mapping[str, NDArray[Any]], package: Package) -> Accounted:
    """Where the source's weights are in the package."""
    asked = {
        name: array for name, array in weights.items() if array.dtype.kind == "f" and array.size > 1
    }
    made = [one.astype(np.float32) for one in package.constants.values() if one.dtype.kind == "f"]
    exact = {one.tobytes() for one in made}
    ordered = {np.sort(one, axis=None).tobytes() for one in made}
    found: dict[str, list[str]] = {"same": [], "moved": [], "scaled": [], "elsewhere": []}
    for name, given in asked.items():
        array = given.astype(np.float32)
        if array.tobytes() in exact:
            found["same"].append(name)
        elif np.sort(array, axis=None).tobytes() in ordered:
            found["moved"].append(name)
        elif any(_is_scaled(array, one) for one in made):
            found["scaled"].append(name)
        else:
            found["elsewhere"].append(name)
    total = sum(array.size for array in asked.values())
    lost = sum(asked[name].size for name in found["elsewhere"])
    share = 1 - lost / total if total else 1.0
    return Accounted(
        tuple(found["same"]), tuple(found["moved"]), tuple(found["scaled"]),
        tuple(found["elsewhere"]), share,
    )  # fmt: skip


def _is_scaled(array: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether a kernel is another times a factor for each output channel: the first axis, or
    (TensorFlow's kernels) the last, or (its depthwise ones) the last but one."""
    if array.ndim < 3 or array.size != other.size:
        return False
    rank = array.ndim
    turned = [array, np.moveaxis(array, (rank - 1, rank - 2), (0, 1))]
    turned.append(np.moveaxis(array, (rank - 2, rank - 1), (0, 1)))
    return any(one.shape == other.shape and _one_factor_each(one, other) for one in turned)


def _one_factor_each(array: NDArray[Any], other: NDArray[Any]) -> bool:
    rows, others = (one.reshape(len(one), -1).astype(np.float64) for one in (array, other))
    if rows.shape[1] < 2:  # any number is another times something
        return False
    norms = (rows * rows).sum(1)
    factors = (rows * others).sum(1) / np.where(norms > 0, norms, 1)
    off = np.abs(others - factors[:, None] * rows).max(1)
    return bool((off <= _ONE_SCALE * np.abs(others).max(1)).all() and (factors != 0).any())


def _main_file(folder: Path) -> Path:
    """The specification that the manifest names."""
    manifest = json.loads((folder / "Manifest.json").read_text())
    inside = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    path: Path = (folder / "Data" / inside).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the manifest leads out of it: {inside}")
    return path


def _constants(block: Any, beside: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    files: dict[str, bytes] = {}
    for op in block.operations:
        if op.type != "const":
            continue
        value = op.attributes["val"]
        dtype, shape = _type_of(value.type)
        if dtype == "string":
            continue
        if value.WhichOneof("value") == "blobFileValue":
            name = value.blobFileValue.fileName.removeprefix(_MODEL_PATH)
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"its weights lead out of it: {name}")
            if name not in files:
                files[name] = (beside / name).read_bytes()
            array = _blob(files[name], value.blobFileValue.offset, dtype)
        else:
            array = _immediate(value.immediateValue.tensor, dtype)
        yield op.outputs[0].name, array.reshape(shape)


def _blob(data: bytes, at: int, dtype: str) -> NDArray[Any]:
    sentinel, kind, size, offset = _BLOB.unpack_from(data, at)
    if sentinel != _SENTINEL or _BLOB_TYPES.get(kind) != dtype or offset + size > len(data):
        raise ValueError(f"no {dtype} weights at byte {at}")
    found: NDArray[Any] = np.frombuffer(data[offset : offset + size], dtype)
    return found


def _immediate(tensor: Any, dtype: str) -> NDArray[Any]:
    field = tensor.WhichOneof("value")
    if field == "bytes":
        return np.frombuffer(tensor.bytes.values, dtype)
    return np.array(getattr(tensor, field).values, dtype)


def _spec(feature: Any, types: Mapping[str, Any]) -> TensorSpec:
    """The feature's type in the description, its shape in the program, where none is left out."""
    _, shape = _type_of(types[feature.name])
    array = feature.type.multiArrayType
    kind = type(array).ArrayDataType.Name(array.dataType).lower()
    names = {"double": "float64"}
    return TensorSpec(feature.name, names.get(kind, kind), shape)


def _type_of(value_type: Any) -> tuple[str, tuple[int, ...]]:
    from coremltools.proto import MIL_pb2

    tensor = value_type.tensorType
    dtype = MIL_pb2.DataType.Name(tensor.dataType).lower()
    return dtype, tuple(int(one.constant.size) for one in tensor.dimensions)
