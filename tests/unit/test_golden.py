"""Golden checks: what passes, what fails, and that nothing passes by being absent.

The engine is numpy itself, behind the interface every engine has.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest

from edgekit_runtime import BundleError, Session, TensorSpec
from edgekit_runtime import source as source_module
from edgekit_runtime.engines import Binding, Loaded, Options, Shapes
from edgekit_runtime.golden import check, compare, read_arrays
from edgekit_runtime.manifest import Tolerance
from edgekit_runtime.placement import Placement
from edgekit_runtime.source import Opened, Source

WEIGHTS = np.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]], np.float32)
Compute = Callable[[np.ndarray], np.ndarray]


class NumpyEngine(Loaded):
    """A model that is one numpy function of `x`."""

    version = np.__version__

    def __init__(self, compute: Compute, x: TensorSpec, y: TensorSpec) -> None:
        self.inputs, self.outputs = (x,), (y,)
        self._compute = compute

    def bind(self, shapes: Shapes) -> Binding:
        return _Binding(self._compute, np.zeros(shapes[0], self.inputs[0].dtype))

    def placement(self, *, operators: bool = True) -> Placement:
        return Placement({"CPU": 1.0}, "numpy", "float32")


class _Binding(Binding):
    fresh_outputs = True

    def __init__(self, compute: Compute, buffer: np.ndarray) -> None:
        self.inputs, self.outputs, self._compute = (buffer,), (), compute

    def invoke(self) -> None:
        self.outputs = (self._compute(self.inputs[0]),)


def numpy_session(
    compute: Compute = lambda x: x @ WEIGHTS,
    *,
    shape: tuple[int | str, ...] = ("N", 2),
    dtype: str = "float32",
) -> Session:
    x = TensorSpec("x", "float32", shape)
    y = TensorSpec("y", dtype, ("a", "b"))
    return Session(Source(Path("numpy")), Opened(NumpyEngine(compute, x, y), (x,), (y,)))


X = np.arange(12, dtype=np.float32).reshape(3, 2, 2)  # three samples of two rows
Y = X @ WEIGHTS
LOOSE = {"y": Tolerance(1e-5, 1e-5)}


def test_the_same_numbers_pass() -> None:
    (result,) = compare(numpy_session(), {"x": X}, {"y": Y}, LOOSE)
    assert (result.output, result.ok, result.max_abs, result.worst) == ("y", True, 0.0, 0.0)


def test_other_weights_fail_and_say_by_how_much() -> None:
    other = WEIGHTS.copy()
    other[1, 2] += 0.5
    (result,) = compare(numpy_session(lambda x: x @ other), {"x": X}, {"y": Y}, LOOSE)
    assert not result.ok
    assert result.max_abs == pytest.approx(0.5 * X[..., 1].max())
    assert result.worst > 1


def test_one_bad_sample_of_many_fails() -> None:
    wanted = Y.copy()
    wanted[2, 1, 0] += 1
    (result,) = compare(numpy_session(), {"x": X}, {"y": wanted}, LOOSE)
    assert (result.ok, result.max_abs) == (False, pytest.approx(1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_on_either_side(value: float) -> None:
    def spoil(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[0] = value
        return array

    spoilt = numpy_session(lambda x: spoil(x @ WEIGHTS))
    for session, wanted in ((spoilt, Y), (numpy_session(), spoil(Y)), (spoilt, spoil(Y))):
        (result,) = compare(session, {"x": X}, {"y": wanted}, {"y": Tolerance(1e30, 1e30)})
        assert (result.ok, result.note) == (False, "NaN or Inf")


@pytest.mark.parametrize(
    "wanted",
    [Y[:, :1], Y[..., :2], Y.reshape(3, 3, 2), Y[..., None], Y[:, 0]],
    ids=lambda y: y.shape,
)
def test_other_shapes_fail(wanted: np.ndarray) -> None:
    (result,) = compare(numpy_session(), {"x": X}, {"y": wanted}, {"y": Tolerance(1e9, 1e9)})
    assert not result.ok
    assert result.note == f"shape [2, 3], wanted {list(wanted.shape[1:])}"


def test_shapes_that_vary_with_the_data_fail() -> None:
    session = numpy_session(lambda x: np.atleast_2d(x[x > 4]))
    (result,) = compare(session, {"x": X}, {"y": np.zeros((3, 1, 4), np.float32)}, LOOSE)
    assert (result.ok, result.note) == (False, "shape [1, 0], wanted [1, 4]")


def _ok(got: float, wanted: float, atol: float, rtol: float) -> bool:
    session = numpy_session(lambda x: np.full((1, 1), got), dtype="float64")
    target = np.full((3, 1, 1), wanted)
    (result,) = compare(session, {"x": X}, {"y": target}, {"y": Tolerance(atol, rtol)})
    assert result.ok == (result.worst <= 1)
    return result.ok


@pytest.mark.parametrize(
    ("got", "wanted", "atol", "rtol", "ok"),
    [
        (1.25, 1.0, 0.25, 0.0, True),  # on the edge: allowed
        (1.25, 1.0, np.nextafter(0.25, 0), 0.0, False),
        (np.nextafter(1.25, 2), 1.0, 0.25, 0.0, False),
        (-5.0, -4.0, 0.0, 0.25, True),  # relative to what is wanted, not to what was got
        (-4.0, -5.0, 0.0, 0.2, True),
        (-4.0, -5.0, 0.0, 0.19, False),
        (5.0, 4.0, 0.5, 0.125, True),  # the two add up
        (5.0, 4.0, 0.5, 0.12, False),
        (0.0, 0.0, 0.0, 0.0, True),
        (7.0, 7.0, 0.0, 0.0, True),
        (1e-30, 0.0, 0.0, 1.0, False),
        (1e30, 0.0, 0.0, 0.0, False),
        (2.0, 1e-300, 0.0, 1e-300, False),
    ],
)
def test_tolerance_edges(got: float, wanted: float, atol: float, rtol: float, ok: bool) -> None:
    assert _ok(got, wanted, atol, rtol) is ok
    assert bool(np.isclose(got, wanted, atol=atol, rtol=rtol)) is ok  # numpy agrees


def test_scalar_inputs_are_samples_too() -> None:
    session = numpy_session(lambda x: np.full((1, 1), 2 * x, np.float32), shape=())
    x = np.array([1, 2, 3], np.float32)
    (result,) = compare(session, {"x": x}, {"y": 2 * x.reshape(3, 1, 1)}, LOOSE)
    assert result.ok


def test_strings_are_equal_or_not() -> None:
    session = numpy_session(lambda x: np.array([["cat", "dog"]], object), dtype="string")
    right = np.array([[["cat", "dog"]]] * 3)
    (result,) = compare(session, {"x": X}, {"y": right}, LOOSE)
    assert result.ok
    wrong = right.copy()
    wrong[1, 0, 1] = "cow"
    (result,) = compare(session, {"x": X}, {"y": wrong}, LOOSE)
    assert not result.ok


@pytest.mark.parametrize(
    ("inputs", "wanted", "tolerance"),
    [
        ({"x": X}, {}, LOOSE),
        ({"x": X}, {"z": Y}, LOOSE),
        ({"x": X}, {"y": Y, "z": Y}, LOOSE),
        ({"x": X}, {"y": Y}, {}),
        ({"x": X}, {"y": Y}, {"z": Tolerance(1, 1)}),
        ({}, {"y": Y}, LOOSE),
    ],
    ids=["nothing", "other", "more", "no-tolerance", "other-tolerance", "no-inputs"],
)
def test_nothing_passes_by_being_absent(inputs: Any, wanted: Any, tolerance: Any) -> None:
    with pytest.raises(BundleError, match="golden outputs"):
        compare(numpy_session(), inputs, wanted, tolerance)


# --- in a bundle ----------------------------------------------------------------------------------


@pytest.fixture
def numpy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles whose model file is an array of weights, multiplied by numpy."""

    def load_engine(name: str, files: dict[str, bytes], options: Options) -> Loaded:
        weights = np.frombuffer(files["model.onnx"], np.float32).reshape(2, 3)
        x, y = TensorSpec("x", "float32", ("N", 2)), TensorSpec("y", "float32", ("N", 3))
        return NumpyEngine(lambda a: a @ weights, x, y)

    monkeypatch.setattr(source_module, "load_engine", load_engine)


