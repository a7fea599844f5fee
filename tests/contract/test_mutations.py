"""Five in a hundred of what benchmarks/mutations.py tries, in every run."""

from pathlib import Path

import mutations
import pytest

COUNT = 250


def test_no_mutated_bundle_reaches_an_engine(tmp_path: Path) -> None:
    outcomes = mutations.bundle_mutations(COUNT, 1, tmp_path)
    assert outcomes["engine"] == outcomes["slow"] == 0
    assert outcomes["BundleError"] + outcomes["unchanged"] == COUNT
    assert outcomes["BundleError"] > 0.9 * COUNT


@pytest.mark.parametrize(
    "fmt",
    [
        pytest.param("onnx", marks=pytest.mark.needs("onnxruntime", "onnx")),
        pytest.param("openvino", marks=pytest.mark.needs("openvino", "onnx")),
        pytest.param("tflite", marks=pytest.mark.needs("litert")),
        pytest.param("ncnn", marks=pytest.mark.needs("ncnn")),
    ],
)
def test_mutated_models_end_in_errors_of_ours(fmt: str, tmp_path: Path) -> None:
    """Whatever the engine does with them: here each is an answer or an EdgeKitError."""
    outcomes = mutations.model_mutations(fmt, COUNT, 1, tmp_path)
    slowest_ms = outcomes.pop("slowest_ms")
    assert sum(outcomes.values()) == COUNT
    assert outcomes["refused"] > 0.2 * COUNT
    assert outcomes["ran"] > 0.05 * COUNT  # else it is not the models that are tried
    assert slowest_ms < 1000 * (mutations.TIMEOUT_S + 10)  # a hang is stopped, not waited for
