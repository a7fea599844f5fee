"""What is particular to ncnn: Mats and their padding, the sidecar, what its own checks let through.

What every engine promises is in `test_engines`. Answers come from numpy, or from PyTorch.
"""

import gc
import json
import os
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ncnn_models import convolution, plain, save_ncnn, write_ncnn
from small_models import linear
from store import fetch_wheel

from edgekit_runtime import EngineError, ModelError, load
from edgekit_runtime.engines import Loaded, Options, load_engine
from edgekit_runtime.errors import ClosedError, EngineTooOldError

pytestmark = pytest.mark.needs("ncnn")
IN_PLACE = ["Input in 0 1 x", "ReLU r 1 1 x y"]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolved(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A valid convolution of (1, I, H, W) with (O, I, K, K)."""
    size = kernel.shape[-1]
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(2, 3))
    return np.einsum("nihwab,oiab->nohw", windows.astype(np.float64), kernel)


def loaded(path: Path, **options: int) -> Loaded:
    files = {p.name: p.read_bytes() for p in path.parent.glob(f"{path.stem}.*")}
    return load_engine("ncnn", files, Options(**options))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("sides", [(5, 7), (3, 3), (4, 4), (13, 4), (28, 28), (3, 9)])
def test_channels_and_odd_sides_keep_their_places(
    tmp_path: Path, size: int, sides: tuple[int, int]
) -> None:
    """ncnn pads each channel to 16 bytes; nothing of that may show."""
    kernel = noise(5, 3, size, size, seed=1)
    with load(convolution(tmp_path, kernel)) as session:
        for seed in range(3):
            x = noise(1, 3, *sides, seed=seed)
            y = session.run({"x": x})["y"]
            assert y.flags.c_contiguous
            np.testing.assert_allclose(y, convolved(x, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 4, 4), (2, 3, 5), (2, 2, 4, 4), (2, 3, 3, 3)])
def test_every_rank_of_mat(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A first layer that works in place does so on a copy."""
    path = write_ncnn(tmp_path, "m", IN_PLACE, [("x", shape, {})], [("y", shape, {})])
    with load(path) as session:
        bound = session.bind()
        buffer, x = bound.inputs["x"], noise(*shape)
        assert buffer.flags.c_contiguous
        for seed in range(2):
            buffer[...] = x = noise(*shape, seed=seed)
            bound()
            np.testing.assert_array_equal(bound.outputs["y"], np.maximum(x, 0))
            np.testing.assert_array_equal(buffer, x)


def test_outputs_are_no_views_of_inputs(tmp_path: Path) -> None:
    """Split hands its input on: both outputs are the memory that the next call fills."""
    path = write_ncnn(
        tmp_path, "m", ["Input in 0 1 x", "Split s 1 2 x y z"],
        [("x", (4,), {})], [("z", (4,), {}), ("y", (4,), {})],
    )  # fmt: skip
    with load(path) as session:
        bound = session.bind()
        bound.inputs["x"][...] = 1
        bound()
        first = bound.outputs
        bound.inputs["x"][...] = 2
        bound()
        assert list(first) == ["z", "y"]
        assert [array.tolist() for array in first.values()] == [[1] * 4] * 2


def test_outputs_outlive_the_session(tmp_path: Path) -> None:
    kernel = noise(5, 3, 3, 3)
    x = noise(1, 3, 30, 30)
    session = load(convolution(tmp_path, kernel))
    bound = session.bind({"x": x.shape})
    bound.inputs["x"][...] = x
    bound()
    kept = bound.outputs["y"]
    session.close()
    with pytest.raises(ClosedError):
        bound()
    del session, bound
    gc.collect()
    np.testing.assert_allclose(kept, convolved(x, kernel), rtol=1e-4, atol=1e-4)


def test_a_net_may_be_closed_while_a_thread_runs_it(tmp_path: Path) -> None:
    net = loaded(convolution(tmp_path, noise(32, 32, 3, 3)))
    binding = net.bind(((1, 32, 64, 64),))
    invoke, started, done = binding.invoke, threading.Event(), []

    def work() -> None:
        for _ in range(30):
            invoke()
            started.set()
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    binding.close()
    net.close()
    del net, binding
    thread.join()
    assert done


# --- threads --------------------------------------------------------------------------------------


def test_threads_change_nothing(tmp_path: Path) -> None:
    kernel, x = noise(16, 16, 3, 3), noise(1, 16, 33, 31)
    path = convolution(tmp_path, kernel)
    for threads in (1, 2, 4):
        with load(path, threads=threads) as session:
            y = session.run({"x": x})["y"]
        np.testing.assert_allclose(y, convolved(x, kernel), rtol=1e-3, atol=1e-3)


def test_bindings_of_one_net_run_at_once(tmp_path: Path) -> None:
    kernel = noise(16, 16, 3, 3)
    net = loaded(convolution(tmp_path, kernel))
    wrong: list[int] = []
    ended: list[int] = []

    def work(seed: int) -> None:
        x = noise(1, 16, 15 + seed, 13, seed=seed)
        want = convolved(x, kernel)
        binding = net.bind((x.shape,))
        for _ in range(200):
            binding.inputs[0][...] = x
            binding.invoke()
            if not np.allclose(binding.outputs[0], want, rtol=1e-3, atol=1e-3):
                wrong.append(seed)
        ended.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == [0, 1, 2, 3]
    assert wrong == []


# --- outputs and dtypes ---------------------------------------------------------------------------


def test_indices_are_int32(tmp_path: Path) -> None:
    table = noise(7, 5)
    path = write_ncnn(
        tmp_path, "m", ["Input in 0 1 ids", f"Embed e 1 1 ids y 0=5 1=7 3={table.size}"],
        [("ids", (1, "T"), {"dtype": "int32"})],
        [("y", (1, "T", 5), {})],
        plain(table),
    )  # fmt: skip
    with load(path) as session:
        for ids in ([[3, 0, 6, 6]], [[1]], [[2, 2, 4]]):
            y = session.run({"ids": np.array(ids, np.int32)})["y"]
            np.testing.assert_array_equal(y, table[ids])


def test_nothing_detected_is_an_empty_array(tmp_path: Path) -> None:
    """SSD's last layer gives no Mat at all when no score reaches its threshold."""
    path = write_ncnn(
        tmp_path, "m",
        ["Input a 0 1 location", "Input b 0 1 confidence", "Input c 0 1 priorbox",
         "DetectionOutput d 3 1 location confidence priorbox found 0=2 4=0.5"],
        [("location", (8,), {}), ("confidence", (4,), {}), ("priorbox", (2, 8), {})],
        [("found", ("K", 6), {})],
    )  # fmt: skip
    boxes = np.array([[0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1], [0.1] * 8], np.float32)
    inputs = {"location": np.zeros(8, np.float32), "priorbox": boxes}
    with load(path) as session:
        for scores, count in (([1, 0, 1, 0], 0), ([0, 1, 1, 0], 1), ([1, 0, 1, 0], 0)):
            found = session.run({**inputs, "confidence": np.array(scores, np.float32)})["found"]
            assert found.shape == (count, 6)


@pytest.mark.parametrize("sides", [(1, 1), (2, 2), (2, 5), (5, 2)])
def test_an_image_smaller_than_the_kernel_is_an_error(
    tmp_path: Path, sides: tuple[int, int]
) -> None:
    x = noise(1, 1, 5, 5)
    with load(save_ncnn(tmp_path, "conv")) as session:
        with pytest.raises(EngineError, match="'y'.*too small"):
            session.run({"x": noise(1, 1, *sides)})
        assert session.run({"x": x})["y"].shape == (1, 1, 3, 3)


def test_an_output_of_another_shape_is_an_error(tmp_path: Path) -> None:
    for shape in ((5,), (1, 8), (), (2, 2, 2), (1, 1, 8)):
        path = write_ncnn(
            tmp_path, "m", IN_PLACE, [("x", (1, 2, 4), {"dims": 2})], [("y", shape, {})]
        )
        with load(path) as session, pytest.raises(EngineError, match=r"'y' of shape \[2, 4\].*y:"):
            session.run({"x": noise(1, 2, 4)})


# --- loading --------------------------------------------------------------------------------------


def test_it_computes_in_float32_on_the_cpu(tmp_path: Path) -> None:
    net = loaded(save_ncnn(tmp_path, "linear"), threads=3)
    placement = net.placement()
    assert str(placement) == "CPU 100 % (ncnn, float32)"
    assert placement.operators == {"Input": 1, "InnerProduct": 1}
    option: Any = net._net.opt  # type: ignore[attr-defined]
    assert option.num_threads == 3
    on = [name for name in dir(option) if name.startswith("use_") and getattr(option, name)]
    assert [name for name in on if "16" in name or "vulkan" in name] == []


def test_without_memfd_a_folder_is_used_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> int:
        raise OSError(f"no memfd for {name}")

    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    x = noise(2, 4)
    with load(save_ncnn(tmp_path, "linear")) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], linear(x), rtol=1e-5, atol=1e-5)
    assert list(scratch.iterdir()) == []


