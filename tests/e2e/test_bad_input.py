"""A user's mistake: one line, the right exit code, nothing half-written, no traceback."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cnn import cnn_data, small_cnn

from edgekit.cache import Cache, content_key
from edgekit.errors import OutOfSpaceError


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("good")
    return small_cnn(folder / "cnn.onnx"), cnn_data(folder / "data.npz")


def optimize(edgekit, model, data, out, *more, profile="this-machine"):
    return edgekit("optimize", model, "--for", profile, "--data", data, "-o", out, *more)


def assert_one_line(done, code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("edgekit: ")
    for text in said:
        assert text in last, last


def damaged(path: Path, good_model: Path, how: str) -> Path:
    data = good_model.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"this is no model\n" * 20,
            "truncated": data[: len(data) // 2],
            "random": np.random.default_rng(0).bytes(2000),
        }[how]
    )
    return path


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "random"])
def test_damaged_model(how, edgekit, good, tmp_path) -> None:
    bad = damaged(tmp_path / "bad.onnx", good[0], how)
    done = optimize(edgekit, bad, good[1], tmp_path / "out")
    assert_one_line(done, 2, "bad.onnx")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.onnx", "no file"),
        ("model.xyz", "not a model"),
        ("model.h5", "Keras"),
        ("model.pt", "TorchScript"),
        ("model.pkl", "pickle"),
    ],
)
def test_unusable_model(name, said, edgekit, good, tmp_path) -> None:
    if "absent" not in name:
        (tmp_path / name).write_bytes(b"x")
    assert_one_line(optimize(edgekit, tmp_path / name, good[1], tmp_path / "out"), 2, said)


DATA_FAULTS = {
    "names": ({"picture": "image"}, "has the arrays labels, picture; the model's inputs are image"),
    "dtype": ({"image": np.float64}, "dtype float64, the model takes float32"),
    "shape": ({"image": (240, 1, 10, 12)}, "shape [1, 1, 10, 12], the model takes [N, 1, 12, 12]"),
    "labels": ({"labels": (239,)}, "'labels' has 239 samples, 'image' has 240"),
    "classes": ({"labels": 77}, "labels go from 77 to 77; the model's scores are for 4 classes"),
    "nan": ({"image": np.nan}, "sample 0 of 'image' holds NaN or Inf"),
    "zero": ({"image": (0, 1, 12, 12), "labels": (0,)}, "holds no samples"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_bad_data(fault, edgekit, good, tmp_path) -> None:
    changes, said = DATA_FAULTS[fault]
    with np.load(good[1]) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, change in changes.items():
        if isinstance(change, str):
            arrays[name] = arrays.pop(change)
        elif isinstance(change, tuple):
            arrays[name] = np.resize(arrays[name], change)
        elif isinstance(change, type):
            arrays[name] = arrays[name].astype(change)
        else:
            arrays[name] = np.full_like(arrays[name], change)
    np.savez(tmp_path / "bad.npz", **{k: arrays[k] for k in sorted(arrays)})
    done = optimize(edgekit, good[0], tmp_path / "bad.npz", tmp_path / "out")
    assert_one_line(done, 2, said)
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_profile_lists_the_known(edgekit, good, tmp_path) -> None:
    done = optimize(edgekit, *good, tmp_path / "out", profile="nope")
    assert_one_line(done, 2, "no device profile 'nope'; known: this-machine", "raspberry-pi-5")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("optimize", "m.onnx", "--data", "d.npz"), "no device is named: --for NAME"),
        (("optimize", "m.onnx", "--for", "this-machine"), "optimize needs --data (see"),
        (("optimize", "m.onnx", "--data"), "--data needs a value (see"),
        (("deploy", "m.edgekit"), "deploy needs --to (see"),
        (("quantize",), "quantize needs MODEL (see"),
    ],
)
def test_what_is_missing_is_named(words, said, edgekit) -> None:
    assert_one_line(edgekit(*words), 2, said)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--max-drop", "-1"), "--max-drop is -1"),
        (("--metric", "beauty"), "no metric 'beauty'"),
        (("--metric", "mae"), "labels have 1 values per sample"),
        (("--budget", "soon"), "--budget is 'soon'"),
        (("--threads", "0"), "--threads is 0"),
        (("--minimize", "beauty"), "beauty"),
        (("--nonsense", "1"), "nonsense"),
        (("--calibration", "absent.npz"), "absent.npz"),
    ],
)
def test_bad_options(more, said, edgekit, good, tmp_path) -> None:
    assert_one_line(optimize(edgekit, *good, tmp_path / "out", *more), 2, said)


def test_a_target_that_cannot_be_reached(edgekit, good, tmp_path) -> None:
    done = optimize(edgekit, *good, tmp_path / "out", "--on", "ssh://pi@127.0.0.1:1")
    assert_one_line(done, 4, "ssh://pi@127.0.0.1:1")


def test_json_error_is_one_object(edgekit, good, tmp_path) -> None:
    done = optimize(edgekit, *good, tmp_path / "out", "--json", profile="nope")
    assert json.loads(done.stdout)["exit_code"] == 2


def test_unwritable_output(edgekit, good, tmp_path) -> None:
    (tmp_path / "file").write_text("kept")
    assert_one_line(optimize(edgekit, *good, tmp_path / "file"), 2, "cannot write to")
    assert (tmp_path / "file").read_text() == "kept"
    # /proc takes no files, whoever asks
    assert_one_line(optimize(edgekit, *good, "/proc/edgekit"), 2, "cannot write to /proc/edgekit")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_full_disk(edgekit, good, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        done = optimize(edgekit, *good, disk / "out")
        assert_one_line(done, 2, "is full")
        assert not [p for p in disk.rglob("*") if p.is_file()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_disk_that_fills_during_the_work(tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    try:
        cache = Cache(disk)
        with pytest.raises(OutOfSpaceError, match="is full"):
            cache.folder(content_key(a=1), lambda f: (f / "a").write_bytes(bytes(3 << 20)))
        assert not [p for p in disk.rglob("*") if p.is_file()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def bundle(edgekit, good, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    done = optimize(edgekit, *good, out, "--max-drop", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    return out / "model.edgekit"


@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.8, 0.999])
def test_flipped_byte_in_a_bundle(where, edgekit, bundle, tmp_path) -> None:
    data = bytearray(bundle.read_bytes())
    data[int(where * len(data))] ^= 0x40
    (tmp_path / "bad.edgekit").write_bytes(data)
    for verb in ("inspect", "bench"):
        assert_one_line(edgekit(verb, tmp_path / "bad.edgekit"), 2, "bad.edgekit")


def test_entry_that_leaves_the_bundle(edgekit, bundle, tmp_path) -> None:
    import zipfile

    evil = tmp_path / "evil.edgekit"
    evil.write_bytes(bundle.read_bytes())
    with zipfile.ZipFile(evil, "a") as archive:
        archive.writestr("../outside", "x")
    assert_one_line(edgekit("inspect", evil), 2, "../outside")


def test_misspelled_labels_are_noted(edgekit, good, tmp_path) -> None:
    with np.load(good[1]) as archive:
        np.savez(tmp_path / "d.npz", image=archive["image"], label=archive["labels"])
    done = optimize(edgekit, good[0], tmp_path / "d.npz", tmp_path / "out", "--budget", "20s")
    assert done.returncode == 0, done.stderr
    assert "arrays of" in done.stdout
    assert "not used: label" in done.stdout
    assert "no labels in" in done.stdout


def test_install_lines_keep_their_brackets(edgekit, monkeypatch, capsys) -> None:
    """Rich takes `[...]` for markup; in an install line it is the extra."""
    from edgekit.cli import doctor

    row = {
        "name": "x",
        "version": None,
        "ok": False,
        "detail": "pip install -c constraints.txt -e '.[tflite-convert]'",
    }
    doctor._show(
        {
            "engines": [row], "accelerators": [], "converters": [], "quantizers": [],
            "microcontrollers": [], "warnings": [],
            "machine": {"name": "m", "arch": "a", "cpu": {"cores": 1}},
        }
    )  # fmt: skip
    assert "'.[tflite-convert]'" in "".join(capsys.readouterr().out.split("\n"))


def test_evaluation_data_may_be_given_to_bench(edgekit, good) -> None:
    done = edgekit(
        "bench", good[0], "--input", good[1], "--threads", "1", "--budget", "2s", "--allow-unfit"
    )
    assert done.returncode == 0, done.stderr


def test_bench_on_wrong_input_is_the_users_mistake(edgekit, good, tmp_path) -> None:
    np.savez(tmp_path / "w.npz", picture=np.zeros((3, 1, 12, 12), np.float32))
    done = edgekit("bench", good[0], "--input", tmp_path / "w.npz", "--allow-unfit")
    assert_one_line(done, 2, "the inputs are named picture; wanted: image")
