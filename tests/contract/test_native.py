"""The native runner on this machine: answers, documents, refusals and folders as Python's."""

import json
import subprocess
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import native_overhead
import numpy as np
import pytest
from bundles import bundle, deflated_bundle, make_manifest, make_variant, npz, raw_deflate
from cnn import cnn_scores, small_cnn
from deployable import Maker
from hostile import archives
from native_runner import Runner, bundle_of, native_program, python_runtime, shape_of

from edgekit.deploy import connect
from edgekit.deploy.install import deploy
from edgekit.deploy.phone import Phone
from edgekit.errors import TargetError
from edgekit_runtime import open_installed
from edgekit_runtime.bundle import MANIFEST
from edgekit_runtime.manifest import InputSteps, Manifest

pytestmark = pytest.mark.needs("onnxruntime", "onnx")
EXECUTIONS, LONGEST = 50_000, 8192


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(native_program())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    rng = np.random.default_rng(0)
    samples = [{"image": rng.normal(size=(1, 1, 12, 12)).astype(np.float32)} for _ in range(3)]
    return bundle_of(
        small_cnn(folder / "small.onnx"), samples, folder / "small.edgekit",
        postprocess=({"op": "softmax"}, {"op": "top-k", "k": 2, "as": "best"}),
        labels=("ant", "bee", "cat", "dog"),
    )  # fmt: skip


@pytest.fixture
def make(small_model, tmp_path) -> Maker:
    return Maker(small_model("onnxruntime", "linear").read_bytes(), tmp_path / "bundles")


def test_answers_are_those_of_a_closed_form_and_of_python(runner, small, tmp_path) -> None:
    image = np.random.default_rng(5).normal(size=(1, 1, 12, 12)).astype(np.float32)
    np.save(tmp_path / "x.npy", image)
    out = tmp_path / "out.npz"
    found = runner.json("run", small, "--input", tmp_path / "x.npy", "--output", out)
    with np.load(out) as saved:
        np.testing.assert_allclose(saved["scores"], cnn_scores(image), atol=1e-5)
    theirs = python_runtime("run", small, "--input", tmp_path / "x.npy")
    assert found["schema"] == theirs["schema"] == "edgekit.run/1"
    ours, wanted = found["outputs"], theirs["outputs"]
    np.testing.assert_allclose(ours["scores"], wanted["scores"], atol=1e-6)
    assert [row["label"] for row in ours["best"]] == [row["label"] for row in wanted["best"]]
    for mine, one in zip(ours["best"], wanted["best"], strict=True):
        assert mine["score"] == pytest.approx(one["score"], abs=1e-6)


@pytest.mark.parametrize(
    "verb", [("check",), ("bench", "--runs", "50"), ("bench", "--cold"), ("info",)]
)
def test_documents_have_the_fields_and_types_of_pythons(runner, small, verb) -> None:
    ours, theirs = runner.json(verb[0], small, *verb[1:]), python_runtime(verb[0], small, *verb[1:])
    if verb == ("bench", "--cold"):
        ours.pop("import_ns")  # who starts Python says when
    if verb[0] == "info":
        assert ours == theirs
    assert shape_of(ours) == shape_of(theirs)


def test_a_check_that_fails_says_how_and_ends_with_1(runner, make) -> None:
    wrong = make(1, off=0.5)
    done = runner("check", wrong, "--json")
    found, theirs = json.loads(done.stdout), python_runtime("check", wrong, code=1)
    assert done.returncode == 1 and not found["ok"]
    for key in ("output", "ok", "samples", "note"):
        assert found["outputs"][0][key] == theirs["outputs"][0][key]
    for key in ("max_abs", "worst"):
        assert found["outputs"][0][key] == pytest.approx(theirs["outputs"][0][key], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"engine": "litert"}, 3),
        ({"placement": {"NPU": 0.9}}, 1),
        ({"machines": ("armv7l",)}, 2),
        ({"memory_bytes": 1 << 50}, 1),
        ({"precision": "float16"}, 2),
    ],
)
def test_what_cannot_run_here_ends_with_pythons_code(runner, make, changes, code) -> None:
    path = make(1, **changes)
    ours = runner("check", path)
    assert (ours.returncode, ours.stdout) == (code, "")
    assert len(ours.stderr.splitlines()) == 1 and ours.stderr.startswith("edgekit-runtime: ")
    if changes.get("engine") != "litert":  # which Python has
        python_runtime("check", path, code=code)


