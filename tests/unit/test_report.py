"""The report page, read back with the standard library's HTML parser."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import subprocess
import sys
from functools import cached_property
from html.parser import HTMLParser
from typing import Any

import pytest

from edgekit.measure.report import report_html
from edgekit.measure.report_text import Scale, bytes_text, ms_text, ratio_text

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!--"
DASH = "\u2013"


class Page(HTMLParser):
    """What a browser would find: elements, the text of the body, the plot's figure."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__()
        self.source = report_html(document)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self._words: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "base"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["script"]:
            self.scripts[-1] += data
        elif "main" in self._inside:
            self._words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._words).split())

    @cached_property
    def figure(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found

    def points(self) -> dict[str, tuple[str, Any]]:
        """`{id: (axis, y)}` of everything drawn."""
        return {
            name: (trace["yaxis"], y)
            for trace in self.figure["data"]
            for name, y in zip(trace.get("customdata", ()), trace["y"], strict=False)
        }


def candidate(id_: str, status: str, reason: str = "", **facts: Any) -> dict[str, Any]:
    """Without `facts` one of which nothing is known."""
    return {
        "id": id_, "engine": id_.split("-")[0], "engine_version": None, "format": "onnx",
        "scheme": "int8 static", "threads": 2, "status": status, "reason": reason,
        "metric": None, "metric_drop": None, "metric_drop_interval": None, "samples": None,
        "cosine": None, "latency_ns": None, "latency_ratio": None, "first_run_ns": None,
        "peak_rss_bytes": None, "placement": None, "size_bytes": None, "build_s": 0.0, **facts,
    }  # fmt: skip


def measured(
    metric: float, drop: float, ms: float, size: int, interval: list[float] | None = None
) -> dict[str, Any]:
    ns = int(ms * 1e6)
    return {
        "engine_version": "1.2.3", "metric": metric, "metric_drop": drop,
        "metric_drop_interval": interval, "samples": 400, "cosine": 0.987,
        "latency_ns": {
            "p50": ns, "p90": 2 * ns, "min": ns // 2, "samples": 58, "label": "measured",
        },
        "latency_ratio": [ms / 8, ms / 9, ms / 7], "first_run_ns": 3 * ns,
        "peak_rss_bytes": 81_000_000, "size_bytes": size,
        "placement": {"shares": {"CPU": 0.25, "NPU": 0.75}, "delegate": "some", "precision": "f32"},
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    reference = candidate(
        "ort-fp32", "kept", "good, but slower", scheme="fp32", **measured(0.96, 0.0, 8, 3_200_000)
    ) | {"latency_ratio": [1.0, 1.0, 1.0], "cosine": None}
    candidates = [
        reference,
        candidate("lite-int8", "failed", "cannot convert: <Equal> & more"),
        candidate(
            "ort-collapsed", "dropped", "loses 0.9", **measured(0.06, 0.9, 6, 800_000, [0.88, 0.92])
        ),
        candidate(
            "ort-int8", "chosen", "fastest", **measured(0.955, 0.005, 4, 800_000, [-0.001, 0.012])
        ),
        candidate("ov-int8", "skipped", "the budget was spent"),
        candidate("ov-slow", "kept", "good, but late", **measured(0.965, -0.005, 16, 900_000)),
    ]
    return {
        "schema": "edgekit.optimize/1",
        "model": {
            "path": "models/net.onnx", "sha256": "a1" * 32, "format": "onnx",
            "size_bytes": 3_200_000, "inputs": ["x: float32 [N, 8]"],
            "outputs": ["y: float32 [N, 2]"],
        },
        "profile": {"id": "pi", "name": "Some Board"},
        "target": "local", "metric": "top1", "higher_is_better": True, "max_drop": 0.01,
        "minimize": "latency", "threads": 2,
        "data": {
            "source": "data.npz", "sha256": "b2" * 32, "samples": 1000, "calibration": 200,
            "calibration_source": "data.npz", "selection": 400, "confirmation": 400,
        },
        "reference": reference, "candidates": candidates, "chosen": "ort-int8",
        "why": "0.50x the latency of fp32",
        "confirmation": {
            "metric": 0.94, "reference_metric": 0.945, "drop": 0.005,
            "drop_interval": [-0.002, 0.009], "samples": 400, "tries": 1, "reason": None,
            "samples_to_tell": 4000,
        },
        "bundle": "out/model.edgekit", "report": "out/report.html", "incomplete": False,
        "notes": [], "command": "edgekit optimize models/net.onnx", "edgekit": "0.1.0",
        "conditions": {
            "taken": "2026-01-02T03:04:05+00:00", "target": "local", "cpu": "Cortex-A76",
            "isa": ["asimd", "asimddp"], "memory_bytes": 8_000_000_000, "governor": None,
            "frequency_khz": 2_400_000, "temperature_mc": 51_500, "something_new": 7,
            "engines": {"onnxruntime": "1.2.3", "litert": None},
        },
        "seconds": {"measure": 9.3, "total": 179.3},
    }  # fmt: skip


def alone(document: dict[str, Any]) -> dict[str, Any]:
    """Everything but the reference failed."""
    reference = document["reference"] | {"status": "chosen", "reason": ""}
    failed = [candidate(f"x-{n}", "failed", "no way") for n in range(3)]
    return document | {
        "reference": reference, "candidates": [reference, *failed], "chosen": reference["id"],
        "why": "nothing is faster", "confirmation": document["confirmation"]
        | {"drop": 0.0, "drop_interval": None, "metric": 0.945},
    }  # fmt: skip


def with_error_metric(document: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(document) | {
        "metric": "mae", "higher_is_better": False, "max_drop": 0.02,
    }  # fmt: skip
    for one in [changed["reference"], *changed["candidates"]]:
        if one["metric"] is not None:
            one["metric"] = 0.4 + one["metric_drop"]
    return changed


@pytest.fixture(autouse=True)
def short_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five megabytes of script need not be parsed in every test."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")


# --- one page, nothing from outside -------------------------------------------------------------


def test_nothing_is_loaded_from_outside(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real plotly.js
    page = Page(document)
    loading = {"src", "href", "srcset", "action", "data", "poster", "background"}
    assert not [(tag, a) for tag, a in page.elements if loading & a.keys()]
    assert len(page.scripts[1]) > 1_000_000
    assert not {"link", "iframe", "img", "object", "base"} & {tag for tag, _ in page.elements}
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_exactly_the_pages_own_scripts(document: dict[str, Any]) -> None:
    page = Page(document)
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == len(page.scripts) - 1 == 2


def test_it_is_a_pure_function(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    assert report_html(document) == report_html(document)
    assert document == before


def test_importing_it_does_not_import_plotly() -> None:
    code = "import sys, edgekit.measure.report; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "place",
    ["path", "reason", "id", "note", "command", "cpu", "metric", "scheme", "key", "confirmation"],
)
def test_hostile_text_stays_text(document: dict[str, Any], place: str) -> None:
    plain = [tag for tag, _ in Page(document | {"notes": ["x"]}).elements]
    document["notes"] = ["x"]
    chosen = document["candidates"][3]
    if place == "path":
        document["model"]["path"] = HOSTILE
    elif place in ("reason", "scheme"):
        chosen[place] = HOSTILE
    elif place == "id":
        chosen["id"] = document["chosen"] = HOSTILE
    elif place == "note":
        document["notes"] = [HOSTILE]
    elif place == "cpu":
        document["conditions"]["cpu"] = HOSTILE
    elif place == "key":
        document["conditions"]["engines"] = {HOSTILE: "1", "x": "2"}
    elif place == "confirmation":
        document["confirmation"]["reason"] = HOSTILE
    else:
        document[place] = HOSTILE
    page = Page(document)
    assert [tag for tag, _ in page.elements] == plain
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert HOSTILE in page.text
    assert "<script>alert" not in page.source


# --- what it says -------------------------------------------------------------------------------


def test_the_headline_says_what_it_gives_and_where_it_was_measured(
    document: dict[str, Any],
) -> None:
    text = Page(document).text
    for words in (
        "ort-int8 Chosen: 0.50x the latency of fp32.",
        "0.50x the latency of fp32 8.00 \u2192 4.00 ms p50 95 % CI 0.44 to 0.57",
        "0.25x the size of fp32 3.20 MB \u2192 800 kB",
        "95.50 % top1; fp32 has 96.00 % drop 0.50 points 95 % CI \u22120.10 to 1.20",
        "Latency measured on Cortex-A76, 2 threads.",
        "on 400 untouched ones 94.50 % \u2192 94.00 %",
    ):
        assert words in text


def test_a_label_other_than_measured_is_shown(document: dict[str, Any]) -> None:
    document["candidates"][3]["latency_ns"]["label"] = "estimated"
    text = Page(document).text
    assert "Latency estimated on Cortex-A76" in text
    assert "58 samples, estimated" in text


def test_every_candidate_and_reason_is_in_the_table(document: dict[str, Any]) -> None:
    page = Page(document)
    table = page.text.split("All candidates")[1]
    for one in document["candidates"]:
        assert one["id"] in table
        assert one["reason"] in table
    assert "cannot convert: &lt;Equal&gt; &amp; more" in page.source
    found = sorted(document["candidates"], key=lambda one: table.index(one["id"]))
    assert [one["id"] for one in found] == [
        "ort-int8", "ort-fp32", "ov-slow", "ort-collapsed", "lite-int8", "ov-int8",
    ]  # fmt: skip


def test_what_is_not_known_is_a_dash(document: dict[str, Any]) -> None:
    page = Page(document)
    failed = page.text.split("lite-int8")[1].split("cannot convert")[0]
    assert failed.split() == ["lite", "int8", "static", "failed", *[DASH] * 6]
    assert f"frequency governor {DASH}" in page.text
    assert f"litert installed {DASH}" in page.text
    assert "None" not in page.text


def test_conditions_have_human_units(document: dict[str, Any]) -> None:
    text = Page(document).text
    for words in (
        "2026-01-02 03:04:05 UTC", "memory 8.00 GB", "CPU frequency 2.40 GHz",
        "temperature 52 \u00b0C", "instruction sets asimd, asimddp", "something new 7",
        "total 3.0 min", "a1" * 32, "b2" * 32, "edgekit optimize models/net.onnx",
    ):  # fmt: skip
        assert words in text


def test_notes_and_incompleteness_are_up_front(document: dict[str, Any]) -> None:
    assert "warning" not in [attrs.get("class") for _, attrs in Page(document).elements]
    noted = Page(document | {"notes": ["only 60 samples"]}).text
    assert "Please note only 60 samples What was asked" in noted
    stopped = Page(document | {"notes": ["stopped by the user"], "incomplete": True}).text
    assert "Incomplete: the run ended before everything was done stopped by the user" in stopped
    assert stopped.index("Incomplete") < stopped.index("What was asked")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "Within the 1.00 points allowed, and so is the whole confidence interval."),
        ({"drop_interval": [0.0, 0.02]}, "do not rule out more: the interval reaches 2.00 points"),
        ({"drop_interval": None}, "too few samples for an interval"),
        ({"reason": "loses 0.0300"}, "Not within the budget: loses 0.0300."),
        ({"tries": 3}, "400, used before only to reject 2 better candidates"),
    ],
)
def test_the_confirmation_says_what_is_not_ruled_out(
    document: dict[str, Any], changes: dict[str, Any], verdict: str
) -> None:
    document["confirmation"] |= changes
    assert verdict in Page(document).text


