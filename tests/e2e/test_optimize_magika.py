"""The main job on magika: what the README promises, from the command line."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import edgekit_runtime

pytestmark = [pytest.mark.measures, pytest.mark.needs("onnxruntime"), pytest.mark.needs("openvino")]

FIELDS = {
    "id", "engine", "format", "scheme", "status", "reason", "metric", "metric_drop", "samples",
    "latency_ns", "size_bytes", "build_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(edgekit, magika, tmp_path_factory):
    """One whole run; the tests look at what it left."""
    model, data = magika
    out = tmp_path_factory.mktemp("out")
    done = edgekit(
        "optimize", model, "--for", "this-machine", "--data", data, "-o", out, "--json",
        "--threads", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), out, done.stderr


def test_document_has_what_scripts_rely_on(run) -> None:
    document, _, log = run
    assert document["schema"] == "edgekit.optimize/1"
    assert document["incomplete"] is False
    for row in document["candidates"]:
        assert row.keys() >= FIELDS
        assert row["status"] in {"chosen", "kept", "dropped", "failed", "skipped"}
        if row["latency_ns"]:
            assert row["latency_ns"].keys() >= {"p50", "p90", "min", "samples", "label"}
            assert row["latency_ns"]["label"] == "measured"
    assert document["reference"]["id"] == "onnxruntime-fp32"
    assert "Traceback" not in log


def test_quantizing_everything_collapses_and_is_dropped(run) -> None:
    rows = {row["id"]: row for row in run[0]["candidates"]}
    collapsed = rows["onnxruntime-int8-static"]
    assert collapsed["metric_drop"] > 0.3
    assert collapsed["status"] == "dropped"
    assert "more than the 0.01 allowed" in collapsed["reason"]
    cured = rows["onnxruntime-int8-static-matmul"]
    assert abs(cured["metric_drop"]) < 0.05
    assert cured["size_bytes"] < 0.3 * run[0]["model"]["size_bytes"]


def test_what_onnx2tf_alone_converts_wrongly_is_converted_right(run) -> None:
    rows = [row for row in run[0]["candidates"] if not row["repairs"]]
    litert = {row["id"]: row for row in rows if row["engine"] == "litert"}
    assert len(litert) == 5
    assert abs(litert["litert-fp32"]["metric_drop"]) < 1e-9
    assert all(row["status"] != "planned" and row["reason"] is not None for row in litert.values())


def test_choice_is_within_the_budget_and_confirmed_on_untouched_samples(run) -> None:
    document, _, _ = run
    chosen = next(row for row in document["candidates"] if row["id"] == document["chosen"])
    assert chosen["status"] == "chosen"
    assert chosen["metric_drop"] <= document["max_drop"]
    data, confirmed = document["data"], document["confirmation"]
    assert confirmed["drop"] <= document["max_drop"]
    assert confirmed["samples"] == data["confirmation"]
    parts = data["calibration"] + data["selection"] + data["confirmation"]
    assert parts == data["samples"]


def test_never_worse(run) -> None:
    document, _, _ = run
    reference = document["reference"]
    for row in document["candidates"]:
        if row["status"] in ("chosen", "kept") and row["id"] != reference["id"]:
            faster = row["latency_ratio"][2] is not None and row["latency_ratio"][2] < 1
            assert faster or row["size_bytes"] < reference["size_bytes"]


def test_metrics_are_those_of_the_raw_engine(run, magika) -> None:
    """The reference's figures, computed again with ONNX Runtime alone."""
    import onnxruntime

    document, _, _ = run
    with np.load(magika[1]) as archive:
        samples, labels = archive["bytes"], archive["labels"]
    raw = onnxruntime.InferenceSession(str(magika[0]))
    right = raw.run(None, {"bytes": samples})[0].argmax(1) == labels
    confirmed, reference = document["confirmation"], document["reference"]
    counted = round(reference["metric"] * reference["samples"]) + round(
        confirmed["reference_metric"] * confirmed["samples"]
    )
    used = reference["samples"] + confirmed["samples"]
    # The rest calibrated: what the two parts counted plus at most that rest is all that is right.
    assert counted <= right.sum() <= counted + (len(labels) - used)


