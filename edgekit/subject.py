"""Runs a model of any format over a data set, sample by sample, in a child process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import SOURCES, TensorSpec, spec_from_json
from edgekit.data import Dataset
from edgekit.errors import InputError, ModelError
from edgekit.metrics import Outputs
from edgekit.sandbox import report_progress
from edgekit_runtime.arrays import read_npz, write_npz
from edgekit_runtime.engines import import_engine
from edgekit_runtime.loading import load

__all__ = ["Subject", "are_numbers", "quantization_of"]

#: what a framework is given at once: its results are in memory together
_CHUNK_BYTES = 32 << 20
_CHUNK_SAMPLES = 512


@dataclass(frozen=True)
class Subject:
    """A model as the parent tells a child of it.

    `inputs` are its specs, `names` those of the data's arrays for them; `quantized` the scale and
    zero point of inputs and outputs, where a file takes or gives quantized numbers and the data
    holds floats; `stored` those of arrays that hold quantized numbers, for models that take
    floats; `classes` what a text or number in an output called `label` stands for.
    """

    source: tuple[str, ...]
    format: str
    reading: Mapping[str, Any]
    options: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    names: tuple[str, ...]
    quantized: Mapping[str, Any]
    stored: Sequence[tuple[float, int] | None]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Subject:
        return cls(
            tuple(raw["source"]), raw["format"], raw["reading"], raw["options"],
            tuple(spec_from_json(one) for one in raw["inputs"]), tuple(raw["names"]),
            raw["quantized"], raw["stored"] or [None] * len(raw["inputs"]), tuple(raw["classes"]),
        )  # fmt: skip

    def sample(self, data: Dataset, index: int) -> dict[str, NDArray[Any]]:
        """One sample, as the model takes it."""
        found = {}
        scales = self.quantized.get("inputs") or [None] * len(self.inputs)
        places = zip(self.inputs, self.names, scales, self.stored, strict=True)
        for spec, name, scale, stored in places:
            array = data.arrays[name]
            batched = array.ndim == len(spec.shape)
            value = np.asarray(array[index : index + 1] if batched else array[index])
            if scale and value.dtype.kind == "f":
                value = _quantized(value, scale, spec.dtype)
            elif stored and value.dtype.kind in "iu" and spec.dtype.startswith("float"):
                value = _dequantized(value, stored)
            elif spec.dtype != "string" and value.dtype.kind in "iubf":
                value = value.astype(spec.dtype, copy=False)
            found[spec.name] = value
        return found

    def outputs(self, data: Dataset) -> Iterator[Outputs]:
        """The outputs by name for each sample, in order: numbers, dequantized where need be."""
        made = self._in_framework(data) if self.format in SOURCES else self._in_engine(data)
        for done, outputs in enumerate(made):
            yield self._numbers(outputs)
            if done % 50 == 49:
                report_progress(done + 1, data.count)

    def _in_engine(self, data: Dataset) -> Iterator[Outputs]:
        with load(self.source[0], **self.options) as session:
            for index in range(data.count):
                yield session.run(self.sample(data, index))

    def _in_framework(self, data: Dataset) -> Iterator[Outputs]:
        """By chunks that fit into memory: few samples first, to see how great the outputs are."""
        module, _, name = SOURCES[self.format].format("run").partition(":")
        run = getattr(import_module(module), name)
        start, size = 0, 4
        with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
            given, made = Path(scratch) / "inputs.npz", Path(scratch) / "outputs.npz"
            while start < data.count:
                chunk = range(start, min(start + size, data.count))
                fed = {
                    f"{i}/{name}": array
                    for i in chunk
                    for name, array in self.sample(data, i).items()
                }
                write_npz(given, fed)
                run(list(self.source), dict(self.reading), str(given), str(made))
                outputs: dict[int, dict[str, NDArray[Any]]] = {i: {} for i in chunk}
                for key, array in read_npz(made).items():
                    number, _, output = key.partition("/")
                    outputs[int(number)][output] = array
                yield from outputs.values()
                used = sum(a.nbytes for one in (fed, *outputs.values()) for a in one.values())
                start += len(chunk)
                size = int(min(max(1, _CHUNK_BYTES * len(chunk) / max(used, 1)), _CHUNK_SAMPLES))

    def _numbers(self, outputs: Outputs) -> Outputs:
        scales = self.quantized.get("outputs") or [None] * len(outputs)
        found: dict[str, NDArray[Any]] = {}
        for (name, array), scale in zip(outputs.items(), scales, strict=True):
            number = self._number(name, array, scale)
            if number.dtype.kind in "fiub":
                found[name] = number
        if not found:
            raise ModelError(f"the outputs {', '.join(outputs)} hold no numbers to evaluate")
        return found

    def _number(
        self, name: str, array: NDArray[Any], scale: tuple[float, int] | None
    ) -> NDArray[Any]:
        if scale is not None and array.dtype.kind in "iu":
            return _dequantized(array, scale)
        if array.dtype.kind in "USO" or (name == "label" and array.size == 1):
            return self.class_numbers(array)
        return array

    def class_numbers(self, values: NDArray[Any]) -> NDArray[Any]:
        """Where each text, or number that stands for a class, stands in the list of classes.

        Raises:
            InputError: it is none of them.
        """
        numbers = values.dtype.kind in "iu"
        if not self.classes or (numbers and not are_numbers(self.classes)):
            return values
        return _class_numbers(values, self.classes)


def _quantized(value: NDArray[Any], scale: tuple[float, int], dtype: str) -> NDArray[Any]:
    ends = np.iinfo(dtype)
    steps = np.rint(value / scale[0]) + scale[1]
    return np.asarray(np.clip(steps, ends.min, ends.max).astype(dtype))


def _dequantized(value: NDArray[Any], scale: tuple[float, int]) -> NDArray[Any]:
    return np.asarray((value.astype(np.float32) - scale[1]) * np.float32(scale[0]))


def _class_numbers(values: NDArray[Any], classes: Sequence[str]) -> NDArray[np.int64]:
    """Where each value stands in the list of classes."""
    places = {name: number for number, name in enumerate(classes)}
    flat = [str(one) for one in np.asarray(values).ravel().tolist()]
    unknown = sorted({one for one in flat if one not in places})
    if unknown:
        raise InputError(
            f"{unknown[0]!r} is none of the model's classes: {', '.join(classes[:20])}"
        )
    found = np.array([places[one] for one in flat], np.int64)
    return np.asarray(found.reshape(np.shape(values)))


def are_numbers(classes: Sequence[str]) -> bool:
    """Whether classes are called by numbers, as scikit-learn calls them that was given such."""
    return bool(classes) and all(one.removeprefix("-").isdigit() for one in classes)


def quantization_of(path: str) -> dict[str, Any]:
    """Scale and zero point of a TFLite file's inputs and outputs, in order; None for others."""
    interpreter = import_engine("litert").Interpreter(model_path=path)

    def each(details: Sequence[Mapping[str, Any]]) -> list[tuple[float, int] | None]:
        found: list[tuple[float, int] | None] = []
        for detail in details:
            scale, zero = detail["quantization"]
            small = np.dtype(detail["dtype"]).itemsize <= 2
            found.append((float(scale), int(zero)) if scale and small else None)
        return found

    return {
        "inputs": each(interpreter.get_input_details()),
        "outputs": each(interpreter.get_output_details()),
    }
