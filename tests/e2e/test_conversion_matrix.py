"""Real models into other formats, as `make test-corpus` does for all: the quick part of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corpus import MODELS, by_name
from corpus_cell import Cell, convert_cell, words
from corpus_claims import CLAIMS, Desk

from edgekit.cache import Cache

#: what models of a kind need, and what formats do
_SOURCE_NEEDS = {
    ".h5": ("keras", "tensorflow"), ".joblib": ("sklearn", "skl2onnx"), ".jit": ("torch",),
    ".onnx": ("onnx",), ".tflite": ("litert", "tf2onnx", "tensorflow"),
}  # fmt: skip
_TARGET_NEEDS = {
    "onnx": ("onnxruntime",), "tflite": ("litert", "onnx2tf"), "openvino": ("openvino",),
    "ncnn": ("ncnn", "pnnx"),
}  # fmt: skip
_CLAIM_NEEDS = {
    "digits": ("torch", "litert_torch", "openvino", "ncnn", "pnnx"),
    "profanity": ("sklearn", "skl2onnx"),
    "live-keras": ("keras", "tensorflow", "tf2onnx"),
    "live-torch": ("torch", "onnxscript"),
    "string-input": ("tensorflow", "tf2onnx"),
    "planted-fault": ("onnx", "openvino"),
}


def _marked(*needs: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs(name) for name in needs]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Cell]:
    """A model in a format; what a model's cells have in common is made once."""
    folder = tmp_path_factory.mktemp("matrix")
    cache = Cache(folder / "cache")
    ready = {}

    def make(name: str, target: str) -> Cell:
        if name not in ready:
            (folder / name).mkdir()
            ready[name] = by_name(name).prepare(folder / name)
        return convert_cell(by_name(name), ready[name], target, cache)[0]

    return make


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(
            model.name, target, id=f"{model.name} to {target}",
            marks=_marked(*_SOURCE_NEEDS[Path(model.name).suffix], *_TARGET_NEEDS[target]),
        )
        for model in MODELS
        for target in model.small
    ],
)  # fmt: skip
def test_a_real_model_computes_the_same_in_another_format(
    name: str, target: str, cell: Callable[[str, str], Cell]
) -> None:
    made = cell(name, target)
    wanted = by_name(name).expected_refusal(target)
    assert made.as_expected(), f"{made.command}: {words(made)}; expected: {wanted or 'same'}"
    assert "\n" not in made.text  # one line, for a user to act on


@pytest.fixture
def desk(tmp_path: Path, cell: Callable[[str, str], Cell]) -> Iterator[Desk]:
    yield Desk(tmp_path, cell)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_marked(*needs)) for name, needs in _CLAIM_NEEDS.items()]
)
def test_what_is_promised_holds(name: str, desk: Desk) -> None:
    for claim in CLAIMS[name](desk):
        assert claim.holds, str(claim)
