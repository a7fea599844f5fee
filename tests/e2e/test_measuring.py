"""bench, compare, trace, runs and report from the command line, failures included."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import onnx_model

from edgekit.errors import ChildError
from edgekit.measure.compare import Effort, duel, verdict
from edgekit.measure.energy import Meter
from edgekit.measure.phases import Bench, run_phases
from edgekit.measure.worker import Contender
from edgekit.observer import Observer

pytestmark = [pytest.mark.needs("onnxruntime", "onnx")]

Run = Callable[..., subprocess.CompletedProcess[str]]

#: the runtime, in which one verb's runs after the given number end the process, or take longer
DISTURBED = """
import os, sys, time
from edgekit_runtime import session
from edgekit_runtime.__main__ import main
run, kind, number = session.Session.run, sys.argv[1], float(sys.argv[2])
count = 0
def other(self, inputs):
    global count
    count += 1
    if kind == "dies" and count > number:
        os._exit(9)
    start = time.perf_counter_ns()
    out = run(self, inputs)
    if kind == "slower":
        until = time.perf_counter_ns() + int(number * (time.perf_counter_ns() - start))
        while time.perf_counter_ns() < until:
            pass
    return out
session.Session.run = other
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    nodes = [
        ("Conv", ["x", "w"], ["a"], {"pads": [1] * 4}),
        ("Relu", ["a"], ["b"], {}),
        ("Conv", ["b", "v"], ["y"], {"pads": [1] * 4}),
    ]
    weights = {
        "w": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "v": rng.standard_normal((8, 16, 3, 3)).astype(np.float32),
    }
    made = onnx_model(
        nodes, {"x": ("float32", ("N", 3, 32, 32))}, {"y": ("float32", ("N", 8, 32, 32))}, weights
    )
    path = tmp_path_factory.mktemp("measuring") / "net.onnx"
    path.write_bytes(made.SerializeToString())
    return path


