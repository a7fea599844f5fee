"""What is least for a device that runs firmware."""

from types import SimpleNamespace

import pytest

from edgekit.errors import UsageError
from edgekit.microcontroller import FirmwareRun
from edgekit.preparation import _firmware_with
from edgekit.profiles import load_profile


def run_for(minimize: str = "latency", **accelerators: str) -> FirmwareRun:
    made = FirmwareRun.__new__(FirmwareRun)
    made.request = SimpleNamespace(minimize=minimize)
    named = {
        name: SimpleNamespace(engine="ethos-u", compiler_target=target)
        for name, target in accelerators.items()
    }
    made.job = SimpleNamespace(profile=SimpleNamespace(accelerators=named))
    return made


def needs(memory: int, latency_ns: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(arena_bytes=memory // 2, flash_bytes=memory // 2, latency_ns=latency_ns)


@pytest.mark.parametrize("accelerators", [{}, {"npu": "ethos-u55-128"}])
def test_half_the_memory_is_half_the_price(accelerators) -> None:
    """Repairs ask whether a candidate is worth it by the ratio of prices."""
    run = run_for(**accelerators)
    assert run._price(needs(20_000)) == pytest.approx(0.5 * run._price(needs(40_000)))


def test_what_is_estimated_comes_first_unless_size_is_wanted() -> None:
    run = run_for(npu="ethos-u55-128")
    slow, small = needs(10_000_000, latency_ns=10 * 60 * 10**9), needs(1_000)
    assert run._price(slow) < run._price(small)
    run = run_for("size", npu="ethos-u55-128")
    assert run._price(slow) > run._price(small)


def test_an_ethos_u_is_asked_for_by_name() -> None:
    board = load_profile("alif-ensemble-e7")
    assert list(_firmware_with(board, "ethos-u55-he").accelerators) == ["ethos-u55-he"]
    alone = _firmware_with(board, "none")
    assert not alone.accelerators and list(alone.engines) == ["tflm"]
    assert _firmware_with(board, None) is board
    with pytest.raises(UsageError, match="no accelerator 'htp'; it has ethos-u55-hp, ethos-u55-he"):
        _firmware_with(board, "htp")
