"""What sessions add to engines: streams, queues, hooks, guards, isolation, forks, updates."""

import contextlib
import gc
import os
import threading
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from engine_cases import Models, assert_linear, bundled, in_threads, noise
from small_models import BIAS, WEIGHTS, onnx_model

from edgekit_runtime import (
    BundleError,
    ClosedError,
    EngineCrashed,
    EngineError,
    EngineMissingError,
    FallbackWarning,
    GuardError,
    GuardWarning,
    InputError,
    LimitError,
    LowMemoryError,
    ModelError,
    QueueFullError,
    Session,
    UsageError,
    WrongDeviceError,
    load,
    open_installed,
)
from edgekit_runtime.installed import activate, install

X = noise(2, 4)


# --- in the background ----------------------------------------------------------------------------


def test_a_batch_comes_back_in_order(session: Session) -> None:
    samples = [{"x": noise(1 + i % 3, 4, seed=i)} for i in range(40)]
    outputs = list(session.run_batch(iter(samples)))
    assert len(outputs) == 40
    for sample, out in zip(samples, outputs, strict=True):
        assert_linear(out["y"], sample["x"])


def test_a_batch_takes_samples_only_as_it_goes(session: Session) -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield {"x": X}

    results = session.run_batch(endless())
    for _ in range(3):
        assert_linear(next(results)["y"], X)
    assert len(taken) < 10
    results.close()  # type: ignore[attr-defined]
    assert_linear(session.run({"x": X})["y"], X)


def test_a_bad_sample_of_a_batch_is_raised_at_its_turn(session: Session) -> None:
    results = session.run_batch([{"x": X}, {"x": X[:, :3]}, {"x": X}])
    with pytest.raises(InputError, match=r"\[2, 3\]"):
        list(results)
    assert_linear(session.run({"x": X})["y"], X)


def test_submitted_inputs_may_be_changed_at_once(session: Session) -> None:
    x = X.copy()
    futures = []
    for i in range(8):
        x[...] = X + i
        futures.append(session.submit({"x": x}))
    for i, future in enumerate(futures):
        assert_linear(future.result(timeout=30)["y"], X + i)


def test_unfit_inputs_are_refused_when_submitted(session: Session) -> None:
    with pytest.raises(InputError, match="float64"):
        session.submit({"x": X.astype(np.float64)})


@pytest.mark.parametrize("intent", ["latency", "throughput"])
def test_many_threads_submit_at_once(engine: str, small_model: Models, intent: str) -> None:
    with load(small_model(engine, "linear"), intent=intent) as session:

        def work(number: int) -> None:
            for turn in range(30):
                x = noise(1 + turn % 2, 4, seed=100 * number + turn)
                assert_linear(session.submit({"x": x}).result(timeout=60)["y"], x)

        in_threads(6, work)


def test_a_full_queue_says_so(session: Session) -> None:
    gate = threading.Event()
    session.hooks.add(on_start=lambda: gate.wait(30))
    waiting: list[Future[Any]] = []
    with pytest.raises(QueueFullError, match="places of the queue"):
        waiting += (session.submit({"x": X}, timeout_s=0.05) for _ in range(10))
    assert 2 <= len(waiting) <= 4
    gate.set()
    for future in waiting:
        assert_linear(future.result(timeout=30)["y"], X)
    assert_linear(session.submit({"x": X}).result(timeout=30)["y"], X)  # its place is free again


def test_closing_lets_queued_calls_end(engine: str, small_model: Models) -> None:
    session = load(small_model(engine, "linear"))
    futures = [session.submit({"x": X}) for _ in range(4)]
    session.close()
    for future in futures:
        assert_linear(future.result(timeout=1)["y"], X)
    with pytest.raises(ClosedError):
        session.submit({"x": X})
    assert not [t for t in threading.enumerate() if t.name.startswith("edgekit")]


def test_an_unknown_intent_is_refused(engine: str, small_model: Models) -> None:
    with pytest.raises(UsageError, match="no intent 'speed'; known: latency, throughput"):
        load(small_model(engine, "linear"), intent="speed")


# --- warming up, counting, binding ----------------------------------------------------------------


