"""The phone of the lab, over its real adbd: deployed to, measured on, and what goes wrong there."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli
from deployable import Maker
from fashion_cnn import fashion_cnn
from native_runner import bundle_of, python_runtime, shape_of

from edgekit.cache import default_root
from edgekit.deploy import Transport, adb, connect, lab
from edgekit.deploy.capsule import capsule, litert_addon
from edgekit.deploy.install import deploy
from edgekit.deploy.lab import Running
from edgekit.deploy.phone import Phone
from edgekit.errors import MissingToolError, TargetError, UsageError

pytestmark = [pytest.mark.devices, pytest.mark.needs("adbutils", "onnxruntime", "onnx")]
DISK_MB = 96
LARGE = 400_000  # a bundle of more than one packet
WITHIN_S = 60.0  # any fault is reported by then


@pytest.fixture(scope="module")
def adb_server() -> Iterator[None]:
    """An adb server of our own, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", "5137")
        yield
        from adbutils import AdbClient

        AdbClient().server_kill()


@pytest.fixture(scope="module")
def phone(adb_server) -> Iterator[Running]:
    try:
        capsule()
        up = lab.up(lab.PHONE, disk_mb=DISK_MB)
    except (UsageError, MissingToolError) as error:
        pytest.skip(str(error))
    yield up
    lab.down(str(up.port))


@pytest.fixture(scope="module")
def edgekit(adb_server) -> Cli:
    return Cli(default_root())  # whose lab the phone is of


@pytest.fixture
def make(small_model, tmp_path) -> Maker:
    return Maker(small_model("onnxruntime", "linear").read_bytes(), tmp_path / "bundles")


@contextmanager
def device(phone: Running, name: str = "m") -> Iterator[Phone]:
    with connect(phone.target) as there, Phone(there, name) as made:
        yield made


def said_by(phone: Running, path: Path, *verbs: tuple[object, ...]) -> list[dict[str, Any]]:
    """What the runner there prints about a bundle that is pushed to it."""
    found = []
    with device(phone, "said") as made:
        folder = made.transport.scratch()
        made.transport.push(path, f"{folder}/{path.name}")
        for verb in verbs:
            words = [str(verb[0]), f"{folder}/{path.name}", *map(str, verb[1:]), "--json"]
            done = made.transport.run([*made.program, *words], timeout_s=300)
            assert done.code == 0, done.last_words
            found.append(json.loads(done.stdout))
        made.transport.run(["rm", "-r", folder], timeout_s=60)
    return found


def test_deploy_check_bench_deploy_again_and_go_back(phone, make, edgekit, tmp_path) -> None:
    there = ("--to", phone.target, "--as", "story", "--json")
    first = json.loads(edgekit("deploy", make(1), *there).stdout)
    assert (first["state"], first["trial"]["ok"]) == ("new", True)
    checked = edgekit("check", make(1), "--on", phone.target, "--json")
    assert checked.returncode == 0 and json.loads(checked.stdout)["ok"], checked.stderr
    np.save(tmp_path / "ones.npy", np.ones((1, 4), np.float32))
    answered = edgekit(
        "run", make(1), "--input", tmp_path / "ones.npy", "--on", phone.target, "--json"
    )
    assert answered.returncode == 0, answered.stderr
    np.testing.assert_allclose(json.loads(answered.stdout)["outputs"]["y"], make.right, rtol=1e-5)
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
    second = json.loads(edgekit("deploy", make(2), *there).stdout)
    assert second["previous"] == first["file"]
    back = json.loads(edgekit("rollback", *there).stdout)
    assert back["active"] == first["file"]
    status = json.loads(edgekit("status", *there).stdout)
    assert status["active"] == first["file"] and len(status["versions"]) == 2
    gone = json.loads(edgekit("gc", *there).stdout)
    assert gone["versions"] == [first["file"]]


def test_probing_reads_what_it_says_of_itself(phone, edgekit, tmp_path) -> None:
    out = tmp_path / "phone.toml"
    done = edgekit("devices", "probe", phone.target, "-o", out)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert 'name = "Emulated Phone"' in text and 'name = "android"' in text
    assert "Cortex-A76" in text and "[engines.onnxruntime]" in text and "[engines.litert]" in text


