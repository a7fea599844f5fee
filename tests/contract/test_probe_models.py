"""The probe models of every engine compute what numpy computes: a rate of wrong results is none."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit_runtime
from edgekit.errors import MissingExtraError, UsageError
from edgekit.measure import probe_models as made
from edgekit.measure.probe_models import ProbeModel, probe_models
from edgekit_runtime.__main__ import main

SIZES = (16, 64)  # a remainder of one vector, and the smallest that is measured
ENGINES = [
    pytest.param("onnxruntime", marks=pytest.mark.needs("onnxruntime", "onnx")),
    pytest.param("openvino", marks=pytest.mark.needs("openvino", "onnx")),
    pytest.param("litert", marks=pytest.mark.needs("litert", "ai_edge_litert")),
    pytest.param("ncnn", marks=pytest.mark.needs("ncnn")),
]

# --- the reference: the same arithmetic on arrays, in float64 or in integers ----------------------


def product(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """x: (pixel, input channel); weights: (output channel, input channel)."""
    return x @ weights.T


def around(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A 3x3 convolution of each channel, zeros around: x (C, H, W), weights (C, 3, 3)."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum("chwij,cij->chw", windows, weights)


def expected(model: ProbeModel, x: np.ndarray) -> np.ndarray:
    """Real values. `x`: real values, (pixel, channel) or (channel, height, width)."""
    gemm = model.kind == "gemm"
    chain = [made._gemm_weights(model.size)] if gemm else made._depthwise_weights(model.size)
    compute: Any = product if gemm else around
    if model.dtype != "int8":
        for one in chain:
            x = compute(x, one.floats.astype(np.float64))
        return x
    ncnn = model.engine == "ncnn"
    step = 1 / 127 if ncnn else 1 / 255
    low, high = (-127, 127) if ncnn else (0, 255)
    x = np.clip(np.round(x / step), low, high)
    for number, one in enumerate(chain):
        sums = compute(x.astype(np.int64), one.integers.astype(np.int64))
        scales = one.scales.astype(np.float64)
        real = sums * step * (scales if gemm else scales[:, None, None])
        if ncnn and number == len(chain) - 1:
            return real  # the last layer gives floats
        to = made._gemm_scale(model.size) if gemm else step
        shift = 128 if gemm else 0  # the product's range is symmetric
        x = np.clip(np.round(real / to), low - shift, high - shift)
        step = to
    return x * step


# --- to and from the layouts and types of the engines ---------------------------------------------


def real_input(model: ProbeModel) -> np.ndarray:
    size, rng = model.size, np.random.default_rng(7)
    shape = (size, size) if model.kind == "gemm" else (size, size // 8, size // 8)
    return rng.integers(0, 256, shape) / 255


def given(x: np.ndarray, spec: Any, model: ProbeModel) -> np.ndarray:
    """Real values as the model's input takes them."""
    if spec.dtype == "uint8":
        x = np.round(x * 255)
    elif spec.dtype == "int8":
        x = np.round(x * 255) - 128
    if len(spec.shape) == 4:
        channels_last = model.engine == "litert"
        if model.kind == "gemm":
            x = x.T  # (channel, pixel)
        elif channels_last:
            x = np.moveaxis(x, 0, -1)
    return x.reshape(spec.shape).astype(spec.dtype)


def taken(y: np.ndarray, model: ProbeModel) -> np.ndarray:
    """The model's output as real values, in the axes of `expected`."""
    gemm, kind = model.kind == "gemm", y.dtype.name
    y = y.astype(np.float64)
    if kind in ("uint8", "int8"):
        scale = made._gemm_scale(model.size) if gemm else 1 / 255
        zero = {"uint8": 128 if gemm else 0, "int8": 0 if gemm else -128}[kind]
        y = (y - zero) * scale
    if gemm:
        return y.reshape(model.size, -1).T if y.ndim == 4 else y
    return np.moveaxis(y[0], -1, 0) if model.engine == "litert" else y[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_they_compute_what_numpy_computes(engine: str, size: int, tmp_path: Path) -> None:
    models = probe_models(tmp_path, [engine], size=size)
    assert {(one.kind, one.dtype) for one in models} >= {
        (kind, dtype) for kind in ("gemm", "depthwise") for dtype in ("float32", "int8")
    }
    for model in models:
        assert model.files[0] == model.path
        assert all(path.stat().st_size > 0 for path in model.files)
        with edgekit_runtime.load(
            model.path, engine=engine, threads=1, precision=model.precision
        ) as session:
            x = real_input(model)
            (source,), (target,) = session.inputs, session.outputs
            answer = session.run({source.name: given(x, source, model)})[target.name]
        wanted, found = expected(model, x), taken(answer, model)
        worst = np.max(np.abs(found - wanted))
        spread = np.std(wanted)
        if model.dtype == "float32":
            assert worst < 1e-5 * max(1, np.max(np.abs(wanted))), model
        elif model.dtype == "float16":  # 11 bits, and sums may be kept in them
            assert worst < 2e-2 * max(1, np.max(np.abs(wanted))), model
        else:
            # Rounding to even or away from zero: one step, which the chain passes on.
            step = made._gemm_scale(size) if model.kind == "gemm" else 1 / 127
            assert worst < (1.01 if model.kind == "gemm" else 3) * step, model
            assert spread > 10 * step  # a wrong channel would show
    assert {model.ops for model in models if model.kind == "gemm"} == {2 * size**3}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_is_small_enough_for_an_emulated_board(engine: str, tmp_path: Path) -> None:
    assert all(model.ops < 1e6 for model in probe_models(tmp_path, [engine], size=64))


@pytest.mark.needs("onnxruntime", "onnx")
def test_the_verb_blocks_takes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from edgekit.measure.roofline import block_request, block_samples

    models = probe_models(tmp_path, ["onnxruntime"], size=64)
    lines = [block_request(one, 1, block_s=0.001) for one in models]
    gone = block_request(models[0], 1, path=str(tmp_path / "gone.onnx"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, gone]) + "\n"))
    assert main(["blocks"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == len(models) + 1
    for model, answer in zip(models, answers[:-1], strict=True):
        samples = block_samples(model, answer)
        assert samples
        assert all(0 < ns < 1e9 for ns in samples)
    with pytest.raises(UsageError, match="gone"):
        block_samples(models[0], answers[-1])


def test_an_unknown_engine_and_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no probe models for 'tflm'; known: onnxruntime, "):
        probe_models(tmp_path, ["tflm"], size=64)
    with pytest.raises(UsageError, match="multiple of 16"):
        probe_models(tmp_path, ["ncnn"], size=40)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"\[onnx\]"):
        probe_models(tmp_path, ["onnxruntime"], size=64)
