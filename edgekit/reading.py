"""How a model is to be read: what its file does not say, and what the user allows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgekit.errors import UsageError

__all__ = ["InputDeclaration", "Layout", "Reading", "parse_inputs", "parse_values"]

Layout = Literal["nchw", "nhwc"]

_DTYPES = (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16",
    "uint32", "uint64", "bool", "string",
)  # fmt: skip
_DIM = re.compile(r"0*[1-9][0-9]{0,11}|[A-Za-z_][A-Za-z_0-9]*")


@dataclass(frozen=True)
class InputDeclaration:
    """The shape of an input (a str is a free dimension's name) and its dtype, if it was said."""

    shape: tuple[int | str, ...]
    dtype: str | None = None


@dataclass(frozen=True)
class Reading:
    """Options of reading a model and of the conversion from it.

    `inputs` fix or name the shapes of its inputs. `values` are of inputs that are always the same,
    and become constants of the result. `layout` is what the converted model's images
    shall have. `signature` chooses one of a SavedModel's, `weights` is a file with parameters for
    code that builds a network. `trust_source` allows what unpickles or runs code from the model.
    """

    inputs: Mapping[str, InputDeclaration] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    layout: Layout | None = None
    opset: int | None = None
    signature: str | None = None
    weights: Path | None = None
    trust_source: bool = False

    def of_source(self) -> Reading:
        """Without what is asked of the result: for reading and running the model itself."""
        return replace(self, values={}, layout=None, opset=None)

    def to_json(self) -> dict[str, Any]:
        """For child processes and content keys; only what was given."""
        every = {
            "inputs": {
                name: {"shape": list(one.shape), "dtype": one.dtype}
                for name, one in self.inputs.items()
            },
            "values": dict(self.values),
            "layout": self.layout,
            "opset": self.opset,
            "signature": self.signature,
            "weights": str(self.weights) if self.weights else None,
            "trust_source": self.trust_source,
        }
        return {key: value for key, value in every.items() if value}


def parse_values(texts: Iterable[str]) -> dict[str, float]:
    """`NAME=NUMBER`, several.

    Raises:
        UsageError: not of that form, or an input given twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not equals or not name or not math.isfinite(value):
            raise UsageError(f"--set {text!r}; wanted NAME=NUMBER, such as sr=16000")
        if name in found:
            raise UsageError(f"--set: {name!r} is given twice")
        found[name] = value
    return found


def parse_inputs(texts: Iterable[str]) -> dict[str, InputDeclaration]:
    """`NAME=1x3x224x224:float32`, several or one with commas between; letters are free dimensions.

    Raises:
        UsageError: not of that form, or an input given twice.
    """
    found: dict[str, InputDeclaration] = {}
    for text in (part for whole in texts for part in whole.split(",") if part):
        name, equals, rest = text.rpartition("=")
        shape, colon, dtype = rest.partition(":")
        dims = shape.split("x") if shape else []
        if not equals or not name or not all(_DIM.fullmatch(dim) for dim in dims):
            raise UsageError(
                f"--inputs {text!r}; wanted NAME=1x3x224x224 or NAME=Nx3x224x224:float32 (numbers "
                "from 1 on, a letter for a free dimension)"
            )
        if colon and dtype not in _DTYPES:
            raise UsageError(f"--inputs {text!r}: no dtype {dtype!r}; known: {', '.join(_DTYPES)}")
        if name in found:
            raise UsageError(f"--inputs: {name!r} is given twice")
        sizes = tuple(int(dim) if dim[0].isdigit() else dim for dim in dims)
        found[name] = InputDeclaration(sizes, dtype or None)
    return found