def test_bundle_runs_and_agrees_with_its_model(run, magika) -> None:
    document, out, _ = run
    with np.load(magika[1]) as archive:
        samples, labels = archive["bytes"], archive["labels"]
    with edgekit_runtime.load(out / "model.edgekit") as session:
        assert session.variant.id == document["chosen"]
        answers = [session.run({"bytes": x[None]})["target_label"][0].argmax() for x in samples]
        batch = session.run({"bytes": samples[:16]})["target_label"].argmax(1)
        assert session.placement.shares == {"CPU": 1.0}
    assert np.mean(np.array(answers) == labels) > 0.9
    assert np.mean(batch == answers[:16]) > 0.9


def test_golden_inputs_are_noise_not_the_users_files(run, magika) -> None:
    import io

    from edgekit_runtime.bundle import Bundle

    with np.load(magika[1]) as archive:
        rows = {row.tobytes() for row in archive["bytes"]}
    with Bundle(run[1] / "model.edgekit") as bundle:
        golden = bundle.manifest.variants[0].golden
        assert golden.synthetic
        with np.load(io.BytesIO(bundle.read(golden.inputs))) as archive:
            assert not {row.tobytes() for row in archive["bytes"]} & rows


def test_check_and_inspect_and_bench(run, edgekit, tmp_path) -> None:
    bundle = run[1] / "model.edgekit"
    checked = edgekit_check(edgekit, bundle)
    assert checked["ok"] is True
    shown = edgekit("inspect", bundle, "--json")
    assert json.loads(shown.stdout)["variants"][0]["id"] == run[0]["chosen"]
    assert run[0]["chosen"] in edgekit("inspect", bundle).stdout
    timed = edgekit("bench", bundle, "--allow-unfit", "--json", "-o", tmp_path / "b.json")
    found = json.loads(timed.stdout)
    assert found["schema"] == "edgekit.bench/1"
    assert len(found["cold"]) == 5
    assert all(one["import_ns"] > 0 and one["load_ns"] > 0 for one in found["cold"])
    cut = found["warm_up_samples"]
    assert found["latency_ns"]["samples"] == found["samples_ns"]["count"] - cut
    assert json.loads((tmp_path / "b.json").read_text()) == found


def edgekit_check(edgekit, bundle: Path) -> dict[str, object]:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "edgekit_runtime", "check", str(bundle), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_report_is_one_file_with_every_candidate(run) -> None:
    document, out, _ = run
    page = (out / "report.html").read_text()
    for row in document["candidates"]:
        assert row["id"] in page
    assert "<script src" not in page
    raw = json.loads((out / "result.json").read_text())
    for row in document["candidates"]:
        if row["latency_ns"]:
            samples = [ns for block in raw["rounds_ns"][row["id"]] for ns in block]
            assert len(samples) == row["latency_ns"]["samples"]
            assert min(samples) == row["latency_ns"]["min"]


def test_second_run_builds_and_evaluates_nothing_again(run, edgekit, magika, tmp_path) -> None:
    model, data = magika
    before = {p: p.stat().st_mtime_ns for p in edgekit.cache.rglob("entry.json")}
    done = edgekit(
        "optimize", model, "--for", "this-machine", "--data", data, "-o", tmp_path, "--json",
        "--threads", "1",
    )  # fmt: skip
    document = json.loads(done.stdout)
    after = {p: p.stat().st_mtime_ns for p in edgekit.cache.rglob("entry.json")}
    # Failed conversions are tried again; whatever worked is not touched. Another winner within
    # the noise would be confirmed for the first time: at most one new entry, unless other rows
    # looked worth repairing (each builds one, and evaluates it on some and on all samples).
    assert before.items() <= after.items()
    first = {row["id"]: row["metric"] for row in run[0]["candidates"]}
    second = {row["id"]: row["metric"] for row in document["candidates"]}
    repairs = {row["id"] for row in document["candidates"] if row["repairs"]}
    new = second.keys() - first.keys()
    assert new <= repairs
    assert len(after) - len(before) <= 1 + (8 * len(new) if new else 0)
    both = first.keys() & second.keys()
    assert {key: first[key] for key in both} == {key: second[key] for key in both}
    assert both >= {row["id"] for row in run[0]["candidates"] if not row["repairs"]}


