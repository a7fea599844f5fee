"""LiteRT's GPU accelerator (WebGPU on Vulkan, Metal or Direct3D), through its CompiledModel.

`CompiledModel` crashes the process on malformed files (ai_edge_litert 2.3); the Interpreter, which
refuses them, reads every model first.
"""

from __future__ import annotations

import re
from typing import Any, List, Mapping, Tuple

import numpy as np

from ..errors import EngineMissingError, one_line
from ..placement import Placement
from . import Binding, Loaded, Options, Shapes
from . import litert as on_cpu
from .chatter import hearing

__all__ = ["load"]

#: what it says of the device it takes, and nowhere else
_ADAPTER = re.compile(r"Selected adapter: ([^,\n]+),.*adapterType=(\w+)")


def load(files: Mapping[str, bytes], options: Options) -> Loaded:
    """Load TFLite bytes for the GPU, which takes them in the shapes the file has."""
    checked = on_cpu.load(files, options)
    (model,) = files.values()
    try:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import GpuOptions
        from ai_edge_litert.options import Options as Settings
    except ImportError as error:
        raise EngineMissingError(
            f"this LiteRT has no GPU accelerator ({one_line(error)}); pip install "
            "'ai-edge-litert>=2.3'"
        ) from None
    settings = Settings(HardwareAccelerator.GPU)
    settings._gpu_options = GpuOptions(enforce_f32=options.precision == "float32")
    said: List[str] = []
    with hearing(said):
        try:
            compiled = CompiledModel.from_buffer(model, options=settings)
        except RuntimeError as error:
            raise EngineMissingError(
                "LiteRT reaches no GPU here: a driver for Vulkan, Metal or Direct3D is needed"
            ) from error
    found = _ADAPTER.search("\n".join(said))
    # without enforce_f32 it takes float16 where the driver can, and does not say whether
    precision = "float32" if options.precision == "float32" else "float16 or float32"
    return _Loaded(checked, compiled, found.groups() if found else ("", ""), precision)


class _Loaded(Loaded):
    max_bindings = 1

    def __init__(
        self, checked: Loaded, compiled: Any, adapter: Tuple[Any, ...], precision: str
    ) -> None:
        self._compiled, self._adapter, self._precision = compiled, adapter, precision
        self.inputs, self.outputs, self.version = checked.inputs, checked.outputs, checked.version
        self._operators = checked.placement().operators

    def bind(self, shapes: Shapes) -> Binding:
        for spec, shape in zip(self.inputs, shapes):
            if tuple(shape) != spec.with_batch(1):  # what a TFLite file has for a free dimension
                raise RuntimeError(
                    f"the GPU runs {spec.name!r} in the shape it was compiled for, "
                    f"{[*spec.with_batch(1)]}, not {[*shape]}"
                )
        return _Binding(self._compiled, self.inputs, self.outputs)

    def placement(self, *, operators: bool = True) -> Placement:
        whole, (name, kind) = self._compiled.is_fully_accelerated(), self._adapter
        return Placement(
            {"GPU": 1.0} if whole else {"unknown": 1.0},  # which part is, it does not say
            f"WebGPU, {name}" if name else "WebGPU", self._precision, dict(self._operators),
            simulated=name if kind == "CPU" else "",
        )  # fmt: skip

    def close(self) -> None:
        self._compiled.close()


class _Binding(Binding):
    fresh_outputs = True

    def __init__(self, compiled: Any, inputs: Any, outputs: Any) -> None:
        ((_, listed),) = compiled.get_signature_list().items()
        feeds = dict(zip(listed["inputs"], compiled.create_input_buffers(0)))
        found = dict(zip(listed["outputs"], compiled.create_output_buffers(0)))
        self.inputs = tuple(np.zeros(one.with_batch(1), one.dtype) for one in inputs)
        self.outputs = ()
        fill = [(feeds[one.name], array) for one, array in zip(inputs, self.inputs)]
        order_in, order_out = list(feeds.values()), list(found.values())
        read = [(found[one.name], one.with_batch(1), np.dtype(one.dtype)) for one in outputs]

        def invoke() -> None:
            for buffer, array in fill:
                buffer.write(array)
            compiled.run_by_index(0, order_in, order_out)
            self.outputs = tuple(
                np.asarray(buffer.read(int(np.prod(shape)), dtype)).reshape(shape)
                for buffer, shape, dtype in read
            )

        self.invoke = invoke
