"""Device profiles: valid, sourced to the figure, honest about this machine; faults are named."""

import os
import platform
import re
from importlib import resources
from pathlib import Path

import pytest

from edgekit.device import DeviceProfile
from edgekit.errors import UsageError
from edgekit.figures import figure_is_in
from edgekit.operators import engine_table, operator_table, operator_table_ids
from edgekit.profiles import (
    catalogue_ids,
    load_profile,
    parse_profile,
    profile_faults,
    profile_ids,
    profile_toml,
)
from edgekit_runtime.engines import ENGINES

DOCS = Path(__file__).parents[2] / "docs"


def example() -> str:
    """The example of the how-to: it must be valid, and most faults are told from it."""
    text = (DOCS / "how-to" / "device-profiles.md").read_text()
    found = re.search(r"```toml\n(.*?)```", text, re.S)
    assert found
    return found[1]


def text_of(profile_id: str) -> str:
    file = resources.files("edgekit_device_profiles") / f"{profile_id}.toml"
    return file.read_text(encoding="utf-8")


def test_the_catalogue_has_what_people_use() -> None:
    wanted = {
        "raspberry-pi-zero-2-w", "raspberry-pi-3", "raspberry-pi-4", "raspberry-pi-5",
        "jetson-orin-nano", "imx8mp-evk", "imx93-evk", "stm32n6570-dk", "corstone-300",
        "esp32-s3", "pixel-8", "galaxy-s24", "generic-arm64", "generic-armv7", "generic-x86-64",
    }  # fmt: skip
    assert wanted <= set(catalogue_ids())
    assert profile_ids()[0] == "this-machine"


@pytest.mark.parametrize("name", catalogue_ids())
def test_every_profile_is_valid_and_every_figure_is_in_what_its_source_says(name) -> None:
    assert profile_faults(text_of(name)) == []  # includes the figures, see the next test
    profile = load_profile(name)
    assert profile.id == name
    for accelerator in profile.accelerators.values():
        if accelerator.operator_table:
            assert operator_table(accelerator.operator_table).operators
    assert any(source.url for source in profile.sources), "anybody can look something up"


@pytest.mark.parametrize("name", catalogue_ids())
def test_no_figure_of_the_catalogue_can_be_changed_unnoticed(name) -> None:
    """Each number in turn is made another one: the source must no longer bear it out."""
    text = text_of(name)
    facts = text[: text.index("[[sources]]")]
    numbers = list(re.finditer(r"^(\w+) = ([\d_]+(?:\.\d+)?)$", facts, re.M))
    for found in numbers:
        if found[1] == "threads":
            continue  # a choice: its reason is words
        value = found[2].replace("_", "")
        other = str(float(value) * 7 + 0.5) if "." in value else str(int(value) * 7 + 1)
        changed = text[: found.start(2)] + other + text[found.end(2) :]
        faults = profile_faults(changed)
        assert faults, f"{found[0]} -> {other} passes"


def test_an_example_that_people_copy_is_valid() -> None:
    assert profile_faults(example()) == []


def test_this_machine_is_this_machine() -> None:
    profile = load_profile("this-machine")
    assert profile.arch == platform.machine()
    assert profile.cpu.cores == len(os.sched_getaffinity(0))
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((one.split(":")[1].split() for one in lines if one.startswith("flags")), None)
    if flags:
        vnni = {"avx512_vnni", "avx_vnni"} & set(flags)
        assert profile.quantization.reduce_range is (not vnni)
        assert set(profile.cpu.features or []) == set(flags)
    assert set(profile.engines) == set(ENGINES)
    assert profile_faults(profile_toml(profile)) == []


@pytest.mark.parametrize("name", [*catalogue_ids(), "this-machine"])
def test_written_and_read_again_it_is_the_same(name) -> None:
    profile = load_profile(name)
    assert parse_profile(profile_toml(profile), name) == profile