def test_warming_up_changes_no_answer(session: Session) -> None:
    session.warm_up()
    session.warm_up({"x": (2, 4)}, runs=1)
    assert_linear(session.run({"x": X})["y"], X)
    with pytest.raises(InputError):
        session.warm_up({"x": (2, 5)})


def test_strided_inputs_are_counted(session: Session) -> None:
    wide = noise(2, 8)
    assert session.strided_copies == 0
    for _ in range(3):
        assert_linear(session.run({"x": wide[:, ::2]})["y"], wide[:, ::2])
        assert_linear(session.run({"x": X})["y"], X)
    assert session.strided_copies == 3


def test_huge_shapes_are_one_error(session: Session) -> None:
    x = np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (1 << 42, 4), (0, 4))
    with pytest.raises(EngineError, match="refused the shapes"):
        session.run({"x": x})
    with pytest.raises(EngineError, match="refused the shapes"):
        session.bind({"x": (1 << 42, 4)})
    assert_linear(session.run({"x": X})["y"], X)


def test_bounds_run_beside_each_other(session: Session) -> None:
    bounds = [session.bind({"x": (n + 1, 4)}) for n in range(3)]

    def work(number: int) -> None:
        bound = bounds[number]
        for turn in range(100):
            x = noise(number + 1, 4, seed=turn)
            bound.inputs["x"][...] = x
            bound()
            assert_linear(bound.outputs["y"], x)

    in_threads(3, work)


# --- state ----------------------------------------------------------------------------------------


def test_a_stateless_model_has_no_stream(session: Session) -> None:
    with pytest.raises(UsageError, match="a plain model names no state"):
        session.stream()
    with pytest.raises(UsageError, match="'nope' fed by 'y' is not this model's"):
        session.stream({"nope": "y"})


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    """y = x + s; t = s + x: what went in so far."""
    model = onnx_model(
        [("Add", ["x", "s"], ["y"], {}), ("Identity", ["y"], ["t"], {})],
        {"x": ("float32", ("N", 2)), "s": ("float32", ("N", 2))},
        {"y": ("float32", ("N", 2)), "t": ("float32", ("N", 2))},
    )
    path = tmp_path / "counter.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.needs("onnxruntime", "openvino", "onnx")
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("isolate", [False, True])
def test_streams_keep_their_own_state(counter: Path, engine: str, isolate: bool) -> None:
    with load(counter, engine=engine, isolate=isolate) as session:
        streams = [session.stream({"s": "t"}) for _ in range(3)]
        assert [s.name for s in streams[0].inputs] == ["x"]
        assert [s.name for s in streams[0].outputs] == ["y"]
        totals = np.zeros((3, 1, 2), np.float32)
        for turn in range(5):
            for number, stream in enumerate(streams):
                x = noise(1, 2, seed=10 * turn + number)
                totals[number] += x
                out = stream.run({"x": x})
                assert list(out) == ["y"]
                np.testing.assert_allclose(out["y"], totals[number], rtol=1e-6)
        with pytest.raises(InputError, match=r"reset\(\) it"):
            streams[0].run({"x": noise(2, 2)})
        with pytest.raises(InputError, match="named x, s; wanted: x"):
            streams[0].run({"x": X[:, :2], "s": X[:, :2]})
        streams[0].reset()
        x = noise(2, 2)
        for turn in range(1, 4):
            np.testing.assert_allclose(streams[0].run({"x": x})["y"], turn * x, rtol=1e-6)
    with pytest.raises(ClosedError):
        streams[0].run({"x": x})


# --- hooks and measuring --------------------------------------------------------------------------


def test_hooks_see_every_call(session: Session) -> None:
    seen: list[Any] = []
    remove = session.hooks.add(lambda: seen.append("start"), seen.append)
    session.run({"x": X})
    session.submit({"x": X}).result(timeout=30)
    assert [one if one == "start" else len(one) for one in seen] == ["start", 3] * 2
    assert all(ns > 0 for ns in seen[1])
    remove()
    session.run({"x": X})
    assert len(seen) == 4


