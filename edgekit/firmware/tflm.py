"""Runs a model in TensorFlow Lite for Microcontrollers' own interpreter, in a child process.

It computes with the reference kernels, which give what a firmware's optimized ones give; times
mean nothing. The arena is that of a 64-bit machine, where pointers are twice as long: an upper
bound for a microcontroller.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import sandbox
from edgekit.errors import InputError, ModelError, one_line, require
from edgekit.firmware.ports import port_names
from edgekit.tflite_file import read_tflite
from edgekit_runtime.manifest import TensorSpec

__all__ = ["Interpreted", "Interpreter", "interpret", "interpret_here"]

_EXTRA = "micro"
#: beyond the tensors: records of tensors and nodes, scratch buffers
_ROOM_BYTES = 4 << 20
_MOST_ARENA_BYTES = 1 << 30
_WIDEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class Interpreted:
    """What the interpreter said. `arena_bytes` is its own total; `head_bytes` of it are
    activations, `tail_bytes` what lives as long as the interpreter. `operators` are the TFLite
    names of the kernels a firmware must register; `outputs` has one mapping per sample."""

    arena_bytes: int
    head_bytes: int
    tail_bytes: int
    operators: tuple[str, ...]
    outputs: list[dict[str, NDArray[Any]]]


def interpret(
    model: Path,
    inputs: Sequence[Mapping[str, NDArray[Any]]],
    *,
    limits: sandbox.Limits,
    arena_bytes: int | None = None,
) -> Interpreted:
    """Run samples, each the model's inputs by name in the model's own types and shapes.

    `arena_bytes` is what the interpreter is given; more than enough otherwise.

    Raises:
        ModelError: an operator, or the form it is used in, is not supported: it is named with its
            output tensor.
        InputError: a sample lacks an input, or has another type or shape.
        MissingExtraError: tflite-micro is not installed.
        ChildError: the interpreter crashed or ran over `limits`.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        given, made = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(
            given, allow_pickle=False,
            **{f"{n}/{name}": array for n, one in enumerate(inputs) for name, array in one.items()},
        )  # fmt: skip
        said = sandbox.call(
            "edgekit.firmware.tflm:interpret_here",
            {
                "model": str(model),
                "inputs": str(given),
                "outputs": str(made),
                "count": len(inputs),
                "arena_bytes": arena_bytes,
            },
            limits=limits,
            what=f"running {model.name} in tflite-micro",
        )
        with np.load(made) as arrays:
            outputs: list[dict[str, NDArray[Any]]] = [{} for _ in inputs]
            for key in arrays.files:
                number, _, name = key.partition("/")
                outputs[int(number)][name] = arrays[key]
    return Interpreted(
        said["arena"], said["head"], said["tail"], tuple(said["operators"]), outputs
    )  # fmt: skip


def interpret_here(
    model: str, inputs: str, outputs: str, count: int, arena_bytes: int | None
) -> dict[str, Any]:
    """What `interpret` has done in a child process."""
    session = Interpreter(Path(model).read_bytes(), arena_bytes=arena_bytes)
    with np.load(inputs) as file:
        arrays = {key: file[key] for key in file.files}
    made = {}
    for number in range(count):
        given = {k.partition("/")[2]: a for k, a in arrays.items() if k.startswith(f"{number}/")}
        for name, array in session.run(given, called=f"sample {number}").items():
            made[f"{number}/{name}"] = array
    np.savez(outputs, allow_pickle=False, **made)
    total, head, tail = session.allocations()
    return {"arena": total, "head": head, "tail": tail, "operators": session.operators}


class Interpreter:
    """The interpreter in this process, which it may take down: call it in a child.

    Raises:
        ModelError: it refuses the model, or a sample of it.
    """

    def __init__(self, content: bytes, *, arena_bytes: int | None = None) -> None:
        require("tflite_micro", extra=_EXTRA)
        micro = require("tflite_micro.python.tflite_micro.runtime", extra=_EXTRA)
        self._parsed = parsed = _Parsed(content)
        self.operators = parsed.operators()
        room = arena_bytes or parsed.arena_bytes()
        with _said() as words:
            try:
                self._interpreter = micro.Interpreter.from_bytes(content, arena_size=room)
            except RuntimeError as error:
                raise ModelError(parsed.refusal(words(), error)) from None
        self.inputs = tuple(
            TensorSpec(name, *self._form(place)) for place, name in enumerate(parsed.inputs)
        )

    def _form(self, place: int) -> tuple[str, tuple[int, ...]]:
        detail = self._interpreter.get_input_details(place)
        return np.dtype(detail["dtype"]).name, tuple(int(size) for size in detail["shape"])

    def run(
        self, sample: Mapping[str, NDArray[Any]], *, called: str = "the sample"
    ) -> dict[str, NDArray[Any]]:
        """The outputs by name.

        Raises:
            InputError: an input is missing, or of another type or shape.
            ModelError: an operator fails.
        """
        for place, array in enumerate(self._checked(sample, called)):
            self._interpreter.set_input(array, place)
        with _said() as words:
            try:
                self._interpreter.invoke()
            except RuntimeError as error:
                raise ModelError(self._parsed.refusal(words(), error)) from None
        names = enumerate(self._parsed.outputs)
        return {name: np.array(self._interpreter.get_output(place)) for place, name in names}

    def _checked(
        self, sample: Mapping[str, NDArray[Any]], called: str
    ) -> list[NDArray[Any]]:  # fmt: skip
        """In the interpreter's order; it reads past the end of what is too short."""
        found = []
        for spec in self.inputs:
            array = sample.get(spec.name)
            if array is None:
                wanted = ", ".join(self._parsed.inputs)
                raise InputError(f"{called} has no {spec.name!r}; wanted {wanted}")
            if array.dtype != np.dtype(spec.dtype) or array.shape != spec.shape:
                raise InputError(
                    f"{spec.name!r} of {called} is {array.dtype.name} {array.shape}; "
                    f"wanted {spec.dtype} {spec.shape}"
                )
            found.append(np.ascontiguousarray(array))
        return found

    def allocations(self) -> tuple[int, int, int]:
        """Bytes of the arena: all, the activations', the rest's."""
        with _said() as words:
            self._interpreter.print_allocations()
            total, head, tail = (_allocation(words(), kind) for kind in ("total", "head", "tail"))
        return total, head, tail


