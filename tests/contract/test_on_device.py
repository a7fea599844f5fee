"""Measuring through a device's own runtime, over transports that end on this machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnn import cnn_scores, small_cnn
from deployable import Maker
from ssh_home import Server

from edgekit.cache import Cache
from edgekit.cli import main
from edgekit.deploy import connect
from edgekit.deploy.memory import Fault, MemoryTransport
from edgekit.deploy.provision import missing_packages, pip_platforms
from edgekit.deploy.workbench import Workbench
from edgekit.device import DeviceProfile
from edgekit.errors import ModelError, TargetError, UsageError
from edgekit.facts import Facts, profile_of
from edgekit.measure import phases as phases_module
from edgekit.measure import target as target_module
from edgekit.measure.benchmark import Rounds, measure
from edgekit.measure.phases import Bench, run_phases
from edgekit.measure.site import HERE, There
from edgekit.measure.target import Target, TargetSite, board_profile, facts_of
from edgekit.measure.worker import Contender
from edgekit.observer import Diary, Observer
from edgekit.on_device import differs_there
from edgekit.pack import pack
from edgekit.preparation import Request, prepare

pytestmark = pytest.mark.needs("onnxruntime", "onnx", "asyncssh")
QUICK = Rounds(least=2, most=2, block_s=0.005)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_cnn(tmp_path / "model.onnx")


def site_of(root: Path, python: str = sys.executable) -> TargetSite:
    """This machine as a target like any other."""
    with connect("local") as here:
        facts = facts_of(here, python)
    tables = profile_of(facts, profile_id="target", name="a target", kind="board")
    where = Target("local", python, str(root))
    return TargetSite(where, facts, DeviceProfile.model_validate(tables))


@contextmanager
def ssh_server(home: Path) -> Iterator[Server]:
    made = Server(home)
    try:
        yield made
    finally:
        made.cut()


def children(text: str) -> list[int]:
    """Processes whose command has the text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if text in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_for(what: Callable[[], bool]) -> None:
    late = time.monotonic() + 10
    while not what():
        assert time.monotonic() < late
        time.sleep(0.02)


def test_it_is_measured_there_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    site, root = site_of(tmp_path / "root"), tmp_path / "root"
    contenders = [Contender(name, model, 1, "onnxruntime") for name in ("a", "b")]
    broken = Contender("c", model, 1, "litert")
    with site.session():
        taken = measure([*contenders, broken], "a", inputs=None, rounds=QUICK, site=site)
        assert isinstance(site.runner, Workbench) and site.runner.sent_bytes == model.stat().st_size
        cold = site.cold_start(contenders[0])
        assert children(str(root)), "processes that measure are there"
    for one in ("a", "b"):
        latency = taken[one].latency()
        assert latency and latency["label"] == "measured" and latency["samples"] >= 2
        assert len(taken[one].rounds_ns) == 2 and min(taken[one].samples_ns) > 0
        assert taken[one].placement["shares"] == {"CPU": 1.0} and taken[one].peak_rss_bytes > 1e6
    assert "litert" in str(taken["c"].failure)
    assert 0 < cold["import_ns"] < cold["process_ns"] and cold["first_run_ns"] > 0
    assert not list((root / "_measured").glob("scratch-*")) and not children(str(root))
    with site.session():  # the second time nothing is sent
        site.bring(contenders, None)
        assert isinstance(site.runner, Workbench) and site.runner.sent_bytes == 0


@pytest.mark.needs("ncnn", "openvino")
@pytest.mark.parametrize("engine", ["ncnn", "openvino"])
def test_files_that_belong_to_a_model_come_with_it(engine, small_model, tmp_path: Path) -> None:
    site = site_of(tmp_path / "root")
    one = Contender("a", small_model(engine, "linear"), 1, engine)
    with site.session():
        taken = measure([one], "a", inputs=None, rounds=QUICK, site=site)
    assert taken["a"].failure is None and taken["a"].latency()


