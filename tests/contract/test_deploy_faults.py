"""Deploying while things go wrong: kills, cuts, full disks, a host that falls silent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from deployable import Maker
from ssh_home import Link, Server

import edgekit_runtime.installer as installer
import edgekit_runtime.place as place
from edgekit.deploy import Transport, connect
from edgekit.deploy.chunks import LARGEST
from edgekit.deploy.install import Device, Installed, deploy
from edgekit.deploy.memory import Fault, MemoryTransport
from edgekit.errors import TargetError
from edgekit_runtime import open_installed

pytestmark = pytest.mark.needs("onnxruntime", "onnx")
TIMES = ("before",)
#: a trial that does not end by itself
ENDLESS = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def make(small_model, tmp_path) -> Maker:
    return Maker(small_model("onnxruntime", "linear").read_bytes(), tmp_path / "bundles")


def install(root: Path, path: Path, transport: Transport | None = None) -> Installed:
    with (
        transport or connect("local") as here,
        Device(here, "m", root=str(root), python=sys.executable) as made,
    ):
        return deploy(path, made)


def assert_old_or_new(root: Path, old: Path, new: Path) -> str:
    """Whole, and it answers; returns the name of the version that is active."""
    active = str(json.loads((root / "m" / "active.json").read_text())["file"])
    found = {p.name: p.read_bytes() for p in (root / "m" / "versions").glob("*.edgekit")}
    assert old.read_bytes() in found.values(), "the old one is lost"
    assert set(found.values()) <= {old.read_bytes(), new.read_bytes()}
    with open_installed("m", root=root) as session:
        assert session.run({"x": np.zeros((1, 4), np.float32)})["y"].shape == (1, 3)
    return active


def assert_repaired(root: Path, old: Path, new: Path) -> None:
    assert_old_or_new(root, old, new)
    began = time.monotonic()
    done = install(root, new)
    assert time.monotonic() - began < 30, "something was waited for"  # seconds of a busy machine
    assert assert_old_or_new(root, old, new) == done.file
    assert done.file.startswith("2-")
    assert not list(root.glob("m/**/.new-*")) and not list(root.glob("m/incoming/*"))
    assert not (root / "m" / "journal.json").exists()


# --- kills on the device --------------------------------------------------------------------------


def killing_python(folder: Path, call: str, number: int) -> str:
    """A Python whose installer is killed at the `number`th call of this name."""
    script = folder / "python"
    script.write_text(
        f"#!/bin/sh\ncase \"$*\" in *' trial '*) exec '{sys.executable}' \"$@\";; esac\n"
        f"exec strace -qq -o /dev/null -e trace={call} "
        f"-e inject={call}:signal=SIGKILL:when={number} '{sys.executable}' \"$@\"\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("call", "number"),
    [("rename", n) for n in range(1, 7)] + [("fsync", n) for n in (2, 5, 8)] + [("unlink", 1)],
)
def test_a_kill_leaves_the_old_or_the_new_version_whole(make, tmp_path, call, number) -> None:
    root, old, new = tmp_path / "root", make(1), make(2)
    install(root, old)
    with (
        pytest.raises(TargetError),
        connect("local") as here,
        Device(here, "m", root=str(root), python=killing_python(tmp_path, call, number)) as made,
    ):
        deploy(new, made)
    assert_repaired(root, old, new)


# --- the link is lost -----------------------------------------------------------------------------


def test_a_link_lost_at_any_step_leaves_the_old_or_the_new_version(make, tmp_path) -> None:
    root, start = tmp_path / "root", tmp_path / "start"
    old, new = make(1), make(2, extra=np.random.default_rng(0).bytes(50_000))
    install(start, old)
    shutil.copytree(start, root)
    whole = MemoryTransport()
    install(root, new, whole)
    assert whole.steps[0] == "converse" and len(whole.steps) > 10
    states: set[str] = set()
    for step, what in enumerate(whole.steps):
        for when in {"write": ("before", "halfway"), "line": ("before", "after")}.get(what, TIMES):
            shutil.rmtree(root)
            shutil.copytree(start, root)
            with pytest.raises(TargetError, match="connection was lost"):
                install(root, new, MemoryTransport(Fault(step, when)))
            states.add(assert_old_or_new(root, old, new)[0])
            if when == "halfway" or step == len(whole.steps) - 1:
                assert_repaired(root, old, new)
    assert states == {"1", "2"}, "of the last answer alone, too"


def test_a_cut_transfer_resumes_where_it_was(make, tmp_path) -> None:
    root = tmp_path / "root"
    path = make(1, extra=np.random.default_rng(4).bytes(1_000_000))
    whole = MemoryTransport()
    with Device(whole, "other", root=str(root)) as made:
        made.ask("begin", file=f"1-{1:032x}.edgekit", sha256="0" * 64, size=1000)
    taking = len(whole.steps)  # the next write is the first of chunks
    with pytest.raises(TargetError):
        install(root, path, MemoryTransport(Fault(taking, "halfway")))
    done = install(root, path)
    assert 0 < done.sent_bytes <= done.size_bytes / 2 + 2 * LARGEST


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    pytest.importorskip("asyncssh")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    made = Server(home)
    yield made
    made.cut()


def test_a_network_cut_at_any_byte_is_one_line(make, tmp_path, server, capfd) -> None:
    root, start = tmp_path / "root", tmp_path / "start"
    old, new = make(1), make(2, extra=np.random.default_rng(0).bytes(100_000))
    install(start, old)
    shutil.copytree(start, root)
    with Link(server.port) as link:
        install(root, new, connect(server.knows(link.port)))
        total = link.bytes
    for offset in np.random.default_rng(5).integers(0, total, 4):
        shutil.rmtree(root)
        shutil.copytree(start, root)
        with Link(server.port, int(offset)) as link:
            with pytest.raises(TargetError) as caught:
                install(root, new, connect(server.knows(link.port)))
            assert "\n" not in str(caught.value) and caught.value.exit_code == 4
        assert_repaired(root, old, new)
    assert capfd.readouterr().err == "", "no library says anything"


def test_the_same_bundle_again_costs_less_than_64_kb_on_the_wire(make, tmp_path, server) -> None:
    path = make(1, extra=np.random.default_rng(0).bytes(1_000_000))
    sent = []
    for state in ("new", "active"):
        with Link(server.port) as link:
            done = install(tmp_path / "root", path, connect(server.knows(link.port)))
            assert done.state == state
            sent.append(link.bytes)
    assert sent[0] > path.stat().st_size and sent[1] < 64_000


# --- the host falls silent, or dies ---------------------------------------------------------------


@contextmanager
def trying(root: Path, path: Path) -> Iterator[Device]:
    """A device on which an endless trial has begun, whose host says nothing any more."""
    with connect("local") as here, Device(here, "m", root=str(root)) as made:
        sha256, size = "0" * 64, 3
        made.ask("begin", file=f"9-{9:032x}.edgekit", sha256=sha256, size=size)
        made.tell("take", b"abc", chunks=[[place.sha256_of(b"abc").hexdigest(), 0, 3]])
        made.hear()
        made.tell("commit", file=f"9-{9:032x}.edgekit", sha256=sha256, trial=ENDLESS)
        until(lambda: b"trial" in (root / "m" / "journal.json").read_bytes())
        yield made


def until(true: Callable[[], bool], within_s: float = 30.0) -> None:
    late = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < late
        time.sleep(0.02)


def test_a_host_that_dies_frees_the_device_at_once_even_during_a_trial(make, tmp_path) -> None:
    root, old, new = tmp_path / "root", make(1), make(2)
    install(root, old)
    with trying(root, new) as made:
        threading.Timer(0.5, made._talk.hang_up).start()
        made._talk._child.wait(10)
    assert_repaired(root, old, new)


def test_a_silent_owner_is_named_then_taken_over_from(make, tmp_path, monkeypatch) -> None:
    root, old, new = tmp_path / "root", make(1), make(2)
    install(root, old)
    with trying(root, new) as silent:
        holder = silent._talk._child
        with pytest.raises(TargetError, match=r"being changed by .*\(process \d+\)"):
            install(root, new)
        record = root / "m" / ".lock"
        facts = json.loads(record.read_text())
        facts["heard"] -= 13.0  # seconds of silence
        record.write_text(json.dumps(facts).ljust(1000))
        assert_repaired(root, old, new)
        assert holder.wait(5) == -signal.SIGKILL


def test_a_program_that_installs_is_not_taken_for_a_silent_host(tmp_path, monkeypatch) -> None:
    where = place.Place(str(tmp_path), "m")
    where.make()
    monkeypatch.setattr(place, "_STALE_S", -1.0)
    monkeypatch.setattr(place, "_WAIT_S", 0.1)
    lock = place.Lock(where, "a program", beats=False)
    with pytest.raises(place.Refused, match="being changed by a program"):
        place.Lock(where, "another")
    lock.close()
    place.Lock(where, "another").close()


def test_the_device_gives_up_a_silent_host_by_itself(tmp_path) -> None:
    reading, writing = os.pipe()
    wire = installer.Wire(reading)
    desk = installer.Desk(place.Place(str(tmp_path), "m"), "somebody", wire)
    before = wire.idle_s
    desk.begin(file=f"1-{1:032x}.edgekit", sha256="0" * 64, size=10)
    assert wire.idle_s < before, "others would have to wait now"
    wire.idle_s = 0.3
    os.write(writing, b"\n\n{}\n\n")
    assert wire.line() == b"{}"
    began = time.monotonic()
    with pytest.raises(installer._Gone):
        wire.line()
    assert 0.2 < time.monotonic() - began < 10
    with pytest.raises(installer._Gone):
        while True:
            wire.alive([], 0.05)
    os.close(writing)
    os.close(reading)


def test_a_deploy_killed_on_the_host_can_be_repeated(make, tmp_path) -> None:
    root, old = tmp_path / "root", make(1)
    new = make(2, extra=np.random.default_rng(6).bytes(2_000_000))
    install(root, old)
    line = ["deploy", str(new), "--to", "local", "--root", str(root), "--as", "m"]
    for after_s in (0.4, 0.7, 1.0):
        child = subprocess.Popen(
            [sys.executable, "-c", "from edgekit.cli import main; main()", *line],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(after_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert_repaired(root, old, new)


# --- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    root = tmp_path / "disk"
    root.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(root)], check=False
    )
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield root
    subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_full_disk_is_one_line_and_changes_nothing(make, tmp_path, small_disk) -> None:
    old, new = make(1), make(2, extra=np.random.default_rng(5).bytes(400_000))
    install(small_disk, old)
    filler, states = small_disk / "filler", set()
    for percent in range(0, 100, 10):
        filler.write_bytes(b"")
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(int(free * percent / 100)))
        try:
            states.add(install(small_disk, new).state)
        except TargetError as error:
            assert "no room for it" in str(error) or "disk there is full" in str(error)
            assert "\n" not in str(error) and error.exit_code == 4
            states.add("refused")
        assert_old_or_new(small_disk, old, new)
        with connect("local") as here, Device(here, "m", root=str(small_disk)) as made:
            if made.ask("status")["previous"]:
                made.ask("rollback")
                made.ask("gc")
    assert states >= {"new", "refused"}
    filler.unlink()
    assert_repaired(small_disk, old, new)


def test_a_read_only_disk_is_one_line_and_can_be_looked_at(make, small_disk) -> None:
    old = make(1)
    install(small_disk, old)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(TargetError, match="the disk there is read-only"):
        install(small_disk, make(2))
    with connect("local") as here, Device(here, "m", root=str(small_disk)) as made:
        assert made.ask("status")["active"].startswith("1-")