def _bundle(path: Path, *, weights: np.ndarray = WEIGHTS, **golden: Any) -> Path:
    contents = {
        "a/in.npz": bundles.npz(x=X),
        "a/model.onnx": weights.tobytes(),
        "a/out.npz": bundles.npz(y=Y),
    } | {f"a/{name}.npz": data for name, data in golden.items() if name in ("in", "out")}
    samples = golden.get("samples", 3)
    variant = bundles.make_variant(
        golden=bundles.Golden("a/in.npz", "a/out.npz", samples, {"y": Tolerance(1e-5, 1e-5)})
    )
    manifest = bundles.make_manifest(
        contents, variants=(variant,),
        inputs=(TensorSpec("x", "float32", ("N", 2)),),
        outputs=(TensorSpec("y", "float32", ("N", 3)),),
    )  # fmt: skip
    path.write_bytes(bundles.bundle(manifest, contents))
    return path


@pytest.mark.usefixtures("numpy_engine")
def test_a_bundle_is_checked_with_its_own_files(tmp_path: Path) -> None:
    (result,) = check(_bundle(tmp_path / "good.edgekit"))
    assert result.ok
    (result,) = check(_bundle(tmp_path / "bad.edgekit", weights=WEIGHTS + 0.01))
    assert not result.ok


@pytest.mark.usefixtures("numpy_engine")
@pytest.mark.parametrize(
    "golden",
    [
        {"in": b""},
        {"in": b"not an archive"},
        {"out": bundles.npz(z=Y)},
        {"out": bundles.npz()},
        {"out": bundles.npz(y=Y[:2])},
        {"in": bundles.npz(x=X[:2]), "out": bundles.npz(y=Y[:2])},
        {"in": bundles.npz(x=np.float32(1))},
        {"samples": 2},
    ],
    ids=["empty", "garbage", "other-name", "no-arrays", "fewer-outputs", "fewer", "scalar", "2"],
)
def test_golden_files_that_do_not_fit_are_refused(tmp_path: Path, golden: Any) -> None:
    with pytest.raises(BundleError) as caught:
        check(_bundle(tmp_path / "m.edgekit", **golden))
    assert "\n" not in str(caught.value)


def test_golden_files_are_never_unpickled_nor_inflated(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "sprung"), "w"))

    np.savez(tmp_path / "objects.npz", y=np.array([Trap()], object))
    np.savez_compressed(tmp_path / "zeros.npz", y=np.zeros(1_000_000))
    for name, says in (("objects", "pickle"), ("zeros", "compressed")):
        with pytest.raises(BundleError, match=says):
            read_arrays((tmp_path / f"{name}.npz").read_bytes())
    assert not (tmp_path / "sprung").exists()