GOOD = {"name": "x", "dtype": "float32", "shape": ["N", 4]}
OUT = {"name": "y", "dtype": "float32", "shape": ["N", 3]}


@pytest.mark.parametrize(
    ("sidecar", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b" " * 200_000, "200000 bytes"),
        ([], "not of the form"),
        ({"inputs": [GOOD]}, "not of the form"),
        ({"inputs": [GOOD], "outputs": [OUT], "extra": 1}, "not of the form"),
        ({"inputs": GOOD, "outputs": [OUT]}, "not of the form"),
        ({"inputs": [], "outputs": [OUT]}, "not of the form"),
        ({"inputs": ["x"], "outputs": [OUT]}, "other keys than name, dtype"),
        ({"inputs": [{"name": "x", "dtype": "float32"}], "outputs": [OUT]}, "other keys"),
        ({"inputs": [GOOD | {"layout": "NC"}], "outputs": [OUT]}, "other keys"),
        ({"inputs": [GOOD | {"name": 1}], "outputs": [OUT]}, "name is 1"),
        ({"inputs": [GOOD | {"name": "x\n"}], "outputs": [OUT]}, r"name is 'x\\n'"),
        ({"inputs": [GOOD | {"dtype": "float16"}], "outputs": [OUT]}, "'x': dtype is 'float16'"),
        ({"inputs": [GOOD | {"dtype": []}], "outputs": [OUT]}, r"'x': dtype is \[\]"),
        ({"inputs": [GOOD | {"shape": 4}], "outputs": [OUT]}, "'x': shape is 4"),
        ({"inputs": [GOOD | {"shape": [0, 4]}], "outputs": [OUT]}, r"shape is \[0, 4\]"),
        ({"inputs": [GOOD | {"shape": [True, 4]}], "outputs": [OUT]}, r"shape is \[True"),
        ({"inputs": [GOOD | {"shape": [10**12]}], "outputs": [OUT]}, "shape is"),
        ({"inputs": [GOOD | {"shape": ["", 4]}], "outputs": [OUT]}, "shape is"),
        ({"inputs": [GOOD | {"dims": 1}], "outputs": [OUT]}, "those before them must be 1"),
        ({"inputs": [GOOD | {"dims": 3}], "outputs": [OUT]}, "a Mat of 3 dims"),
        ({"inputs": [GOOD | {"dims": "2"}], "outputs": [OUT]}, "a Mat of '2' dims"),
        ({"inputs": [GOOD | {"shape": [2] * 5}], "outputs": [OUT]}, "a Mat of 5 dims"),
        ({"inputs": [GOOD, GOOD], "outputs": [OUT]}, "names 'x' twice"),
        ({"inputs": [GOOD | {"name": "z"}], "outputs": [OUT]}, "has the inputs z.*param has x"),
        ({"inputs": [GOOD], "outputs": [OUT | {"name": "z"}]}, "no output 'z'; it has y"),
    ],
)
def test_bad_sidecars_are_explained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sidecar: Any, says: str
) -> None:
    path = save_ncnn(tmp_path, "linear")
    data = sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode()
    path.with_suffix(".json").write_bytes(data)
    with pytest.raises(ModelError, match=rf"linear\.(json|param).*{says}"):
        load(path)
    assert capfd.readouterr().err == ""


