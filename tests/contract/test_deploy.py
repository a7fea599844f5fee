"""Deploying to this machine: what arrives, what is refused, what a kill leaves."""

import ast
import hashlib
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bundle, make_manifest
from deployable import Maker, scaled
from hostile import archives
from service_story import Story

import edgekit_runtime
from edgekit.bundle import latency_limits
from edgekit.deploy import connect
from edgekit.deploy.chunks import LARGEST, chunks_of
from edgekit.deploy.install import Device, Installed, deploy
from edgekit.errors import TargetError, UsageError
from edgekit_runtime import BundleError, load, open_installed, source
from edgekit_runtime.bundle import Bundle
from edgekit_runtime.machine import cpu_name

pytestmark = pytest.mark.needs("onnxruntime", "onnx")
FOLDER = str(Path(edgekit_runtime.__file__).parent)
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


def begin(made: Device) -> None:
    made.ask("begin", file=f"1-{1:032x}.edgekit", sha256="0" * 64, size=1000)


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


def test_a_service_answers_all_the_time_while_versions_change(make, tmp_path) -> None:
    with connect("local") as here:
        story = Story(here, sys.executable, str(tmp_path / "root"), "m")
        assert story.tell(make, Maker(scaled(make.model, 2), tmp_path / "second"))["answers"] > 9


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
        ({"factor": float("nan")}, "golden output 'y': NaN"),
        ({"expected": {"limits": {"latency_ns": 1}}}, "the bundle's limit is"),
        ({"memory_bytes": 1000}, "of memory, the bundle says"),
    ],
)
def test_a_bundle_that_fails_its_trial_changes_nothing_and_is_refused_after_three(
    make, tmp_path, fault, says
) -> None:
    root = tmp_path / "root"
    good = install(root, make(1)).file
    if "factor" in fault:
        fault = {"model": scaled(make.model, fault["factor"])}
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


def test_a_limit_holds_for_the_processor_it_was_measured_on(make, tmp_path) -> None:
    here = {"arch": platform.machine(), "cpu": cpu_name(), "latency_ns": 1}
    with pytest.raises(TargetError, match="the bundle's limit is"):
        install(tmp_path / "root", make(1, expected={"limits": here}))
    for number, (key, other) in enumerate((("cpu", "Another"), ("arch", "aarch65"))):
        limits = {**here, key: other}
        trial = install(tmp_path / "root", make(2 + number, expected={"limits": limits})).trial
        assert trial["unused_limits"] == f"latency: measured on {other}"


def test_limits_are_made_of_what_was_measured_on_a_processor_with_a_name() -> None:
    where = {"target": "local", "arch": "x86_64"}
    made = latency_limits({"p50": 1_000_000, "label": "measured"}, where)["limits"]
    assert made["latency_ns"] == 5_100_000 and made["cpu"] == cpu_name()
    assert latency_limits({"p50": 1_000_000, "label": "simulated"}, where) == {}
    assert latency_limits({"p50": 1_000_000, "label": "measured"}, {"target": "ssh://x"}) == {}
    named = {"target": "ssh://x", "arch": "aarch64", "cpu_id": "implementer 0x41 part 0xd08"}
    assert latency_limits({"p50": 1, "label": "measured"}, named)["limits"]["arch"] == "aarch64"


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


def test_flipped_bits_and_crafted_archives_reach_no_engine_and_no_device(
    make, tmp_path, monkeypatch
) -> None:
    root, good, bad = tmp_path / "root", make(1).read_bytes(), tmp_path / "bad.edgekit"
    rng = np.random.default_rng(3)
    cases = archives(good)
    assert len(cases) >= 60
    for place in rng.integers(0, len(good), 60):
        data = bytearray(good)
        data[place] ^= 1 << int(rng.integers(8))
        cases.append((f"bit at {place}", bytes(data)))
    given: list[str] = []
    monkeypatch.setattr(source, "load_engine", lambda name, *_: given.append(name))
    with device(root) as made:
        for what, data in cases:
            bad.write_bytes(data)
            for action in (lambda: deploy(bad, made), lambda: load(bad)):
                with pytest.raises(UsageError) as caught:
                    action()
                assert "\n" not in str(caught.value) and str(bad) in str(caught.value), what
        assert made.ask("status")["versions"] == [] and given == []