def test_a_hook_that_fails_is_taken_out(session: Session) -> None:
    def fail() -> None:
        raise ValueError("no disk")

    session.hooks.add(on_start=fail)
    with pytest.warns(RuntimeWarning, match="a hook was taken out: it raised ValueError"):
        assert_linear(session.run({"x": X})["y"], X)
    assert_linear(session.run({"x": X})["y"], X)


def test_measuring_takes_the_last_calls(session: Session) -> None:
    start = time.perf_counter_ns()
    with session.measure(capacity=20) as measured:
        for _ in range(30):
            session.run({"x": X})
    wall = time.perf_counter_ns() - start
    session.run({"x": X})
    assert len(measured.samples) == 20
    found = measured.summary()
    assert found["total"]["samples"] == found["infer"]["samples"] == 20
    assert sum(sum(one) for one in measured.samples) < wall
    assert 0 < found["infer"]["p50"] <= found["total"]["p50"]
    assert found["cpu_ns"] > 0
    assert found["wall_ns"] <= wall
    assert found["rss_bytes"]["after"] > 10_000_000


def test_an_energy_meter_may_be_given(session: Session) -> None:
    meter = iter([10.0, 12.5])
    with session.measure(energy_j=lambda: next(meter)) as measured:
        session.run({"x": X})
    assert measured.summary()["energy_j"] == 2.5


# --- guards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.nan, "holds NaN"),
        (np.inf, "holds an infinity"),
        (0.0, "is all zeros"),
        (7.0, "the value 7.0 everywhere"),
    ],
)
@pytest.mark.needs("onnxruntime", "onnx")
def test_guards_look_at_outputs(tmp_path: Path, value: float, says: str) -> None:
    model = onnx_model(
        [("Mul", ["x", "z"], ["t"], {}), ("Add", ["t", "v"], ["y"], {})],
        {"x": ("float32", ("N", 2))}, {"y": ("float32", ("N", 2))},
        {"z": np.zeros(2, np.float32), "v": np.full(2, value, np.float32)},
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    x = noise(3, 2)
    with load(path, guard="raise") as session, pytest.raises(GuardError, match=says):
        session.run({"x": x})
    with load(path, guard="warn") as session, pytest.warns(GuardWarning, match=says):
        session.run({"x": x})
    with load(path) as session:
        session.run({"x": x})
    with pytest.raises(UsageError, match="no guard 'nope'; known: raise, warn"):
        load(path, guard="nope")


@pytest.mark.needs("onnxruntime", "onnx")
def test_an_output_that_does_not_move_is_noticed(tmp_path: Path) -> None:
    model = onnx_model(
        [("Mul", ["x", "z"], ["t"], {}), ("Add", ["t", "v"], ["y"], {})],
        {"x": ("float32", (2,))}, {"y": ("float32", (2,))},
        {"z": np.zeros(2, np.float32), "v": np.array([1, 2], np.float32)},
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with load(path, guard="raise") as session:
        same = noise(2)
        for _ in range(10):  # the same answer to the same question is right
            session.run({"x": same})
        with pytest.raises(GuardError, match="have not changed in 4 calls"):
            for seed in range(1, 10):
                session.run({"x": noise(2, seed=seed)})


def test_sound_outputs_pass_the_guard(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "linear"), guard="raise") as session:
        for seed in range(8):
            x = noise(2, 4, seed=seed)
            assert_linear(session.run({"x": x})["y"], x)


# --- a process of its own -------------------------------------------------------------------------


def test_an_isolated_engine_answers_the_same(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "linear"), isolate=True) as session:
        for size in (2, 1, 5, 2):
            x = noise(size, 4, seed=size)
            assert_linear(session.run({"x": x})["y"], x)
        bound = session.bind({"x": (2, 4)})
        bound.inputs["x"][...] = X
        bound()
        assert_linear(bound.outputs["y"], X)
        assert session.placement.shares == {"CPU": 1.0}
        with pytest.raises(InputError):
            session.run({"x": X[:, :3]})
        for out in session.run_batch([{"x": X}] * 5):
            assert_linear(out["y"], X)
    with pytest.raises(ClosedError):
        session.run({"x": X})


def test_isolated_outputs_may_vary_with_the_data(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "where"), isolate=True) as session:
        for bits in ("101", "000", "111", "11010", "1", "101"):
            x = np.array([bit == "1" for bit in bits])
            np.testing.assert_array_equal(session.run({"x": x})["y"], np.argwhere(x))