def test_a_missing_sidecar_is_shown(tmp_path: Path) -> None:
    path = save_ncnn(tmp_path, "linear")
    path.with_suffix(".json").unlink()
    with pytest.raises(ModelError, match=r'needs a \.json.*write {"inputs": .*"dtype": "float32"'):
        load(path)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (["ReLU r 1 1 x y", "Sigmoid s 1 1 x z"], "another one takes"),
        (["ReLU r 1 1 q y"], "no layer before it makes"),
        (["BinaryOp b 2 1 x y y"], "no layer before it makes"),
        (["ReLU r 1 1 x"], "cut off"),
        (["ReLU r -1 1 x y"], "cut off"),
        (["ReLU r 1"], "cut off"),
    ],
)
def test_nets_that_contradict_themselves_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], layers: list[str], says: str
) -> None:
    path = write_ncnn(
        tmp_path, "m", ["Input in 0 1 x", "Input i 0 1 y"], [("x", (4,), {})], [("y", (4,), {})]
    )
    text = "\n".join([f"7767517\n{len(layers) + 1} 2\nInput in 0 1 x", *layers, ""])
    path.write_text(text)
    with pytest.raises(ModelError, match=rf"m\.param.*{says}"):
        load(path)
    assert capfd.readouterr().err == ""


