"""LiteRT's reference kernels, which round as TensorFlow Lite Micro's do.

LiteRT's usual ones (XNNPACK) round otherwise: of a keyword net's int8 answers a tenth differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.errors import ModelError, one_line, require
from edgekit.firmware.ports import port_names
from edgekit.tflite_file import read_tflite
from edgekit_runtime.manifest import TensorSpec

__all__ = ["ReferenceSession", "reference_here", "reference_outputs"]

_EXTRA = "litert"


def reference_outputs(
    model: Path, inputs: Sequence[Mapping[str, NDArray[Any]]], *, limits: sandbox.Limits
) -> list[dict[str, NDArray[Any]]]:
    """The outputs by name for each sample, in a child process; inputs in the model's own types.

    Raises:
        ModelError: LiteRT refuses the model or a sample.
        MissingExtraError: LiteRT is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        given, made = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(
            given, allow_pickle=False,
            **{f"{n}/{name}": array for n, one in enumerate(inputs) for name, array in one.items()},
        )  # fmt: skip
        sandbox.call(
            "edgekit.firmware.reference:reference_here",
            {"model": str(model), "inputs": str(given), "outputs": str(made), "count": len(inputs)},
            limits=limits,
            what=f"running {model.name} by LiteRT's reference kernels",
        )
        outputs: list[dict[str, NDArray[Any]]] = [{} for _ in inputs]
        with np.load(made) as arrays:
            for key in arrays.files:
                number, _, name = key.partition("/")
                outputs[int(number)][name] = arrays[key]
    return outputs


def reference_here(model: str, inputs: str, outputs: str, count: int) -> None:
    """What `reference_outputs` has done in a child process."""
    litert = require("ai_edge_litert.interpreter", extra=_EXTRA)
    content = Path(model).read_bytes()
    names_in, names_out = port_names(read_tflite(content))
    with np.load(inputs) as file:
        arrays = {key: file[key] for key in file.files}
    kernels = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    made = {}
    try:
        interpreter = litert.Interpreter(
            model_content=content, experimental_op_resolver_type=kernels
        )
        interpreter.allocate_tensors()
        for number in range(count):
            for name, detail in zip(names_in, interpreter.get_input_details(), strict=True):
                interpreter.set_tensor(detail["index"], arrays[f"{number}/{name}"])
            interpreter.invoke()
            for name, detail in zip(names_out, interpreter.get_output_details(), strict=True):
                made[f"{number}/{name}"] = interpreter.get_tensor(detail["index"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"LiteRT's reference kernels: {one_line(error)}") from None
    np.savez(outputs, allow_pickle=False, **made)


class ReferenceSession:
    """A model on these kernels in this process: far faster than TensorFlow Lite Micro's own."""

    def __init__(self, content: bytes) -> None:
        litert = require("ai_edge_litert.interpreter", extra=_EXTRA)
        kernels = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        names_in, self._outputs = port_names(read_tflite(content))
        self._interpreter = litert.Interpreter(
            model_content=content, experimental_op_resolver_type=kernels
        )
        self._interpreter.allocate_tensors()
        details = self._interpreter.get_input_details()
        self._places = [int(one["index"]) for one in details]
        self.inputs = tuple(
            TensorSpec(name, np.dtype(one["dtype"]).name, tuple(int(n) for n in one["shape"]))
            for name, one in zip(names_in, details, strict=True)
        )

    def run(self, sample: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        for spec, place in zip(self.inputs, self._places, strict=True):
            self._interpreter.set_tensor(place, sample[spec.name])
        self._interpreter.invoke()
        made = self._interpreter.get_output_details()
        return {
            name: self._interpreter.get_tensor(one["index"])
            for name, one in zip(self._outputs, made, strict=True)
        }