@pytest.fixture
def edgekit(tmp_path: Path) -> Run:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", "from edgekit.cli import main; main()", *map(str, words)],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
            env=os.environ | {"EDGEKIT_STORE": str(tmp_path / "store"),
                              "EDGEKIT_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def _disturbed(model: Path, folder: Path, kind: str, number: float, name: str = "new") -> Contender:
    script = folder / f"{kind}.py"
    script.write_text(DISTURBED)
    return Contender(
        name, model, 1, "onnxruntime", launcher=(sys.executable, str(script), kind, str(number))
    )


def test_bench_measures_in_phases_and_keeps_the_run(
    edgekit: Run, model: Path, tmp_path: Path
) -> None:
    done = edgekit("bench", model, "--allow-unfit", "--threads", "1,2", "--throughput", "--soak",
                   "2s", "--budget", "2s", "--cold", "2", "--json", "-o", "run.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["schema"] == "edgekit.bench/1"
    assert document["status"] == "done"
    assert [one["name"] for one in document["phases"]] == [
        "cold start", "throughput", "threads", "warm latency", "soak",
    ]  # fmt: skip
    for number in range(1, 6):
        assert f"[{number}/5]" in done.stderr
    first, *_ = document["cold"]
    assert {"import_ns", "load_ns", "first_run_ns", "process_ns"} <= set(first)
    memory = first["memory_bytes"]
    assert memory["import"]["rss"] < memory["first_run"]["rss"]
    for part in memory.values():
        assert part["anonymous"] + part["file"] <= part["rss"]
    latency = document["latency_ns"]
    assert latency["min"] <= latency["p50"]
    low, high = latency["intervals"]["p50"]
    assert low <= latency["p50"] <= high
    assert latency["effective_samples"] <= latency["samples"]
    assert document["stopped"] in ("narrow", "budget")
    assert document["cpu_ns_per_run"] > 0
    assert [row["threads"] for row in document["threads_sweep"]] == [1, 2]
    batches = {row["batch"] for row in document["throughput"] if row["per_second"]}
    assert batches == {1, 2, 4, 8}
    assert document["soak"]["at_s"]
    assert document["energy"]["joules_per_inference"] is None or document["energy"]["meter"]
    around = document["conditions"]
    assert around["before"]["at"] <= around["after"]["at"]
    assert around["clock_resolution_ns"] > 0
    assert json.loads((tmp_path / "run.json").read_text()) == document

    listed = json.loads(edgekit("runs", "list", "--json").stdout)
    (row,) = listed["runs"]
    assert (row["kind"], row["status"], row["p50_ns"]) == ("bench", "done", latency["p50"])
    assert json.loads(edgekit("runs", "show", row["id"]).stdout) == document
    assert edgekit("runs", "export", row["id"], "-o", "s.csv").returncode == 0
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "series,number,ns"
    assert len(lines) - 1 == document["samples_ns"]["count"]
    same = edgekit("compare", "run.json", row["id"], "--json")
    assert same.returncode == 0, same.stderr
    compared = json.loads(same.stdout)
    assert compared["verdict"] in ("no difference", "not enough data")
    assert "at different times" in same.stderr
    assert edgekit("report", "run.json", row["id"], "-o", "r.html").returncode == 0
    assert "net.onnx" in (tmp_path / "r.html").read_text()


def test_a_slower_one_fails_the_gate_and_the_same_one_passes(model: Path, tmp_path: Path) -> None:
    base = Contender("base", model, 1, "onnxruntime")
    effort = Effort(turns=25, most=8)
    slower = duel(base, _disturbed(model, tmp_path, "slower", 0.5), effort=effort)
    assert verdict(slower.latency) == "slower"
    assert 1.3 < slower.latency.value < 1.8
    faster = duel(_disturbed(model, tmp_path, "slower", 0.5, "base"), base, effort=effort)
    assert verdict(faster.latency) == "faster"
    assert slower.stopped in ("narrow", "starts", "budget")
    assert len(slower.ratios) >= 6


def test_compare_from_the_command_line(edgekit: Run, model: Path, tmp_path: Path) -> None:
    done = edgekit("compare", model, model, "--threads", "1", "--fail-over", "60%", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    figures = {one["figure"]: one for one in document["figures"]}
    assert document["interleaved"]
    assert figures["size_bytes"]["verdict"] == "same size"
    assert figures["placement"]["verdict"] == "same"
    assert figures["parity"]["new"] == 1.0
    assert figures["latency_ns"]["interval"]


def test_an_engine_that_dies_keeps_what_was_measured(model: Path, tmp_path: Path) -> None:
    """Cold start is another process and works; the warm runs die after a while."""
    dying = _disturbed(model, tmp_path, "dies", 3000)
    bench = Bench(dying, 1, cold=1, budget_s=30.0, enough=0.0, soak_s=1.0)
    found = run_phases(bench, Observer(), meter=lambda: "none")
    states = {one["name"]: one["status"] for one in found.phases}
    assert states["cold start"] == "done"
    assert states["warm latency"] == "partial"
    assert found.status == "partial"
    assert "process ended" in found.phases[1]["failure"]
    assert found.found["latency_ns"]["samples"] > 0
    at_once = Bench(_disturbed(model, tmp_path, "dies", 1), 1, cold=1, budget_s=5.0)
    none = run_phases(at_once, Observer(), meter=lambda: "none")
    assert [one["status"] for one in none.phases] == ["done", "failed"]
    assert none.found["cold"]


def test_a_duel_keeps_the_starts_before_a_crash(model: Path, tmp_path: Path) -> None:
    flag = tmp_path / "starts"
    script = tmp_path / "flaky.py"
    script.write_text(
        f"import pathlib, sys\np = pathlib.Path({str(flag)!r})\n"
        "n = int(p.read_text()) if p.exists() else 0\np.write_text(str(n + 1))\n"
        "if n >= 2: sys.exit(9)\n"
        "from edgekit_runtime.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    base = Contender("base", model, 1, "onnxruntime")
    flaky = Contender("new", model, 1, "onnxruntime", launcher=(sys.executable, str(script)))
    found = duel(base, flaky, effort=Effort(turns=5))
    assert (len(found.ratios), found.stopped) == (2, "failure")
    assert verdict(found.latency) == "not enough data"
    with pytest.raises(ChildError, match="process ended"):
        duel(base, flaky)


def test_what_cannot_be_stored_is_not_lost(edgekit: Run, model: Path, tmp_path: Path) -> None:
    """A store on a full disk: the result is still printed and in its file."""
    words = ["bench", model, "--allow-unfit", "--cold", "1", "--budget", "1s", "--json"]
    (tmp_path / "store").mkdir()
    assert edgekit("runs", "list").returncode == 0
    with sqlite3.connect(tmp_path / "store" / "results.sqlite") as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON runs BEGIN "
                   "SELECT RAISE(ABORT, 'database or disk is full'); END")  # fmt: skip
    done = edgekit(*words, "-o", "run.json")
    assert done.returncode == 2
    assert "is full" in done.stderr.strip().splitlines()[-1]
    assert json.loads(done.stdout) == json.loads((tmp_path / "run.json").read_text())


def test_joules_come_from_the_meter(model: Path) -> None:
    counted = [0.0]

    def joules() -> float:
        counted[0] += 0.5
        return counted[0]

    bench = Bench(Contender("m", model, 1, "onnxruntime"), 1, cold=1, budget_s=1.0)
    found = run_phases(bench, Observer(), meter=lambda: Meter("simulated", joules)).found["energy"]
    assert found["meter"] == "simulated"
    assert found["joules"] > 0
    assert found["joules_per_inference"] >= 0


def test_trace_from_the_command_line(edgekit: Run, model: Path, tmp_path: Path) -> None:
    done = edgekit("trace", model, "-o", "t.json", "--json", "--runs", "10")
    document = json.loads(done.stdout)
    assert (done.returncode, document["schema"]) == (0, "edgekit.trace/1")
    # ONNX Runtime computes channels in blocks of the vector width: 8 become 16 with AVX-512.
    block = 16 if "avx512f" in Path("/proc/cpuinfo").read_text() else 8
    assert sum(one["macs"] for one in document["steps"]) == 32 * 32 * 9 * 16 * (3 + block)
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert "Conv" in edgekit("trace", model, "--runs", "10").stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("bench MODEL --threads x", 2, "several: 1,2,4"),
        ("bench MODEL --threads 0", 2, "wanted at least 1"),
        ("bench MODEL --soak soon", 2, "--soak soon: wanted a time"),
        ("bench MODEL --budget 0s", 2, "--budget 0s: wanted a time"),
        ("bench MODEL --cold 0", 2, "--cold is 0"),
        ("bench MODEL --on ssh://127.0.0.1:1", 4, "ssh://127.0.0.1:1"),
        ("bench MODEL -o no/such/f.json", 2, "folder that exists"),
        ("bench missing.onnx", 2, "missing.onnx"),
        ("compare MODEL MODEL --fail-over much", 2, "wanted a share"),
        ("compare MODEL 7", 2, "no run 7"),
        ("compare newer.json MODEL", 2, "newer EdgeKit"),
        ("compare damaged.json MODEL", 2, "no result file"),
        ("trace MODEL --runs 1", 2, "wanted at least 4"),
        ("runs show 3", 2, "no run 3"),
        ("runs list --limit 0", 2, "wanted at least 1"),
        ("runs export 3 -o x.txt", 2, ".json or .csv"),
        ("report", 2, "no runs given"),
        ("report newer.json", 2, "newer EdgeKit"),
        ("runs list --store damaged.json", 2, "wanted a folder"),
    ],
)
def test_mistakes_are_one_line(
    edgekit: Run, model: Path, tmp_path: Path, words: str, code: int, says: str
) -> None:
    (tmp_path / "newer.json").write_text('{"schema": "edgekit.bench/7"}')
    (tmp_path / "damaged.json").write_text("{")
    done = edgekit(*words.replace("MODEL", str(model)).split())
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("edgekit: ")
    assert says in last