def test_what_is_not_a_param_file_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save_ncnn(tmp_path, "linear")
    good = path.read_text()
    for bad, says in (
        ("\0\1\2\xff", "begins with 7767517"),
        ("7767516\n2 2\n", "begins with 7767517"),
        ("7767517\n", "it says nothing"),
        ("7767517\n0 0\n", "0 layers and 0 blobs"),
        (good.replace("2 2", "3 2"), "has 2 layers and 2 blobs.*says 3 and 2"),
        (good.replace("2 2", "2 9999999999"), "2 layers and 2 blobs"),
        (good[: good.index("InnerProduct")], "1 layers and 1 blobs"),
    ):
        path.write_text(bad)
        with pytest.raises(ModelError, match=rf"linear\.param.*{says}"):
            load(path)
    path.write_text(good.replace("InnerProduct", "torch.foo"))
    with pytest.raises(EngineTooOldError, match="no layer type 'torch.foo'; update ncnn"):
        load(path)
    assert capfd.readouterr().err == ""


def test_a_net_too_deep_for_the_stack_is_refused(tmp_path: Path) -> None:
    def chain(count: int) -> Path:
        layers = ["Input in 0 1 b0", *(f"ReLU r{i} 1 1 b{i} b{i + 1}" for i in range(count))]
        return write_ncnn(
            tmp_path, "m", layers, [("b0", (4,), {})], [(f"b{count}", (4,), {})]
        )  # fmt: skip

    with pytest.raises(ModelError, match="has 10001 layers.*at most 10000"):
        load(chain(10_000))
    x = noise(4)
    with load(chain(9_999)) as session:  # and one that is just not, in a thread
        found: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: found.append(session.run({"b0": x})["b9999"]))
        thread.start()
        thread.join()
    np.testing.assert_array_equal(found[0], np.maximum(x, 0))


