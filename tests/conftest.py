"""What all suites share: the `needs` marker, and small models in every engine's format."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import LACKING, SAVERS

#: what `needs(name)` looks for, where the package is not called like that
_PACKAGES = {"litert": ("ai_edge_litert", "tflite_runtime")}


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = {name.strip() for name in os.environ.get("EDGEKIT_REQUIRE", "").split(",")}
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            packages = _PACKAGES.get(name, (name,))
            if all(importlib.util.find_spec(package) is None for package in packages):
                if name in required:
                    pytest.fail(f"{name} is not installed, EDGEKIT_REQUIRE says it must be")
                pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`small_model(engine, name)`: the path of one of the small models, in the engine's format.

    They are made here, or, where that cannot be, found ready in EDGEKIT_SMALL_MODELS/engine.
    """
    folder = tmp_path_factory.mktemp("small-models")
    made: dict[tuple[str, str], Path] = {}

    ready = os.environ.get("EDGEKIT_SMALL_MODELS")

    def find(engine: str, name: str) -> Path:
        if name in LACKING.get(engine, {}):
            pytest.skip(LACKING[engine][name])
        if ready is not None:
            return next(Path(ready, engine).glob(f"{name}.*"))
        if (engine, name) not in made:
            own = folder / engine
            own.mkdir(exist_ok=True)
            made[engine, name] = SAVERS[engine](own, name)
        return made[engine, name]

    return find
