"""The soak and the phases, on devices that are simulated: clock, frequency, meter."""

from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import ChildError
from edgekit.measure import conditions as module
from edgekit.measure.conditions import Moment, moment, unfit, wait_until_fit
from edgekit.measure.energy import Meter, hwmon, idle_watts, per_inference, rapl
from edgekit.measure.soak import soak


class Device:
    """A device with a clock of its own, whose frequency halves at `throttles_s`."""

    def __init__(self, throttles_s: float, *, dies_s: float = 1e9, noise: float = 0.05) -> None:
        self.now = 0.0
        self._throttles_s, self._dies_s, self._noise = throttles_s, dies_s, noise
        self._rng = np.random.default_rng(1)

    @property
    def frequency_khz(self) -> int:
        return 750_000 if self.now >= self._throttles_s else 1_500_000

    def take(self, window_s: float) -> list[int]:
        if self.now >= self._dies_s:
            raise ChildError("m: the engine's process ended, -9")
        end, samples = self.now + window_s, []
        while self.now < end:
            usual = 30e-3 * 1_500_000 / self.frequency_khz
            ns = int(1e9 * usual * self._rng.lognormal(0, self._noise))
            samples.append(ns)
            self.now += ns / 1e9
        return samples

    def look(self) -> Moment:
        return Moment("", None, self.frequency_khz, None, {}, [], 1 << 30, None, None)


def test_throttling_after_a_minute_is_found_at_a_minute() -> None:
    device = Device(60.0)
    found = soak(device.take, 300, clock=lambda: device.now, look=device.look).to_json()
    assert found["onset_s"] == pytest.approx(60, abs=2)
    assert found["slowdown"] == pytest.approx(2, rel=0.05)
    assert found["first_ns"] == pytest.approx(30e6, rel=0.03)
    assert found["last_ns"] == pytest.approx(60e6, rel=0.03)
    assert {found["frequency_khz"][0], found["frequency_khz"][-1]} == {1_500_000, 750_000}


def test_a_device_that_keeps_its_pace_has_no_onset() -> None:
    device = Device(1e9)
    found = soak(device.take, 300, clock=lambda: device.now, look=device.look).to_json()
    assert found["onset_s"] is None
    assert found["slowdown"] == pytest.approx(1, abs=0.02)


def test_a_device_that_dies_leaves_what_it_measured() -> None:
    device = Device(60.0, dies_s=100.0)
    found = soak(device.take, 300, clock=lambda: device.now, look=device.look).to_json()
    assert "process ended" in found["failure"]
    assert found["at_s"][-1] == pytest.approx(100, abs=2)
    assert found["onset_s"] == pytest.approx(60, abs=2)
    gone = Device(60.0, dies_s=0.0)
    nothing = soak(gone.take, 300, clock=lambda: gone.now, look=gone.look).to_json()
    assert (nothing["at_s"], nothing["onset_s"]) == ([], None)


# --- energy ---------------------------------------------------------------------------------------


def test_joules_above_idle() -> None:
    """A meter of 2 W idle and 5 W busy: 10 s busy with 100 runs are 0.3 J each."""
    now, joules = [0.0], [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        joules[0] += 2 * seconds

    meter = Meter("simulated", lambda: joules[0])
    idle = idle_watts(meter, clock=lambda: now[0], sleep=sleep)
    found = per_inference(meter, idle_w=idle, joules=50.0, seconds=10.0, runs=100)
    assert idle == pytest.approx(2)
    assert found["joules_per_inference"] == pytest.approx(0.3)
    quiet = per_inference(meter, idle_w=9.0, joules=50.0, seconds=10.0, runs=100)
    assert quiet["joules_per_inference"] == 0


def test_rapl_sums_packages_and_undoes_the_wrap(tmp_path: Path) -> None:
    for number, used in ((0, 900_000), (1, 500_000)):
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{used}\n")
        (folder / "max_energy_range_uj").write_text("1000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of a package: counted there
    meter = rapl(tmp_path)
    assert isinstance(meter, Meter)
    assert meter.joules() == pytest.approx(1.4)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000\n")
    assert meter.joules() == pytest.approx(1.6)


def test_hwmon_sums_a_monitors_counters(tmp_path: Path) -> None:
    for number, files in ((0, {}), (1, {"energy1_input": "2000000", "energy2_input": "500000"})):
        folder = tmp_path / f"hwmon{number}"
        folder.mkdir()
        for name, text in {"name": "amd_energy", **files}.items():
            (folder / name).write_text(text)
    meter = hwmon(tmp_path)
    assert isinstance(meter, Meter)
    assert (meter.name, meter.joules()) == ("hwmon:amd_energy", 2.5)


def test_without_a_meter_there_is_a_reason(tmp_path: Path) -> None:
    assert "no /sys/class/powercap" in str(rapl(tmp_path))
    assert "counts energy" in str(hwmon(tmp_path))


# --- the host -------------------------------------------------------------------------------------


def _moment(**changes: object) -> Moment:
    usual: dict[str, object] = {
        "at": "", "busy": 0.05, "frequency_khz": None, "temperature_mc": None, "cooling": {},
        "throttled": [], "memory_free_bytes": 1 << 30, "memory_pressure": 0.0, "battery": None,
    }  # fmt: skip
    return Moment(**{**usual, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"busy": 0.9}, "others use 90 %"),
        ({"throttled": ["under-voltage"]}, "firmware says: under-voltage"),
        ({"cooling": {"cpufreq-cpu0": 3}}, "slowing down (cpufreq-cpu0 at step 3"),
        ({"memory_pressure": 30.0}, "wait for memory 30 %"),
        ({"battery": {"percent": 9, "discharging": True}}, "battery is at 9 %"),
    ],
)
def test_an_unfit_host_is_told_why(changes: dict[str, object], says: str) -> None:
    (reason,) = unfit(_moment(**changes))
    assert says in reason


def test_a_fit_host_has_nothing_against_it() -> None:
    assert unfit(_moment()) == []
    assert unfit(_moment(busy=None, battery={"percent": 9, "discharging": False})) == []


def test_waiting_ends_when_it_is_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.9, 0.8, 0.1])
    monkeypatch.setattr(module, "moment", lambda **_: _moment(busy=next(loads)))
    now, reasons = wait_until_fit(60)
    assert (now.busy, reasons) == (0.1, [])
    monkeypatch.setattr(module, "moment", lambda **_: _moment(busy=0.9))
    assert "others use" in wait_until_fit(0)[1][0]


def test_a_raspberry_pis_flags_and_a_cooled_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = tmp_path / "get_throttled"
    flags.write_text("50005\n")  # now: under-voltage and throttled; both have been before
    monkeypatch.setattr(module, "_RASPBERRY", flags)
    for name, kind, state in (("0", "cpufreq-cpu0", "2"), ("1", "pwm-fan", "4")):
        folder = tmp_path / f"cooling_device{name}"
        folder.mkdir()
        (folder / "type").write_text(kind)
        (folder / "cur_state").write_text(state)
    monkeypatch.setattr(module, "_THERMAL", tmp_path)
    now = moment()
    assert now.throttled == ["under-voltage", "throttled"]
    assert now.cooling == {"cpufreq-cpu0": 2}
    flags.write_text("no number")
    assert moment().throttled == []
