"""LiteRT through its Interpreter, from bytes.

`CompiledModel.from_file` is not used: it crashes the process on malformed files (ai_edge_litert
2.3), and a mapped file that is truncated kills it, too.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from ..errors import ModelError
from ..manifest import Dim, TensorSpec
from ..placement import Placement
from . import Binding, Loaded, Options, Shapes

__all__ = ["load"]


def load(files: Mapping[str, bytes], options: Options) -> Loaded:
    """Load TFLite bytes; XNNPACK takes what it can, as LiteRT does by default."""
    from ai_edge_litert.interpreter import Interpreter

    if len(files) != 1:
        raise ModelError(f"a TFLite variant is one file, found {len(files)}: {', '.join(files)}")
    (model,) = files.values()
    if model[4:8] != b"TFL3":
        raise ModelError(f"not a TFLite model: bytes 4..8 are {model[4:8]!r}, wanted b'TFL3'")
    return _Loaded(Interpreter(model_content=model, num_threads=options.threads))


class _Loaded(Loaded):
    max_bindings = 1

    def __init__(self, interpreter: Any) -> None:
        from importlib import metadata

        self._interpreter = interpreter
        self._lock = threading.Lock()  # all bindings share the interpreter's one set of tensors
        self.version = metadata.version("ai-edge-litert")
        names_in, names_out = _signature_names(interpreter)
        self._in = interpreter.get_input_details()
        self._out = interpreter.get_output_details()
        self.inputs = tuple(_spec(d, names_in) for d in self._in)
        self.outputs = tuple(_spec(d, names_out) for d in self._out)
        self._bound: Optional[Shapes] = None

    def bind(self, shapes: Shapes) -> Binding:
        with self._lock:
            before = self._bound
            if before != shapes:
                self._bound = None
                try:
                    self._resize(shapes)
                except Exception:
                    if before is not None:  # bindings for the former shapes shall go on working
                        self._resize(before)
                        self._bound = before
                    raise
                self._bound = shapes
        return _Binding(self._interpreter, self._lock, self._in, self._out, shapes)

    def _resize(self, shapes: Shapes) -> None:
        for detail, shape in zip(self._interpreter.get_input_details(), shapes):
            if tuple(detail["shape"]) != shape:
                self._interpreter.resize_tensor_input(detail["index"], shape)
        self._interpreter.allocate_tensors()

    def placement(self) -> Placement:
        if self._bound is None:
            # 1 may be too small for a free dimension: XNNPACK has taken its operators by then.
            with contextlib.suppress(Exception):
                self.bind(tuple(spec.with_batch(1) for spec in self.inputs))
        counts: Dict[str, int] = {}
        for op in self._interpreter._get_ops_details():
            counts[op["op_name"]] = counts.get(op["op_name"], 0) + 1
        delegate = "XNNPACK" if counts.get("DELEGATE") else "reference kernels"
        return Placement({"CPU": 1.0}, delegate, "float32", counts)


class _Binding(Binding):
    fresh_outputs = True

    def __init__(
        self,
        interpreter: Any,
        lock: threading.Lock,
        inputs: List[Dict[str, Any]],
        outputs: List[Dict[str, Any]],
        shapes: Shapes,
    ) -> None:
        self._interpreter, self._lock = interpreter, lock
        self.inputs = tuple(np.zeros(s, d["dtype"]) for d, s in zip(inputs, shapes))
        self.outputs = ()
        self._in = tuple((d["index"], buffer) for d, buffer in zip(inputs, self.inputs))
        self._out = tuple(d["index"] for d in outputs)
        self._scalars = any(len(d["shape"]) == 0 for d in outputs)

    def invoke(self) -> None:
        # The Interpreter's own methods first count references to be sure that nobody holds a
        # view into its tensors: nobody here does, and that would be a third of a small call.
        # Not kept: one more reference to it is what they would find.
        raw = self._interpreter._interpreter
        with self._lock:
            for index, buffer in self._in:
                raw.SetTensor(index, buffer)
            raw.Invoke()
            try:
                if len(self._out) == 1:
                    self.outputs = (raw.GetTensor(self._out[0], 0),)
                else:
                    self.outputs = tuple([raw.GetTensor(index, 0) for index in self._out])
            except ValueError:
                self.outputs = tuple([self._empty(index) for index in self._out])
        if self._scalars:  # get_tensor gives those as numpy scalars
            self.outputs = tuple([np.asarray(value) for value in self.outputs])

    def _empty(self, index: int) -> np.ndarray:
        """An output that may have no elements, which `get_tensor` cannot read."""
        detail = self._interpreter._get_tensor_details(index, 0)
        if 0 in detail["shape"]:
            return np.zeros(tuple(detail["shape"]), detail["dtype"])
        return np.asarray(self._interpreter.get_tensor(index))


_Names = Dict[int, List[str]]


def _signature_names(interpreter: Any) -> Tuple[_Names, _Names]:
    """Tensor index -> names in the model's only signature: what its author called it. A tensor
    that is two outputs has two."""
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return {}, {}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    found: Tuple[_Names, _Names] = {}, {}
    details = runner.get_input_details(), runner.get_output_details()
    for names, tensors in zip(found, details):
        for name, detail in tensors.items():
            names.setdefault(detail["index"], []).append(name)
    return found


def _spec(detail: Dict[str, Any], names: _Names) -> TensorSpec:
    given = names.get(detail["index"])
    name = given.pop(0) if given else detail["name"]
    kind = np.dtype(detail["dtype"])
    if kind.kind not in "fiub":
        raise ModelError(f"{name!r} is of type {kind.name}; not supported")
    shape: List[Dim] = []
    signature = detail.get("shape_signature", detail["shape"])
    for position, dim in enumerate(signature):
        shape.append(int(dim) if dim > 0 else f"{name}_{position}")
    return TensorSpec(name, kind.name, tuple(shape))