def test_short_weights_are_refused(tmp_path: Path) -> None:
    path = save_ncnn(tmp_path, "linear")
    weights = path.with_suffix(".bin")
    whole = weights.read_bytes()
    for size in (0, 3, 4, 20, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"linear\.bin is shorter"):
            load(path)


MUTANTS = """
import sys
from pathlib import Path
import numpy as np
from edgekit_runtime import load
from edgekit_runtime.errors import EdgeKitError
files = [Path(name) for name in sys.argv[1:]]
rng = np.random.default_rng(len(files[0].read_bytes()))
good = [file.read_bytes() for file in files]
for number in range(40):
    which = int(rng.integers(3))
    data = bytearray(good[which])
    if number % 2:
        data = data[: rng.integers(len(data))]
    else:
        data[rng.integers(len(data))] = rng.integers(256)
    files[which].write_bytes(data)
    print(number, files[which].name, bytes(data), flush=True)
    try:
        with load(files[0]) as session:
            session.warm_up({s.name: s.with_batch(6) for s in session.inputs}, runs=1)
    except EdgeKitError as error:
        assert str(error).isprintable(), error
    files[which].write_bytes(good[which])
print("end")
"""


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_damaged_files_end_in_our_errors(tmp_path: Path, name: str) -> None:
    """In a child: now and then one ends the process, which `isolate=True` is for."""
    path = save_ncnn(tmp_path, name)
    files = [str(path.with_suffix(suffix)) for suffix in (".param", ".bin", ".json")]
    done = subprocess.run(
        [sys.executable, "-c", MUTANTS, *files], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stdout[-300:] + done.stderr
    assert done.returncode < 0 or done.stdout.endswith("end\n")


# --- a real model ---------------------------------------------------------------------------------


def unpacked(requirement: str, into: Path) -> Path:
    """A package's wheel, downloaded once, unpacked."""
    name = requirement.partition("==")[0].replace("-", "_")
    with zipfile.ZipFile(fetch_wheel(requirement)) as archive:
        archive.extractall(into)
    return into / name.removesuffix("_py")


@pytest.mark.needs("torch")
def test_a_trained_net_through_pnnx_is_torchs(tmp_path: Path) -> None:
    import importlib.util

    import torch

    package = unpacked("digit-recognizer-py==0.1.0", tmp_path)
    spec = importlib.util.spec_from_file_location("digits_net", package / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.CNN().eval()
    weights = package / "models" / "handwriting_model.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    with warnings.catch_warnings():  # torch calls this way deprecated; pnnx reads no other
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.zeros(1, 1, 28, 28)).save(str(tmp_path / "digits.pt"))

    pnnx = unpacked("pnnx==20261020", tmp_path) / "pnnx"
    pnnx.chmod(0o755)
    subprocess.run(
        [pnnx, "digits.pt", "inputshape=[1,1,28,28]", "fp16=0"], cwd=tmp_path,
        capture_output=True, check=True,
    )  # fmt: skip
    path = tmp_path / "digits.ncnn.param"
    sidecar = {
        "inputs": [{"name": "in0", "dtype": "float32", "shape": [1, 1, 28, 28]}],
        "outputs": [{"name": "out0", "dtype": "float32", "shape": [1, 10]}],
    }
    path.with_suffix(".json").write_text(json.dumps(sidecar))

    images = noise(20, 1, 1, 28, 28)
    images[10:] = np.clip(images[10:], -0.42, 2.8)  # the range of its normalised digits
    for threads in (1, 2):
        with load(path, threads=threads) as session:
            for image in images:
                with torch.no_grad():
                    want = net(torch.tensor(image)).numpy()
                found = session.run({"in0": image})["out0"]
                assert found.shape == want.shape == (1, 10)
                np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
