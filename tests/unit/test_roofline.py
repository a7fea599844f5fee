"""The roof: closed forms of the share, how sizes grow, and what of failures is kept."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.device import ComputeRoof, Roofline
from edgekit.errors import (
    ChildError,
    EdgeKitError,
    EngineError,
    EngineMissingError,
    TargetError,
    UsageError,
)
from edgekit.measure.probe_models import Kind, ProbeModel
from edgekit.measure.roofline import (
    FULL,
    QUICK,
    Effort,
    block_request,
    block_samples,
    measure_roofline,
    roof_share,
    run_local,
)
from edgekit_runtime.__main__ import main
from edgekit_runtime.bandwidth import largest_cache_bytes, memory_bandwidth

# --- roof_share -----------------------------------------------------------------------------------


def roofline(
    gemm: float = 100e9, depthwise: float | None = 20e9, memory: float | None = 10e9
) -> Roofline:
    rates: list[tuple[Kind, float | None]] = [("gemm", gemm), ("depthwise", depthwise)]
    return Roofline(
        memory_bytes_per_s=memory,
        threads=2,
        compute=[
            ComputeRoof(engine="ncnn", kind=kind, dtype="int8", threads=2, ops_per_s=rate)
            for kind, rate in rates
            if rate is not None
        ],
    )


def share(ops: list, latency_ns: float, roof: Roofline | None = None, **more: int) -> float:
    found = roof_share(ops, roof or roofline(), "ncnn", "int8", 2, latency_ns, **more)
    assert found is not None
    return found


def test_arithmetic_alone() -> None:
    # 2 * 5e8 operations at 100e9 a second: 10 ms at best
    assert share([(5 * 10**8, 0)], 20e6) == pytest.approx(0.5)
    assert share([(3 * 10**8, 0), (2 * 10**8, 0)], 10e6) == pytest.approx(1)
    assert share([], 10e6) == 0


def test_a_depthwise_operator_has_its_own_roof() -> None:
    ops = [(10**8, 0), (10**8, 0, "depthwise")]  # 2 ms and 10 ms
    assert share(ops, 24e6) == pytest.approx(0.5)


def test_memory_counts_where_it_takes_longer_than_arithmetic() -> None:
    ops = [(10**8, 10**6), (10**6, 10**8)]  # 2 ms (0.1 of traffic); 10 ms of traffic (0.02)
    assert share(ops, 12e6, cache_bytes=0) == pytest.approx(1)


def test_what_fits_the_cache_need_not_be_moved() -> None:
    ops = [(10**8, 10**6), (10**6, 10**8)]
    assert share(ops, 12e6, cache_bytes=5 * 10**7) == pytest.approx(7 / 12)  # 5 ms less
    assert share(ops, 12e6, cache_bytes=10**12) == pytest.approx(2.02 / 12)  # arithmetic remains


def test_unknown_caches_or_bandwidth_leave_arithmetic() -> None:
    ops = [(10**6, 10**8)]
    assert share(ops, 1e6) == pytest.approx(0.02)
    assert share(ops, 1e6, roofline(memory=None), cache_bytes=0) == pytest.approx(0.02)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_never_more_than_any_schedule_allows(seed: int) -> None:
    """Simulated runs: each operator takes the longer of arithmetic and of the bytes that are not
    in the cache, wherever those in the cache belong. The best of them is no better than the roof.
    """
    rng = np.random.default_rng(seed)
    ops = [(int(m), int(b)) for m, b in zip(rng.integers(0, 10**8, 8), rng.integers(0, 10**8, 8),
                                            strict=True)]  # fmt: skip
    cache = int(rng.integers(0, 3 * 10**8))
    for _ in range(50):
        left, seconds = cache, 0.0
        for index in rng.permutation(len(ops)):
            macs, size = ops[index]
            kept = min(size, left)
            left -= kept
            seconds += max(2 * macs / 100e9, (size - kept) / 10e9)
        assert share(ops, seconds * 1e9, cache_bytes=cache) <= 1 + 1e-9


@pytest.mark.parametrize(
    "asked", [("openvino", "int8", 2), ("ncnn", "float32", 2), ("ncnn", "int8", 1)]
)
def test_no_figure_no_share(asked: tuple) -> None:
    assert roof_share([(1, 1)], roofline(), *asked, 1e6) is None


def test_a_depthwise_operator_without_its_roof_is_no_guess() -> None:
    roof = roofline(depthwise=None)
    assert roof_share([(1, 1, "depthwise")], roof, "ncnn", "int8", 2, 1e6) is None
    assert roof_share([], Roofline(threads=1), "ncnn", "int8", 2, 1e6) is None


@pytest.mark.parametrize("latency_ns", [0, -1, float("nan")])
def test_a_latency_is_positive(latency_ns: float) -> None:
    with pytest.raises(UsageError, match="latency_ns"):
        roof_share([], roofline(), "ncnn", "int8", 2, latency_ns)


# --- measure_roofline, on devices of known speed --------------------------------------------------


def models_of(size: int) -> list[ProbeModel]:
    return [
        ProbeModel(engine, kind, dtype, size, Path(f"{engine}-{kind}-{dtype}-{size}"))
        for engine in ("ncnn", "litert")
        for kind in ("gemm", "depthwise")
        for dtype in ("float32", "int8")
    ]  # type: ignore[misc]


class Device:
    """Runs at a known rate, after a known overhead; counts what it is asked for."""

    def __init__(self, ops_per_s: float, *, overhead_ns: float = 5000) -> None:
        self.rate, self.overhead_ns = ops_per_s, overhead_ns
        self.asked: Counter[tuple[str, str, str, int, int]] = Counter()
        self.busy_s = 0.0

    def __call__(self, model: ProbeModel, threads: int) -> list[int]:
        self.asked[model.engine, model.kind, model.dtype, model.size, threads] += 1
        rate = self.rate * threads * (2 if model.dtype == "int8" else 1)
        ns = round(self.overhead_ns + model.ops / rate * 1e9)
        self.busy_s += max(0.02, 3 * ns / 1e9)
        return [ns] * 3

    def sizes(self) -> set[int]:
        return {size for _, _, _, size, _ in self.asked}


def rates(found: Roofline) -> dict[tuple[str, str, str, int], float]:
    return {(r.engine, r.kind, r.dtype, r.threads): r.ops_per_s for r in found.compute}


@pytest.mark.parametrize("effort", [FULL, QUICK])
@pytest.mark.parametrize("ops_per_s", [1e8, 1e9, 1e10, 1e11, 1e12])
def test_the_rate_is_found_whatever_it_is(ops_per_s: float, effort: Effort) -> None:
    device = Device(ops_per_s)
    found = measure_roofline(models_of, device, threads=(1, 2), effort=effort)
    assert found.failures == ()
    assert found.roofline.threads == 2
    assert found.roofline.memory_bytes_per_s is None
    assert len(found.roofline.compute) == 16
    for (_, _, dtype, threads), rate in rates(found.roofline).items():
        true = ops_per_s * threads * (2 if dtype == "int8" else 1)
        assert rate <= true * (1 + 1e-3)  # nanoseconds are whole
        assert rate > true * (0.98 if effort is FULL and ops_per_s < 1e12 else 0.7)


def test_a_slow_board_runs_the_smallest_only() -> None:
    device = Device(1e8)  # 5 ms and more: a PC under qemu
    measure_roofline(models_of, device, threads=(1,))
    assert device.sizes() == {64}
    assert device.busy_s < 5


def test_a_fast_pc_stops_when_runs_are_long_enough() -> None:
    device = Device(1e11)
    measure_roofline(models_of, device, threads=(1,))
    assert device.sizes() == {64, 192, 512, 1024}
    # float32 at 512 takes 2.7 ms, int8 1.4 ms
    assert device.asked["ncnn", "gemm", "float32", 1024, 1] == 0
    assert device.asked["ncnn", "gemm", "int8", 1024, 1] > 0


def effort(*sizes: int, rounds: int = 4, time_s: float = 60) -> Effort:
    return Effort(sizes, rounds, time_s, block_s=0.01)


def test_every_one_is_repeated_in_every_round() -> None:
    device = Device(1e8)
    found = measure_roofline(models_of, device, threads=(1, 2), effort=effort(64))
    assert set(device.asked.values()) == {5}
    assert found.unconfirmed == ()


def test_what_is_never_the_same_is_said_so() -> None:
    device = Device(1e8)

    def run(model: ProbeModel, threads: int) -> list[int]:
        factor = 1 if model.dtype == "int8" else device.asked.total() + 1  # slower every time
        return [ns * factor for ns in device(model, threads)]

    found = measure_roofline(models_of, run, threads=(1,), effort=effort(64))
    assert {roof.dtype for roof in found.unconfirmed} == {"float32"}
    assert set(found.unconfirmed) <= set(found.roofline.compute)


def test_no_round_begins_when_time_is_up() -> None:
    device = Device(1e8)
    found = measure_roofline(models_of, device, threads=(1,), effort=effort(64, time_s=0))
    assert set(device.asked.values()) == {1}
    assert len(found.unconfirmed) == len(found.roofline.compute) == 8


def test_the_best_block_counts_and_not_the_biggest_model() -> None:
    """Caches: small models are fast, big ones are not; and a disturbed block changes nothing."""
    taken: list[int] = []

    def run(model: ProbeModel, threads: int) -> list[int]:
        taken.append(model.size)
        rate = {64: 10e9, 192: 50e9}.get(model.size, 20e9)
        disturbed = 3 if len(taken) in (3, 4) else 1
        return [round(disturbed * model.ops / rate * 1e9)] * 3

    found = measure_roofline(
        lambda n: models_of(n)[:1], run, threads=(1,), effort=effort(64, 192, 512)
    )
    assert list(rates(found.roofline).values()) == [pytest.approx(50e9, rel=1e-3)]
    # the fastest; the biggest, too, while nothing confirms the fastest
    assert taken == [64, 192, 512, 192, 512, 192, 192]
    assert found.unconfirmed == ()


def test_a_disturbed_big_model_gets_another_chance() -> None:
    taken: list[int] = []

    def run(model: ProbeModel, threads: int) -> list[int]:
        taken.append(model.size)
        rate = {64: 10e9, 192: 11e9 if len(taken) < 4 else 5e9}.get(model.size, 20e9)
        return [round((3 if len(taken) == 3 else 1) * model.ops / rate * 1e9)]

    found = measure_roofline(
        lambda n: models_of(n)[:1], run, threads=(1,), effort=effort(64, 192, 512)
    )
    assert list(rates(found.roofline).values()) == [pytest.approx(20e9, rel=1e-3)]


def test_threads_that_wait_for_each_other_do_not_end_the_growth() -> None:
    """Most runs of a small model take a time slice on a busy machine, some do not."""

    def run(model: ProbeModel, threads: int) -> list[int]:
        true = round(model.ops / 50e9 * 1e9)
        return [true, true + 10**7, true + 10**7] if model.size == 64 else [true] * 3

    found = measure_roofline(lambda n: models_of(n)[:1], run, threads=(2,))
    (rate,) = rates(found.roofline).values()
    assert rate == pytest.approx(50e9, rel=1e-3)


def test_nor_when_they_always_do() -> None:
    """OpenMP's threads spin for one another where others have the processors."""

    def run(model: ProbeModel, threads: int) -> list[int]:
        true = round(model.ops / 50e9 * 1e9)
        return [true] if threads == 1 else [true // 2 + 10**7]

    found = measure_roofline(lambda n: models_of(n)[:1], run, threads=(2, 1))
    assert max(rates(found.roofline).values()) == pytest.approx(50e9, rel=1e-3)
    assert min(rates(found.roofline).values()) > 20e9  # 0.05e9 at the smallest size


def failing(error: EdgeKitError) -> Callable[[ProbeModel, int], list[int]]:
    device = Device(1e8)

    def run(model: ProbeModel, threads: int) -> list[int]:
        samples = device(model, threads)
        if (model.engine, model.dtype) == ("ncnn", "int8"):
            raise error
        return samples

    run.device = device  # type: ignore[attr-defined]
    return run


def test_what_fails_is_left_out_with_its_reason_and_not_tried_again() -> None:
    run = failing(EngineError("no such kernel"))
    found = measure_roofline(models_of, run, threads=(1, 2))
    left = {(engine, dtype) for engine, _, dtype, _ in rates(found.roofline)}
    assert left == {("ncnn", "float32"), ("litert", "float32"), ("litert", "int8")}
    assert {(f.kind, f.dtype, f.reason) for f in found.failures} == {
        (kind, "int8", "no such kernel") for kind in ("gemm", "depthwise")
    }
    tried = Counter(key[:3] for key in run.device.asked.elements())  # type: ignore[attr-defined]
    assert tried["ncnn", "gemm", "int8"] == 1


def test_what_fails_when_bigger_keeps_what_it_reached() -> None:
    def run(model: ProbeModel, threads: int) -> list[int]:
        if model.size > 64:
            raise ChildError("no memory")
        return [model.ops]  # 1e9 a second, under 2 ms

    found = measure_roofline(lambda n: models_of(n)[:1], run, threads=(1,))
    assert list(rates(found.roofline).values()) == [pytest.approx(1e9)]
    assert [(f.size, f.reason) for f in found.failures] == [(192, "no memory")]


def test_a_device_that_is_gone_ends_it() -> None:
    with pytest.raises(TargetError, match="gone"):
        measure_roofline(models_of, failing(TargetError("gone")), threads=(1,))


@pytest.mark.parametrize("threads", [(), (0,), (2, -1)])
def test_threads_are_at_least_one(threads: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="threads"):
        measure_roofline(models_of, Device(1e9), threads=threads)


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    measure_roofline(
        models_of,
        Device(1e9),
        threads=(1,),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {10}
    assert seen[-1] == (10, 10)


# --- requests and answers -------------------------------------------------------------------------

MODEL = ProbeModel("openvino", "gemm", "float16", 64, Path("/here/m.onnx"), "float16")


def test_a_request_says_all_the_runtime_needs() -> None:
    assert json.loads(block_request(MODEL, 3, path="there/m.onnx", block_s=0.5)) == {
        "model": "there/m.onnx", "engine": "openvino", "threads": 3, "precision": "float16",
        "block_ns": 500_000_000,
    }  # fmt: skip
    assert json.loads(block_request(MODEL, 1))["model"] == "/here/m.onnx"


def test_answers_are_samples_or_errors() -> None:
    assert block_samples(MODEL, '{"samples": [5, 6], "precision": "float16"}') == [5, 6]
    with pytest.raises(EngineError, match="computes in float32 on this device; float16 was asked"):
        block_samples(MODEL, b'{"samples": [5, 6], "precision": "float32"}')
    with pytest.raises(EngineMissingError, match="pip"):
        block_samples(MODEL, '{"error": "pip install", "kind": "EngineMissingError"}')
    for nonsense in ("", "{", "[]", "{}", '{"samples": 3, "precision": "float16"}'):
        with pytest.raises(ChildError, match="no answer to read"):
            block_samples(MODEL, nonsense)


def test_a_dead_child_is_one_failure_and_the_next_block_has_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that dies of the first model and answers the second."""
    package = tmp_path / "edgekit_runtime"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    name = json.loads(line)['model']\n"
        "    if name == 'crash': print('illegal instruction', file=sys.stderr); os._exit(132)\n"
        "    if name == 'hang': time.sleep(60)\n"
        "    print(json.dumps({'samples': [os.getpid()], 'precision': 'float32'}), flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    named = {name: ProbeModel("ncnn", "gemm", "int8", 64, Path(name)) for name in
             ("good", "crash", "hang")}  # fmt: skip
    with run_local(timeout_s=2) as run:
        first = run(named["good"], 1)
        assert run(named["good"], 1) == first
        with pytest.raises(ChildError, match=r"ended, 132 \(illegal instruction\)"):
            run(named["crash"], 1)
        second = run(named["good"], 1)
        assert second != first
        with pytest.raises(ChildError, match="no answer within 2 s"):
            run(named["hang"], 1)
        last = run(named["good"], 1)
    with pytest.raises(ProcessLookupError):
        os.kill(last[0], 0)


@pytest.mark.needs("ncnn")
def test_a_missing_file_is_that_models_failure(tmp_path: Path) -> None:
    with run_local() as run:
        gone = ProbeModel("ncnn", "gemm", "int8", 64, tmp_path / "gone.param")
        with pytest.raises(UsageError, match=r"gone\.param"):
            run(gone, 1)


# --- memory ---------------------------------------------------------------------------------------


def test_bandwidth_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bandwidth", "--threads", "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["schema"] == "edgekit.bandwidth/1"
    assert found["label"] == "measured"
    assert 1e8 < found["bytes_per_s"] < 1e13
    assert found["threads"] in (1, 2)
    assert main(["bandwidth", "--threads", "0"]) == 2


@pytest.mark.parametrize(
    ("free", "cache", "buffer"),
    [
        (1 << 40, None, 32 << 20), (1 << 40, 1 << 20, 32 << 20), (1 << 40, 16 << 20, 64 << 20),
        (64 << 20, 16 << 20, 8 << 20), (None, None, 32 << 20),
    ],
)  # fmt: skip
def test_the_buffer_fits_device_and_cache(
    monkeypatch: pytest.MonkeyPatch, free: int | None, cache: int | None, buffer: int
) -> None:
    module = sys.modules["edgekit_runtime.bandwidth"]
    monkeypatch.setattr(module, "free_memory_bytes", lambda: free)
    monkeypatch.setattr(module, "largest_cache_bytes", lambda: cache)
    monkeypatch.setattr(module, "_ENOUGH_NS", 0)
    assert memory_bandwidth()["buffer_bytes"] == buffer


def test_caches_are_counted_once(tmp_path: Path) -> None:
    """Four processors in two clusters, each with a level 2 of 512 K; as on a Cortex-A72 board."""
    for cpu in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [
                (1, "Data", "32K", str(cpu)), (1, "Instruction", "48K", str(cpu)),
                (2, "Unified", "512K", "0-1" if cpu < 2 else "2-3"),
            ]
        ):  # fmt: skip
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("type", kind), ("size", size),
                                ("shared_cpu_list", shared)):  # fmt: skip
                (folder / name).write_text(f"{value}\n")
    assert largest_cache_bytes(str(tmp_path)) == 1 << 20
    assert largest_cache_bytes(str(tmp_path / "nothing")) is None
