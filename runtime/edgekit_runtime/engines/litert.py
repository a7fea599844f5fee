"""LiteRT through its Interpreter, from bytes.

`CompiledModel.from_file` is not used: it crashes the process on malformed files (ai_edge_litert
2.3), and a mapped file that is truncated kills it, too.
"""

from __future__ import annotations

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
        self.version = metadata.version("ai-edge-litert")
        names_in, names_out = _signature_names(interpreter)
        self._in = interpreter.get_input_details()
        self._out = interpreter.get_output_details()
        self.inputs = tuple(_spec(d, names_in) for d in self._in)
        self.outputs = tuple(_spec(d, names_out) for d in self._out)
        self._bound: Optional[Shapes] = None

    def bind(self, shapes: Shapes) -> Binding:
        if self._bound != shapes:
            for detail, shape in zip(self._in, shapes):
                if tuple(detail["shape"]) != shape or self._bound is not None:
                    self._interpreter.resize_tensor_input(detail["index"], shape)
            self._interpreter.allocate_tensors()
            self._bound = shapes
        return _Binding(self._interpreter, self._in, self._out, shapes)

    def placement(self) -> Placement:
        if self._bound is None:
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
        inputs: List[Dict[str, Any]],
        outputs: List[Dict[str, Any]],
        shapes: Shapes,
    ) -> None:
        self._interpreter = interpreter
        self.inputs = tuple(np.zeros(s, d["dtype"]) for d, s in zip(inputs, shapes))
        self.outputs = ()
        self._in = tuple((d["index"], buffer) for d, buffer in zip(inputs, self.inputs))
        self._out = tuple(d["index"] for d in outputs)

    def invoke(self) -> None:
        interpreter = self._interpreter
        for index, buffer in self._in:
            interpreter.set_tensor(index, buffer)
        interpreter.invoke()
        self.outputs = tuple([interpreter.get_tensor(index) for index in self._out])


def _signature_names(interpreter: Any) -> Tuple[Dict[int, str], Dict[int, str]]:
    """Tensor index -> name in the model's only signature: what its author called it."""
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return {}, {}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    return (
        {d["index"]: name for name, d in runner.get_input_details().items()},
        {d["index"]: name for name, d in runner.get_output_details().items()},
    )


def _spec(detail: Dict[str, Any], names: Dict[int, str]) -> TensorSpec:
    name = names.get(detail["index"], detail["name"])
    shape: List[Dim] = []
    signature = detail.get("shape_signature", detail["shape"])
    for position, dim in enumerate(signature):
        shape.append(int(dim) if dim > 0 else f"{name}_{position}")
    return TensorSpec(name, np.dtype(detail["dtype"]).name, tuple(shape))
