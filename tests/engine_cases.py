"""The engines that every contract suite runs against, and what its cases share."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from small_models import BIAS, WEIGHTS, linear

ENGINES = [
    pytest.param("onnxruntime", marks=pytest.mark.needs("onnxruntime", "onnx")),
    pytest.param("openvino", marks=pytest.mark.needs("openvino", "onnx")),
    pytest.param("litert", marks=pytest.mark.needs("litert")),
    pytest.param("ncnn", marks=pytest.mark.needs("ncnn")),
]
#: those that also load ONNX files
ONNX_ENGINES = ENGINES[:2]
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", "litert": "tflite", "ncnn": "ncnn"}

Models = Callable[[str, str], Path]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_linear(found: np.ndarray, x: np.ndarray) -> None:
    assert found.shape == (len(x), 3)
    np.testing.assert_allclose(found, linear(x), rtol=1e-5, atol=1e-5)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """`work(number)` in as many threads at once; the first failure is raised."""
    faults: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def files_of(model: Path) -> dict[str, bytes]:
    """A model's files, as they stand in a bundle."""
    paths = (model, *(model.with_suffix(s) for s in (".bin", ".json")))
    return {f"a/{path.name}": path.read_bytes() for path in paths if path.exists()}


def bundled(folder: Path, engine: str, model: Path, *, name: str = "m", **changes: Any) -> Path:
    """A bundle of the `linear` model; `variants` is a list of changes, one for each variant."""
    x = noise(2, 1, 4)
    files = files_of(model)
    contents = {
        **files, "a/in.npz": bundles.npz(x=x), "a/out.npz": bundles.npz(y=x @ WEIGHTS + BIAS),
    }  # fmt: skip
    common = {"engine": engine, "format": FORMATS[engine], "files": tuple(files)}
    variants = tuple(
        bundles.make_variant(**({"id": f"v{i}"} | common | row))
        for i, row in enumerate(changes.pop("variants", [{}]))
    )
    path = folder / f"{name}.edgekit"
    manifest = bundles.make_manifest(contents, variants=variants, **changes)
    path.write_bytes(bundles.bundle(manifest, contents))
    return path