def _allocation(words: str, kind: str) -> int:
    found = re.search(rf"Arena allocation {kind} (\d+) bytes", words)
    if found is None:
        raise ModelError(f"tflite-micro did not say its arena's {kind}: {words.strip()[-200:]!r}")
    return int(found[1])


class _Parsed:
    """What the interpreter does not say: names of ports, operators and tensors."""

    def __init__(self, content: bytes) -> None:
        if content[4:8] != b"TFL3":
            raise ModelError(f"not a TFLite model: bytes 4..8 are {content[4:8]!r}, wanted b'TFL3'")
        self._model = read_tflite(content, extra=_EXTRA)
        self.inputs, self.outputs = port_names(self._model)
        schema = require("ai_edge_litert.schema_py_generated", extra=_EXTRA)
        self._names = {v: n for n, v in vars(schema.BuiltinOperator).items() if n[0] != "_"}

    def operators(self) -> list[str]:
        """Unique, in the order of their first use."""
        graphs = self._model.subgraphs
        return list(dict.fromkeys(self._name(o) for g in graphs for o in g.operators or ()))

    def arena_bytes(self) -> int:
        """More than any plan of the tensors needs: all of them side by side."""
        total = 0
        for graph in self._model.subgraphs:
            for tensor in graph.tensors or ():
                shape = () if tensor.shape is None else tensor.shape
                total += math.prod(max(1, int(size)) for size in shape) * _WIDEST_BYTES
        return min(total + _ROOM_BYTES, _MOST_ARENA_BYTES) & -16  # as aligned as its contents

    def refusal(self, words: str, error: Exception) -> str:
        """The operator it stumbled over, in the model's terms."""
        missing = re.search(r"Didn't find op for builtin opcode '(\w+)'", words)
        missing = missing or re.search(r"Failed to get registration from op code (\w+)", words)
        if missing:
            kind = missing[1]
            at = next((n for n, one in enumerate(self._main()) if self._code(one) == kind), None)
            where = "" if at is None else f" ({kind}#{at}, output {self._output(at)!r})"
            name = kind if at is None else self._name(self._main()[at])
            return f"tflite-micro has no operator {name}{where}"
        node = re.search(r"Node (\w+) \(number (\d+)f?\) failed to (\w+)", words)
        said = " ".join((words[: node.start()] if node else words).split())[:300]
        said = said or one_line(error)
        if node and int(node[2]) < len(self._main()):
            at = int(node[2])
            where = f"{self._name(self._main()[at])}#{at}, output {self._output(at)!r}"
            return f"tflite-micro cannot {node[3]} {where}: {said}"
        return f"tflite-micro: {said}"

    def _main(self) -> list[Any]:
        return list(self._model.subgraphs[0].operators or ())

    def _code(self, operator: Any) -> str:
        code = self._model.operatorCodes[operator.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        return str(self._names.get(number, f"BUILTIN_{number}"))

    def _name(self, operator: Any) -> str:
        kind = self._code(operator)
        if kind != "CUSTOM":
            return kind
        custom = self._model.operatorCodes[operator.opcodeIndex].customCode
        return custom.decode(errors="replace") if custom else kind

    def _output(self, place: int) -> str:
        graph = self._model.subgraphs[0]
        name = graph.tensors[graph.operators[place].outputs[0]].name
        return name.decode(errors="replace").partition(";")[0] if name else ""


@contextmanager
def _said() -> Iterator[Any]:
    """What C++ code writes to stderr meanwhile, as a function that reads it."""
    with tempfile.TemporaryFile() as log:
        before = os.dup(2)
        os.dup2(log.fileno(), 2)

        def words() -> str:
            log.seek(0)
            return log.read().decode(errors="replace")

        try:
            yield words
        finally:
            os.dup2(before, 2)
            os.close(before)
            os.write(2, words().encode())