def test_without_confirmation_it_says_so(document: dict[str, Any]) -> None:
    text = Page(document | {"confirmation": None}).text
    assert "Not confirmed" in text
    assert "not confirmed on others" in text


def test_the_reference_may_be_the_choice(document: dict[str, Any]) -> None:
    page = Page(alone(document))
    assert "8.00 ms latency p50 the model as it came" in page.text
    assert "The choice is the reference itself" in page.text
    assert list(page.points()) == ["ort-fp32"]


def test_an_errors_words_are_turned_around(document: dict[str, Any]) -> None:
    text = Page(with_error_metric(document)).text
    assert "mae (lower is better)" in text
    assert "largest rise 0.02: mae \u2264 0.42" in text
    assert "0.405 mae; fp32 has 0.4 rise 0.005" in text
    assert "drop" not in text.replace("dropped", "")


# --- the plot -----------------------------------------------------------------------------------


def test_a_collapsed_candidate_does_not_squeeze_the_others(document: dict[str, Any]) -> None:
    page = Page(document)
    layout = page.figure["layout"]
    assert page.points()["ort-collapsed"] == ("y2", 0.0)
    assert layout["yaxis2"]["ticktext"] == ["6.00"]
    worst, best = layout["yaxis"]["range"]
    assert 90 < worst < 95 < 96.5 < best < 100
    assert layout["yaxis2"]["domain"][1] < layout["yaxis"]["domain"][0]