@pytest.mark.parametrize("build", ["", "sanitized"])  # which sees what is left behind
def test_another_variant_takes_over_and_that_is_said(build, make) -> None:
    runner = Runner(native_program(build))
    first = make_variant(id="npu", placement={"NPU": 1.0}, on_misplacement="next")
    contents = {"a/model.onnx": make.model, "a/in.npz": npz(x=make.inputs),
                "a/out.npz": npz(y=make.outputs)}  # fmt: skip
    path = make.folder / "two.edgekit"
    path.write_bytes(bundle(make_manifest(contents, variants=(first, make_variant())), contents))
    done = runner("check", path)
    assert (
        done.returncode == 0 and "FallbackWarning" in done.stderr and "'a'; not npu" in done.stderr
    )


def test_wrong_usage_ends_with_2(runner, small, tmp_path) -> None:
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00")
    for words in (
        ("fly", small), ("run", small), ("run", small, "--input", tmp_path / "none.npy"),
        ("run", small, "--input", tmp_path / "x.npy"), ("check", tmp_path),
        ("info", "none.edgekit"), ("bench", small, "--runs", "0"), ("run", small, "--colour"),
        ("check", small, "--variant", "z"), ("status", "../x"),
    ):  # fmt: skip
        done = runner(*words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), words


@pytest.mark.parametrize("build", ["", "sanitized"])
def test_no_hostile_archive_is_accepted(build, small, tmp_path) -> None:
    program = Runner(native_program(build))
    bad = archives(small.read_bytes())
    for number, (what, data) in enumerate(bad):
        path = tmp_path / f"{number}.edgekit"
        path.write_bytes(data)
        done = program("check", path)
        assert (done.returncode, done.stdout) == (2, ""), f"{what}: {done.stderr}"
        assert len(done.stderr.splitlines()) == 1, what
        path.unlink()
    assert len(bad) > 60


def deflated(small: Path, path: Path, stream: bytes) -> Path:
    """The bundle with its model's bytes in the archive being this stream."""
    with zipfile.ZipFile(small) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    manifest = Manifest.from_json(contents.pop(MANIFEST))
    path.write_bytes(deflated_bundle(contents, "a/model.onnx", manifest=manifest, stream=stream))
    return path


def model_in(small: Path) -> bytes:
    with zipfile.ZipFile(small) as archive:
        return archive.read("a/model.onnx")


@pytest.mark.parametrize(
    ("level", "strategy"),
    [(0, zlib.Z_DEFAULT_STRATEGY), (6, zlib.Z_FIXED), (1, zlib.Z_DEFAULT_STRATEGY),
     (9, zlib.Z_DEFAULT_STRATEGY), (9, zlib.Z_HUFFMAN_ONLY), (9, zlib.Z_RLE)],
)  # fmt: skip
@pytest.mark.parametrize("build", ["", "sanitized"])
def test_deflated_models_are_inflated(build, small, tmp_path, level, strategy) -> None:
    stream = raw_deflate(model_in(small), level, strategy)
    path = deflated(small, tmp_path / "sparse.edgekit", stream)
    assert Runner(native_program(build)).json("check", path)["ok"]


def test_streams_that_are_not_what_is_declared_are_refused(small, tmp_path) -> None:
    program, model = Runner(native_program("sanitized")), model_in(small)
    whole, rng = raw_deflate(model), np.random.default_rng(0)
    streams = [
        raw_deflate(model + b"more"), raw_deflate(model[:-1]), whole + b"hidden", whole[:-4],
        b"\x07" + whole, *(rng.bytes(400) for _ in range(40)),
    ]  # fmt: skip
    for stream in streams:
        done = program("check", deflated(small, tmp_path / "odd.edgekit", stream))
        assert done.returncode == 2, done.stderr
        assert "inflates to other sizes" in done.stderr or "times larger" in done.stderr
    for place in (*range(0, 8 * len(whole), len(whole) // 8), 8 * len(whole) - 1):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path = deflated(small, tmp_path / "flipped.edgekit", whole)
        path.write_bytes(path.read_bytes().replace(whole, bytes(changed)))
        done = program("check", path)
        assert (done.returncode, "is damaged" in done.stderr) == (2, True), done.stderr


def test_a_flipped_byte_anywhere_is_found(runner, small, tmp_path) -> None:
    data = small.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(data), 60, replace=False):
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "x.edgekit").write_bytes(changed)
        assert runner("check", tmp_path / "x.edgekit").returncode == 2, place


