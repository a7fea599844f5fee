"""What machines say of themselves: recorded from real ones, odd ones, and this one."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from edgekit.device import DeviceProfile
from edgekit.errors import TargetError
from edgekit.facts import facts_script, profile_of, read_facts
from edgekit.profiles import profile_faults, profile_toml

RECORDED = Path(__file__).parents[1] / "recorded"


def profile(text: str) -> DeviceProfile:
    tables = profile_of(read_facts(text), profile_id="it", name="It", kind="board")
    return DeviceProfile.model_validate(tables)


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


@pytest.mark.parametrize("file", sorted(RECORDED.glob("*.txt")), ids=lambda file: file.stem)
def test_every_recording_gives_a_valid_profile(file) -> None:
    made = profile(file.read_text())
    assert profile_faults(profile_toml(made)) == []
    assert made.memory.ram_bytes and made.cpu.features and made.cpu.cores


def test_a_board_with_four_cortex_a72() -> None:
    # Expected: what lscpu prints there.
    facts = read_facts(recorded("board-arm64"))
    assert facts.model == "Raspberry Pi 4 Model B Rev 1.4"
    assert set(facts.cores) == {("Arm Cortex-A72", 1_500_000_000)} and len(facts.cores) == 4
    assert facts.packages["onnxruntime"] and facts.packages["ai-edge-litert"]
    made = profile(recorded("board-arm64"))
    assert made.arch == "aarch64" and made.cpu.simd_bits == 128
    assert "asimddp" not in (made.cpu.features or [])
    assert made.quantization.reduce_range is False


def test_a_virtual_machine_with_dot_product() -> None:
    made = profile(recorded("vm-cortex-a76"))
    assert made.cpu.model == "Arm Cortex-A76" and made.cpu.cores == 2
    assert {"asimddp", "asimdhp"} <= set(made.cpu.features or [])
    assert made.memory.ram_bytes == 747_008 * 1024


def test_a_32_bit_board_has_tflite_runtime() -> None:
    made = profile(recorded("board-armhf"))
    assert made.arch == "armv7l"
    litert = made.engines["litert"]
    assert (litert.distribution, litert.version) == ("tflite-runtime", "2.14.0")


def test_a_phone_has_no_python() -> None:
    facts = read_facts(recorded("phone-arm64"))
    assert facts.android and facts.python is None and facts.libc == "bionic"
    assert any("no usable Python" in fault for fault in facts.faults)
    assert profile(recorded("phone-arm64")).engines == {}


def test_32_bit_systems_under_64_bit_kernels_are_32_bit() -> None:
    text = recorded("board-arm64").replace("\naarch64\n64\n", "\naarch64\n32\n")
    assert profile(text).arch == "armv7l"


def test_big_and_little_cores_are_two_clusters_and_threads_are_the_big_ones() -> None:
    core = "processor\t: {}\nCPU implementer\t: 0x41\nCPU part\t: {}\nFeatures\t: asimd\n\n"
    info = "".join(core.format(n, "0xd05" if n < 4 else "0xd41") for n in range(8))
    clocks = "".join(f"{n} {1_800_000 if n < 4 else 2_400_000} - -\n" for n in range(8))
    text = (
        f"@@ uname\nLinux\n6.1\naarch64\n64\n@@ processors\n8\n@@ /proc/cpuinfo\n{info}"
        f"@@ cpus\n{clocks}@@ end\n"
    )
    made = profile(text)
    clusters = made.cpu.clusters
    assert clusters is not None
    found = [(one.core, one.count, one.max_hz) for one in clusters.values()]
    assert found == [
        ("Arm Cortex-A78", 4, 2_400_000_000), ("Arm Cortex-A55", 4, 1_800_000_000)
    ]  # fmt: skip
    assert made.threads == 4


def test_threads_need_only_features_that_all_cores_have() -> None:
    core = "processor\t: {}\nFeatures\t: asimd{}\n\n"
    info = core.format(0, " asimddp") + core.format(1, "")
    text = f"@@ uname\nLinux\n6.1\naarch64\n@@ /proc/cpuinfo\n{info}@@ end\n"
    assert read_facts(text).features == ("asimd",)


def test_a_container_limit_is_the_models_limit() -> None:
    text = recorded("board-arm64").replace(
        "@@ end", "@@ /sys/fs/cgroup/memory.max\n536870912\n@@ end"
    )
    made = profile(text)
    assert made.memory.model_bytes == 536_870_912
    unlimited = recorded("board-arm64").replace(
        "@@ end", "@@ /sys/fs/cgroup/memory.max\nmax\n@@ end"
    )
    assert profile(unlimited).memory.model_bytes is None


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("/proc/cpuinfo", "/proc/cpuinfo cannot be read"),
        ("cpus", "/sys/devices/system/cpu is empty"),
        ("python", "no usable Python"),
    ],
)
def test_odd_targets_are_read_as_far_as_they_go_and_say_what_is_missing(missing, said) -> None:
    text = re.sub(
        rf"@@ {missing}\n.*?(?=@@ )", f"@@ {missing}\n", recorded("board-arm64"), flags=re.S
    )
    assert text != recorded("board-arm64")
    facts = read_facts(text)
    assert any(said in fault for fault in facts.faults)
    assert profile_faults(profile_toml(profile(text))) == []


@pytest.mark.parametrize("text", ["", "sh: not found", "@@ uname\nLinux\n", "BusyBox\n\n$ "])
def test_what_is_no_probe_output_is_refused_with_its_last_words(text) -> None:
    with pytest.raises(TargetError, match="did not run the probe") as caught:
        read_facts(text)
    assert "\n" not in str(caught.value)


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(TargetError, match="architecture is 'mips'"):
        profile("@@ uname\nLinux\n6.1\nmips\n@@ end\n")


def test_here_it_says_what_lscpu_and_proc_say() -> None:
    done = subprocess.run(
        ["sh", "-s"], input=facts_script().encode(), capture_output=True, check=True
    )
    facts = read_facts(done.stdout.decode())
    lscpu = json.loads(subprocess.run(["lscpu", "-J"], capture_output=True, check=True).stdout)
    said = {row["field"].rstrip(":"): row["data"] for row in lscpu["lscpu"]}
    assert facts.arch == said["Architecture"]
    assert facts.cpu == said["Model name"]
    assert set(facts.features) == set(said["Flags"].split())
    assert len(facts.cores) == int(said["CPU(s)"])
    total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert total and facts.ram_bytes == int(total[1]) * 1024


def test_the_script_is_plain_posix_and_writes_nothing(tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    for shell in (["dash", "-n"], ["bash", "--posix", "-n"]):
        subprocess.run(shell, input=facts_script().encode(), check=True, cwd=tmp_path)
    subprocess.run(["sh", "-s"], input=facts_script().encode(), check=True, cwd=tmp_path,
                   capture_output=True)  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before
