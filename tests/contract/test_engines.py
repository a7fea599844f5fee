"""One suite for every engine: what a session promises, whoever computes.

The answers come from numpy (`small_models`). A new engine is one more line in ENGINES.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from engine_cases import (
    FORMATS,
    ONNX_ENGINES,
    Models,
    assert_linear,
    bundled,
    files_of,
    in_threads,
    noise,
)
from small_models import convolved, onnx_linear, onnx_model

from edgekit_runtime import EngineError, InputError, ModelError, Session, UsageError, load
from edgekit_runtime.errors import EngineMissingError, EngineTooOldError, LimitError
from edgekit_runtime.golden import check
from edgekit_runtime.probe import probe


@pytest.fixture(params=ONNX_ENGINES)
def onnx_engine(request: pytest.FixtureRequest) -> str:
    return request.param


# --- answers --------------------------------------------------------------------------------------


def test_the_answer_is_numpys(session: Session) -> None:
    x = noise(3, 4)
    out = session.run({"x": x})
    assert list(out) == ["y"]
    assert out["y"].dtype == np.float32
    assert_linear(out["y"], x)


def test_specs_say_what_the_model_takes(session: Session) -> None:
    (x,), (y,) = session.inputs, session.outputs
    assert (x.name, x.dtype, y.name, y.dtype) == ("x", "float32", "y", "float32")
    assert x.shape[1:] == (4,)
    assert y.shape[1:] == (3,)
    assert isinstance(x.shape[0], str)
    assert isinstance(y.shape[0], str)


def test_results_are_the_callers_own(session: Session) -> None:
    x, other = noise(2, 4), noise(2, 4, seed=1)
    first = session.run({"x": x})["y"]
    kept = first.copy()
    second = session.run({"x": other})["y"]
    np.testing.assert_array_equal(first, kept)
    second[...] = 1e9
    assert_linear(session.run({"x": other})["y"], other)
    assert_linear(first, x)


def test_inputs_are_not_changed_and_not_kept(session: Session) -> None:
    x = noise(2, 4)
    given = x.copy()
    first = session.run({"x": given})["y"]
    np.testing.assert_array_equal(given, x)
    given[...] = 0
    assert_linear(first, x)
    assert_linear(session.run({"x": given})["y"], given)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::-1, :4],
        lambda x: np.asfortranarray(x[:, :4]),
        lambda x: x.T[:4].T,
        lambda x: np.broadcast_to(x[0, :4], (6, 4)),
    ],
    ids=["strided", "backwards", "fortran", "transposed", "broadcast"],
)
def test_any_memory_layout_will_do(session: Session, view: Callable[..., np.ndarray]) -> None:
    x = view(noise(6, 8))
    for _ in range(2):  # the first run checks, the second takes the short way
        assert_linear(session.run({"x": x})["y"], x)


def test_batch_sizes_come_and_go(session: Session) -> None:
    for size in (1, 5, 1, 2, 3, 4, 6, 7, 5, 1, 64, 2):
        x = noise(size, 4, seed=size)
        assert_linear(session.run({"x": x})["y"], x)


def test_two_inputs_two_outputs_by_name(engine: str, small_model: Models) -> None:
    z = np.array([[1, -2, 3, 0.5]], np.float32)
    a = np.array([[7, -9]], np.int32)
    with load(small_model(engine, "two")) as session:
        assert {s.name for s in session.inputs} == {"z", "a"}
        assert {s.name for s in session.outputs} == {"q", "b"}
        for inputs in ({"z": z, "a": a}, {"a": a + 1, "z": z + 1}):
            out = session.run(inputs)
            assert {n: v.dtype.name for n, v in out.items()} == {"q": "int32", "b": "float32"}
            np.testing.assert_array_equal(out["q"], 2 * inputs["a"])
            np.testing.assert_allclose(out["b"], inputs["z"] ** 2, rtol=1e-6)


def test_scalars_are_arrays_too(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "scalar")) as session:
        for value in (1.5, -4.0):
            out = session.run({"x": np.array(value, np.float32)})["y"]
            assert isinstance(out, np.ndarray)
            assert out.shape == ()
            assert out == 2 * value


def test_output_shapes_may_depend_on_the_data(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "where")) as session:
        for bits in ("101", "000", "111", "010", "000", "11010", "1", "101"):
            x = np.array([bit == "1" for bit in bits])
            np.testing.assert_array_equal(session.run({"x": x})["y"], np.argwhere(x))


def test_free_sides_for_which_one_is_too_small(engine: str, small_model: Models) -> None:
    image = noise(6, 5)
    free_h = (1, 6, 5, 1) if engine == "litert" else (1, 1, 6, 5)
    with load(small_model(engine, "conv")) as session:
        assert session.placement.shares == {"CPU": 1.0}  # asked before any shape is known
        found = session.run({"x": image.reshape(free_h)})["y"]
        np.testing.assert_allclose(found.reshape(4, 3), convolved(image), rtol=1e-4, atol=1e-4)


# --- refused inputs -------------------------------------------------------------------------------

X = noise(2, 4)


@pytest.mark.parametrize(
    ("inputs", "found", "wanted"),
    [
        ({"z": X}, "z", "x"),
        ({}, "nothing", "x"),
        ({"x": X, "z": X}, "x, z", "wanted: x"),
        ({1: X, "x": X}, "1, x", "wanted: x"),
        ({"x": X.astype(np.float64)}, "float64", "float32"),
        ({"x": X.astype(np.int32)}, "int32", "float32"),
        ({"x": X.astype(object)}, "object", "float32"),
        ({"x": X.astype(">f4")}, "foreign byte order", "float32"),
        ({"x": X[0]}, "[4]", "4]"),
        ({"x": X[None]}, "[1, 2, 4]", "4]"),
        ({"x": X[:, :3]}, "[2, 3]", "4]"),
        ({"x": X[:0]}, "[0, 4]", "empty"),
        ({"x": X.tolist()}, "list", "numpy float32 array"),
        ({"x": None}, "NoneType", "numpy float32 array"),
        ({"x": np.float32(1)}, "float32", "numpy float32 array"),
        (X, "dict", "x"),
        ([X], "dict", "x"),
        (None, "dict", "x"),
        ("x", "dict", "x"),
    ],
    ids=[
        "wrong-name", "missing", "extra", "odd-key", "float64", "int32", "object", "byte-order",
        "rank-1", "rank-3", "fixed-dim", "empty-batch", "list", "none", "numpy-scalar", "array",
        "list-of-arrays", "no-dict", "string",
    ],
)  # fmt: skip
def test_unfit_inputs_are_explained(session: Session, inputs: Any, found: str, wanted: str) -> None:
    for warm in (False, True):
        if warm:  # the short way must refuse the same things
            assert_linear(session.run({"x": X})["y"], X)
        with pytest.raises(InputError) as caught:
            session.run(inputs)
        message = str(caught.value)
        assert found in message
        assert wanted in message
        assert "\n" not in message
    assert_linear(session.run({"x": X})["y"], X)


def test_a_shape_the_model_cannot_compute_does_no_lasting_harm(
    engine: str, small_model: Models
) -> None:
    one = np.arange(4, dtype=np.float32).reshape(1, 4)
    with load(small_model(engine, "stubborn")) as session:
        for _ in range(2):
            with pytest.raises(EngineError, match="engine"):
                session.run({"x": np.ones((3, 4), np.float32)})
            for _ in range(2):
                np.testing.assert_array_equal(session.run({"x": one})["y"], one.reshape(2, 2))


# --- bound buffers --------------------------------------------------------------------------------


def test_bound_buffers_run_without_copies(session: Session) -> None:
    bound = session.bind({"x": (2, 4)})
    buffer = bound.inputs["x"]
    assert (buffer.shape, buffer.dtype) == ((2, 4), np.float32)
    for seed in range(3):
        x = noise(2, 4, seed=seed)
        buffer[...] = x
        bound()
        assert list(bound.outputs) == ["y"]
        assert_linear(bound.outputs["y"], x)


def test_a_bound_run_again_gives_the_same(session: Session) -> None:
    """The engine must not use its inputs' memory for anything else."""
    bound = session.bind({"x": (2, 4)})
    x = noise(2, 4)
    bound.inputs["x"][...] = x
    for _ in range(5):
        bound()
        assert_linear(bound.outputs["y"], x)
    np.testing.assert_array_equal(bound.inputs["x"], x)


