"""Shares of an accelerator, the contract about them, and accelerators that plug in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit_runtime.engines import check_engine
from edgekit_runtime.engines.accelerators import accelerator_of, all_names
from edgekit_runtime.errors import LimitError, UsageError
from edgekit_runtime.placement import Placement, by_macs, enforce, shortfall

ROOT = Path(__file__).parents[2]


def found(*nodes: tuple[str, str, str], **shares: float) -> Placement:
    return Placement(shares or {"NPU": 1.0}, "P", "float32", {}, nodes)


CONV, DENSE = ("NPU", "Conv", "c"), ("CPU", "Einsum", "e")


def test_shares_are_of_multiply_accumulates() -> None:
    placed = by_macs(found(CONV, DENSE, NPU=0.5, CPU=0.5), {"c": 300, "e": 100})
    assert placed.shares == {"NPU": 0.75, "CPU": 0.25} and placed.of == "MACs"


def test_without_macs_or_nodes_the_shares_stay() -> None:
    for placed, macs in ((found(CONV), {}), (found(), {"c": 1}), (found(CONV), {"c": 0})):
        assert by_macs(placed, macs) is placed


def test_what_was_compiled_into_one_node_counts_there() -> None:
    whole = found(("NPU", "EPContext", "part_0"), DENSE)
    assert by_macs(whole, {"c": 30, "d": 10, "e": 60}).shares == {"NPU": 0.4, "CPU": 0.6}


def test_merged_operators_count_where_all_others_that_multiply_are() -> None:
    merged = found(("CPU", "FusedConv", "c_fused"), ("NPU", "Softmax", "s"))
    assert by_macs(merged, {"c": 10}).shares == {"CPU": 1.0}


def test_operators_that_may_be_in_two_places_are_unknown() -> None:
    both = found(("CPU", "FusedConv", "x"), ("NPU", "FusedConv", "y"), ("NPU", "Gemm", "g"))
    assert by_macs(both, {"c": 30, "d": 30, "g": 40}).shares == {"NPU": 0.4, "unknown": 0.6}


def test_a_contract_names_what_multiplies_and_is_elsewhere() -> None:
    placed = by_macs(found(CONV, DENSE, ("CPU", "Relu", "r")), {"c": 3, "e": 1})
    with pytest.raises(LimitError, match=r"'v': not on NPU: Einsum e; 75 % of its multiply-acc"):
        enforce({"NPU": 1.0}, placed, variant="v")
    enforce({"NPU": 0.75}, placed, variant="v")
    many = found(*(("CPU", "Conv", f"c{i}") for i in range(5)), CPU=1.0)
    assert "Conv c0, Conv c1, Conv c2 and 2 more" in shortfall({"NPU": 0.1}, many)
    assert shortfall({"GPU": 0.5}, found(NPU=1.0)).startswith("0 % of its operators are on GPU")
    assert "unknown" in shortfall({"GPU": 1.0}, Placement({"unknown": 1.0}, "W", "float32"))


@pytest.mark.parametrize("name", ["onnxruntime:nosuch", "ncnn:vulkan:0", "nosuch"])
def test_unknown_engines_and_accelerators_are_refused(name) -> None:
    with pytest.raises(UsageError, match="known: "):
        check_engine(name)


def test_names_are_of_an_engine() -> None:
    assert "onnxruntime:cuda" in all_names() and all_names("ncnn") == ("ncnn:vulkan",)
    assert accelerator_of("openvino:npu").device == "NPU"


def plugged(folder: Path, text: str, lines: str) -> dict[str, str]:
    """The environment of a process for which this module plugs in."""
    info = folder / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[edgekit.accelerators]\n{lines}\n")
    (folder / "mine.py").write_text(text)
    return {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def said(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, check=True,
                          capture_output=True)  # fmt: skip
    return done.stdout.strip()


def test_a_broken_plug_in_is_an_error_only_when_it_is_used(tmp_path) -> None:
    environment = plugged(
        tmp_path, "THING = 7\n", "litert.one = mine:THING\nncnn.two = nosuch:X"
    )  # fmt: skip
    code = (
        "from edgekit_runtime.engines.accelerators import *\n"
        "from edgekit_runtime.engines.accelerators import all_names\n"
        "print('litert:one' in all_names(), 'ncnn:two' in all_names(), accelerators_of('litert'))\n"
        "for name in ('litert:one', 'ncnn:two'):\n"
        "    try: accelerator_of(name)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    lines = said(code, environment).splitlines()
    assert lines[0].startswith("True True {'gpu': ") and "'one': " in lines[0]
    assert lines[1] == "EngineError the plug-in mine:THING is int, no Accelerator"
    assert lines[2].startswith("EngineError the plug-in nosuch:X cannot be imported: ")


def test_the_worked_example_is_short_and_says_what_it_lacks(tmp_path) -> None:
    example = ROOT / "examples" / "vx_plugin"
    text = (example / "edgekit_vx.py").read_text()
    project = (example / "pyproject.toml").read_text()
    assert text.count("\n") + project.count("\n") < 60
    (line,) = (one for one in project.splitlines() if one.startswith('"litert.vx"'))
    environment = plugged(tmp_path, "", line.replace('"', ""))
    (tmp_path / "edgekit_vx.py").write_text(text)
    code = (
        "from edgekit.accelerate import engines_of\nfrom edgekit.profiles import load_profile\n"
        "from edgekit.facts import probe_engine\n"
        "print(engines_of(load_profile('imx8mp-evk')))\nprint(probe_engine('litert:vx'))\n"
    )
    pytest.importorskip("ai_edge_litert")
    assert said(code, environment).splitlines() == [
        "{'npu': ('litert:vx',)}",
        "no libvx_delegate.so here: it comes with NXP's Linux for the i.MX 8M Plus",
    ]