def test_what_fails_its_trial_there_is_not_activated(phone, make) -> None:
    with device(phone) as made:
        good = deploy(make(1), made)
        with pytest.raises(TargetError, match="golden output"):
            deploy(make(2, off=0.5), made)
        with pytest.raises(TargetError, match="not a TFLite model"):
            deploy(make(3, engine="litert"), made)
        assert made.ask("status")["active"] == good.file
        modes = made.transport.run(["stat", "-c", "%a", made.folder, made._root], timeout_s=60)
        assert modes.stdout.split() == [b"755", b"755"]  # nobody else writes there


@pytest.mark.needs("litert")
def test_a_tflite_model_runs_there_with_litert(phone, small_model, edgekit, tmp_path) -> None:
    model = small_model("litert", "linear")
    sample = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}
    changes = {"engine": "litert", "format": "tflite"}
    path = bundle_of(model, [sample], tmp_path / "lite.edgekit", variant=changes)
    with device(phone, "lite") as made:
        done = deploy(path, made)
        assert done.trial["ok"] and "XNNPACK" in done.trial["placement"]
    checked = edgekit("check", path, "--on", phone.target, "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["outputs"][0]["max_abs"] <= 1e-5


def test_the_outputs_of_a_digit_cnn_are_the_hosts_and_documents_pythons(
    phone, digits, tmp_path
) -> None:
    model, data = digits
    with np.load(data) as held:
        samples = [{"image": held["image"][n : n + 1]} for n in range(2)]
    path = bundle_of(model, samples, tmp_path / "digits.edgekit")
    verbs: tuple[tuple[object, ...], ...] = (("check",), ("bench", "--runs", 2), ("info",))
    said = dict(zip(("check", "bench", "info"), said_by(phone, path, *verbs), strict=True))
    for verb in verbs:
        assert shape_of(said[str(verb[0])]) == shape_of(python_runtime(verb[0], path, *verb[1:]))
    found = said["check"]
    assert found["ok"] and found["outputs"][0]["max_abs"] <= 1e-5


def test_the_outputs_of_a_fashion_cnn_are_the_hosts(phone, tmp_path) -> None:
    pytest.importorskip("torch")
    model, images, right = fashion_cnn(tmp_path / "fashion.onnx")
    assert right > 0.75  # it has learned something
    samples = [{"image": images[n : n + 1]} for n in range(2)]
    (found,) = said_by(phone, bundle_of(model, samples, tmp_path / "f.edgekit"), ("check",))
    assert found["ok"] and found["outputs"][0]["max_abs"] <= 1e-5


def test_the_outputs_of_magika_are_the_hosts(phone, magika, tmp_path) -> None:
    model, data = magika
    with np.load(data) as held:
        samples = [{"bytes": held["bytes"][:1]}]
    (found,) = said_by(phone, bundle_of(model, samples, tmp_path / "m.edgekit"), ("check",))
    assert found["ok"] and found["outputs"][0]["max_abs"] <= 1e-5


# --- what goes wrong ----------------------------------------------------------------------------


@contextmanager
def at(made: Phone, verb: str, action: Callable[[], object]) -> Iterator[None]:
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


def inside(phone: Running, word: str) -> list[int]:
    """Processes of the phone that have this word in their command, as this machine numbers them."""
    found = []
    network = Path(f"/proc/{phone.pid}/ns/net").readlink()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if word in words and (folder / "ns/net").readlink() == network:
                found.append(int(folder.name))
    return found


def send(phone: Running, word: str, number: int) -> None:
    found = inside(phone, word)
    assert found, word
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def daemon(phone: Running, number: int) -> None:
    send(phone, "/usr/sbin/adbd", number)


def reboot(phone: Running) -> None:
    (init,) = Path(f"/proc/{phone.pid}/task/{phone.pid}/children").read_text().split()
    os.kill(int(init), signal.SIGUSR1)


def cable(phone: Running, state: str) -> None:
    link = f"ekphone{phone.target.split('.')[2]}"
    subprocess.run(["ip", "link", "set", link, state], check=True)


def base(phone: Running, make: Maker) -> str:
    """The version that is active, deployed first if there is none."""
    with device(phone, "fault") as made:
        active = made.ask("status")["active"]
        return str(active or deploy(make(1), made).file)


def faulty(
    phone: Running, make: Maker, sequence: int, verb: str, action: Callable[[], object],
    undo: Callable[[], object] = lambda: None,
) -> str:  # fmt: skip
    """What a deploy says to which this happens at a request: one line, in time; the old version is
    intact, and the next deploy works."""
    file, start = base(phone, make), time.monotonic()
    with (
        pytest.raises(TargetError) as caught,
        device(phone, "fault") as made,
        at(made, verb, action),
    ):
        start = time.monotonic()
        deploy(make(sequence, extra=os.urandom(LARGE)), made)
    assert time.monotonic() - start < WITHIN_S
    undo()
    with reached(phone) as made:
        assert made.ask("status")["active"] == file
        assert deploy(make(sequence + 1), made).file.startswith(f"{sequence + 1}-")
    text = str(caught.value)
    assert "\n" not in text and phone.target in text
    return text


@contextmanager
def reached(phone: Running) -> Iterator[Phone]:
    """The phone once its adbd is back, and once the one before has noticed its end."""
    late = time.monotonic() + WITHIN_S
    while True:
        try:
            with device(phone, "fault") as made:
                made.ask("there", files=[])  # takes the lock
                break
        except TargetError:
            assert time.monotonic() < late
            time.sleep(0.5)
    with device(phone, "fault") as made:
        yield made


@pytest.mark.parametrize("verb", ["take", "commit"])
def test_a_killed_runner(phone, make, verb) -> None:
    kill = lambda: send(phone, "desk", signal.SIGKILL)
    said = faulty(phone, make, {"take": 10, "commit": 12}[verb], verb, kill)
    assert "ended" in said


def test_a_killed_adbd(phone, make) -> None:
    said = faulty(phone, make, 20, "take", lambda: daemon(phone, signal.SIGKILL))
    assert "the link is lost" in said


def test_a_reboot(phone, make) -> None:
    said = faulty(phone, make, 30, "commit", lambda: reboot(phone))
    assert "the link is lost" in said


def test_a_frozen_daemon(phone, make) -> None:
    said = faulty(
        phone, make, 40, "take", lambda: daemon(phone, signal.SIGSTOP),
        lambda: daemon(phone, signal.SIGCONT),
    )  # fmt: skip
    assert "frozen" in said


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent device is given up in a third of the time."""
    monkeypatch.setattr(adb, "_SILENCE_S", 3.0)
    monkeypatch.setattr(adb, "_SIGN_S", 3.0)


@pytest.mark.usefixtures("impatient")
def test_unplugged_in_mid_push(phone, make) -> None:
    said = faulty(phone, make, 50, "take", lambda: cable(phone, "down"), lambda: cable(phone, "up"))
    assert "unplugged" in said


@pytest.mark.usefixtures("impatient")
def test_unplugged_while_the_runner_is_brought(phone, tmp_path) -> None:
    large = tmp_path / "engine.so"
    large.write_bytes(os.urandom(24 << 20))
    timer = threading.Timer(0.3, cable, [phone, "down"])
    with connect(phone.target) as there:
        folder, start = there.scratch(), time.monotonic()
        timer.start()
        try:
            with pytest.raises(TargetError, match=r"engine\.so") as caught:
                for _ in range(20):
                    there.push(large, f"{folder}/engine.so")
        finally:
            timer.join()
            cable(phone, "up")
    assert time.monotonic() - start < WITHIN_S and "\n" not in str(caught.value)
    with reached(phone) as made:
        made.transport.run(["rm", "-r", folder], timeout_s=60)


def test_a_full_disk(phone, make) -> None:
    file = base(phone, make)
    fill = "head -c 200000000 /dev/zero >/data/local/tmp/fill; true"
    with connect(phone.target) as there:
        there.run(["sh", "-c", fill], timeout_s=120)
    with (
        device(phone, "fault") as made,
        pytest.raises(TargetError, match="no room|disk there is full"),
    ):
        deploy(make(60, extra=os.urandom(LARGE)), made)
    with connect(phone.target) as there:
        there.run(["rm", "/data/local/tmp/fill"], timeout_s=60)
    with device(phone, "fault") as made:
        assert made.ask("status")["active"] == file
        assert deploy(make(61), made).file.startswith("61-")


def test_a_capsule_is_small() -> None:
    try:
        made = capsule()
    except MissingToolError as error:
        pytest.skip(str(error))
    assert made.size_bytes <= 35_000_000
    assert litert_addon().size_bytes <= 8_000_000
    assert made.files["edgekit-run"].stat().st_size <= 200_000


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