def test_weights_in_another_file_are_refused(runner, tmp_path) -> None:
    import onnx

    model = onnx.load(small_cnn(tmp_path / "m.onnx"))
    onnx.save(
        model,
        tmp_path / "apart.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="w.bin",
    )
    done = runner("info", tmp_path / "apart.onnx")
    assert done.returncode == 2 and "weights in another file" in done.stderr


STEPS: list[tuple[np.ndarray, list[dict[str, Any]]]] = [
    (np.arange(48, dtype=np.float32).reshape(4, 4, 3),
     [{"op": "normalize", "scale": 0.01, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 0.5]},
      {"op": "layout", "to": "NCHW"}]),
    (np.arange(5, dtype=np.float32),
     [{"op": "quantize", "scale": 0.5, "dtype": "int8", "zero_point": -3},
      {"op": "pad", "length": 8, "value": 7, "side": "left"}]),
    (np.array([1.7, -2.2, 300.0], np.float32),
     [{"op": "cast", "dtype": "int16"}, {"op": "truncate", "length": 2, "side": "left"}]),
    (np.arange(12, dtype=np.int64),
     [{"op": "reshape", "shape": [3, -1]}, {"op": "expand", "axis": 0},
      {"op": "cast", "dtype": "float16"}]),
    (np.frombuffer(b"  \n some text \x00\xff  ", np.uint8),
     [{"op": "head-tail", "head": 6, "tail": 12, "block": 12, "strip": True, "pad": 256}]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(STEPS)))
def test_steps_before_the_model_make_pythons_numbers(runner, case, tmp_path) -> None:
    from onnx import TensorProto, helper, save

    from edgekit_runtime.preprocess import Preprocess

    raw, steps = STEPS[case]
    wanted = Preprocess("array", steps)(raw)
    kind = helper.np_dtype_to_tensor_dtype(wanted.dtype)
    dims = [f"d{n}" for n in range(wanted.ndim)]
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE)], "same",
        [helper.make_tensor_value_info("x", kind, dims)],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, dims)],
    )  # fmt: skip
    opset = helper.make_opsetid("", 15)
    save(helper.make_model(graph, opset_imports=[opset], ir_version=7), tmp_path / "same.onnx")
    path = bundle_of(
        tmp_path / "same.onnx", [{"x": wanted}], tmp_path / "same.edgekit",
        preprocess={"x": InputSteps("array", tuple(steps))},
    )  # fmt: skip
    np.save(tmp_path / "raw.npy", raw)
    found = runner.json("run", path, "--input", tmp_path / "raw.npy")["outputs"]["y"]
    np.testing.assert_array_equal(np.array(found), wanted.astype(np.float64))


def test_steps_that_are_not_here_are_named(runner, make, tmp_path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(4, np.float32))
    steps = ({"op": "resize", "size": 4},)
    path = Maker(make.model, tmp_path / "s", preprocess={"x": InputSteps("array", steps)})(1)
    done = runner("run", path, "--input", tmp_path / "x.npy")
    assert done.returncode == 3 and "step 1 (resize)" in done.stderr and "--tensors" in done.stderr


class Here(Phone):
    """The native runner as the installer of this machine."""

    def _bring_program(self) -> list[str]:
        return [str(Runner(native_program()).started(self._root))]


@contextmanager
def desk(root: Path, name: str = "m") -> Iterator[Here]:
    root.mkdir(exist_ok=True)
    with connect("local") as here, Here(here, name, root=str(root)) as made:
        yield made


def test_what_it_installs_python_opens_and_goes_back_on(make, tmp_path) -> None:
    root = tmp_path / "root"
    with desk(root) as made:
        first = deploy(make(1), made)
        assert (first.state, first.trial["ok"]) == ("new", True)
        assert deploy(make(1), made).state == "active"
        second = deploy(make(2), made)
        assert second.previous == first.file and second.sent_bytes <= second.size_bytes
        with pytest.raises(TargetError, match="golden output"):
            deploy(make(3, off=0.5), made)
        status = made.ask("status")
    with open_installed("m", root=root) as session:
        answer = session.run({"x": np.ones((1, 4), np.float32)})["y"]
        np.testing.assert_allclose(answer, make.right, rtol=1e-5)
    with desk(root) as made:
        assert made.ask("rollback")["active"] == first.file
        assert made.ask("gc")["versions"] == [first.file]
    assert status["active"] == second.file and len(status["failed_trials"]) == 1


