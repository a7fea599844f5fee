"""OpenVINO: compiled for the first shapes that come, infer request with pre-set tensors."""

from __future__ import annotations

from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

import numpy as np

from ..errors import EngineMissingError, ModelError
from ..manifest import Dim, TensorSpec
from ..placement import Placement
from . import PRECISIONS, Binding, Loaded, Options, Shapes, refuse_external_data
from .accelerators import ACCELERATORS

__all__ = ["load"]

# OpenVINO's names -> numpy's
_DTYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "boolean": "bool", "string": "string",
    "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64",
}  # fmt: skip


def load(files: Mapping[str, bytes], options: Options) -> Loaded:
    """Load an IR (`.xml` and `.bin`) or ONNX for the CPU, or Intel's GPU or NPU, computing floats
    as `options.precision` says."""
    import openvino as ov

    wanted = ACCELERATORS["openvino"].get(options.accelerator)
    devices = ov.Core().available_devices if wanted is not None else []
    if wanted is not None and not any(one.startswith(wanted.provider) for one in devices):
        raise EngineMissingError(f"OpenVINO finds no {wanted.provider} here: {', '.join(devices)}")
    if len(files) == 1 and next(iter(files)).endswith(".onnx"):
        (onnx,) = files.values()
        refuse_external_data(onnx)
        core = ov.Core()
        return _Loaded(core, core.read_model(model=onnx), options)
    xml = [data for name, data in files.items() if name.endswith(".xml")]
    weights = [data for name, data in files.items() if name.endswith(".bin")]
    if len(xml) != 1 or len(weights) > 1:
        raise ModelError(f"an OpenVINO variant is one .xml and one .bin, found: {', '.join(files)}")
    core = ov.Core()
    blob = np.frombuffer(weights[0], np.uint8) if weights else np.zeros(0, np.uint8)
    model = core.read_model(model=xml[0], weights=ov.Tensor(blob))
    return _Loaded(core, model, options)


class _Loaded(Loaded):
    def __init__(self, core: Any, model: Any, options: Options) -> None:
        import openvino as ov

        self._core, self._model = core, model
        wanted = ACCELERATORS["openvino"].get(options.accelerator)
        self._device = wanted.provider if wanted is not None else "CPU"
        self._config: Dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY" if options.streams == 1 else "THROUGHPUT",
            # Without this a CPU with AVX512-BF16 computes float models in bfloat16.
            "INFERENCE_PRECISION_HINT": PRECISIONS[options.precision],
        }
        if wanted is None:
            self._config["INFERENCE_NUM_THREADS"] = options.threads * options.streams
            self._config["NUM_STREAMS"] = options.streams
        self.version = str(ov.get_version()).split("-", maxsplit=1)[0]
        self.inputs = tuple(_spec(port) for port in model.inputs)
        self.outputs = tuple(_spec(port) for port in model.outputs)
        self._static: Optional[Tuple[Shapes, Any]] = None
        self._dynamic: Optional[Any] = None
        self._sound: Set[Shapes] = set()
        self.stateful = bool(model.get_sinks())

    def bind(self, shapes: Shapes) -> Binding:
        return _Binding(self._compiled(shapes), self.inputs, shapes)

    def _compiled(self, shapes: Shapes) -> Any:
        """Compiled for fixed shapes, which is faster, for the first shapes; for all others
        compiled once with free shapes."""
        if self._static is None:
            model = self._shaped(shapes)
            self._static = (shapes, self._core.compile_model(model, self._device, self._config))
        if self._static[0] == shapes:
            return self._static[1]
        # Compiled with free shapes, the CPU plugin gives nonsense for shapes the model cannot
        # compute (2026.4: Reshape of 12 elements to 4); shape inference refuses them.
        if shapes not in self._sound:
            self._shaped(shapes)
            self._sound.add(shapes)
        if self._dynamic is None:
            self._dynamic = self._core.compile_model(self._model, self._device, self._config)
        return self._dynamic

    def _shaped(self, shapes: Shapes) -> Any:
        model = self._model
        if any(port.partial_shape.is_dynamic for port in model.inputs):
            model = model.clone()
            model.reshape({port: list(s) for port, s in zip(model.inputs, shapes)})
        return model

    def placement(self, *, operators: bool = True) -> Placement:
        if self._static is None and self._dynamic is None:
            try:
                ones = tuple(spec.with_batch(1) for spec in self.inputs)
                self._compiled(self.usual_shapes or ones)
            except Exception:  # 1 is too small for some free dimension
                self._dynamic = self._core.compile_model(self._model, self._device, self._config)
        compiled = self._static[1] if self._static is not None else self._dynamic
        assert compiled is not None  # noqa: S101  (for the type checker)
        devices = list(compiled.get_property("EXECUTION_DEVICES"))
        precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        counts: Dict[str, int] = {}
        for op in compiled.get_runtime_model().get_ordered_ops() if operators else ():
            info = op.get_rt_info()
            kind = info["runtimePrecision"].astype(str) if "runtimePrecision" in info else "?"
            counts[kind] = counts.get(kind, 0) + 1
        return Placement(
            {str(d).split(".", maxsplit=1)[0]: 1.0 / len(devices) for d in devices},
            "+".join(map(str, devices)),
            {theirs: ours for ours, theirs in PRECISIONS.items()}.get(precision, precision),
            counts,
        )


class _Binding(Binding):
    def __init__(self, compiled: Any, specs: Tuple[TensorSpec, ...], shapes: Shapes) -> None:
        import openvino as ov

        self._request = request = compiled.create_infer_request()
        self.inputs = tuple(np.zeros(s, np.dtype(i.dtype)) for i, s in zip(specs, shapes))
        for index, buffer in enumerate(self.inputs):
            request.set_input_tensor(index, ov.Tensor(buffer, shared_memory=True))
        ports = compiled.outputs
        # An input that is an output, too, has one tensor for both: it cannot be set twice.
        self.fixed_outputs = not any(
            port.partial_shape.is_dynamic
            or port.get_node().input_value(0).get_node().get_type_name() == "Parameter"
            for port in ports
        )
        self.fresh_outputs = not self.fixed_outputs
        # The method under InferRequest.infer: that one builds a dictionary of copies each time.
        plain = ov.InferRequest.__base__.infer
        self._infer = partial(plain, request, {}, True, False)
        if not self.fixed_outputs:
            self._count = len(ports)
            self.outputs, self.invoke = (), self._run
            return
        self.outputs = tuple(
            np.zeros(tuple(port.shape), np.dtype(_DTYPES[port.element_type.get_type_name()]))
            for port in ports
        )
        for index, buffer in enumerate(self.outputs):
            request.set_output_tensor(index, ov.Tensor(buffer, shared_memory=True))
        self.invoke = self._infer

    def _run(self) -> None:
        self._infer()
        request = self._request
        # Copies: what a later, larger call replaces must not be looked at any more.
        self.outputs = tuple(request.get_output_tensor(i).data.copy() for i in range(self._count))

    def reset(self) -> None:
        self._request.reset_state()


def _spec(port: Any) -> TensorSpec:
    kind = port.element_type.get_type_name()
    names = sorted(port.get_names())
    name = port.get_any_name() if names else port.get_node().get_friendly_name()
    if kind not in _DTYPES or kind == "string":
        raise ModelError(f"{name!r} is of type {kind}; not supported")
    shape: List[Dim] = []
    for position, dim in enumerate(port.partial_shape):
        shape.append(f"{name}_{position}" if dim.is_dynamic else dim.get_length())
    return TensorSpec(name, _DTYPES[kind], tuple(shape))
