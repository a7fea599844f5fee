"""The phone of the lab, over its real adbd: deployed to, measured on, and what goes wrong there."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployable import Maker
from native_runner import bundle_of

from edgekit.deploy import Transport, connect, lab
from edgekit.deploy.capsule import capsule
from edgekit.deploy.install import deploy
from edgekit.deploy.lab import Running
from edgekit.deploy.phone import Phone
from edgekit.errors import MissingToolError, TargetError, UsageError

pytestmark = [pytest.mark.devices, pytest.mark.needs("adbutils", "onnxruntime", "onnx")]
DISK_MB = 96


def _up() -> Running:
    try:
        capsule()
        return lab.up(lab.PHONE, disk_mb=DISK_MB)
    except (UsageError, MissingToolError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def phone() -> Iterator[Running]:
    os.environ.setdefault("ANDROID_ADB_SERVER_PORT", "5137")  # not the user's
    up = _up()
    yield up
    lab.down(str(up.port))


@pytest.fixture
def make(small_model, tmp_path) -> Maker:
    return Maker(small_model("onnxruntime", "linear").read_bytes(), tmp_path / "bundles")


@contextmanager
def device(phone: Running, name: str = "m") -> Iterator[Phone]:
    with connect(phone.target) as there, Phone(there, name) as made:
        yield made


def said_by(phone: Running, path: Path, *verb: object) -> dict[str, Any]:
    """What the runner there prints about a bundle that is pushed to it."""
    with device(phone, "said") as made:
        folder = made.transport.scratch()
        made.transport.push(path, f"{folder}/{path.name}")
        words = [str(verb[0]), f"{folder}/{path.name}", *map(str, verb[1:]), "--json"]
        done = made.transport.run([*made.program, *words], timeout_s=300)
        assert done.code == 0, done.last_words
        made.transport.run(["rm", "-r", folder], timeout_s=60)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def test_deploy_check_bench_deploy_again_and_go_back(phone, make, edgekit, tmp_path) -> None:
    there = ("--to", phone.target, "--as", "story")
    first = json.loads(edgekit("deploy", make(1), *there, "--json").stdout)
    assert (first["state"], first["trial"]["ok"]) == ("new", True)
    checked = edgekit("check", make(1), "--on", phone.target, "--json")
    assert checked.returncode == 0 and json.loads(checked.stdout)["ok"], checked.stderr
    benched = edgekit(
        "bench", make(1), "--on", phone.target, "--json", "--allow-unfit", "--budget", "1s",
        "--cold", "1",
    )  # fmt: skip
    assert benched.returncode == 0, benched.stderr
    document = json.loads(benched.stdout)
    taken_in = document["conditions"]
    assert document["latency_ns"]["label"] == "simulated (emulator)"
    assert (taken_in["target"], taken_in["screen"], taken_in["thermal_status"]) == ("adb", "on", 0)
    assert taken_in["battery"] == {"percent": 81, "discharging": False}
    second = json.loads(edgekit("deploy", make(2), *there, "--json").stdout)
    assert second["previous"] == first["file"]
    back = json.loads(edgekit("rollback", *there, "--json").stdout)
    assert back["active"] == first["file"]
    status = json.loads(edgekit("status", *there, "--json").stdout)
    assert status["active"] == first["file"] and len(status["versions"]) == 2
    gone = json.loads(edgekit("gc", *there, "--json").stdout)
    assert gone["versions"] == [first["file"]]


def test_probing_reads_what_it_says_of_itself(phone, edgekit, tmp_path) -> None:
    out = tmp_path / "phone.toml"
    done = edgekit("devices", "probe", phone.target, "-o", out)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert 'name = "Emulated Phone"' in text and 'name = "android"' in text
    assert "Cortex-A76" in text and "onnxruntime" in text


def test_what_fails_its_trial_there_is_not_activated(phone, make) -> None:
    with device(phone) as made:
        good = deploy(make(1), made)
        with pytest.raises(TargetError, match="golden output"):
            deploy(make(2, off=0.5), made)
        with pytest.raises(TargetError, match="has no engine 'litert'"):
            deploy(make(3, engine="litert"), made)
        assert made.ask("status")["active"] == good.file


def test_the_outputs_of_a_digit_cnn_are_the_hosts(phone, digits, tmp_path) -> None:
    model, data = digits
    with np.load(data) as held:
        samples = [{"image": held["image"][n : n + 1]} for n in range(2)]
    found = said_by(phone, bundle_of(model, samples, tmp_path / "digits.edgekit"), "check")
    assert found["ok"] and found["outputs"][0]["max_abs"] <= 1e-5


def test_the_outputs_of_magika_are_the_hosts(phone, magika, tmp_path) -> None:
    model, data = magika
    with np.load(data) as held:
        samples = [{"bytes": held["bytes"][:1]}]
    found = said_by(phone, bundle_of(model, samples, tmp_path / "magika.edgekit"), "check")
    assert found["ok"] and found["outputs"][0]["max_abs"] <= 1e-5


# --- what goes wrong ----------------------------------------------------------------------------


@contextmanager
def at(made: Phone, verb: str, action: Any) -> Iterator[None]:
    """Have something happen right after a request was sent."""
    tell = made.tell

    def told(do: str, *words: Any, **facts: Any) -> None:
        tell(do, *words, **facts)
        if do == verb:
            action()

    made.tell = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        made.tell = tell  # type: ignore[method-assign]


def inside(phone: Running, pattern: str) -> list[int]:
    """Processes of the phone by their command line, as this machine numbers them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            tree = (folder / "ns/net").readlink() == Path(f"/proc/{phone.pid}/ns/net").readlink()
            if tree and pattern in words:
                found.append(int(folder.name))
    return found


