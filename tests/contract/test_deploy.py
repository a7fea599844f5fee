"""Deploying to this machine: what arrives, what is refused, what a kill leaves."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import archive, bundle, make_manifest
from deployable import Maker

import edgekit_runtime.installer as installer
from edgekit.deploy import connect
from edgekit.deploy.chunks import LARGEST, chunks_of
from edgekit.deploy.install import Device, Installed, deploy
from edgekit.errors import EdgeKitError, TargetError, UsageError
from edgekit_runtime import open_installed
from edgekit_runtime.bundle import MANIFEST

pytestmark = pytest.mark.needs("onnxruntime", "onnx")
Make = Callable[..., Path]


@pytest.fixture
def make(small_model, tmp_path) -> Make:
    return Maker(small_model("onnxruntime", "linear").read_bytes(), tmp_path / "bundles")


@contextmanager
def device(root: Path, name: str = "m", python: str | None = None) -> Iterator[Device]:
    with connect("local") as here, Device(here, name, root=str(root), python=python) as made:
        yield made


def install(root: Path, path: Path, **options: Any) -> Installed:
    with device(root) as made:
        return deploy(path, made, **options)


def active(root: Path) -> str:
    with device(root) as made:
        return str(made.ask("status")["active"])


def test_what_was_deployed_is_what_a_program_opens_and_rollback_goes_back(make, tmp_path) -> None:
    root = tmp_path / "root"
    one, two = make(1), make(2)
    done = install(root, one)
    assert (done.state, done.previous, done.trial["ok"]) == ("new", None, True)
    there = root / "m" / "versions" / done.file
    assert there.read_bytes() == one.read_bytes()
    with open_installed("m", root=root) as session:
        assert session.run({"x": np.zeros((1, 4), np.float32)})["y"].shape == (1, 3)
    assert install(root, two).previous == done.file
    with device(root) as made:
        assert made.ask("rollback")["active"] == done.file
        with pytest.raises(UsageError, match="no version before"):
            made.ask("rollback")
        assert made.ask("gc")["versions"] == [done.file]
    with open_installed("m", root=root) as session:
        assert session.manifest is not None and session.manifest.sequence == 1


def test_the_same_bundle_again_sends_nothing_and_a_changed_one_only_its_change(
    make, tmp_path
) -> None:
    root = tmp_path / "root"
    noise = np.random.default_rng(1).bytes(3_000_000)
    first = install(root, make(1, extra=noise))
    assert first.sent_bytes == first.size_bytes
    again = install(root, make(1, extra=noise))
    assert (again.state, again.sent_bytes) == ("active", 0)
    changed = noise[:1_000_000] + b"inserted" + noise[1_000_000:]
    assert install(root, make(2, extra=changed)).sent_bytes < 0.15 * first.size_bytes


def test_chunks_cover_a_file_and_an_insertion_moves_few(tmp_path) -> None:
    data = np.random.default_rng(2).bytes(2_000_000)
    path = tmp_path / "f"
    for content in (data, b"x" * 1_000_000, b"a", b""):
        path.write_bytes(content)
        found = chunks_of(path)
        pieces = [content[c.offset : c.offset + c.size_bytes] for c in found]
        assert b"".join(pieces) == content and max(map(len, pieces), default=0) <= LARGEST
        assert [hashlib.sha256(p).hexdigest() for p in pieces] == [c.sha256 for c in found]
    path.write_bytes(data)
    before = {c.sha256 for c in chunks_of(path)}
    path.write_bytes(b"more" + data)
    after = {c.sha256 for c in chunks_of(path)}
    assert len(after - before) <= 2


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"off": 0.5}, "golden output 'y'"),
        ({"off": float("nan")}, "golden output 'y': NaN"),
        ({"expected": {"limits": {"latency_ns": 1}}}, "the bundle's limit is"),
        ({"memory_bytes": 1000}, "of memory, the bundle says"),
    ],
)
def test_a_bundle_that_fails_its_trial_changes_nothing_and_is_refused_after_three(
    make, tmp_path, fault, says
) -> None:
    root = tmp_path / "root"
    good = install(root, make(1)).file
    bad = make(2, **fault)
    for number in (1, 2, 3):
        with pytest.raises(TargetError, match=says) as caught:
            install(root, bad)
        assert f"({number} of 3)" in str(caught.value)
    with pytest.raises(TargetError, match="failed its trial here 3 times"):
        install(root, bad)
    assert active(root) == good
    assert install(root, make(3)).previous == good
    with device(root) as made:
        made.ask("gc")
    with pytest.raises(TargetError, match="1 of 3"):
        install(root, bad, allow_older=True)


def test_an_older_one_needs_to_be_asked_for(make, tmp_path) -> None:
    root = tmp_path / "root"
    install(root, make(2))
    with pytest.raises(UsageError, match="--allow-older"):
        install(root, make(1))
    assert install(root, make(1), allow_older=True).file.startswith("1-")


def test_other_inputs_are_refused_under_the_same_name(make, tmp_path, small_model) -> None:
    root = tmp_path / "root"
    good = install(root, make(1)).file
    contents = {"a/model.onnx": b"x", "a/in.npz": b"", "a/out.npz": b""}
    from edgekit_runtime.manifest import TensorSpec

    other = make_manifest(
        contents, sequence=5, bundle_id="5" * 32, inputs=(TensorSpec("x", "float32", ("N", 9)),)
    )
    path = tmp_path / "other.edgekit"
    path.write_bytes(bundle(other, contents))
    with pytest.raises(TargetError, match="other inputs or outputs"):
        install(root, path)
    assert active(root) == good


def test_a_bundle_for_another_processor_is_not_even_sent(make, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"variants for riscv64; the device is"):
        install(tmp_path / "root", make(1, machines=("riscv64",)))


def test_flipped_bits_and_crafted_archives_reach_no_device(make, tmp_path) -> None:
    root, good = tmp_path / "root", make(1).read_bytes()
    bad = tmp_path / "bad.edgekit"
    rng = np.random.default_rng(3)
    cases = []
    for place in rng.integers(0, len(good), 60):
        data = bytearray(good)
        data[place] ^= 1 << int(rng.integers(8))
        cases.append(bytes(data))
    names = ("../x", "/etc/x", "a//b", "a/../../b", ".hidden")
    cases += [archive([(MANIFEST, b"{}"), (name, b"x")]) for name in names]
    cases += [b"", good[:-1], good + b"x", b"PK\x05\x06" + bytes(18)]
    with device(root) as made:
        for data in cases:
            bad.write_bytes(data)
            with pytest.raises(UsageError):
                deploy(bad, made)
        assert made.ask("status")["versions"] == []


def test_two_at_once_and_the_second_is_told_whose(make, tmp_path) -> None:
    with device(tmp_path) as first:
        first.ask("status")
        with pytest.raises(TargetError, match=r"being changed by .*process"), device(tmp_path):
            pass


@pytest.mark.parametrize("python", ["no-such-python", "/bin/false"])
def test_no_python_there_is_one_line(tmp_path, python) -> None:
    with pytest.raises(TargetError) as caught, device(tmp_path, python=python):
        pass
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


def test_too_old_a_python_is_said(tmp_path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nprintf '3.7\\n/tmp/x\\n'\n")
    old.chmod(0o755)
    with (
        pytest.raises(TargetError, match=r"is Python 3\.7, 3\.9 or newer"),
        device(tmp_path, python=str(old)),
    ):
        pass


def test_a_place_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError) as caught, device(tmp_path / "file"):
        pass
    assert "\n" not in str(caught.value)


def killing_python(folder: Path, call: str, number: int) -> str:
    """A Python whose installer is killed at the `number`th call of this name."""
    script = folder / f"python-{call}-{number}"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--receive*|*trial*|-c*) exec '
        f"'{sys.executable}' \"$@\";; esac\n"
        f"exec strace -qq -o /dev/null -e trace={call} "
        f"-e inject={call}:signal=SIGKILL:when={number} '{sys.executable}' \"$@\"\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("call", "number"),
    [("rename", n) for n in range(1, 7)] + [("fsync", n) for n in (3, 8)] + [("unlink", 1)],
)
def test_a_kill_leaves_the_old_or_the_new_version_whole(make, tmp_path, call, number) -> None:
    root, one, two = tmp_path / "root", make(1), make(2)
    old = install(root, one).file
    with pytest.raises(TargetError):
        with device(root, python=killing_python(tmp_path, call, number)) as made:
            deploy(two, made)
        raise TargetError("it was through before that call")
    state = json.loads((root / "m" / "active.json").read_text())["file"]
    whole = {p.name: p.read_bytes() for p in (root / "m" / "versions").glob("*.edgekit")}
    assert whole[old] == one.read_bytes()
    assert set(whole.values()) <= {one.read_bytes(), two.read_bytes()}
    with open_installed("m", root=root) as session:
        assert session.run({"x": np.zeros((1, 4), np.float32)})["y"].shape == (1, 3)
    done = install(root, two)
    assert done.file != old and active(root) == done.file
    assert state in (old, done.file)
    assert not list(root.glob("m/**/.new-*")) and not list(root.glob("m/incoming/*"))


def test_a_cut_transfer_resumes_where_it_was(make, tmp_path) -> None:
    root = tmp_path / "root"
    path = make(1, extra=np.random.default_rng(4).bytes(1_000_000))
    pieces = chunks_of(path)
    data, frame = path.read_bytes(), struct.Struct(">32sIQ")
    sha = hashlib.sha256(data).hexdigest()
    with device(root) as made:
        made.ask("begin", file=f"1-{1:032x}.edgekit", sha256=sha, size=len(data))
        frames = b"".join(
            frame.pack(bytes.fromhex(c.sha256), c.size_bytes, c.offset)
            + data[c.offset : c.offset + c.size_bytes]
            for c in pieces
        )
        made.receive(sha, frames[: len(frames) // 2])
    done = install(root, path)
    most = len(data) - len(frames) // 2 + LARGEST + frame.size * len(pieces)
    assert 0 < done.sent_bytes <= most


def test_a_damaged_chunk_is_refused(tmp_path) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(bytes(10))
    frame = struct.pack(">32sIQ", hashlib.sha256(b"abc").digest(), 3, 0) + b"abd"
    done = subprocess.run(
        [sys.executable, installer.__file__, "--receive", str(part)], input=frame,
        capture_output=True, check=False,
    )  # fmt: skip
    assert b"damaged on the way" in done.stdout and part.read_bytes() == bytes(10)


def test_the_installer_needs_the_standard_library_only() -> None:
    code = (
        "import sys, runpy; before = set(sys.modules)\n"
        f"runpy.run_path({installer.__file__!r}, run_name='x')\n"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_full_disk_is_one_line_and_changes_nothing(make, tmp_path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    root = tmp_path / "root"
    root.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(root)], check=False
    )
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        good = install(root, make(1)).file
        with pytest.raises(EdgeKitError, match=r"no room for it|disk there is full") as caught:
            install(root, make(2, extra=np.random.default_rng(5).bytes(3_000_000)))
        assert caught.value.exit_code == 4
        assert active(root) == good
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_deploy_killed_on_the_host_can_be_repeated(make, tmp_path) -> None:
    root, path = tmp_path / "root", make(1, extra=np.random.default_rng(6).bytes(2_000_000))
    line = ["deploy", str(path), "--to", "local", "--root", str(root), "--as", "m"]
    for after_s in (0.5, 1.0, 1.6):
        child = subprocess.Popen(
            [sys.executable, "-c", "from edgekit.cli import main; main()", *line],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(after_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert install(root, path).file == active(root)