def test_isolated_errors_are_the_engines(engine: str, small_model: Models, tmp_path: Path) -> None:
    model = small_model(engine, "linear")
    path = tmp_path / model.name
    path.write_bytes(model.read_bytes()[:40])
    for beside in (".bin", ".json"):
        if model.with_suffix(beside).exists():
            path.with_suffix(beside).write_bytes(model.with_suffix(beside).read_bytes())
    with pytest.raises((ModelError, EngineCrashed)):  # tflite_runtime dies of it
        load(path, isolate=True)


def _child_of(session: Session) -> Any:
    return session._loaded._child._process  # type: ignore[union-attr]


def test_a_crash_is_an_error_and_the_session_goes_on(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "linear"), isolate=True) as session:
        assert_linear(session.run({"x": X})["y"], X)
        _child_of(session).kill()
        with pytest.raises(EngineCrashed, match="died of SIGKILL; the model was loaded"):
            session.run({"x": X})
        assert_linear(session.run({"x": X})["y"], X)


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_hang_is_an_error(small_model: Models) -> None:
    import signal

    with load(small_model("onnxruntime", "linear"), isolate=True, timeout_s=2) as session:
        session.run({"x": X})
        _child_of(session).send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(EngineCrashed, match="did not answer within 2 s and was stopped"):
            session.run({"x": X})
        assert time.monotonic() - start < 20
        assert_linear(session.run({"x": X})["y"], X)


@pytest.mark.needs("onnxruntime", "onnx")
def test_the_next_variant_takes_over(small_model: Models, tmp_path: Path) -> None:
    model = small_model("onnxruntime", "linear")
    path = bundled(tmp_path, "onnxruntime", model, variants=[{}, {}])
    with load(path, isolate=True) as session:
        stale = session.submit({"x": X}).result(timeout=30)
        assert_linear(stale["y"], X)
        _child_of(session).kill()
        with (
            pytest.warns(FallbackWarning, match="runs variant 'v1'; not v0: the engine's process"),
            pytest.raises(EngineCrashed, match="variant 'v1' was loaded"),
        ):
            session.run({"x": X})
        assert session.variant is not None
        assert session.variant.id == "v1"
        assert len(session.fallbacks) == 1
        assert_linear(session.run({"x": X})["y"], X)
        assert_linear(session.submit({"x": X}).result(timeout=30)["y"], X)


@pytest.mark.needs("onnxruntime", "onnx")
def test_it_does_not_go_on_for_ever(small_model: Models) -> None:
    with load(small_model("onnxruntime", "linear"), isolate=True) as session:
        for _ in range(3):
            _child_of(session).kill()
            with pytest.raises(EngineCrashed, match="was loaded"):
                session.run({"x": X})
        _child_of(session).kill()
        with pytest.raises(EngineCrashed, match="nothing takes over: it has died 4 times"):
            session.run({"x": X})
        with pytest.raises(ClosedError, match="nothing takes over"):
            session.run({"x": X})


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_child_ends_with_its_parent(small_model: Models) -> None:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads may run here
        child = os.fork()
    if child == 0:  # dies without closing anything
        with contextlib.suppress(BaseException):
            session = load(small_model("onnxruntime", "linear"), isolate=True)
            os.write(writer, str(_child_of(session).pid).encode())
        os._exit(0)
    os.waitpid(child, 0)
    grandchild = int(os.read(reader, 20))
    deadline = time.monotonic() + 10
    while Path(f"/proc/{grandchild}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{grandchild}").exists()


@pytest.mark.needs("onnxruntime", "onnx")
def test_isolation_leaves_nothing_behind(small_model: Models) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    before = descriptors()
    for _ in range(3):
        with load(small_model("onnxruntime", "linear"), isolate=True) as session:
            session.run({"x": X})
            process = _child_of(session)
        assert process.poll() is not None
    gc.collect()
    assert descriptors() <= before


# --- forks ----------------------------------------------------------------------------------------