def send(phone: Running, pattern: str, number: int) -> None:
    found = inside(phone, pattern)
    assert found, pattern
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def intact(phone: Running, make: Maker, file: str, sequence: int) -> None:
    """The old version is active, and the next deploy works."""
    with device(phone, "fault") as made:
        assert made.ask("status")["active"] == file
        assert deploy(make(sequence), made).file.startswith(f"{sequence}-")


def base(phone: Running, make: Maker) -> str:
    with device(phone, "fault") as made:
        active = made.ask("status")["active"]
        return str(active or deploy(make(1), made).file)


def fails(
    phone: Running, make: Maker, sequence: int, verb: str, action: Any, within_s: float
) -> str:
    start = time.monotonic()
    with (
        pytest.raises(TargetError) as caught,
        device(phone, "fault") as made,
        at(made, verb, action),
    ):
        deploy(make(sequence, extra=os.urandom(400_000)), made)
    assert time.monotonic() - start < within_s
    text = str(caught.value)
    assert "\n" not in text and phone.target in text
    return text


def test_a_killed_runner(phone, make) -> None:
    file = base(phone, make)
    said = fails(phone, make, 10, "commit", lambda: send(phone, " desk ", signal.SIGKILL), 60)
    assert "ended" in said or "lost" in said
    intact(phone, make, file, 11)


def test_a_killed_adbd_and_a_reboot(phone, make) -> None:
    file = base(phone, make)

    def pull_and_boot() -> None:
        os.kill(phone.pid, signal.SIGKILL)

    said = fails(phone, make, 20, "take", pull_and_boot, 60)
    assert "lost" in said or "ended" in said
    with pytest.raises(TargetError, match=phone.target):
        connect(phone.target)
    assert file


def test_a_frozen_daemon_is_given_up_in_time(make) -> None:
    up = _up()
    try:
        file = base(up, make)
        stop = lambda: os.kill(_daemon(up), signal.SIGSTOP)
        start = time.monotonic()
        with connect(up.target) as there:
            stop()
            with pytest.raises(TargetError, match="frozen|did not end"):
                there.run(["true"], timeout_s=5)
            os.kill(_daemon(up), signal.SIGCONT)
        assert time.monotonic() - start < 60
        intact(up, make, file, 31)
    finally:
        lab.down(str(up.port))


def _daemon(up: Running) -> int:
    (pid,) = [one for one in inside(up, "/usr/sbin/adbd") if one != up.pid][-1:] or [up.pid]
    return pid


