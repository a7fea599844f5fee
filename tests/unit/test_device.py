"""Device profiles: valid, sourced, and honest about this machine."""

import platform
from pathlib import Path

import pytest

from edgekit.device import load_profile, profile_ids
from edgekit.errors import UsageError
from edgekit_runtime.engines import ENGINES


@pytest.mark.parametrize("name", profile_ids())
def test_every_profile_is_valid_and_its_figures_have_sources(name) -> None:
    profile = load_profile(name)
    assert profile.id == name
    assert set(profile.engines) <= set(ENGINES)
    figures = {
        "cpu.cores": profile.cpu.cores,
        "memory_bytes": profile.memory_bytes,
        "threads": profile.threads,
    }
    unsourced = [k for k, v in figures.items() if v is not None and not profile.sources.get(k)]
    assert not unsourced


def test_this_machine_is_this_machine() -> None:
    profile = load_profile("this-machine")
    assert profile.arch == platform.machine()
    flags = [
        line.split(":")[1].split()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("flags")
    ]
    if flags:
        vnni = {"avx512_vnni", "avx_vnni"} & set(flags[0])
        assert profile.quantization.reduce_range is (not vnni)


def test_unknown_profile_lists_the_known() -> None:
    with pytest.raises(UsageError, match="no device profile 'nope'; known: this-machine, .*pi-5"):
        load_profile("nope")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "not TOML"),
        ("schema = 'edgekit.device/9'", "schema"),
        ("{base}\nvolts = 5", "volts"),
        ("{base}\n[cpu]\ncores = 0", "cpu.cores"),
        ("{base}\n[cpu]\ncores = 'four'", "cpu.cores"),
    ],
)
def test_bad_files_name_the_field(tmp_path, text, said) -> None:
    base = (
        "schema = 'edgekit.device/1'\nid = 'a'\nname = 'A'\narch = 'aarch64'\n"
        "engines = []\nthreads = 1\nsources = {}"
    )
    file = tmp_path / "a.toml"
    file.write_text(text.replace("{base}", base))
    with pytest.raises(UsageError, match=said) as caught:
        load_profile(str(file))
    assert "\n" not in str(caught.value)
