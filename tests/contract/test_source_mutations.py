"""Five in a hundred of what benchmarks/source_mutations.py tries, in every run."""

from pathlib import Path

import pytest
import source_mutations

SHARE, COUNT = 0.05, 200


@pytest.mark.needs("tensorflow", "keras", "torch", "sklearn", "skl2onnx", "skops", "openvino")
def test_no_file_runs_code_ends_this_process_or_is_waited_for(tmp_path: Path) -> None:
    found = source_mutations.run(source_mutations.FORMATS, COUNT, 1, SHARE, tmp_path / "it")
    crafted = found.pop("crafted")
    assert crafted.pop("ran") == []
    assert crafted["refused"] > 25 and "host" not in crafted
    for outcomes in found.values():
        assert "host" not in outcomes
        assert outcomes["refused"] > 0
        assert outcomes["slowest_s"] < 3 * source_mutations.TIMEOUT_S  # reading, then two edges
        counted = ("converted", "refused", "died", "over", "unforeseen")
        assert sum(outcomes.get(one, 0) for one in counted) == SHARE * COUNT