def test_bound_defaults_to_one(session: Session) -> None:
    bound = session.bind()
    x = noise(1, 4)
    bound.inputs["x"][...] = x
    bound()
    assert_linear(bound.outputs["y"], x)


def test_bound_inputs_cannot_be_replaced(session: Session) -> None:
    bound: Any = session.bind()
    with pytest.raises(TypeError):
        bound.inputs["x"] = noise(1, 4)


def test_bound_and_run_do_not_disturb_each_other(session: Session) -> None:
    bound = session.bind({"x": (2, 4)})
    x, other = noise(2, 4), noise(2, 4, seed=1)
    bound.inputs["x"][...] = x
    assert_linear(session.run({"x": other})["y"], other)
    bound()
    assert_linear(bound.outputs["y"], x)
    assert_linear(session.run({"x": other})["y"], other)


def test_bound_to_former_shapes_is_right_or_refuses(session: Session) -> None:
    bound = session.bind({"x": (2, 4)})
    x, other = noise(2, 4), noise(5, 4, seed=1)
    bound.inputs["x"][...] = x
    assert_linear(session.run({"x": other})["y"], other)
    try:
        bound()
    except EngineError:
        return  # an engine with one set of tensors says so
    assert_linear(bound.outputs["y"], x)


@pytest.mark.parametrize(
    "shapes",
    [{"x": (2, 3)}, {"x": (4,)}, {"x": (0, 4)}, {"x": (-1, 4)}, {"nope": (1, 4)}],
    ids=str,
)
def test_unfit_shapes_cannot_be_bound(session: Session, shapes: Any) -> None:
    with pytest.raises(InputError):
        session.bind(shapes)