def test_unknown_profiles_list_the_known_and_the_nearest() -> None:
    with pytest.raises(UsageError, match="no device profile 'nope'; known: this-machine, .*pi-5"):
        load_profile("nope")
    for name, meant in (
        ("raspberry-pi5", "raspberry-pi-5"),
        ("local", "this-machine"),
        ("jetson", "jetson-orin-nano"),
        ("galaxy", "galaxy-a21s or galaxy-s24"),
    ):
        with pytest.raises(UsageError, match=f"did you mean {meant}"):
            load_profile(name)


def test_files_that_cannot_be_read_are_named(tmp_path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name, said in (("missing.toml", "No such file"), ("binary.toml", "not text")):
        with pytest.raises(UsageError, match=said):
            load_profile(str(tmp_path / name))


FAULTS = [
    ("cores = 6", "cores = 7", "cpu.clusters have 6 cores together, cpu.cores says 7"),
    ("cores = 6", "cors = 6", "cpu.cors: no such key; did you mean cores?"),
    ("ram_bytes = 4_294_967_296", "ram_mb = 4096",
     "memory.ram_mb: no such key; did you mean ram_bytes (in bytes)?"),
    ("ram_bytes = 4_294_967_296", 'ram_bytes = "4 GB"',
     "memory.ram_bytes: '4 GB'; wanted a whole number of bytes, such as 4294967296"),
    ("ram_bytes = 4_294_967_296", "ram_bytes = 8_589_934_592",
     "memory.ram_bytes: 8589934592 is not in what its source says (Example 9000 data sheet"),
    ("max_hz = 2_400_000_000", "max_hz = 2.4",
     "cpu.clusters.big.max_hz: 2.4; wanted a whole number of hertz"),
    ("threads = 2", "threads = 8", "defaults.threads is 8, cpu.cores only 6"),
    ("threads = 2", "threads = 0", "defaults.threads: 0; wanted more than 0: a number"),
    ("threads = 2", "threads = 2\naffinity = [0, 6]", "defaults.affinity names core 6"),
    ("model_bytes = 1_073_741_824", "model_bytes = 8_073_741_824",
     "memory.model_bytes is 8073741824, memory.ram_bytes only 4294967296"),
    ('"asimddp"]', '"avx2"]', "cpu.features: avx2 does not exist on aarch64"),
    ('arch = "aarch64"', 'arch = "arm64"', "arch: 'arm64'; wanted 'x86_64', 'aarch64'"),
    ('name = "My board"', "", "name: missing"),
    ('id = "my-board"', 'id = "My Board"', "id: 'My Board'; wanted small letters, digits, -"),
    ('schema = "edgekit.device/1"', "", 'schema is missing; wanted schema = "edgekit.device/1"'),
    ("edgekit.device/1", "edgekit.device/2",
     "schema is edgekit.device/2, of a newer EdgeKit; this one reads edgekit.device/1"),
    ('minimum = "1.17"', 'minimum = "1.17"\nversion = "1.9"',
     "engines.onnxruntime.version is 1.9, older than its minimum 1.17"),
    ('minimum = "1.17"', 'minimum = "1.18"', "engines.onnxruntime.minimum: 1.18 is not in"),
    ('engine = "litert"', 'engine = "rknn"',
     "accelerators.npu.engine is rknn, which engines does not list"),
    ('dtypes = ["int8"]', 'dtypes = ["int9"]', "accelerators.npu.dtypes.0: 'int9'; wanted"),
    ('operator_format = "tflite"', "", "operators and operator_format come together"),
    ('operator_format = "tflite"', 'operator_format = "tflite"\noperator_table = "tflm"',
     "operators are given twice"),
    ('activations = ["int8"]', 'activations = ["int8"]\nweights = ["float32"]',
     "weights float32 go with none of the activations int8"),
    ('activations = ["int8"]', "activations = []", "activations is empty"),
    ('kind = "datasheet"', 'kind = "guess"', "sources.0.kind: 'guess'; wanted 'datasheet'"),
    ('fields = ["soc", "cpu", "memory.ram_bytes"]', 'fields = ["cpu", "memory.ram_bytes"]',
     "soc has no source"),
    ('fields = ["soc", "cpu", ', 'fields = ["soc", "cpu", "gpu", ',
     "sources: gpu is not stated in this profile"),
    ("max_hz = 2_400_000_000", "max_hz = 2.4e9",
     "cpu.clusters.big.max_hz: 2400000000.0; wanted a whole number of hertz, such as 2400000000"),
    ("[engines.litert]", "[engines.tflite]\n[engines.litert]",
     "engines.tflite: no such engine; did you mean litert?"),
    ("[engines.litert]", "[engines.tensorfloe]\n[engines.litert]",
     "engines.tensorfloe: no such engine; known: onnxruntime"),
    ('"DEPTHWISE_CONV_2D"', '"DEPTHWISE_CONV2D"',
     "accelerators.npu.operators: no tflite operator 'DEPTHWISE_CONV2D'; "
     "did you mean DEPTHWISE_CONV_2D?"),
    ("[cpu]", "[cpu", "not TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), FAULTS, ids=[f[2][:40] for f in FAULTS])
def test_faults_are_one_line_with_the_field(old, new, said) -> None:
    changed = example().replace(old, new, 1)
    assert changed != example()
    faults = profile_faults(changed)
    assert any(said in fault for fault in faults), faults
    assert not any("\n" in fault for fault in faults)


def test_a_missing_schema_hides_nothing_else() -> None:
    changed = example().replace('schema = "edgekit.device/1"', "").replace("cores = 6", "cors = 6")
    assert len(profile_faults(changed)) == 2


def test_every_fault_is_listed_not_only_the_first() -> None:
    changed = example().replace("cores = 6", "cors = 6").replace("threads = 2", "threads = 0")
    assert len(profile_faults(changed)) == 2
    with pytest.raises(UsageError, match=r"and 1 more; edgekit devices validate"):
        parse_profile(changed, "x.toml")


@pytest.mark.parametrize(
    ("figure", "unit", "text"),
    [
        (2_400_000_000, "hz", "quad-core at 2.4GHz"), (2_400_000_000, "hz", "2400 MHz"),
        (536_870_912, "bytes", "512 MB of RAM"), (512_000, "bytes", "512 kB"),
        (524_288, "bytes", "512 KiB"), (4_294_967_296, "bytes", "4GB"),
        (4_294_967_296, "bytes", "sold with 2, 4 and 8 GB"), (2_147_483_648, "bytes", "2/4/8 GB"),
        (2_097_152, "bytes", "2 MBytes of flash"), (6e12, "ops_per_s", "6 TOPS"),
        (17e12, "ops_per_s", "17 TFLOPS"), (28.0, "w", "base power 28 W"),
        (4, "", "Quad-core A76"), (8, "", "octa-core"), (1, "", "a single core"),
        (1024, "", "1,024 MACs"), (85.0, "", "85 °C"), (128, "", "128-bit SIMD"),
        ("1.17", "", "onnxruntime 1.17 or newer"),
    ],
)  # fmt: skip
def test_figures_are_found_in_usual_spellings(figure, unit, text) -> None:
    assert figure_is_in(figure, text, unit=unit)


@pytest.mark.parametrize(
    ("figure", "unit", "text"),
    [
        (76, "", "Cortex-A76"), (4, "", "LPDDR4X"), (2, "", "1.2 GHz"), (17, "", "1.17"),
        (512, "", "5120"), ("1.1", "", "version 1.17"), (1, "", "a phone in Zone A"),
        (6, "", "sixteen cores"), (8, "", "light weight"), (10, "", "often"), (2, "", "network"),
        (2_400_000_000, "hz", "24 GHz"), (2_400_000_000, "hz", "2.4 Gb"),
        (4_294_967_296, "bytes", "4 cores"), (8_589_934_592, "bytes", "8 Gbit"),
        (8_589_934_592, "bytes", "8 GHz"), (8_589_934_592, "bytes", "8 Gb"),
        (1_048_576, "bytes", "1 mW"), (3072, "bytes", "3 kg"), (1_000_000.0, "w", "1 mW"),
        ("1", "", "2.3-1"),
    ],
)  # fmt: skip
def test_figures_are_not_found_inside_others(figure, unit, text) -> None:
    assert not figure_is_in(figure, text, unit=unit)


HOSTILE = {
    "deep arrays": "a = " + "[" * 3000,
    "deep tables": "a = " + "{a=" * 900,
    "a long key": "a" + ".a" * 100_000 + " = 1",
    "a long number": "a = " + "9" * 5000,
    "a big number": 'schema = "edgekit.device/1"\nid = "a"\nname = "A"\nkind = "pc"\n'
    'arch = "x86_64"\n[engines.litert]\n[power]\nmost_w = 1' + "0" * 400 + "\n[[sources]]\n"
    'fields = ["power", "engines"]\nkind = "datasheet"\ntitle = "t"\nsays = "5 W"',
    "an odd schema": 'schema = "edgekit.device/²"',
    "a schema of digits": 'schema = "edgekit.device/' + "1" * 5000 + '"',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_faults_and_nothing_worse(text) -> None:
    faults = profile_faults(text)
    assert faults and not any("\n" in fault for fault in faults)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("threads = 2", "threads = true"),
        ("threads = 2", "threads = 2\naffinity = [0, 0]"),
        ('name = "My board"', 'name = "My\\nboard"'),
        ("[engines.litert]", '[engines.""]\n[engines.litert]'),
        ("[defaults]", "[power]\nmost_w = true\n[defaults]"),
        ("[defaults]", '[power]\nmost_w = "12"\n[defaults]'),
        ("[defaults]", "[power]\nmost_w = inf\n[defaults]"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_faults(old, new) -> None:
    changed = example().replace(old, new, 1)
    if "power" in new:
        changed = changed.replace('fields = ["defaults"', 'fields = ["power", "defaults"')
    assert changed != example()
    assert profile_faults(changed)


def test_a_table_that_nobody_has_is_named_with_the_known() -> None:
    changed = re.sub(r"operator_format.*\n", "", example())
    changed = re.sub(r"operators = .*", 'operator_table = "nosuch"', changed)
    (fault,) = profile_faults(changed)
    assert fault.startswith("accelerators.npu.operator_table: no table 'nosuch'; known: ethos-u55")


def test_what_is_no_file_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UsageError, match="not a file"):
        load_profile(str(tmp_path / "pipe.toml"))


def test_the_longest_name_wins_and_covers_what_is_below() -> None:
    profile = DeviceProfile.model_validate(
        {
            "schema": "edgekit.device/1", "id": "a", "name": "A", "kind": "board",
            "arch": "aarch64", "engines": {"litert": {}}, "cpu": {"cores": 4, "model": "X"},
            "sources": [
                {"fields": ["cpu", "engines"], "kind": "probe", "title": "all"},
                {"fields": ["cpu.cores"], "kind": "probe", "title": "cores"},
            ],
        }
    )  # fmt: skip
    assert profile.source_of("cpu.model").title == "all"
    assert profile.source_of("cpu.cores").title == "cores"
    assert profile.source_of("memory.ram_bytes") is None


@pytest.mark.parametrize("name", operator_table_ids())
def test_operator_tables_are_readable_and_sourced(name) -> None:
    table = operator_table(name)
    assert table.id == name
    assert len(table.operators) > 20
    assert table.source.says or table.source.kind == "probe"


def test_known_limits_of_engines() -> None:
    # TensorFlow 2.21's dynamic-range FULLY_CONNECTED is version 12, which 2.14 refuses.
    old = engine_table("litert", distribution="tflite-runtime")
    new = engine_table("litert")
    assert old is not None and new is not None
    assert old.operators["FULLY_CONNECTED"] < 12 <= new.operators["FULLY_CONNECTED"]
    # Documented: ONNX Runtime 1.17 takes opset 20; an opset 7 model is taken by all.
    for version, opset in (("1.17.3", 20), ("1.20.1", 21)):
        table = engine_table("onnxruntime", version=version)
        assert table is not None and table.opset == opset
    assert engine_table("nonsense") is None
