"""What the README shows is what happens."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from cnn import cnn_data, small_cnn

from edgekit_runtime.__main__ import main as runtime_main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder like the one a reader has: the model, the data, one sample of it."""
    folder = tmp_path_factory.mktemp("readme")
    small_cnn(folder / "model.onnx")
    with np.load(cnn_data(folder / "eval.npz", 400)) as data:
        np.save(folder / "one.npy", data["image"][:1])
    return folder


def test_shell_examples_run(edgekit, folder) -> None:
    block = re.findall(r"```sh\n(.*?)```", README, re.S)[0]
    for line in block.splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "edgekit"
        if command[1] == "bench":  # a test machine may be busy
            command.append("--allow-unfit")
        done = edgekit(*command[1:], cwd=folder)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout.strip()


def test_examples_for_the_device_run(edgekit, folder, monkeypatch, capsys) -> None:
    """The same lines on a bundle whose input is called like magika's, and which takes files."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Cast", ["bytes"], ["target_label"], to=TensorProto.FLOAT)], "g",
        [helper.make_tensor_value_info("bytes", TensorProto.INT32, ["N", 2048])],
        [helper.make_tensor_value_info("target_label", TensorProto.FLOAT, ["N", 2048])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=7)
    onnx.save(model, folder / "bytes.onnx")
    files = folder / "files"
    files.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        (files / f"{number}").write_bytes(rng.bytes(3000))
    (files / "labels.csv").write_text("".join(f"{number}\n" for number in range(40)))
    (folder / "steps.toml").write_text(
        '[inputs.bytes]\nsource = "bytes"\nsteps = [{ op = "head-tail", head = 1024, tail = 1024, '
        'block = 4096, strip = true, pad = 256 }]\n[[outputs]]\nop = "top-k"\nk = 1\n'
    )
    done = edgekit(
        "optimize", "bytes.onnx", "--for", "this-machine", "--data", "files", "--preprocess",
        "steps.toml", "-o", "out/demo", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "README.md").write_text(README)
    monkeypatch.chdir(folder)
    for line in re.findall(r"```sh\n(.*?)```", README, re.S)[1].splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "edgekit-runtime"
        assert runtime_main(command[1:]) == 0, line
        assert capsys.readouterr().out.strip()
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(block, "README.md", "exec"), {})
    assert "CPU 100 %" in capsys.readouterr().out


def test_every_linked_file_exists() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document, link)


def test_code_map_names_what_is_there() -> None:
    tree = README.split("## Where things are")[1]
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"*/*/{name}")), name


def test_reference_is_up_to_date(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "reference"))
    monkeypatch.setattr(sys, "argv", sys.argv)  # it sets its own
    import generate

    for path, make in generate.PAGES.items():
        assert path.read_text() == make(), f"run {sys.executable} docs/reference/generate.py"