def one_engine(folder):
    """A profile for the tests that need no more."""
    path = folder / "one.toml"
    path.write_text(
        'schema = "edgekit.device/1"\nid = "one"\nname = "One engine"\nkind = "board"\n'
        'arch = "x86_64"\n[engines.onnxruntime]\n[[sources]]\nfields = ["engines"]\n'
        'kind = "choice"\ntitle = "test"\nsays = "one is enough"\n'
    )
    return path


def start_and_wait_for(edgekit, text: str, *arguments: object):
    """Start a run and wait until its log says `text`."""
    process = edgekit.start(*arguments)
    deadline = time.monotonic() + 240
    assert process.stderr is not None
    seen = []
    while time.monotonic() < deadline:
        line = process.stderr.readline()
        seen.append(line)
        if text in line:
            return process
        if not line:
            break
    process.kill()
    raise AssertionError("".join(seen))


@pytest.mark.parametrize("at", ["onnxruntime-fp32: top1", "int8-static-matmul: top1"])
def test_ctrl_c_returns_the_best_so_far(at, edgekit, magika, tmp_path) -> None:
    from conftest import Cli

    own = Cli(tmp_path / "cache")
    model, data = magika
    arguments = ("optimize", model, "--for", "this-machine", "--data", data)
    process = start_and_wait_for(own, at, *arguments, "-o", tmp_path / "out", "--json")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    document = json.loads(stdout)
    assert document["incomplete"] is True
    assert "stopped by the user" in document["notes"]
    assert any(row["status"] == "skipped" for row in document["candidates"])
    with edgekit_runtime.load(tmp_path / "out" / "model.edgekit") as session:
        assert session.variant.id == document["chosen"]


def test_killed_run_resumes_with_what_was_finished(magika, tmp_path) -> None:
    import psutil
    from conftest import Cli

    own = Cli(tmp_path / "cache")
    model, data = magika
    out = tmp_path / "out"
    profile = one_engine(tmp_path)
    arguments = ("optimize", model, "--for", profile, "--data", data, "-o", out, "--json")
    process = start_and_wait_for(own, "int8-static-matmul: top1", *arguments)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], "orphans"
    # The best so far is there, whole.
    assert [path.name for path in out.iterdir()] == ["model.edgekit"]
    with edgekit_runtime.load(out / "model.edgekit") as session:
        assert session.variant.id == "onnxruntime-fp32"
    finished = {p: p.stat().st_mtime_ns for p in own.cache.rglob("entry.json")}
    assert finished
    done = own(*arguments)
    assert done.returncode == 0, done.stderr
    after = {p: p.stat().st_mtime_ns for p in own.cache.rglob("entry.json")}
    assert finished.items() <= after.items()
    assert json.loads(done.stdout)["incomplete"] is False


def test_spent_budget_is_marked_incomplete(magika, tmp_path) -> None:
    from conftest import Cli

    own = Cli(tmp_path / "cache")
    model, data = magika
    done = own(
        "optimize", model, "--for", "this-machine", "--data", data, "-o", tmp_path / "out",
        "--budget", "14s", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["incomplete"] is True
    assert any("budget" in note for note in document["notes"])
    assert (tmp_path / "out" / "model.edgekit").exists()
