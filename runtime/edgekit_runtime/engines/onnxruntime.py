"""ONNX Runtime: inputs and outputs bound once to numpy memory, on the CPU or a provider of its."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from ..errors import EngineError, EngineMissingError, ModelError
from ..machine import machine_name
from ..manifest import Dim, TensorSpec
from ..placement import Placement
from . import Binding, Loaded, Options, Shapes, numpy_dtype, refuse_external_data
from .accelerators import ACCELERATORS, Accelerator
from .chatter import hearing

__all__ = ["load", "qnn_devices"]

_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool",
    "string": "string", "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64",
    "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
}  # fmt: skip
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"  # ORT 1.23 and later


def load(files: Mapping[str, bytes], options: Options) -> Loaded:
    """Load ONNX bytes on the CPU provider, or on the accelerator's with the CPU's behind it."""
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
    wanted = ACCELERATORS["onnxruntime"].get(options.accelerator)
    if wanted is None:
        session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    else:
        session = _accelerated(model, settings, wanted)
    session._model_bytes = None  # it would keep them for `set_providers`
    return _Loaded(session, wanted)


def _accelerated(model: bytes, settings: Any, wanted: Accelerator) -> Any:
    """A session on the accelerator's provider.

    Raises:
        EngineMissingError: this installation does not have the provider.
        EngineError: it has, but the session came up without it.
    """
    import onnxruntime as ort

    if wanted.provider == "QNNExecutionProvider":
        devices, told = qnn_devices()
        settings.add_provider_for_devices(devices, told)
        with hearing([]):
            session = ort.InferenceSession(model, settings)
    else:
        if wanted.provider not in ort.get_available_providers():
            found = ", ".join(ort.get_available_providers())
            raise EngineMissingError(f"this onnxruntime has no {wanted.provider}; it has {found}")
        listed = [(wanted.provider, dict(wanted.options)), "CPUExecutionProvider"]
        session = ort.InferenceSession(model, settings, providers=listed)
    if wanted.provider not in session.get_providers():  # which is all it does when one fails
        found = ", ".join(session.get_providers())
        raise EngineError(f"onnxruntime was asked for {wanted.provider} and came up with {found}")
    return session


_LOCK = threading.Lock()


def qnn_devices() -> Tuple[List[Any], Dict[str, str]]:
    """Qualcomm's provider comes as a plug-in: its devices, and what it is to be told.

    Raises:
        EngineMissingError: onnxruntime-qnn is not installed, or older than 2.0.
        EngineError: it is, but has no device here.
    """
    import onnxruntime as ort

    try:
        import onnxruntime_qnn as qnn

        library, backend = qnn.get_library_path(), qnn.get_qnn_htp_path()
    except (ImportError, AttributeError):
        raise EngineMissingError(
            "onnxruntime has no QNNExecutionProvider; pip install 'onnxruntime-qnn>=2.0'"
        ) from None
    name = "QNNExecutionProvider"

    def found() -> List[Any]:
        return [one for one in ort.get_ep_devices() if one.ep_name == name]

    with _LOCK:  # a library can be registered once
        if not found():
            ort.register_execution_provider_library(name, library)
        devices = found()
    if not devices:
        raise EngineError("onnxruntime-qnn is installed, but finds no device here")
    return devices, {"backend_path": backend, "htp_performance_mode": "burst"}


class _Loaded(Loaded):
    def __init__(self, session: Any, accelerator: Optional[Accelerator]) -> None:
        import onnxruntime as ort

        self._session, self._accelerator = session, accelerator
        self.version = ort.__version__
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())

    def bind(self, shapes: Shapes) -> Binding:
        return _Binding(self._session, self.inputs, self.outputs, shapes)

    def placement(self, *, operators: bool = True) -> Placement:
        wanted = self._accelerator
        nodes = [(self._device(provider), *one) for provider, one in _assigned(self._session)]
        counts: Dict[str, int] = {}
        for provider, _ in _assigned(self._session):
            counts[provider] = counts.get(provider, 0) + 1
        devices = [device for device, _, _ in nodes] or ["unknown" if wanted else "CPU"]
        shares = {one: devices.count(one) / len(devices) for one in dict.fromkeys(devices)}
        delegates = list(counts) or list(self._session.get_providers())
        htp = wanted is not None and wanted.provider.startswith("QNN")
        emulated = htp and machine_name() == "x86_64"
        precision = "float16" if htp else "float32"  # enable_htp_fp16_precision is its default
        return Placement(
            shares, "+".join(delegates), precision, dict(counts), tuple(nodes) if wanted else (),
            simulated="Qualcomm's HTP emulator" if emulated else "",
        )  # fmt: skip

    def _device(self, provider: str) -> str:
        wanted = self._accelerator
        return wanted.device if wanted is not None and wanted.provider == provider else "CPU"


def _assigned(session: Any) -> List[Tuple[str, Tuple[str, str]]]:
    """The provider of each node, with its type and name, as the session recorded them; empty on
    older versions."""
    reader = getattr(session, "get_provider_graph_assignment_info", None)
    if reader is None:
        return []
    return [
        (part.ep_name, (node.op_type, node.name)) for part in reader() for node in part.get_nodes()
    ]


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