def test_a_shape_the_engine_refuses_cannot_be_bound(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "stubborn")) as session, pytest.raises(EngineError):
        session.bind({"x": (3, 4)})()


# --- closing, threads, placement ------------------------------------------------------------------


def test_a_closed_session_refuses(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "linear")) as session:
        bound = session.bind({"x": (2, 4)})
        assert_linear(session.run({"x": X})["y"], X)
    for call in (
        lambda: session.run({"x": X}),
        lambda: session.bind(),
        lambda: session.placement,
        bound,
    ):
        with pytest.raises(EngineError, match="closed"):
            call()
    session.close()


def test_results_outlive_their_session(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "linear")) as session:
        y = session.run({"x": X})["y"]
    del session
    assert_linear(y, X)


@pytest.mark.parametrize("sizes", [(2,), (1, 2, 3)], ids=["one-size", "several-sizes"])
def test_eight_threads_share_a_session(session: Session, sizes: tuple[int, ...]) -> None:
    def work(number: int) -> None:
        for turn in range(200):
            x = noise(sizes[(turn + number) % len(sizes)], 4, seed=200 * number + turn)
            assert_linear(session.run({"x": x})["y"], x)

    in_threads(8, work)


def test_threads_with_a_bound_each(session: Session) -> None:
    def work(number: int) -> None:
        bound = session.bind({"x": (2, 4)})
        for turn in range(200):
            x = noise(2, 4, seed=200 * number + turn)
            bound.inputs["x"][...] = x
            bound()
            assert_linear(bound.outputs["y"], x)

    in_threads(4, work)


def test_placement_is_what_the_engine_says(session: Session) -> None:
    session.run({"x": X})
    placement = session.placement
    assert placement.shares == {"CPU": 1.0}
    assert placement.precision == "float32"
    assert placement.delegate in ("CPUExecutionProvider", "CPU", "XNNPACK", "ncnn")
    assert "CPU 100 %" in str(placement)


def test_the_probe_computes_one_operator(engine: str) -> None:
    assert any(letter.isdigit() for letter in probe(engine))


# --- loading --------------------------------------------------------------------------------------

_LOADS = """
import json, sys
from pathlib import Path
from edgekit_runtime import load
for line in sys.stdin:
    path = Path(line.strip())
    try:
        with load(path) as session:
            print(json.dumps([path.name, "loaded", ""]), flush=True)
    except Exception as error:
        print(json.dumps([path.name, type(error).__name__, str(error)]), flush=True)
"""


def _outcomes(paths: list[Path]) -> list[tuple[str, str, str]]:
    """What loading each gives, in a child: a crash there is a missing answer here."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADS],
        input="".join(f"{path}\n" for path in paths),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    answers = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died on {paths[len(answers)].name}: {done.stderr[-500:]}"
    return answers


def _copy_beside(model: Path, copy: Path) -> None:
    """The files that belong to a model, under the copy's name."""
    for suffix in (".bin", ".json"):
        if model.with_suffix(suffix).exists():
            copy.with_suffix(suffix).write_bytes(model.with_suffix(suffix).read_bytes())