def test_the_device_that_is_reached_needs_no_profile(tmp_path: Path) -> None:
    """A known board is known by its model; another one is what it says of itself."""
    asked = Request(tmp_path / "none.onnx", None, "none.npz", tmp_path)
    site = site_of(tmp_path / "root")
    notes = Diary(Observer())
    with pytest.raises(ModelError):
        prepare(replace(asked, site=site), notes, Cache(tmp_path / "cache"))
    assert notes.notes == ["for a target (as it was read)"]
    known = site.profile.model_copy(update={"name": "Raspberry Pi 5 Model B Rev 1.0"})
    with pytest.raises(UsageError, match=r"raspberry-pi-5 is aarch64, .* is x86_64"):
        prepare(
            replace(asked, site=TargetSite(Target("local"), Facts(), known)),
            notes, Cache(tmp_path / "cache"),
        )  # fmt: skip
    with pytest.raises(UsageError, match="no device is named"):
        prepare(asked, notes, Cache(tmp_path / "cache"))


def test_its_conditions_are_those_of_a_local_run(tmp_path: Path) -> None:
    from edgekit.measure.conditions import conditions

    site, here = site_of(tmp_path), conditions()
    with site.session():
        there, now = site.conditions(), site.moment(watch_s=0.1)
    assert here.keys() <= there.keys()
    same = ("cpu", "arch", "cores", "isa", "memory_bytes", "kernel", "python", "governor")
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    assert there["engines"]["onnxruntime"] == here["engines"]["onnxruntime"]
    assert now.busy is not None and 0 <= now.busy <= 1 and now.memory_free_bytes


def test_a_link_lost_while_measuring_keeps_what_there_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases_module, "_MOST_SAMPLES", 10**9)  # never before the link is cut
    link = MemoryTransport()

    @contextmanager
    def opened() -> Iterator[Workbench]:
        with link, Workbench(link, root=str(tmp_path / "root"), python=sys.executable) as bench:
            yield bench

    plain = site_of(tmp_path / "root")
    site = There(opened, plain.profile, target="memory")

    class Cutting(Observer):
        def progress(self, task: str, done: int, total: int) -> None:
            if task == "runs" and done > 5:
                link.fault = Fault(len(link.steps) + 2)

    bench = Bench(Contender("m", model, 1, "onnxruntime"), 1, cold=1, budget_s=30.0,
                  enough=0.0, site=site)  # fmt: skip
    with site.session():
        phases = run_phases(bench, Cutting())
    assert (phases.status, phases.failure_code) == ("partial", 4), phases.phases
    assert "lost" in phases.phases[-1]["failure"] and "\n" not in phases.phases[-1]["failure"]
    assert phases.found["latency_ns"]["samples"] > 0, phases.phases and phases.found["cold"]


@pytest.mark.parametrize("where", ["here", "there"])
def test_ctrl_c_keeps_what_there_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(phases_module, "_MOST_SAMPLES", 10**9)
    root = tmp_path / "root"
    site = HERE if where == "here" else site_of(root)

    class Impatient(Observer):
        def progress(self, task: str, done: int, total: int) -> None:
            if task == "runs" and done > 5:
                threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGINT)).start()

    bench = Bench(Contender("m", model, 1, "onnxruntime"), 1, cold=1, budget_s=30.0, soak_s=30.0,
                  enough=0.0, site=site)  # fmt: skip
    with site.session():
        phases = run_phases(bench, Impatient())
    last = phases.phases[-1]
    assert (phases.status, last["name"], last["failure"]) == ("partial", "warm latency", "stopped")
    assert phases.found["latency_ns"]["samples"] > 0
    assert phases.found["stopped"] == "stopped"
    assert not children(str(root))
    assert where == "here" or not list((root / "_measured").glob("scratch*"))


def test_what_is_frozen_ends_with_who_started_it(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script, model], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        pid = int(started.stdout.readline())
        wait_for(lambda: "\nState:\tT" in Path(f"/proc/{pid}/status").read_text())
        started.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in
             Path(f"/proc/{pid}/status").read_text())  # fmt: skip


