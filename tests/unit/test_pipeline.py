"""Steps files, and that host and device make the same bytes of a sample."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_cases import bundled
from small_models import linear

from edgekit.artifact import TensorSpec
from edgekit.cache import Cache
from edgekit.data import open_dataset
from edgekit.errors import InputError, UsageError
from edgekit.pipeline import Pipeline, read_pipeline
from edgekit_runtime import BundleError, load
from edgekit_runtime.__main__ import main
from edgekit_runtime.manifest import InputSteps, StatePair

X = (TensorSpec("x", "float32", ("N", 4)),)
Y = (TensorSpec("y", "float32", ("N", 3)),)
STEPS = """
labels = ["cat", "dog", "owl"]
[inputs.x]
source = "bytes"
steps = [
  { op = "truncate", length = 4 },
  { op = "pad", length = 4 },
  { op = "normalize", scale = 0.01, mean = 0.5 },
]
[[outputs]]
op = "softmax"
[[outputs]]
op = "top-k"
k = 2
"""


def by_hand(data: bytes) -> np.ndarray:
    """What STEPS make of a file."""
    row = np.frombuffer(data[:4].ljust(4, b"\0"), np.uint8).astype(np.float32)
    return ((row * np.float32(0.01) - np.float32(0.5)) / np.float32(1))[None]


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Pipeline]:
    def read_text(text: str) -> Pipeline:
        path = tmp_path / "steps.toml"
        path.write_text(text)
        return read_pipeline(path, X, Y)

    return read_text


# --- the file -------------------------------------------------------------------------------------


def test_a_steps_file_says_what_surrounds_the_model(read: Callable[[str], Pipeline]) -> None:
    found = read(STEPS)
    assert found.labels == ("cat", "dog", "owl")
    assert found.preprocess["x"].source == "bytes"
    assert [step["op"] for step in found.preprocess["x"].steps] == ["truncate", "pad", "normalize"]
    assert [step["op"] for step in found.postprocess] == ["softmax", "top-k"]
    assert read("") == Pipeline()


def test_labels_may_stand_in_a_file(read: Callable[[str], Pipeline], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    assert read('labels = "names.txt"').labels == ("cat", "dog", "owl")


def test_states_are_pairs_of_names(tmp_path: Path) -> None:
    path = tmp_path / "steps.toml"
    path.write_text('[states]\ns = "t"\n')
    specs = [(TensorSpec(name, "float32", (1, 2)),) for name in ("s", "t")]
    assert read_pipeline(path, specs[0], specs[1]).states == (StatePair("s", "t"),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[inputs", "cannot read"),
        ("[input.x]", "'input' is unknown; known: inputs, outputs, labels, states"),
        ("[inputs.z]\nsource = 'bytes'", "[inputs.z] is no input; the model has: x"),
        ("[inputs.x]\nsteps = []", "[inputs.x] holds source and steps"),
        ("[inputs.x]\nsource = 'bytes'\nstep = []", "[inputs.x] holds source and steps"),
        ("inputs = 3", "inputs"),
        ("[inputs]\nx = 3", "[inputs.x] holds source and steps"),
        ("[inputs.x]\nsource = 'film'", "film"),
        ("[inputs.x]\nsource = 'bytes'\nsteps = [{ op = 'nope' }]", "nope"),
        ("[inputs.x]\nsource = 'bytes'\nsteps = 3", "steps"),
        ("[[outputs]]\nop = 'nope'", "nope"),
        ("outputs = 3", "[[outputs]]"),
        ("[outputs]\nop = 'softmax'", "[[outputs]]"),
        ("[[outputs]]\nop = 'softmax'\non = 'z'", "z"),
        ("labels = 3", "labels are a file"),
        ("labels = ['a', 3]", "labels are a file"),
        ("labels = 'missing.txt'", "cannot read the labels"),
        ("[states]\nz = 'y'", "the state 'z' fed by 'y' is not this model's"),
        ("states = 3", "states"),
    ],
)
def test_mistakes_name_the_file_and_the_place(
    read: Callable[[str], Pipeline], text: str, says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read(text)
    message = str(caught.value)
    assert says in message
    assert "steps.toml" in message
    assert "\n" not in message


# --- data -----------------------------------------------------------------------------------------

FILES = {f"{i}.bin": bytes([i, 2 * i, 3 * i, 255 - i])[: 1 + i % 4] for i in range(12)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label"])
        for number, (name, data) in enumerate(FILES.items()):
            (folder / name).write_bytes(data)
            rows.writerow([name, ["cat", "dog", "2"][number % 3]])
    return folder


def test_a_folder_is_data(folder: Path, read: Callable[[str], Pipeline], tmp_path: Path) -> None:
    data = open_dataset(str(folder), X, Cache(tmp_path / "cache"), read(STEPS))
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2] * 4
    wanted = np.concatenate([by_hand(one) for one in FILES.values()])
    np.testing.assert_array_equal(np.asarray(data.arrays["x"]).reshape(12, 4), wanted)


def test_a_function_may_give_raw_samples(read: Callable[[str], Pipeline], tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(
        f"FILES = {list(FILES.values())!r}\n"
        "def samples():\n    for number, one in enumerate(FILES): yield {'x': one}, number % 3\n"
    )
    data = open_dataset(f"{tmp_path}/source.py:samples", X, Cache(tmp_path / "c"), read(STEPS))
    wanted = np.concatenate([by_hand(one) for one in FILES.values()])
    np.testing.assert_array_equal(np.asarray(data.arrays["x"]).reshape(12, 4), wanted)


def test_an_npz_may_hold_raw_samples(read: Callable[[str], Pipeline], tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (10, 7)).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x=raw, labels=np.arange(10) % 3)
    data = open_dataset(str(tmp_path / "d.npz"), X, Cache(tmp_path / "c"), read(STEPS))
    wanted = np.concatenate([by_hand(row.tobytes()) for row in raw])
    np.testing.assert_array_equal(np.asarray(data.arrays["x"]).reshape(10, 4), wanted)
    assert data.labels is not None
    assert data.labels.tolist() == (np.arange(10) % 3).tolist()


def test_other_steps_are_other_data(
    folder: Path, read: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache")
    first = open_dataset(str(folder), X, cache, read(STEPS))
    second = open_dataset(str(folder), X, cache, read(STEPS.replace("0.01", "0.02")))
    assert first.sha256 != second.sha256
    assert not np.array_equal(first.arrays["x"], second.arrays["x"])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([["gone.bin", "cat"]], "names 'gone.bin', which is no file"),
        ([["../secret", "cat"]], "names '../secret', which is no file"),
        ([["0.bin", "lynx"]], "'lynx' is neither a number nor one of the 3 labels"),
        ([["0.bin", "cat"], ["1.bin"]], "all alike"),
        ([["0.bin", "cat", "x"]], "wanted rows 'file,label'"),
        ([], "wanted rows 'file,label'"),
    ],
)
def test_bad_lists_are_refused(
    folder: Path, read: Callable[[str], Pipeline], tmp_path: Path, rows: Any, says: str
) -> None:
    (tmp_path / "secret").write_text("s")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(InputError) as caught:
        open_dataset(str(folder), X, Cache(tmp_path / "cache"), read(STEPS))
    assert says in str(caught.value)


def test_folders_need_steps_and_a_list(
    folder: Path, read: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache")
    with pytest.raises(UsageError, match="say with --preprocess how they become inputs"):
        open_dataset(str(folder), X, cache)
    (folder / "labels.csv").unlink()
    with pytest.raises(UsageError, match=r"has no labels\.csv"):
        open_dataset(str(folder), X, cache, read(STEPS))


def test_a_bad_sample_is_named(
    folder: Path, read: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    text = STEPS.replace('{ op = "pad", length = 4 },', "")
    with pytest.raises(InputError, match=r"sample 1 has|'x' of sample"):
        open_dataset(str(folder), X, Cache(tmp_path / "cache"), read(text))


# --- on the device --------------------------------------------------------------------------------


@pytest.fixture
def bundle(read: Callable[[str], Pipeline], small_model: Any, tmp_path: Path) -> Path:
    around = read(STEPS)
    return bundled(
        tmp_path, "onnxruntime", small_model("onnxruntime", "linear"), labels=around.labels,
        preprocess=around.preprocess, postprocess=around.postprocess,
    )  # fmt: skip


def _softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return np.asarray(e / e.sum())


@pytest.mark.needs("onnxruntime", "onnx")
def test_the_device_makes_the_same_bytes(
    bundle: Path, folder: Path, read: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    data = open_dataset(str(folder), X, Cache(tmp_path / "cache"), read(STEPS))
    with load(bundle) as session:
        for number, name in enumerate(FILES):
            ready = session.preprocess({"x": folder / name})["x"]
            assert ready.tobytes() == data.sample(number, X)["x"].tobytes()


@pytest.mark.needs("onnxruntime", "onnx")
def test_from_a_file_to_an_answer(bundle: Path, folder: Path) -> None:
    with load(bundle) as session, session.measure() as measured:
        for name, data in FILES.items():
            wanted = _softmax(linear(by_hand(data))[0])
            best = np.argsort(-wanted, kind="stable")[:2]
            for raw in (folder / name, data, {"x": data}):
                rows = session.predict(raw)["y"]
                assert [row["index"] for row in rows] == best.tolist()
                assert [row["label"] for row in rows] == [("cat", "dog", "owl")[i] for i in best]
                found = [row["score"] for row in rows]
                np.testing.assert_allclose(found, wanted[best], rtol=1e-4)
        assert measured.samples[0][0] > 0
        with pytest.raises(InputError, match="input 'x': "):
            session.predict({"x": 3})
        with pytest.raises(InputError, match="named z; wanted: x"):
            session.predict({"z": b"abcd"})


@pytest.mark.needs("onnxruntime", "onnx")
def test_the_command_line_takes_files(
    bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(bundle), "--input", str(folder / "3.bin")]) == 0
    assert "label " in capsys.readouterr().out
    assert main(["run", str(bundle), "--input", f"x={folder / '3.bin'}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["outputs"]["y"]
    assert {row["label"] for row in rows} <= {"cat", "dog", "owl"}
    np.savez(tmp_path / "t.npz", x=by_hand(FILES["3.bin"]))
    assert (
        main(["run", str(bundle), "--input", str(tmp_path / "t.npz"), "--tensors", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["outputs"]["y"] == rows
    assert main(["info", str(bundle)]) == 0
    assert "before   x: bytes, truncate, pad, normalize" in capsys.readouterr().out
    assert main(["run", str(bundle), "--input", str(folder / "none.bin")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize(
    "changes",
    [
        {"preprocess": {"x": InputSteps("bytes", ({"op": "nope"},))}},
        {"preprocess": {"x": InputSteps("film", ())}},
        {"postprocess": ({"op": "top-k"},)},
        {"postprocess": ({"on": "y"},)},
    ],
    ids=["step", "source", "option", "no-op"],
)
def test_processing_nobody_knows_is_refused_at_load(
    small_model: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = bundled(tmp_path, "onnxruntime", small_model("onnxruntime", "linear"), **changes)
    with pytest.raises(BundleError, match="processing is not understood"):
        load(path)
