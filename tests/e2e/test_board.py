"""A board of the lab, over a real sshd: deployed to, gone back on, cut off."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from deployable import Maker, scaled
from service_story import Story

from edgekit.deploy import connect, lab
from edgekit.deploy.install import Device, deploy
from edgekit.deploy.lab import Running
from edgekit.errors import TargetError, UsageError

pytestmark = [pytest.mark.devices, pytest.mark.needs("asyncssh", "onnxruntime", "onnx")]
USE = """import json, numpy, sys; sys.path.insert(0, sys.argv[1])
from edgekit_runtime import open_installed
with open_installed("m") as session:
    print(session.run({"x": numpy.ones((1, 4), "float32")})["y"].tolist())
"""


@pytest.fixture(scope="module")
def board() -> Iterator[Running]:
    try:
        up = lab.up("raspberry-pi-4", disk_mb=64)
    except UsageError as error:
        pytest.skip(str(error))
    yield up
    lab.down(str(up.port))


@pytest.fixture
def make(small_model, tmp_path) -> Maker:
    model = small_model("onnxruntime", "linear").read_bytes()
    return Maker(model, tmp_path / "bundles", profiles=("raspberry-pi-4",))


@contextmanager
def device(board: Running) -> Iterator[Device]:
    with connect(board.target) as there, Device(there, "m", python=board.python) as made:
        yield made


def test_deployed_used_and_rolled_back(board, make) -> None:
    with device(board) as made:
        assert made.facts["machine"] == "aarch64"
        first = deploy(make(1), made)
        assert first.trial["ok"] and first.trial["latency_ns"]["samples"] >= 3
        second = deploy(make(2), made)
        assert second.previous == first.file
        with pytest.raises(TargetError, match="golden output"):
            deploy(make(3, off=0.5), made)
        assert made.ask("status")["active"] == second.file
        runtime = f"{made.folder}/{made.runtime}"
        done = made.transport.run([board.python, "-c", USE, runtime], timeout_s=120)
        np.testing.assert_allclose(json.loads(done.stdout), make.right, rtol=1e-5)
        assert made.ask("rollback")["active"] == first.file


def test_a_service_answers_all_the_time_while_versions_change(board, make, tmp_path) -> None:
    second = Maker(scaled(make.model, 2), tmp_path / "second", profiles=("raspberry-pi-4",))
    with connect(board.target) as there:
        story = Story(there, board.python, "/home/pi/service", "keywords")
        assert story.tell(make, second)["answers"] > 9


def test_a_bundle_for_another_board_or_processor_is_not_sent(board, make) -> None:
    other = Maker(make.model, make.folder, profiles=("raspberry-pi-5",))
    with device(board) as made:
        before = made.ask("status")
        with pytest.raises(UsageError, match=r"for raspberry-pi-5, the device is a Raspberry Pi 4"):
            deploy(other(50), made)
        with pytest.raises(UsageError, match=r"variants for x86_64; the device is aarch64"):
            deploy(make(51, machines=("x86_64",)), made)
        assert made.ask("status") == before


def test_a_board_that_loses_power_is_one_error(make) -> None:
    own = lab.up("raspberry-pi-4", disk_mb=64)
    with pytest.raises(TargetError) as caught, device(own) as made:
        lab.down(str(own.port))
        deploy(make(1), made)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


def test_the_command_line_lists_and_reaches_it(board, make) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from edgekit.cli import main; main()", *words],
            capture_output=True, text=True, check=False, env=dict(os.environ),
        )  # fmt: skip

    listed = json.loads(run("lab", "list", "--json").stdout)["boards"]
    assert board.target in [one["target"] for one in listed]
    where = ("--to", board.target, "--as", "cli", "--python", board.python, "--json")
    done = run("deploy", str(make(7)), *where)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "new"
    assert json.loads(run("status", *where).stdout)["active"].startswith("7-")