def test_by_hand(runner, make, tmp_path) -> None:
    root = ("--root", tmp_path / "root")
    assert runner("install", make(1), "--as", "m", *root).returncode == 0
    assert runner("install", make(2), "--as", "m", *root).returncode == 0
    worse = runner("install", make(3, off=1.0), "--as", "m", *root)
    assert worse.returncode == 1 and "golden output" in worse.stdout
    status = json.loads(runner("status", "m", *root).stdout)
    assert status["active"].startswith("2-") and status["unfinished"] is None
    assert runner("rollback", "m", *root).returncode == 0
    assert runner("rollback", "m", *root).returncode == 2
    assert runner("activate", "m", status["active"], *root).returncode == 0
    older = runner("install", make(1), "--as", "m", *root)
    assert older.returncode == 2 and "edgekit rollback" in older.stderr
    with open_installed("m", root=tmp_path / "root") as session:
        assert session.manifest is not None and session.manifest.sequence == 2


def test_a_kill_at_any_request_leaves_a_version_and_the_next_deploy_works(make, tmp_path) -> None:
    root = tmp_path / "root"
    with desk(root) as made:
        deploy(make(1), made)
    for sequence, verb in enumerate(("begin", "take", "commit"), 2):
        with pytest.raises(TargetError), desk(root) as made:
            tell = made.tell

            def killed(do: str, *words: Any, _verb: str = verb, _made: Any = made,
                       _tell: Any = tell, **facts: Any) -> None:  # fmt: skip
                _tell(do, *words, **facts)
                if do == _verb:
                    _made._talk.close()

            made.tell = killed  # type: ignore[method-assign]
            deploy(make(sequence), made)
        with open_installed("m", root=root) as session:
            assert session.manifest is not None
        with desk(root) as made:
            assert deploy(make(sequence), made).file.startswith(f"{sequence}-")


@pytest.mark.measures
def test_it_costs_little_over_the_engines_own_calls(runner, tmp_path) -> None:
    """At most 2 % or 20 us, of a model that takes microseconds."""
    program = native_overhead.plain_program(tmp_path)
    model = small_cnn(tmp_path / "small.onnx")
    plain, ours = native_overhead.compare(model, program, rounds=8, starts=2)
    over = np.median(np.subtract(ours, plain)), np.median(np.divide(ours, plain))
    assert over[0] <= native_overhead.BAR_NS or over[1] <= native_overhead.BAR_RATIO


def test_the_runner_is_small() -> None:
    assert native_program().stat().st_size <= 200_000


def test_fuzzing_finds_nothing(small, tmp_path) -> None:
    program = native_program("fuzz")
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    contents = {"a/model.onnx": b"m" * 40, "a/in.npz": npz(x=np.ones((2, 1, 4), np.float32)),
                "a/out.npz": npz(y=np.ones((2, 1, 3), np.float32))}  # fmt: skip
    made = make_manifest(contents, labels=("a",), postprocess=({"op": "top-k", "k": 1},))
    (seeds / "bundle").write_bytes(b"\0" + bundle(made, contents))
    (seeds / "manifest").write_bytes(b"\1" + made.to_json().encode())
    for number, (_, data) in enumerate(archives(bundle(made, contents))):
        if len(data) < LONGEST:
            (seeds / f"hostile-{number}").write_bytes(b"\0" + data)
    packed = deflated_bundle(contents, "a/model.onnx", stream=raw_deflate(contents["a/model.onnx"]))
    (seeds / "deflated").write_bytes(b"\0" + packed)
    (seeds / "npz").write_bytes(b"\2" + contents["a/in.npz"])
    (seeds / "json").write_bytes(b'\3{"a": [1, -2.5e3, "\\u00e9\\ud83d\\ude00", null, true]}')
    done = subprocess.run(
        # libFuzzer's limit is of peak memory, which starts at its parent's, ours, on Linux
        [program, f"-runs={EXECUTIONS}", "-seed=1", f"-max_len={LONGEST}", "-rss_limit_mb=0",
         "-malloc_limit_mb=100", seeds],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {EXECUTIONS} runs" in done.stderr
