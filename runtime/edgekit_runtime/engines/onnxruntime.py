"""ONNX Runtime: inputs and outputs bound once to numpy memory."""

from __future__ import annotations

from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from ..errors import ModelError
from ..manifest import Dim, TensorSpec
from ..placement import Placement
from . import Binding, Loaded, Options, Shapes, numpy_dtype, refuse_external_data

__all__ = ["load"]

_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool",
    "string": "string", "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64",
    "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
}  # fmt: skip
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"  # ORT 1.23 and later


def load(files: Mapping[str, bytes], options: Options) -> Loaded:
    """Load ONNX bytes on the CPU provider."""
    import onnxruntime as ort

    if len(files) != 1:
        raise ModelError(f"an ONNX variant is one file, found {len(files)}: {', '.join(files)}")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # its errors reach us as exceptions, some are expected
    settings.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
    (model,) = files.values()
    refuse_external_data(model)
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    session._model_bytes = None  # it would keep them for `set_providers`
    return _Loaded(session)


class _Loaded(Loaded):
    def __init__(self, session: Any) -> None:
        import onnxruntime as ort

        self._session = session
        self.version = ort.__version__
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())

    def bind(self, shapes: Shapes) -> Binding:
        return _Binding(self._session, self.inputs, self.outputs, shapes)

    def placement(self, *, operators: bool = True) -> Placement:
        counts = _assigned(self._session)
        total = sum(counts.values())
        shares = {"CPU": 1.0} if not total else {}
        for provider, count in counts.items():
            device = "CPU" if provider == "CPUExecutionProvider" else "NPU"
            shares[device] = shares.get(device, 0.0) + count / total
        delegates = list(counts) or list(self._session.get_providers())
        return Placement(shares, "+".join(delegates), "float32", dict(counts))


def _assigned(session: Any) -> Dict[str, int]:
    """Nodes per execution provider as the session recorded them; empty on older versions."""
    reader = getattr(session, "get_provider_graph_assignment_info", None)
    counts: Dict[str, int] = {}
    if reader is None:
        return counts
    for subgraph in reader():
        counts[subgraph.ep_name] = counts.get(subgraph.ep_name, 0) + len(subgraph.get_nodes())
    return counts


class _Binding(Binding):
    """Input buffers are bound at once. Outputs are bound when their shapes are known: from the
    model, or from the first run. A model whose output shapes vary with the data runs unbound."""

    def __init__(
        self,
        session: Any,
        inputs: Tuple[TensorSpec, ...],
        outputs: Tuple[TensorSpec, ...],
        shapes: Shapes,
    ) -> None:
        self._session, self._specs = session, outputs
        self._names = [spec.name for spec in outputs]
        self.inputs = tuple(np.zeros(s, numpy_dtype(i.dtype)) for i, s in zip(inputs, shapes))
        self.outputs = ()
        self._feed = dict(zip((spec.name for spec in inputs), self.inputs))
        self.invoke = self._first_run
        passed_on = set(self._names) & set(self._feed)  # an input that is an output, too
        if passed_on or any(spec.dtype == "string" for spec in (*inputs, *outputs)):
            self._unbind()
            return
        known = _output_shapes(inputs, outputs, shapes)
        if known is not None:
            self._bind(tuple(np.zeros(s, numpy_dtype(o.dtype)) for o, s in zip(outputs, known)))

    def retry(self, error: Exception) -> None:
        if not self.fixed_outputs or "shape" not in str(error).lower():
            raise error
        self._unbind()  # the outputs' shapes depend on the data
        self.invoke()

    def _unbind(self) -> None:
        self.fixed_outputs, self.fresh_outputs, self.invoke = False, True, self._run

    def _run(self) -> None:
        self.outputs = tuple(self._session.run(self._names, self._feed))

    def _first_run(self) -> None:
        self._run()
        self._bind(self.outputs)

    def _bind(self, buffers: Tuple[np.ndarray, ...]) -> None:
        io = self._session.io_binding()
        for name, buffer in self._feed.items():
            io.bind_input(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        for name, buffer in zip(self._names, buffers):
            io.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        self.outputs, self.fixed_outputs = buffers, True
        # What InferenceSession.run_with_iobinding calls, without its two Python frames.
        self.invoke = partial(self._session._sess.run_with_iobinding, io._iobinding, None)


def _output_shapes(
    inputs: Tuple[TensorSpec, ...], outputs: Tuple[TensorSpec, ...], shapes: Shapes
) -> Optional[List[Tuple[int, ...]]]:
    """The outputs' shapes if the model's dimension names give them, else None."""
    free: Dict[Dim, int] = {}
    for spec, shape in zip(inputs, shapes):
        free.update((d, n) for d, n in zip(spec.shape, shape) if isinstance(d, str))
    known = []
    for spec in outputs:
        dims = [free.get(d) if isinstance(d, str) else d for d in spec.shape]
        if any(d is None for d in dims):
            return None
        known.append(tuple(int(d) for d in dims if d is not None))
    return known


def _spec(node: Any) -> TensorSpec:
    kind = str(node.type)
    inner = kind[len("tensor(") : -1] if kind.startswith("tensor(") else ""
    if inner not in _DTYPES:
        raise ModelError(f"{node.name!r} is of type {kind}; only plain tensors are supported")
    shape: List[Dim] = []
    for position, dim in enumerate(node.shape):
        fixed = isinstance(dim, int) and dim > 0
        # Paddle's exporter calls every free dimension "?" or "-1": that makes none equal.
        named = isinstance(dim, str) and dim not in ("", "?", "-1")
        shape.append(dim if fixed or named else f"{node.name}_{position}")
    return TensorSpec(node.name, _DTYPES[inner], tuple(shape))