def test_a_forked_session_refuses(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "linear"), threads=2) as session:
        session.run({"x": X})
        bound = session.bind({"x": (2, 4)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                for call in (lambda: session.run({"x": X}), bound, session.bind):
                    with pytest.raises(ClosedError, match="before this process was forked"):
                        call()
                session.close()
                code = 0
            finally:
                os._exit(code)
        deadline = time.monotonic() + 30
        status = None
        while status is None and time.monotonic() < deadline:
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            time.sleep(0.01)
        assert status == 0
        assert_linear(session.run({"x": X})["y"], X)


# --- which variant, and why -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "kind", "says"),
    [
        ({"machines": ("riscv64",)}, WrongDeviceError, "is for riscv64, this is"),
        ({"memory_bytes": 1 << 50}, LowMemoryError, "MB are free"),
        ({"engine": "nope"}, EngineMissingError, "no engine 'nope'"),
        ({"placement": {"NPU": 1.0}, "on_misplacement": "next"}, LimitError, "on NPU"),
    ],
    ids=["machine", "memory", "engine", "placement"],
)
def test_what_does_not_run_here_is_passed_over_aloud(
    engine: str, small_model: Models, tmp_path: Path, first: dict[str, Any],
    kind: type[Exception], says: str,
) -> None:  # fmt: skip
    model = small_model(engine, "linear")
    alone = bundled(tmp_path, engine, model, variants=[first])
    with pytest.raises(kind, match=says):
        load(alone)
    both = bundled(tmp_path, engine, model, variants=[first, {}], name="both")
    with pytest.warns(FallbackWarning, match=says), load(both) as session:
        assert session.variant is not None
        assert session.variant.id == "v1"
        assert says in session.fallbacks[0]
        assert_linear(session.run({"x": X})["y"], X)
    with pytest.raises(kind, match=says):
        load(both, variant="v0")  # asked for by name: nothing else will do
    none = bundled(tmp_path, engine, model, variants=[first, first], name="none")
    with pytest.raises(kind, match="no variant runs here: v0: .*; v1: "):
        load(none)


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_contract_may_warn_or_refuse(small_model: Models, tmp_path: Path) -> None:
    model = small_model("onnxruntime", "linear")
    wrong = {"placement": {"NPU": 0.5}}
    warns = bundled(tmp_path, "onnxruntime", model, variants=[{**wrong, "on_misplacement": "warn"}])
    with (
        pytest.warns(
            FallbackWarning,
            match="0 % of its operators are on NPU, wanted 50 %.*as the bundle allows",
        ),
        load(warns) as session,
    ):
        assert_linear(session.run({"x": X})["y"], X)
    refuses = bundled(tmp_path, "onnxruntime", model, variants=[wrong, {}], name="refuses")
    with pytest.raises(LimitError, match="nothing falls back in silence"):
        load(refuses)


@pytest.mark.needs("onnxruntime", "onnx")
def test_hashing_may_be_left_out(small_model: Models, tmp_path: Path) -> None:
    path = bundled(tmp_path, "onnxruntime", small_model("onnxruntime", "linear"))
    data = path.read_bytes()
    path.write_bytes(data.replace(WEIGHTS.tobytes(), (2 * WEIGHTS).tobytes()))
    with pytest.raises(BundleError, match="damaged"):
        load(path)
    with load(path, verify=False) as session:
        np.testing.assert_allclose(session.run({"x": X})["y"], X @ (2 * WEIGHTS) + BIAS, rtol=1e-5)


# --- installed bundles ----------------------------------------------------------------------------


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_session_moves_to_what_was_activated(small_model: Models, tmp_path: Path) -> None:
    model = small_model("onnxruntime", "linear")
    old = bundled(tmp_path, "onnxruntime", model, bundle_id="a" * 32, sequence=1)
    new = bundled(tmp_path, "onnxruntime", model, bundle_id="b" * 32, sequence=2, name="new")
    other = bundled(
        tmp_path, "onnxruntime", small_model("onnxruntime", "linear"), name="other",
        bundle_id="c" * 32, sequence=3, inputs=(bundles.TensorSpec("x", "float32", (1, 4)),),
    )  # fmt: skip
    root = tmp_path / "root"
    with pytest.raises(BundleError, match="nothing is installed under 'eye'.*there is: nothing"):
        open_installed("eye", root=root)
    first = install(old, "eye", root=root)
    with open_installed("eye", root=root) as session:
        assert session.refresh() is False
        bound, stream_of = session.bind({"x": (2, 4)}), session.manifest
        install(new, "eye", root=root)
        assert session.manifest is stream_of
        assert session.refresh() is True
        assert session.manifest is not None
        assert session.manifest.bundle_id == "b" * 32
        assert_linear(session.run({"x": X})["y"], X)
        assert_linear(session.submit({"x": X}).result(timeout=30)["y"], X)
        with pytest.raises(ClosedError):
            bound()
        with pytest.raises(UsageError, match="has other inputs or outputs than the version"):
            install(other, "eye", root=str(root))
        activate(install(other, "eye", root=root, activate_it=False), "eye", root=root)
        with pytest.raises(ModelError, match="other inputs or outputs"):
            session.refresh()
        assert_linear(session.run({"x": X})["y"], X)
        activate(first, "eye", root=root)  # back again
        assert session.refresh() is True
        assert session.manifest.bundle_id == "a" * 32
    with pytest.raises(BundleError, match="there is: eye"):
        open_installed("ear", root=root)
    with load(old) as plain, pytest.raises(UsageError, match="only sessions of open_installed"):
        plain.refresh()


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_damaged_bundle_is_never_activated(small_model: Models, tmp_path: Path) -> None:
    good = bundled(tmp_path, "onnxruntime", small_model("onnxruntime", "linear"))
    bad = tmp_path / "bad.edgekit"
    bad.write_bytes(good.read_bytes()[:-9])
    root = tmp_path / "root"
    with pytest.raises(BundleError):
        install(bad, "eye", root=root)
    assert list((root / "eye").rglob("*.edgekit")) == []
    install(good, "eye", root=root)
    with pytest.raises(BundleError):
        install(bad, "eye", root=root)
    open_installed("eye", root=root).close()
    assert [p.name for p in (root / "eye" / "versions").iterdir()] == [f"1-{'0' * 32}.edgekit"]
    for name in ("../eye", "", "a/b", ".hidden", "x" * 65):
        with pytest.raises(UsageError, match="no name for an installed bundle"):
            install(good, name, root=root)
    (root / "eye" / "active.json").write_text('{"schema": "edgekit.active/1", "file": "../../x"}')
    with pytest.raises(BundleError, match="is damaged"):
        open_installed("eye", root=root)


# --- what an adversary found ----------------------------------------------------------------------


@pytest.mark.needs("onnxruntime", "openvino", "onnx")
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_input_may_be_an_output_too(engine: str, tmp_path: Path) -> None:
    model = onnx_model(
        [("Add", ["x", "x"], ["y"], {})],
        {"x": ("float32", ("N", 2))},
        {"y": ("float32", ("N", 2)), "x": ("float32", ("N", 2))},
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    x = noise(3, 2)
    with load(path, engine=engine) as session:
        for _ in range(3):
            out = session.run({"x": x})
            np.testing.assert_array_equal(out["y"], 2 * x)
            np.testing.assert_array_equal(out["x"], x)
            out["x"][...] = 0
        bound = session.bind({"x": (3, 2)})
        bound.inputs["x"][...] = x
        bound()
        np.testing.assert_array_equal(bound.outputs["x"], x)


def test_bound_outputs_follow_their_shape(engine: str, small_model: Models) -> None:
    with load(small_model(engine, "where")) as session:
        bound = session.bind({"x": (5,)})
        held = []
        for bits in ("10101", "11111", "10000", "01110"):
            x = np.array([bit == "1" for bit in bits])
            bound.inputs["x"][...] = x
            bound()
            np.testing.assert_array_equal(bound.outputs["y"], np.argwhere(x))
            held.append((bound.outputs["y"], np.argwhere(x)))
        if engine != "onnxruntime":  # its first output is a buffer that is written again
            for array, wanted in held:
                np.testing.assert_array_equal(array, wanted)


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize("isolate", [False, True])
def test_states_may_feed_each_other(tmp_path: Path, isolate: bool) -> None:
    """A delay line: what was the input becomes the first state, the first the second."""
    model = onnx_model(
        [("Identity", ["x"], ["a"], {}), ("Identity", ["s"], ["b"], {}),
         ("Identity", ["t"], ["y"], {})],
        dict.fromkeys(("x", "s", "t"), ("float32", (1,))),
        dict.fromkeys(("a", "b", "y"), ("float32", (1,))),
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with load(path, isolate=isolate) as session:
        stream = session.stream({"s": "a", "t": "b"})
        found = [float(stream.run({"x": np.float32([i])})["y"][0]) for i in range(1, 7)]
        assert found == [0, 0, 1, 2, 3, 4]


@pytest.mark.needs("litert", "tensorflow")
@pytest.mark.filterwarnings("ignore")
def test_a_computed_shape_is_not_taken_for_a_fixed_one(tmp_path: Path) -> None:
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
    def call(x: Any) -> Any:
        return {"y": tf.reshape(x, [tf.shape(x)[0] * 2, 2])}

    module = tf.Module()
    module.call = call
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [call.get_concrete_function()], module
    )
    path = tmp_path / "m.tflite"
    path.write_bytes(converter.convert())
    with load(path) as session:
        for size in (2, 1, 3):
            x = noise(size, 4)
            np.testing.assert_array_equal(session.run({"x": x})["y"], x.reshape(-1, 2))


@pytest.mark.needs("onnxruntime", "onnx")
def test_an_interrupted_call_does_not_shift_the_answers(
    small_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit_runtime import isolate

    with load(small_model("onnxruntime", "linear"), isolate=True) as session:
        session.run({"x": X})
        real = isolate._Child._read

        def interrupted(*_: Any) -> bytes:
            monkeypatch.setattr(isolate._Child, "_read", real)
            raise KeyboardInterrupt

        monkeypatch.setattr(isolate._Child, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.run({"x": X + 1})
        with pytest.raises(EngineCrashed):
            session.run({"x": X + 2})
        assert_linear(session.run({"x": X})["y"], X)


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize(
    "call",
    [lambda s: s.bind(), lambda s: s.warm_up(), lambda s: s.placement, lambda s: s.run({"x": X})],
    ids=["bind", "warm_up", "placement", "run"],
)
def test_every_call_survives_a_crash(small_model: Models, call: Any) -> None:
    with load(small_model("onnxruntime", "linear"), isolate=True) as session:
        bound = session.bind()
        _child_of(session).kill()
        _child_of(session).wait()
        with pytest.raises(EngineCrashed, match="was loaded for the calls that follow"):
            call(session)
        call(session)
        assert_linear(session.run({"x": X})["y"], X)
        with pytest.raises(ClosedError):
            bound()
        _child_of(session).kill()
    # and closing a session whose process is dead is no error


@pytest.mark.needs("onnxruntime", "onnx")
def test_warnings_made_errors_leave_a_clear_state(small_model: Models, tmp_path: Path) -> None:
    model = small_model("onnxruntime", "linear")
    path = bundled(tmp_path, "onnxruntime", model, variants=[{}, {}])
    with load(path, isolate=True) as session:
        _child_of(session).kill()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(EngineCrashed, match="nothing takes over"):
                session.run({"x": X})
        with pytest.raises(ClosedError, match="nothing takes over"):
            session.run({"x": X})


@pytest.mark.needs("onnxruntime", "onnx")
def test_the_working_folder_is_not_searched_for_modules(
    small_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("onnxruntime", "linear")
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    with load(model, isolate=True) as session:
        assert_linear(session.run({"x": X})["y"], X)


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_dropped_bound_gives_its_memory_back(small_model: Models) -> None:
    with load(small_model("onnxruntime", "linear"), isolate=True) as session:
        child: Any = session._loaded._child  # type: ignore[union-attr]
        for _ in range(30):
            session.bind({"x": (50_000, 4)})
        gc.collect()
        session.bind()
        assert os.fstat(child.memory).st_size < 10 * 50_000 * 7 * 4


@pytest.mark.needs("onnxruntime", "onnx")
def test_closing_frees_the_model(small_model: Models) -> None:
    import weakref

    session = load(small_model("onnxruntime", "linear"))
    session.run({"x": X})
    loaded = weakref.ref(session._loaded)
    session.close()
    assert loaded() is None
    again = load(small_model("onnxruntime", "linear"))
    gone = weakref.ref(again)
    again.run({"x": X})
    del again  # without the garbage collector's help
    assert gone() is None


@pytest.mark.needs("onnxruntime", "onnx")
def test_refreshing_beside_submitted_calls(small_model: Models, tmp_path: Path) -> None:
    model = small_model("onnxruntime", "linear")
    root = tmp_path / "root"
    paths = [
        install(
            bundled(tmp_path, "onnxruntime", model, bundle_id=letter * 32, sequence=number),
            "eye", root=root,
        )
        for number, letter in enumerate("ab")
    ]  # fmt: skip
    stop = threading.Event()
    with open_installed("eye", root=root, intent="throughput", threads=1) as session:

        def work(number: int) -> None:
            if number == 0:
                for turn in range(40):
                    activate(paths[turn % 2], "eye", root=root)
                    session.refresh()
                stop.set()
            while not stop.is_set():
                assert_linear(session.submit({"x": X}).result(timeout=60)["y"], X)
                assert_linear(session.run({"x": X})["y"], X)

        in_threads(4, work)


@pytest.mark.needs("onnxruntime", "onnx")
def test_installing_mends_what_is_damaged(small_model: Models, tmp_path: Path) -> None:
    model = small_model("onnxruntime", "linear")
    good = bundled(tmp_path, "onnxruntime", model)
    root = tmp_path / "root"
    path = install(good, "eye", root=root)
    assert path.stat().st_mode & 0o777 == 0o644
    path.write_bytes(b"")
    install(good, "eye", root=root)
    open_installed("eye", root=root).close()
    (root / "eye" / "active.json").write_text("{")
    install(good, "eye", root=root)
    open_installed("eye", root=root).close()
    other_data = bundled(
        tmp_path, "onnxruntime", model, name="recalibrated", sequence=2, bundle_id="d" * 32,
        inputs=(bundles.TensorSpec("x", "float32", ("M", 4), range=(0.0, 9.0), example=(2, 4)),),
    )  # fmt: skip
    install(other_data, "eye", root=root)  # the same interface: ranges come from data
    with pytest.raises(UsageError, match=r"sequence 1.* is older than the version active"):
        install(good, "eye", root=root)


@pytest.mark.needs("onnxruntime", "onnx")
def test_a_class_number_may_stay_the_same(tmp_path: Path) -> None:
    model = onnx_model(
        [
            ("Mul", ["x", "z"], ["t"], {}),
            ("ArgMax", ["t"], ["y"], {"axis": 0, "keepdims": 0}),
        ],
        {"x": ("float32", (3,))}, {"y": ("int64", ())}, {"z": np.zeros(3, np.float32)},
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with load(path, guard="raise") as session:
        for seed in range(8):
            session.run({"x": noise(3, seed=seed)})


# --- leaks ----------------------------------------------------------------------------------------


def _resources() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))


def test_loading_and_closing_leaves_no_thread_or_file(engine: str, small_model: Models) -> None:
    path = small_model(engine, "linear")

    def once() -> None:
        with load(path, threads=2) as session:
            session.run({"x": X})
            session.submit({"x": X}).result(timeout=30)

    for _ in range(3):
        once()
    gc.collect()
    before = _resources()
    for _ in range(20):
        once()
    gc.collect()
    after = _resources()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 1  # an engine may keep one more thread of its pool


def test_measured_calls_are_kept_as_a_file(session: Session, tmp_path: Path) -> None:
    from edgekit.measure.record import read_record

    with session.measure() as measured:
        for _ in range(40):
            session.run({"x": X})
    measured.save(tmp_path / "calls.json")
    record = read_record(tmp_path / "calls.json")
    assert record.samples_ns == [sum(one) for one in measured.samples]
    assert record.document["placement"]["shares"] == session.placement.shares
    assert record.document["engine_version"] == session.engine_version
    assert [one.name for one in tmp_path.iterdir()] == ["calls.json"]
    with pytest.raises(OSError, match="No such file"):
        measured.save(tmp_path / "missing" / "calls.json")