def test_better_is_always_up(document: dict[str, Any]) -> None:
    layout = Page(with_error_metric(document)).figure["layout"]
    worst, best = layout["yaxis"]["range"]
    assert best < 0.395 < 0.42 < worst
    budget = next(shape for shape in layout["shapes"] if shape["type"] == "line")
    assert budget["y0"] == budget["y1"] == pytest.approx(0.42)


def test_a_wide_range_of_latencies_is_logarithmic(document: dict[str, Any]) -> None:
    assert Page(document).figure["layout"]["xaxis"]["type"] == "linear"
    document["candidates"][5]["latency_ns"]["p50"] = 90_000_000
    axis = Page(document).figure["layout"]["xaxis"]
    assert axis["type"] == "log"
    assert {"5", "10", "50", "100"} <= set(axis["ticktext"])


def test_without_anything_to_draw_there_is_no_script(document: dict[str, Any]) -> None:
    document["reference"]["metric"] = float("nan")  # a metric of the user's own may say so
    page = Page(document)
    assert not page.scripts
    assert "Nothing to draw" in page.text
    assert "NaN" in page.text


def test_a_marks_area_follows_the_file_size(document: dict[str, Any]) -> None:
    document["candidates"][3]["size_bytes"] = 1_600_000
    sizes = {
        name: size
        for trace in Page(document).figure["data"]
        for name, size in zip(
            trace.get("customdata", ()), trace.get("marker", {}).get("size", ()), strict=True
        )
    }
    assert (sizes["ort-fp32"] / sizes["ort-int8"]) ** 2 == pytest.approx(2, rel=0.02)


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (bytes_text(None), DASH),
        (bytes_text(0), "0 B"),
        (bytes_text(839_816), "840 kB"),
        (bytes_text(25_276_514_304), "25.3 GB"),
        (ms_text(None), DASH),
        (ms_text(8_031_302), "8.03"),
        (ms_text(133_546_507), "134"),
        (ms_text(1_234), "0.00123"),
        (ratio_text(None), (DASH, "")),
        (ratio_text([0.66, 0.49, 0.74]), ("0.66x", "95 % CI 0.49 to 0.74")),
        (ratio_text([0.66, 0.66, 0.66]), ("0.66x", "too few rounds for an interval")),
        (Scale("top1", higher_is_better=True).drop(-1e-9), "0.00 points"),
        (Scale("top1", higher_is_better=True).drop(-0.0009), "\u22120.09 points"),
        (Scale("mae", higher_is_better=False).drop(0.0), "0"),
        (Scale("mae", higher_is_better=False).value(None), DASH),
        (Scale("cosine", higher_is_better=True).value(0.99993), "0.99993"),
    ],
)
def test_numbers_are_written_with_care(text: object, wanted: object) -> None:
    assert text == wanted
