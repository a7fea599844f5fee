"""The choice is the board's: int8 pays where the processor has dot products (virtual time)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnn import separable_cnn

from edgekit.artifact import open_model
from edgekit.cache import Cache
from edgekit.convert import convert
from edgekit.deploy import lab
from edgekit.deploy.lab import Running
from edgekit.errors import UsageError
from edgekit_runtime.bundle import Bundle

pytestmark = [
    pytest.mark.devices,
    pytest.mark.needs("asyncssh", "onnx", "onnx2tf", "tensorflow", "litert", "litert_quantizer"),
]
#: LiteRT alone: each candidate takes seconds of an emulator
PROFILE = """schema = "edgekit.device/1"
id = "lab-board"
name = "a board of the lab"
kind = "board"
arch = "aarch64"

[engines.litert]

[[sources]]
fields = ["engines.litert"]
kind = "choice"
title = "this test"
says = "LiteRT alone"
"""
BOARDS = ("raspberry-pi-4", "raspberry-pi-5")


@pytest.fixture(scope="module")
def boards() -> Iterator[dict[str, Running]]:
    with ExitStack() as stack:
        up = {}
        for name in BOARDS:
            try:
                up[name] = lab.up(name, virtual_time=True)
            except UsageError as error:
                pytest.skip(str(error))
            stack.callback(lab.down, str(up[name].port))
        yield up


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    cache = Cache(folder / "cache")
    made = convert(open_model(str(separable_cnn(folder / "net.onnx"))), "tflite", cache=cache)
    (folder / "net.tflite").write_bytes(made.path.read_bytes())
    (name,) = (spec.name for spec in made.inputs)
    images = np.random.default_rng(1).normal(0, 1, (120, 3, 32, 32)).astype(np.float32)
    shape = made.inputs[0].shape
    if shape[-1] == 3:
        images = images.transpose(0, 2, 3, 1)
    np.savez(folder / "data.npz", **{name: images})
    (folder / "board.toml").write_text(PROFILE)
    return folder


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """With the cache in which the lab's keys are."""
    return subprocess.run(
        [sys.executable, "-P", "-c", "from edgekit.cli import main; main()", *map(str, words)],
        capture_output=True, text=True, check=False, timeout=550,
    )  # fmt: skip


@pytest.mark.timeout(1800)
def test_the_boards_choose_what_their_processors_are_good_at(boards, files) -> None:
    def optimize(board: Running) -> dict[str, Any]:
        done = run(
            "optimize", files / "net.tflite", "--for", files / "board.toml", "--data",
            files / "data.npz", "--max-drop", "0.05", "--threads", "1", "--on", board.target,
            "--python", board.python, "-o", files / board.board, "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = {name: optimize(board) for name, board in boards.items()}
    again = optimize(boards["raspberry-pi-5"])

    def p50(document: dict[str, Any], name: str) -> float:
        (row,) = (one for one in document["candidates"] if one["id"] == name)
        assert row["latency_ns"]["label"] == "simulated (instructions)"
        return float(row["latency_ns"]["p50"])

    old, new = (found[name] for name in BOARDS)
    assert new["chosen"] == "litert-int8-static" and "int8" not in old["chosen"]
    assert p50(old, "litert-int8-static") > p50(old, "litert-fp32")
    assert p50(new, "litert-int8-static") < 0.8 * p50(new, "litert-fp32")
    assert again["chosen"] == new["chosen"]
    for name in ("litert-fp32", "litert-int8-static"):
        assert p50(again, name) == pytest.approx(p50(new, name), rel=0.01)
    assert new["conditions"]["cpu"] == "Arm Cortex-A76" and "asimddp" in new["conditions"]["isa"]
    with Bundle(files / "raspberry-pi-5" / "model.edgekit") as bundle:
        manifest = bundle.manifest
    expected = manifest.variant().expected
    assert expected["latency_ns"]["label"] == "simulated (instructions)"
    assert "limits" not in expected and expected["conditions"]["target"] == "ssh"
    assert manifest.provenance["latency"]["label"] == "simulated (instructions)"
    assert "simulated (instructions)" in (files / "raspberry-pi-5" / "report.html").read_text()
