"""Small ncnn nets written by hand: no converter has a say in blobs, names and free dimensions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from small_models import BIAS, KERNEL, WEIGHTS

#: a tensor of the sidecar: name, shape, and what differs from the defaults
Tensor = tuple[str, Sequence[int | str], dict[str, Any]]


def write_ncnn(
    folder: Path,
    name: str,
    layers: Sequence[str],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    weights: bytes = b"",
) -> Path:
    """Write `.param`, `.bin` and `.json`; a layer is a line of the param file."""
    blobs = sum(int(line.split()[3]) for line in layers)
    path = folder / f"{name}.param"
    path.write_text("\n".join(["7767517", f"{len(layers)} {blobs}", *layers, ""]))
    path.with_suffix(".bin").write_bytes(weights)

    def listed(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [{"name": n, "dtype": "float32", "shape": [*s], **more} for n, s, more in tensors]

    sidecar = {"inputs": listed(inputs), "outputs": listed(outputs)}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    return path


def plain(*arrays: np.ndarray) -> bytes:
    """Weights of one layer: the first array is preceded by a 4-byte tag, 0 for float32."""
    return bytes(4) + b"".join(np.ascontiguousarray(a, np.float32).tobytes() for a in arrays)


def convolution(
    folder: Path, kernel: np.ndarray, *, height: int | str = "H", width: int | str = "W"
) -> Path:
    """A valid convolution x (1, I, H, W) -> y with a kernel (O, I, K, K), no bias."""
    outs, ins, size, _ = kernel.shape
    return write_ncnn(
        folder, "conv",
        ["Input in 0 1 x",
         f"Convolution c 1 1 x y 0={outs} 1={size} 5=0 6={kernel.size}"],
        [("x", (1, ins, height, width), {})],
        [("y", (1, outs, "H2", "W2"), {})],
        plain(kernel),
    )  # fmt: skip


def save_ncnn(folder: Path, name: str) -> Path:
    """One of the small models of `small_models`, as the path of its `.param`. There is no `two` and
    no `where`, since ncnn computes on float32 only, and no `stubborn`: its Reshape makes 2 x 2 of
    12 numbers by dropping eight."""
    if name == "linear":
        return write_ncnn(
            folder, name,
            ["Input in 0 1 x", f"InnerProduct fc 1 1 x y 0=3 1=1 2={WEIGHTS.size}"],
            [("x", ("N", 4), {})],
            [("y", ("N", 3), {})],
            plain(WEIGHTS.T, BIAS),
        )  # fmt: skip
    if name == "scalar":  # BinaryOp 2 with a constant: multiply by it
        return write_ncnn(
            folder, name,
            ["Input in 0 1 x", "BinaryOp twice 1 1 x y 0=2 1=1 2=2.0"],
            [("x", (), {})],
            [("y", (), {})],
        )  # fmt: skip
    assert name == "conv", name
    return convolution(folder, KERNEL.reshape(1, 1, 3, 3))
