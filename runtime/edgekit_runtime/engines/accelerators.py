"""What engines reach beside the CPU, by name: `onnxruntime:qnn`, `litert:gpu`, `ncnn:vulkan`."""

from __future__ import annotations

from typing import Dict, NamedTuple, Tuple

from ..errors import UsageError

__all__ = ["ACCELERATORS", "VERIFIED", "Accelerator", "accelerator_of", "split_engine"]


class Accelerator(NamedTuple):
    """`device` is what placements call it (`GPU`, `NPU`), `provider` what the engine calls it, and
    `options` what its provider is told."""

    device: str
    provider: str
    options: Tuple[Tuple[str, str], ...] = ()


ACCELERATORS: Dict[str, Dict[str, Accelerator]] = {
    "onnxruntime": {
        "qnn": Accelerator("NPU", "QNNExecutionProvider"),
        "cuda": Accelerator("GPU", "CUDAExecutionProvider"),
        "tensorrt": Accelerator("GPU", "TensorrtExecutionProvider"),
        "openvino-gpu": Accelerator("GPU", "OpenVINOExecutionProvider", (("device_type", "GPU"),)),
        "openvino-npu": Accelerator("NPU", "OpenVINOExecutionProvider", (("device_type", "NPU"),)),
        "coreml": Accelerator("NPU", "CoreMLExecutionProvider"),
        "directml": Accelerator("GPU", "DmlExecutionProvider"),
        "migraphx": Accelerator("GPU", "MIGraphXExecutionProvider"),
        "nnapi": Accelerator("NPU", "NnapiExecutionProvider"),
        "vitisai": Accelerator("NPU", "VitisAIExecutionProvider"),
    },
    "openvino": {"gpu": Accelerator("GPU", "GPU"), "npu": Accelerator("NPU", "NPU")},
    "litert": {"gpu": Accelerator("GPU", "WebGPU")},
    "ncnn": {"vulkan": Accelerator("GPU", "Vulkan")},
}  # fmt: skip
#: those that the project's own tests run; all others are taken from their engines' documentation
VERIFIED = ("onnxruntime:qnn", "litert:gpu", "ncnn:vulkan")


def split_engine(name: str) -> Tuple[str, str]:
    """`ncnn:vulkan` -> (`ncnn`, `vulkan`); the second is empty for the CPU."""
    engine, _, accelerator = name.partition(":")
    return engine, accelerator


def accelerator_of(name: str) -> Accelerator:
    """What `ENGINE:ACCELERATOR` names.

    Raises:
        UsageError: the engine has no accelerator of that name.
    """
    engine, key = split_engine(name)
    known = ACCELERATORS.get(engine, {})
    if key not in known:
        listed = ", ".join(f"{engine}:{one}" for one in known) or "none"
        raise UsageError(f"{engine} has no accelerator {key!r}; known: {listed}")
    return known[key]
