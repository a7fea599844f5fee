"""The report of measured runs, read back with the standard library's HTML parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from edgekit.errors import InputError
from edgekit.measure.report_chart import Axis
from edgekit.measure.report_runs import runs_html
from edgekit.measure.series import latency_summary
from edgekit_runtime.timing import pack_ns

HOSTILE = "</svg></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'"
SAMPLES = [1_000_000 + 1000 * (i * 37 % 101) for i in range(500)]


class Page(HTMLParser):
    def __init__(self, *documents: dict[str, Any]) -> None:
        super().__init__()
        self.source = runs_html([(f"file{i}.json", one) for i, one in enumerate(documents)])
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, style: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if style in (a.get("class") or "").split()]


def _bench(**changes: Any) -> dict[str, Any]:
    return {
        "schema": "edgekit.bench/1", "model": "/m/net.onnx", "engine": "onnxruntime",
        "engine_version": "1.0", "samples_ns": pack_ns(SAMPLES), "warm_up_samples": 0,
        "latency_ns": latency_summary(SAMPLES), "cold": [], "peak_rss_bytes": 70_000_000,
        "cpu_ns_per_run": 1_000_000.0, "unfit": [], "notes": [], "phases": [],
        "energy": {"joules_per_inference": None, "reason": "no meter"},
        "conditions": {"cpu": "A CPU", "kernel": "Linux"}, **changes,
    }  # fmt: skip


def _trace(**changes: Any) -> dict[str, Any]:
    steps = [
        {"name": f"op{i}", "type": "Conv", "device": "CPU", "duration_ns": 1000 * (i + 1),
         "gop_per_s": 2.5} for i in range(30)
    ]  # fmt: skip
    return {
        "schema": "edgekit.trace/1", "model": "net.onnx", "engine": "onnxruntime", "steps": steps,
        "sum_ns": sum(one["duration_ns"] for one in steps), "covered": 0.97,
        "advice": [{"text": "quantize Erf_1, too"}], "conditions": {}, **changes,
    }  # fmt: skip


PRUNED = {
    "schema": "edgekit.prune/1", "model": HOSTILE, "method": "channels", "amount": 0.5,
    "reached": 0.51, "macs": [1000, 490], "parameters": [100, 50], "size_bytes": 500,
    "before_bytes": 900, "deflated_bytes": 400, "notes": [HOSTILE],
    "evaluation": {"name": "top1", "reference": 0.9, "metric": 0.88, "drop": 0.02,
                   "drop_interval": [0.01, 0.03], "samples": 500},
    "latency": {"ratio": [0.6, 0.59, 0.61], "engine": "onnxruntime", "threads": 1},
    "steps": [{"amount": 0.25, "reached": 0.26, "metric": 0.895, "drop": 0.005,
               "latency_ratio": [0.8, 0.79, 0.81]}],
    "layers": [
        {"name": "first", "type": "Conv", "macs": [600, 300], "channels": [8, 4],
         "parameters": [60, 30], "sqnr_db": None},
        {"name": HOSTILE, "type": "Gemm", "macs": [400, 190], "channels": [10, 10],
         "parameters": [40, 20], "sqnr_db": 21.34},
    ],
}  # fmt: skip


def test_pruning_shows_what_each_amount_costs_and_every_layer() -> None:
    page = Page(PRUNED)
    assert len(page.of("dot")) == 3  # as it came, on the way, what was written
    for text in ("26.0 % gone: top1 0.8950, 0.80x the latency", "8 to 4", "600 to 300", "21.3 dB",
                 "the same", "0.9000 before, 0.8800 after", "400 B compressed"):  # fmt: skip
        assert text in page.text
    assert all(tag != "script" for tag, _ in page.tags)
    plain = {**PRUNED, "method": "magnitude", "steps": [], "layers": [
        {"name": "first", "type": "Conv", "weights": 600, "zeros_before": 2, "zeros": 360},
    ]}  # fmt: skip
    assert "360" in Page(plain).text


def test_a_distribution_ends_at_all_runs() -> None:
    page = Page(_bench())
    (line,) = page.of("line")
    ends = re.findall(r"[ML]([\d.]+) ([\d.]+)", line["d"] or "")
    assert [float(y) for _, y in ends] == sorted((float(y) for _, y in ends), reverse=True)
    assert float(ends[-1][1]) < 5  # of 400 from the top: 99 %
    assert "p50 1.05" in page.text
    assert "no meter" in page.text
    assert "Linux" in page.text


def test_several_runs_share_the_plot_under_different_names() -> None:
    page = Page(_bench(), _bench(), {"schema": "edgekit.measure/1", "model": "app.edgekit",
                                     "samples_ns": pack_ns(SAMPLES)})  # fmt: skip
    assert len(page.of("line")) == 3
    assert "3 runs" in page.text
    assert "net.onnx, onnxruntime (file1.json)" in page.text


def test_a_soak_marks_where_it_became_slower() -> None:
    soak = {
        "at_s": [float(i) for i in range(1, 301)], "p50_ns": [10**6] * 60 + [2 * 10**6] * 240,
        "p90_ns": [2 * 10**6] * 300, "onset_s": 60.0, "window_s": 30.0, "first_ns": 10**6,
        "last_ns": 2 * 10**6, "slowdown": 2.0, "failure": "the device rebooted",
    }  # fmt: skip
    page = Page(_bench(soak=soak))
    (mark,) = page.of("mark")
    assert mark["d"] == "M200.0 0 L200.0 400"  # a minute of five
    assert "slower from 60 s on" in page.text
    assert "ended early: the device rebooted" in page.text


def test_operators_are_bars_the_dearest_first() -> None:
    page = Page(_trace())
    fills = [float((one["style"] or "").split(":")[1].rstrip("%")) for one in page.of("fill")]
    assert len(fills) == 20
    assert fills[0] == 100
    assert fills == sorted(fills, reverse=True)
    assert fills[9] == pytest.approx(100 * 21 / 30, abs=0.01)
    assert "quantize Erf_1, too" in page.text
    assert "the 20 dearest are shown" in page.text


def test_operators_stand_under_the_roof_by_what_they_do_with_a_byte() -> None:
    steps = [
        {"name": "on the slope", "type": "Conv", "device": "CPU", "duration_ns": 1000,
         "gop_per_s": 10.0, "macs": 5000, "bytes": 10000},  # one operation a byte
        {"name": "on the flat", "type": "Conv", "device": "CPU", "duration_ns": 1000,
         "gop_per_s": 100.0, "macs": 5000, "bytes": 100},  # a hundred
        {"name": "no products", "type": "Relu", "device": "CPU", "duration_ns": 10,
         "gop_per_s": None, "macs": 0, "bytes": 100},
    ]  # fmt: skip
    page = Page(_trace(steps=steps, sum_ns=2010, roof_gop_per_s=100.0, roof_bytes_per_s=1e10))
    slope, flat = (
        [float(part.split(":")[1].rstrip("%")) for part in (one["style"] or "").split(";")]
        for one in page.of("dot")
    )
    (roof,) = page.of("line")
    bends = [(float(x) / 10, 100 - float(y) / 4)
             for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", roof["d"] or "")]  # fmt: skip
    (x0, y0), (x1, y1), (_, y2) = bends
    assert y1 == y2 == pytest.approx(flat[1], abs=0.1)
    assert (slope[1] - y0) / (slope[0] - x0) == pytest.approx((y1 - y0) / (x1 - x0), rel=0.01)
    assert flat[0] > x1
    assert "operations a byte" in (page.of("dot")[0]["title"] or "")
    assert not Page(_trace()).of("dot")


def test_a_comparison_is_shown_with_both_distributions() -> None:
    figure = {"figure": "latency_ns", "ratio": 1.2, "interval": [1.1, 1.3], "verdict": "slower",
              "regression": True, "note": ""}  # fmt: skip
    page = Page(
        {"schema": "edgekit.compare/1", "base": "a.onnx", "new": "b.onnx", "figures": [figure],
         "interleaved": True, "notes": [], "base_samples_ns": pack_ns(SAMPLES),
         "new_samples_ns": pack_ns([2 * ns for ns in SAMPLES]), "conditions": {}}
    )  # fmt: skip
    assert "slower, a regression 1.200x (1.100 to 1.300)" in page.text
    assert len(page.of("line")) == 2


def test_what_failed_and_what_is_unfit_is_said_at_the_top() -> None:
    row = {"name": "soak", "status": "failed", "failure": "it crashed", "seconds": 1}
    text = Page(
        _bench(unfit=["others use 90 %"], phases=[row], latency_ns=None, samples_ns=None)
    ).text
    assert text.index("soak failed: it crashed") < text.index("Phases")
    assert "others use 90 %" in text


def test_no_text_breaks_out_of_the_page() -> None:
    trace = _trace(model=HOSTILE, advice=[{"text": HOSTILE}])
    trace["steps"][0]["name"] = HOSTILE
    page = Page(_bench(model=HOSTILE, notes=[HOSTILE], conditions={"cpu": HOSTILE}), trace)
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "link")] == []
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert "script-src 'none'" in str(policy)


def test_other_documents_are_refused() -> None:
    with pytest.raises(InputError, match="wanted edgekit.bench/1"):
        runs_html([("x.json", {"schema": "edgekit.check/1"})])
    with pytest.raises(InputError, match="newer EdgeKit"):
        runs_html([("x.json", {"schema": "edgekit.trace/9"})])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 3.9), (0, 12345), (5, 5), (0, 0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    axis = Axis.over("x", low, high)
    assert 2 <= len(axis.ticks) <= 6
    assert all(0 <= axis.place(at) <= 1 for at, _ in axis.ticks)
    assert all(float(text) == pytest.approx(at) for at, text in axis.ticks)
