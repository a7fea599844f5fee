"""What earlier runs on networks like this came to; it only says what is tried first."""

import json
from pathlib import Path

import pytest

from edgekit.experience import Experience, Outcome

CNN = {"Conv": 10, "Relu": 10, "Gemm": 1}
ISA = ["avx2", "avx"]


def outcomes(good: bool, count: int = 1, scheme: str = "int8-static") -> list[Outcome]:
    return [Outcome("onnxruntime", scheme, good)] * count


def test_the_share_is_laplaces_rule_of_succession(tmp_path: Path) -> None:
    Experience(tmp_path, CNN, ISA).add([*outcomes(True, 3), *outcomes(False)])
    found = Experience(tmp_path, CNN, reversed(ISA))
    assert found.tally("onnxruntime", "int8-static") == (3, 4)
    assert found.promise("onnxruntime", "int8-static") == pytest.approx(4 / 6)
    assert found.promise("openvino", "int8-static") == 0.5
    assert found.promise("onnxruntime", "int8-static", repair=True) == 0.5


@pytest.mark.parametrize(
    ("operators", "isa", "alike"),
    [
        (CNN, ISA, True),
        ({"Conv": 50, "Relu": 48, "Gemm": 1, "Add": 8}, ISA, True),
        ({"MatMul": 20, "Softmax": 4, "Add": 30}, ISA, False),
        ({}, ISA, False),
        (CNN, [*ISA, "avx512_vnni"], False),  # another CPU says nothing of speed here
    ],
)
def test_only_networks_and_processors_alike_count(
    operators: dict[str, int], isa: list[str], alike: bool, tmp_path: Path
) -> None:
    Experience(tmp_path, CNN, ISA).add(outcomes(True, 8))
    found = Experience(tmp_path, operators, isa)
    assert (found.promise("onnxruntime", "int8-static") > 0.5) is alike


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    Experience(tmp_path, CNN, ISA).add(outcomes(True, 2))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(b'{"engine": "x"}\n[1]\n\xff\n{"future": 1}\n' + whole + whole[:40])
    assert Experience(tmp_path, CNN, ISA).tally("onnxruntime", "int8-static") == (2, 2)


def test_the_file_keeps_to_its_size(tmp_path: Path) -> None:
    for _ in range(3):
        Experience(tmp_path, CNN, ISA).add(outcomes(False, 3999))
    Experience(tmp_path, CNN, ISA).add(outcomes(True, 10))
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    assert len(lines) <= 8000
    assert json.loads(lines[-1])["good"]
    assert Experience(tmp_path, CNN, ISA).tally("onnxruntime", "int8-static") == (10, 4000)


def test_a_folder_that_cannot_be_written_loses_it_and_nothing_else(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    Experience(gone, CNN, ISA).add(outcomes(True))
    assert Experience(gone, CNN, ISA).promise("onnxruntime", "int8-static") == 0.5
