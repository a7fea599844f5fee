"""The emulated CPU without VNNI, against sums written out and ONNX Runtime's integer operators."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cnn import small_cnn
from onnxruntime import quantization
from saturation import Emulation, PairSums

pytestmark = pytest.mark.needs("onnxruntime")


def test_pairs_are_clipped_to_16_bits() -> None:
    rng = np.random.default_rng(0)
    a = rng.choice(np.array([0, 3, 200, 255], np.uint8), (20, 7))
    b = rng.choice(np.array([-128, -127, -5, 90, 127], np.int8), (7, 9))
    wanted = np.zeros((20, 9), np.int64)
    for k in range(0, 7, 2):
        pair = a[:, k : k + 2].astype(np.int64) @ b[k : k + 2].astype(np.int64)
        wanted += np.clip(pair, -32768, 32767)
    assert (PairSums(True).product(a, b) == wanted).all()
    exact = a.astype(np.int64) @ b.astype(np.int64)
    assert (PairSums(False).product(a, b) == exact).all()
    assert (wanted != exact).any()


def test_7_bit_weights_are_never_clipped() -> None:
    sums = PairSums(True)
    a, b = np.full((4, 10), 255, np.uint8), np.full((10, 4), 64, np.int8)
    assert (sums.product(a, b) == 255 * 64 * 10).all()
    assert (sums.product(a, -b) == -255 * 64 * 10).all()
    assert sums.total and not sums.clipped


def test_exact_sums_are_what_onnxruntime_computes_in_7_bits(tmp_path) -> None:
    source, target = small_cnn(tmp_path / "cnn.onnx"), tmp_path / "int8.onnx"
    images = np.random.default_rng(1).normal(size=(30, 1, 12, 12)).astype(np.float32)

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"image": one[None]} for one in images]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    quantization.quantize_static(
        source, target, Images(), per_channel=True, reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
    )  # fmt: skip
    session = ort.InferenceSession(target, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"image": images})
    (found,) = Emulation(onnx.load(target), PairSums(True)).run({"image": images})
    # Rounding to 8 bits of what is in the middle of two numbers may go either way.
    step = np.ptp(wanted) / 255
    assert np.abs(found - wanted).max() <= 1.01 * step
    assert np.mean(found != wanted) < 0.02
