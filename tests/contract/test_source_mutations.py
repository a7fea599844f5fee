"""Five in a hundred of what benchmarks/source_mutations.py tries, in every run."""

from pathlib import Path

import pytest
import source_mutations

SHARE, COUNT = 0.05, 200

NEEDS = {
    "keras": ("keras", "h5", "savedmodel", "tflite"),
    "torch": ("pt2", "torchscript"),
    "skl2onnx": ("joblib", "skops"),
    "openvino": ("onnx", "xml"),
}


@pytest.mark.needs("tensorflow", "keras", "torch", "sklearn", "skl2onnx", "skops", "openvino")
@pytest.mark.parametrize("library", NEEDS)
def test_no_file_runs_code_ends_this_process_or_is_waited_for(library, tmp_path: Path) -> None:
    formats = NEEDS[library]
    found = source_mutations.run(formats, COUNT, 1, SHARE, tmp_path / "it")
    crafted = found.pop("crafted")
    assert crafted.pop("ran") == []
    assert crafted.pop("refused") >= 15 and "host" not in crafted
    assert set(found) == set(formats)
    for outcomes in found.values():
        assert "host" not in outcomes
        assert outcomes.get("refused", 0) > 0
        assert outcomes["slowest_s"] < 3 * source_mutations.TIMEOUT_S  # reading, then two edges
        counted = ("converted", "refused", "died", "over", "unforeseen")
        assert sum(outcomes.get(one, 0) for one in counted) == SHARE * COUNT