def test_a_full_disk_and_a_phone_unplugged_in_mid_push(make) -> None:
    up = _up()
    name = f"ekphone{up.port - 2240}"

    def cable(state: str) -> None:
        subprocess.run(["ip", "link", "set", name, state], check=True)

    try:
        file = base(up, make)
        with connect(up.target) as there:
            fill = "dd if=/dev/zero of=/data/local/tmp/fill bs=1048576 count=200 2>/dev/null; true"
            there.run(["sh", "-c", fill], timeout_s=120)
        with (
            device(up, "fault") as made,
            pytest.raises(TargetError, match="no room|disk there is full"),
        ):
            deploy(make(40, extra=os.urandom(400_000)), made)
        with connect(up.target) as there:
            there.run(["rm", "/data/local/tmp/fill"], timeout_s=60)
        intact(up, make, file, 41)
        with device(up, "fault") as made:
            file = str(made.ask("status")["active"])
        threading.Timer(60.0, cable, ["up"]).start()
        start = time.monotonic()
        with (
            pytest.raises(TargetError),
            device(up, "fault") as made,
            at(made, "take", lambda: cable("down")),
        ):
            made.hear = lambda timeout_s=20.0, _hear=made.hear: _hear(timeout_s=20.0)  # type: ignore
            deploy(make(42, extra=os.urandom(400_000)), made)
        assert time.monotonic() - start < 60
        cable("up")
        time.sleep(1)
        intact(up, make, file, 43)
    finally:
        lab.down(str(up.port))


def test_an_overhead_beside_the_host_is_not_in_the_capsule(phone) -> None:
    assert capsule().size_bytes <= 35_000_000
    assert capsule().files["edgekit-run"].stat().st_size <= 200_000


def test_transport(phone, tmp_path) -> None:
    """What the contract of transports says, with a phone's own tools."""
    with connect(phone.target) as there:
        _commands(there)
        _files(there, tmp_path)
        _conversations(there)


def _commands(there: Transport) -> None:
    done = there.run(["printf", "%s|", "a b", "$HOME", "'; rm x", ""], timeout_s=30)
    assert (done.code, done.stdout) == (0, b"a b|$HOME|'; rm x||")
    done = there.run(["sh", "-c", "cat; echo oops >&2; exit 3"], stdin=b"\x00\xff", timeout_s=30)
    assert (done.code, done.stdout, done.last_words) == (3, b"\x00\xff", "oops")
    assert there.run(["no-such-command-here"], timeout_s=30).code == 127
    with pytest.raises(TargetError, match="did not end within 1 s"):
        there.run(["sleep", "77.5"], timeout_s=1)
    time.sleep(1)
    assert b"sleep 77.5" not in there.run(["ps", "-A", "-o", "args"], timeout_s=60).stdout


def _files(there: Transport, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "model.bin").write_bytes(data)
    folder = there.scratch()
    there.push(tmp_path / "model.bin", f"{folder}/there.bin")
    assert there.run(["cat", f"{folder}/there.bin"], timeout_s=60).stdout == data
    assert there.run(["stat", "-c", "%a", folder], timeout_s=60).stdout == b"700\n"
    with pytest.raises(TargetError, match=r"model\.bin"):
        there.push(tmp_path / "model.bin", f"{folder}/there.bin/below")


def _conversations(there: Transport) -> None:
    echo = 'while read -r l; do [ "$l" = die ] && { echo gone >&2; exit 5; }; echo "$l"; done'
    talk = there.converse(["sh", "-c", echo])
    assert talk.ask("one", timeout_s=30) == b"one\n"
    assert talk.ask("two", timeout_s=30) == b"two\n"
    with pytest.raises(TargetError, match="gone"):
        talk.ask("die", timeout_s=30)
    talk.close()
    talk.close()
    late = there.converse(["sh", "-c", 'while read -r l; do sleep 2; echo "$l"; done'])
    with pytest.raises(TargetError, match="within 1 s"):
        late.ask("one", timeout_s=1)
    with pytest.raises(TargetError):
        late.ask("two", timeout_s=5)