def test_a_file_swapped_while_it_is_loaded_is_not_loaded_unverified(
    make, tmp_path, monkeypatch
) -> None:
    good = make(1, extra=np.random.default_rng(7).bytes(500_000)).read_bytes()
    evil, path = bytearray(good), tmp_path / "there.edgekit"
    where = good.index(b"\x32", 300_000)  # inside the model
    evil[where] ^= 1
    given: list[bytes] = []
    real = source.load_engine

    def kept(name: str, files: dict[str, bytes], *rest: Any) -> Any:
        given.extend(files.values())
        return real(name, files, *rest)

    monkeypatch.setattr(source, "load_engine", kept)
    refused = 0
    for number in range(30):
        path.write_bytes(good)
        swap = threading.Timer(number / 10_000, overwrite, (path, where, evil[where]))
        swap.start()
        try:
            load(path).close()
        except BundleError as error:
            assert "is damaged: SHA-256" in str(error)
            refused += 1
        swap.join()
    assert refused + len(given) == 30 and len(set(given)) <= 1
    path.write_bytes(good)
    verify = Bundle.verify

    def late(self: Bundle, *rest: Any, **more: Any) -> Any:
        found = verify(self, *rest, **more)
        overwrite(path, where, evil[where])  # in the window between verifying and loading
        return found

    monkeypatch.setattr(Bundle, "verify", late)
    load(path).close()
    assert len(set(given)) == 1 and given[-1] in good and path.read_bytes() == bytes(evil)


def overwrite(path: Path, where: int, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(where)
        file.write(bytes([byte]))


def test_two_at_once_and_the_second_is_told_whose(make, tmp_path) -> None:
    with device(tmp_path) as first, device(tmp_path) as second:
        begin(first)
        with pytest.raises(TargetError, match=r"being changed by \S+@\S+ \(process \d+\); try"):
            begin(second)
        assert second.ask("status")["active"] is None, "looking is always allowed"


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ("no-such-python", "no no-such-python there; install Python 3.9 or newer"),
        ("/bin/false", "does not run as Python 3.9 or newer does"),
        ("/bin/cat", "does not run as Python 3.9 or newer does"),
    ],
)
def test_no_python_there_is_one_line(tmp_path, python, says) -> None:
    with pytest.raises(TargetError, match=says) as caught, device(tmp_path, python=python):
        pass
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


def test_a_python_without_an_engine_is_not_the_bundles_fault(make, tmp_path) -> None:
    root, bare = tmp_path / "root", tmp_path / "bare"
    bare.write_text(
        f"#!/bin/sh\ncase \"$*\" in *' trial '*) exec '{sys.executable}' -I -S \"$@\";; esac\n"
        f"exec '{sys.executable}' \"$@\"\n"
    )
    bare.chmod(0o755)
    with device(root, python=str(bare)) as made:
        for _ in range(4):
            with pytest.raises(TargetError, match=r"cannot be tried: .*needs numpy and an engine"):
                deploy(make(1), made)
        assert made.ask("status")["failed_trials"] == {}
    assert install(root, make(1)).state == "new"


def test_too_old_a_python_is_said(tmp_path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho Python 3.7\n")
    old.chmod(0o755)
    with (
        pytest.raises(TargetError, match=r"is Python 3\.7, 3\.9 or newer"),
        device(tmp_path, python=str(old)),
    ):
        pass


def test_a_place_that_cannot_be_written(make, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="Not a directory") as caught:
        install(tmp_path / "file", make(1))
    assert "\n" not in str(caught.value)


def test_what_is_sent_to_devices_needs_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import edgekit_runtime.installer\n"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}"
        " - {'edgekit_runtime'}))"
    )
    code = (
        f"import sys, types; m = types.ModuleType('edgekit_runtime'); m.__path__ = [{FOLDER!r}]; "
        + (f"sys.modules['edgekit_runtime'] = m\n{code}")
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    slow = {"json", "re", "pathlib", "subprocess", "typing", "tempfile", "contextlib", "shutil"}
    found = set(ast.literal_eval(done.stdout))
    assert found <= set(sys.stdlib_module_names) - slow