KILLED = """
import sys, time
from pathlib import Path
from edgekit.measure.worker import Contender, Worker

with Worker(Contender("m", Path(sys.argv[1]), 1, "onnxruntime"), None) as worker:
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_what_is_frozen_ends_with_its_keeper(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    site = site_of(root)
    with (
        pytest.raises(TargetError),
        site.session(),
        site.worker(Contender("m", model, 1, "onnxruntime"), None) as worker,
    ):
        (measuring,) = (pid for pid in children(str(root)) if b"worker" in
                        Path(f"/proc/{pid}/cmdline").read_bytes())  # fmt: skip
        wait_for(lambda: "\nState:\tT" in Path(f"/proc/{measuring}/status").read_text())
        keeper = int(Path(f"/proc/{measuring}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(keeper, signal.SIGKILL)
        wait_for(lambda: measuring not in children(str(root)))
        worker.take(0.01)


def test_two_do_not_measure_at_once(model: Path, tmp_path: Path) -> None:
    first, second = site_of(tmp_path / "root"), site_of(tmp_path / "root")
    one = Contender("m", model, 1, "onnxruntime")
    with first.session():
        first.bring([one], None)
        with pytest.raises(TargetError, match=r"is being changed by .+@.+ \(process \d+\)"), \
                second.session():  # fmt: skip
            second.bring([one], None)


def test_golden_outputs_are_compared_there(small_model, tmp_path: Path) -> None:
    make = Maker(small_model("onnxruntime", "linear").read_bytes(), tmp_path / "bundles")
    site = site_of(tmp_path / "root")
    assert differs_there(site, make(1), 1) is None
    why = differs_there(site, make(2, off=0.5), 1)
    assert why is not None and why.startswith("on the device, golden output 'y': off by")
    with pytest.raises(ModelError, match="cannot load"):
        differs_there(site, make(3, model=b"no model"), 1)


def test_a_bare_interpreter_is_named_and_numpy_can_be_brought(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    python = str(bare / "bin" / "python3")
    site = site_of(tmp_path / "root", python)
    with pytest.raises(TargetError, match=r"has no numpy and no onnxruntime; .*--provision"):
        site.need(["onnxruntime"], Observer())
    able = TargetSite(
        Target("local", python, str(tmp_path / "root"), provision=True), site._facts, site.profile
    )
    assert not board_profile(site._facts).engines
    assert {"onnxruntime", "litert"} <= board_profile(site._facts, provision=True).engines.keys()
    able.need([], Observer())
    with able.session():
        assert isinstance(able.runner, Workbench)
        done = able.runner.call([python, "-c", "import numpy; print(numpy.__version__)"])
        assert done.code == 0 and done.out[:1].isdecimal()
    again = TargetSite(
        Target("local", python, str(tmp_path / "root"), provision=True), site._facts, site.profile
    )
    again.need([], Observer())
    assert again.packages_folder == able.packages_folder
    assert (tmp_path / "root/.device/packages/numpy/__init__.py").is_file()


def test_wheels_are_chosen_for_the_devices_system() -> None:
    board = Facts(system="Linux", arch="aarch64", libc="glibc 2.31")
    assert pip_platforms(board)[0] == "manylinux_2_31_aarch64"
    assert not any("2_34" in one for one in pip_platforms(board))
    with pytest.raises(UsageError, match="glibc"):
        pip_platforms(Facts(system="Linux", arch="aarch64", libc="bionic"))
    had = {"numpy": "1", "tflite-runtime": "2.14"}
    assert missing_packages(["litert", "ncnn"], had) == ["ncnn"]
    assert missing_packages(["litert:gpu", "ncnn:vulkan", "ncnn"], had) == ["ncnn"]


Run = Callable[..., Any]


@pytest.fixture
def said(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`said(words, code=0)`: the JSON that the command line answers, or its error's line."""
    (tmp_path / "home").mkdir()
    for name in ("HOME", "EDGEKIT_CACHE", "EDGEKIT_STORE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))

    def run(*words: object, code: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        out, errors = capsys.readouterr()
        assert ended.value.code == code, errors
        return json.loads(out) if code == 0 else errors.splitlines()[-1]

    return run


def test_run_answers_there_what_it_answers_here(model, tmp_path, said) -> None:
    sample = np.random.default_rng(0).random((1, 1, 12, 12), np.float32)
    np.save(tmp_path / "x.npy", sample)
    np.savez(tmp_path / "x.npz", image=sample)
    pack(Contender("m", model, 1, "onnxruntime"), tmp_path / "m.edgekit")
    with ssh_server(tmp_path / "home") as server:
        target = ("--on", server.target, "--python", sys.executable, "--root", tmp_path / "root")
        for path, given, where in (
            (model, tmp_path / "x.npy", ()), (model, tmp_path / "x.npz", ()),
            (model, f"image={tmp_path / 'x.npy'}", target), (model, tmp_path / "x.npz", target),
            (tmp_path / "m.edgekit", tmp_path / "x.npy", target),
        ):  # fmt: skip
            answer = said("run", path, "--input", given, *where)
            assert answer["target"] == ("ssh" if where else "local")
            np.testing.assert_allclose(
                answer["outputs"]["scores"], cnn_scores(sample), rtol=1e-4, atol=1e-5
            )
        wrong = said("run", model, "--input", f"picture={tmp_path / 'x.npy'}", *target, code=2)
        assert "no input 'picture'; the model has: image" in wrong
        saved = said("run", model, "--input", tmp_path / "x.npy", "--output", "o.npz", *target,
                     code=2)  # fmt: skip
        assert "--output saves what this machine computes" in saved
    assert "no such file; wanted a sample" in said("run", model, "--input", "nope.npy", code=2)
    said("run", model, "--input", tmp_path / "x.npy", "--output", tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz") as outputs:
        np.testing.assert_allclose(outputs["scores"], cnn_scores(sample), rtol=1e-4, atol=1e-5)


def test_what_is_brought_later_leaves_what_was_brought(model, tmp_path) -> None:
    site, one = site_of(tmp_path / "root"), Contender("m", model, 1, "onnxruntime")
    np.savez(tmp_path / "x.npz", image=np.zeros((1, 1, 12, 12), np.float32))
    with site.session():
        site.bring([one], None)
        site.bring([], tmp_path / "x.npz")
        with site.worker(one, tmp_path / "x.npz") as worker:
            assert worker.take(0.01).samples_ns


def test_the_command_line_measures_over_ssh(model, tmp_path, said) -> None:
    with ssh_server(tmp_path / "home") as server:
        target = ("--on", server.target, "--python", sys.executable, "--root", tmp_path / "root")
        options = ("--cold", "1", "--budget", "1s", "--threads", "1", "--allow-unfit")
        local = said("bench", model, *options)
        remote = said("bench", model, *options, *target)
        checked = said("check", model, *target)
    assert local.keys() == remote.keys()
    assert local["conditions"].keys() <= remote["conditions"].keys()
    assert remote["conditions"]["target"] == "ssh" and remote["status"] == "done"
    assert remote["latency_ns"]["label"] == "measured" and remote["samples_ns"]["count"] >= 50
    assert checked["ok"] and checked["outputs"][0]["output"] == "scores"


@pytest.mark.parametrize(("virtual", "label"), [(True, "instructions"), (False, "emulator")])
def test_boards_of_the_lab_are_never_measured(virtual: bool, label: str, monkeypatch) -> None:
    from edgekit.deploy.lab import Running

    boards = [Running("raspberry-pi-4", 1, 2240, virtual, "")]
    monkeypatch.setattr(target_module.lab, "running", lambda: boards)
    assert target_module.label_of("ssh://pi@127.0.0.1:2240") == f"simulated ({label})"
    assert target_module.label_of("ssh://pi@10.0.0.7") == "measured"
