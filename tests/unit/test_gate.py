"""The figures of a comparison: when each is a regression."""

from typing import Any

import numpy as np
import pytest

from edgekit.measure.agreement import _alike
from edgekit.measure.compare import Ratio
from edgekit.measure.gate import (
    latency_figure,
    memory_figure,
    metric_figures,
    parity_figure,
    placement_figure,
    size_figure,
)


@pytest.mark.parametrize(
    ("ratio", "fail_over", "said", "fails"),
    [
        (Ratio(1.08, 1.06, 1.1), 0.05, "slower", True),
        (Ratio(1.04, 1.03, 1.05), 0.05, "slower", False),  # surely slower, and allowed
        (Ratio(1.04, 1.03, 1.05), 0.0, "slower", True),
        (Ratio(1.08, 0.9, 1.3), 0.05, "not enough data", False),
        (Ratio(0.5, 0.4, 0.6), 0.0, "faster", False),
    ],
)
def test_latency(ratio: Ratio, fail_over: float, said: str, fails: bool) -> None:
    found = latency_figure(100.0, 108.0, ratio, fail_over=fail_over)
    assert (found.verdict, found.regression) == (said, fails)


def test_memory_and_size() -> None:
    more = memory_figure(100, 130, None, fail_over=0.1)
    assert more is not None
    assert (more.verdict, more.regression) == ("more memory", True)
    same = memory_figure(100, 101, None, fail_over=0.0)
    assert same is not None
    assert (same.verdict, same.regression) == ("no difference", False)
    assert memory_figure(None, 5, None, fail_over=0.0) is None
    larger = size_figure(100, 104, fail_over=0.05)
    assert larger is not None
    assert (larger.verdict, larger.regression) == ("larger", False)
    over = size_figure(100, 106, fail_over=0.05)
    assert over is not None
    assert over.regression


def test_what_leaves_the_accelerator_is_a_regression() -> None:
    npu = {"shares": {"NPU": 0.95, "CPU": 0.05}, "delegate": "QNN", "precision": "float16"}
    half = {**npu, "shares": {"NPU": 0.5, "CPU": 0.5}}
    bf16 = {**npu, "precision": "bfloat16"}
    lost = placement_figure(npu, half)
    assert lost is not None
    assert (lost.verdict, lost.regression) == ("less on the accelerator", True)
    gained = placement_figure(half, npu)
    assert gained is not None
    assert not gained.regression
    other = placement_figure(npu, bf16)
    assert other is not None
    assert (other.verdict, other.regression) == ("other", False)
    assert other.note == "float16, now bfloat16"
    same = placement_figure(npu, npu)
    assert same is not None
    assert same.verdict == "same"


def _metric(value: float, interval: list[float] | None, **others: Any) -> dict[str, Any]:
    return {"name": "top1", "value": value, "interval": interval, "higher_is_better": True,
            **others}  # fmt: skip


def test_metrics_judged_against_the_base_are_paired() -> None:
    worse = _metric(0.90, None, reference=0.95, drop=0.05, drop_interval=[0.03, 0.07])
    (found,) = metric_figures([], [worse], max_drop=0.01)
    assert (found.verdict, found.regression, found.base) == ("worse", True, 0.95)
    (allowed,) = metric_figures([], [worse], max_drop=0.06)
    assert not allowed.regression
    unsure = {**worse, "drop_interval": [-0.01, 0.1]}
    assert metric_figures([], [unsure], max_drop=0.0)[0].verdict == "no difference"
    same = _metric(0.95, None, reference=0.95, drop=0.0, drop_interval=None)
    assert metric_figures([], [same], max_drop=0.0)[0].verdict == "no difference"


def test_metrics_judged_apart_differ_where_their_intervals_do() -> None:
    base = [_metric(0.95, [0.94, 0.96])]
    (apart,) = metric_figures(base, [_metric(0.90, [0.89, 0.91])], max_drop=0.01)
    assert (apart.verdict, apart.regression) == ("worse", True)
    (near,) = metric_figures(base, [_metric(0.94, [0.93, 0.95])], max_drop=0.0)
    assert (near.verdict, near.regression) == ("no difference", False)
    error = {"name": "mae", "value": 2.0, "interval": [1.9, 2.1], "higher_is_better": False}
    (better,) = metric_figures([error], [{**error, "value": 1.0, "interval": [0.9, 1.1]}],
                               max_drop=0.0)  # fmt: skip
    assert better.verdict == "better"


def _parity(ours: np.ndarray, theirs: np.ndarray, name: str = "y") -> Any:
    return parity_figure(_alike({"0/0/y": ours}, {f"0/0/{name}": theirs}))


def test_parity() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 10)).astype(np.float32)
    assert _parity(x, x).verdict == "agrees"
    assert _parity(x, x, "renamed").new == 1.0
    turned = _parity(x, -x)
    assert (turned.verdict, turned.regression, turned.new) == ("differs", True, -1.0)
    close = _parity(x, x + 0.01 * rng.standard_normal(x.shape).astype(np.float32))
    assert 0.999 < close.new < 1
    broken = _parity(x, np.where(x > 1, np.nan, x))
    assert (broken.verdict, broken.regression) == ("NaN or infinities", True)
    reshaped = _parity(x, x[:, :5])
    assert (reshaped.verdict, reshaped.regression) == ("not compared", False)
    top1 = _alike({"0/0/y": np.eye(4)}, {"0/0/y": np.eye(4)[[0, 1, 3, 2]]})["top1"]
    assert top1 == 0.5