def test_truncated_models_are_refused(engine: str, small_model: Models, tmp_path: Path) -> None:
    whole = small_model(engine, "linear")
    data = whole.read_bytes()
    cuts = sorted({len(data) * n // 40 for n in range(40)} | {1, 4, 7, 8, 9})
    paths = []
    for cut in cuts:
        path = tmp_path / f"{cut}{whole.suffix}"
        path.write_bytes(data[:cut])
        _copy_beside(whole, path)
        paths.append(path)
    if engine == "openvino":
        weights = whole.with_suffix(".bin").read_bytes()
        for cut in (0, 1, len(weights) // 2, len(weights) - 1):
            path = tmp_path / f"weights-{cut}.xml"
            path.write_bytes(data)
            path.with_suffix(".bin").write_bytes(weights[:cut])
            paths.append(path)
    answers = _outcomes(paths)
    assert [a for a in answers if a[1] != "ModelError" or "\n" in a[2]] == []
    assert len(answers) == len(paths)


def test_garbage_is_refused(engine: str, small_model: Models, tmp_path: Path) -> None:
    suffix = small_model(engine, "linear").suffix
    rng = np.random.default_rng(0)
    head = {"litert": b"\x1c\0\0\0TFL3", "openvino": b"<?xml version='1.0'?>\n<net "}
    paths = []
    for number in range(20):
        path = tmp_path / f"{number}{suffix}"
        start = head.get(engine, b"\x08\x09") if number % 2 else b""
        path.write_bytes(start + rng.bytes(int(rng.integers(1, 2000))))
        path.with_suffix(".bin").write_bytes(b"\0" * 64)
        paths.append(path)
    assert [a for a in _outcomes(paths) if a[1] != "ModelError" or "\n" in a[2]] == []


def test_another_engines_file_under_our_suffix_is_refused(
    engine: str, small_model: Models, tmp_path: Path
) -> None:
    suffix = small_model(engine, "linear").suffix
    other = small_model("openvino" if engine == "litert" else "litert", "linear")
    path = tmp_path / f"other{suffix}"
    path.write_bytes(other.read_bytes())
    path.with_suffix(".bin").write_bytes(b"\0" * 64)
    path.with_suffix(".json").write_bytes(b"{}")
    (answer,) = _outcomes([path])
    assert answer[1] == "ModelError"


def test_missing_and_empty_files_are_named(
    engine: str, small_model: Models, tmp_path: Path
) -> None:
    path = tmp_path / f"gone{small_model(engine, 'linear').suffix}"
    with pytest.raises(ModelError, match=r"gone.*No such file"):
        load(path)
    path.write_bytes(b"")
    path.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"gone.* is empty"):
        load(path)
    folder = tmp_path / f"folder{path.suffix}"
    folder.mkdir()
    with pytest.raises(ModelError, match="Is a directory"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threads": 0}, "0 threads"),
        ({"threads": -1}, "-1 threads"),
        ({"threads": 100_000}, "100000 threads"),
        ({"precision": "int3"}, "'int3'; known: float32"),
    ],
    ids=str,
)
def test_unusable_options_are_refused(
    engine: str, small_model: Models, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        load(small_model(engine, "linear"), **options)


def test_precision_an_engine_does_not_have_is_refused(engine: str, small_model: Models) -> None:
    path = small_model(engine, "linear")
    if engine == "openvino":  # it may lack the instructions; then it says float32
        with load(path, precision="bfloat16") as session:
            assert session.placement.precision in ("bfloat16", "float32")
        return
    with pytest.raises(UsageError, match=f"{engine} computes floats in float32"):
        load(path, precision="bfloat16")


def test_unknown_and_unfit_engines_are_refused(engine: str, small_model: Models) -> None:
    path = small_model(engine, "linear")
    with pytest.raises(EngineMissingError, match="no engine 'nope'; known: onnxruntime"):
        load(path, engine="nope")
    unfit = "onnxruntime" if engine == "litert" else "litert"
    with pytest.raises(UsageError, match=f"{unfit} does not load {path.suffix} files; {engine}"):
        load(path, engine=unfit)
    with pytest.raises(ModelError, match="only bundles have variants"):
        load(path, variant="a")


def test_a_model_of_a_later_version_is_refused_as_such(
    engine: str, small_model: Models, tmp_path: Path
) -> None:
    """Operator versions nobody has yet."""
    model = small_model(engine, "linear")
    path = tmp_path / model.name
    _copy_beside(model, path)
    if engine == "onnxruntime":
        import onnx

        newer = onnx.load(model)
        newer.opset_import[0].version = 99
        path.write_bytes(newer.SerializeToString())
    elif engine == "openvino":
        path.write_text(model.read_text().replace('version="opset1"', 'version="opset99"'))
    elif engine == "litert":
        schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
        import flatbuffers

        parsed = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytearray(model.read_bytes()), 0))
        parsed.operatorCodes[0].version = 99
        builder = flatbuffers.Builder(1024)
        builder.Finish(parsed.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
    else:
        path.write_text(model.read_text().replace("InnerProduct", "OuterProduct9"))
    with pytest.raises(EngineTooOldError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


# --- what is particular to ONNX -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "answer"),
    [(("a", 4), ("b", 3)), ((None, 4), (None, 3)), ((None, 4), ("N", 3)), (("N", 4), ("N", 3))],
    ids=["other-name", "no-name", "named-out", "one-name"],
)
def test_names_of_free_dimensions_do_not_matter(
    onnx_engine: str, tmp_path: Path, shape: Any, answer: Any
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_linear(shape, answer).SerializeToString())
    with load(path, engine=onnx_engine) as session:
        for size in (1, 3, 2, 3, 1, 7):
            x = noise(size, 4, seed=size)
            assert_linear(session.run({"x": x})["y"], x)


def test_a_free_dimension_may_be_written_as_minus_one(onnx_engine: str, tmp_path: Path) -> None:
    model = onnx_linear()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with load(path, engine=onnx_engine) as session:
        for size in (2, 5):
            x = noise(size, 4)
            assert_linear(session.run({"x": x})["y"], x)


def test_a_promised_output_shape_may_be_wrong(onnx_engine: str, tmp_path: Path) -> None:
    """NonZero's output is as long as the input only now and then, whatever its declaration."""
    model = onnx_model(
        [("NonZero", ["x"], ["y"], {})], {"x": ("float32", ("N",))}, {"y": ("int64", (1, "N"))}
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with load(path, engine=onnx_engine) as session:
        for row in ([1, 1, 1], [0, 5, 0], [0, 0, 0], [1, 1, 1], [1, 0]):
            x = np.array(row, np.float32)
            np.testing.assert_array_equal(session.run({"x": x})["y"], np.stack(np.nonzero(x)))


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
     "float16", "float32", "float64"],
)  # fmt: skip
def test_every_dtype_comes_back(onnx_engine: str, tmp_path: Path, dtype: str) -> None:
    model = onnx_model(
        [("Reshape", ["x", "s"], ["y"], {})],
        {"x": (dtype, ("N", 2))},
        {"y": (dtype, ("M",))},
        {"s": np.array([-1], np.int64)},
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    narrow = onnx_engine == "openvino" and dtype == "int64"  # its CPU plugin computes in int32
    info = np.iinfo("int32" if narrow else dtype) if np.dtype(dtype).kind in "iu" else None
    values = [0, 1, info.min, info.max] if info else [0, 1, 1, 0.5]
    x = np.array(values, dtype).reshape(2, 2)
    with load(path, engine=onnx_engine) as session:
        for batch in (x, x[::-1], x[:1]):
            out = session.run({"x": batch})["y"]
            assert out.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(out, batch.reshape(-1))


@pytest.mark.needs("onnxruntime", "onnx")
def test_strings_are_strings_or_refused(tmp_path: Path) -> None:
    model = onnx_model(
        [("Identity", ["x"], ["y"], {})], {"x": ("string", ("N",))}, {"y": ("string", ("N",))}
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with load(path) as session:
        for x in (np.array(["a", "bc"]), np.array(["ü", ""], object)):
            assert session.run({"x": x})["y"].tolist() == x.tolist()
            for bad in (np.array([1.5, 2.0]), np.array(["a", 1], object), np.array([b"a", b"b"])):
                with pytest.raises(InputError, match="wanted strings"):
                    session.run({"x": bad})


def test_weights_in_another_file_are_refused(
    onnx_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    onnx.save(
        onnx_linear(), tmp_path / "m.onnx",
        save_as_external_data=True, location="weights", size_threshold=0,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where an engine given bytes would find them
    with pytest.raises(ModelError, match="weights in another file"):
        load(tmp_path / "m.onnx", engine=onnx_engine)


@pytest.mark.needs("openvino", "onnx")
def test_an_ir_without_weights_has_an_empty_bin(small_model: Models) -> None:
    path = small_model("openvino", "scalar")
    assert path.with_suffix(".bin").read_bytes() == b""
    with load(path) as session:
        assert session.run({"x": np.array(3, np.float32)})["y"] == 6


@pytest.mark.needs("openvino", "onnx")
def test_an_ir_needs_its_bin(small_model: Models, tmp_path: Path) -> None:
    path = tmp_path / "m.xml"
    path.write_bytes(small_model("openvino", "linear").read_bytes())
    with pytest.raises(ModelError, match=r"m\.bin.*No such file"):
        load(path)


# --- bundles --------------------------------------------------------------------------------------


def test_a_bundle_runs_and_keeps_its_promise(
    engine: str, small_model: Models, tmp_path: Path
) -> None:
    path = bundled(tmp_path, engine, small_model(engine, "linear"))
    with load(path) as session:
        assert session.inputs[0].shape == ("N", 4)
        for size in (2, 1, 5):
            x = noise(size, 4)
            assert_linear(session.run({"x": x})["y"], x)
    (result,) = check(path)
    assert (result.output, result.ok) == ("y", True)
    with pytest.raises(UsageError, match="choose one of its variants"):
        load(path, engine=engine)
    with pytest.raises(UsageError, match="0 threads"):
        load(path, threads=0)


def test_a_bundle_may_rename_what_the_engine_names(
    engine: str, small_model: Models, tmp_path: Path
) -> None:
    model = small_model(engine, "two")
    files = files_of(model)
    contents = {**files, "a/in.npz": b"-", "a/out.npz": b"-"}
    spec, tolerance = bundles.TensorSpec, bundles.Tolerance(0, 0)
    golden = bundles.Golden("a/in.npz", "a/out.npz", 1, {"sum": tolerance, "square": tolerance})
    variant = bundles.make_variant(
        engine=engine, format=FORMATS[engine], files=tuple(files),
        input_names=("a", "z"), output_names=("b", "q"), golden=golden,
    )  # fmt: skip
    manifest = bundles.make_manifest(
        contents,
        inputs=(spec("count", "int32", (1, 2)), spec("values", "float32", (1, 4))),
        outputs=(spec("square", "float32", (1, 4)), spec("sum", "int32", (1, 2))),
        variants=(variant,),
    )
    path = tmp_path / "m.edgekit"
    path.write_bytes(bundles.bundle(manifest, contents))
    count, values = np.array([[3, 4]], np.int32), noise(1, 4)
    with load(path) as session:
        out = session.run({"count": count, "values": values})
    np.testing.assert_array_equal(out["sum"], 2 * count)
    np.testing.assert_allclose(out["square"], values**2, rtol=1e-6)


def test_a_bundle_that_promises_another_device_is_refused(
    engine: str, small_model: Models, tmp_path: Path
) -> None:
    model = small_model(engine, "linear")
    path = bundled(tmp_path, engine, model, variants=[{"placement": {"NPU": 0.5}}])
    with pytest.raises(LimitError, match="0 % of its operators are on NPU, wanted 50 %"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": (bundles.TensorSpec("x", "float32", ("N", 5)),)}, "4"),
        ({"inputs": (bundles.TensorSpec("x", "float16", ("N", 4)),)}, "float32"),
        ({"outputs": (bundles.TensorSpec("y", "float32", (3,)),)}, r"\[3\]"),
    ],
    ids=["dimension", "dtype", "rank"],
)
def test_a_manifest_that_contradicts_the_model_is_refused(
    engine: str, small_model: Models, tmp_path: Path, changes: Any, says: str
) -> None:
    model = small_model(engine, "linear")
    files = files_of(model)
    contents = {**files, "a/in.npz": b"-", "a/out.npz": b"-"}
    variant = bundles.make_variant(engine=engine, format=FORMATS[engine], files=tuple(files))
    manifest = bundles.make_manifest(contents, variants=(variant,), **changes)
    path = tmp_path / "m.edgekit"
    path.write_bytes(bundles.bundle(manifest, contents))
    with pytest.raises(ModelError, match=says):
        load(path)
