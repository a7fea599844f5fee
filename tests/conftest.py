"""What all suites share: the `needs` marker, and small models in every engine's format."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import SAVERS

#: what `needs(name)` looks for, where the package is not called like that
_PACKAGES = {"litert": "ai_edge_litert"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = {name.strip() for name in os.environ.get("EDGEKIT_REQUIRE", "").split(",")}
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            if importlib.util.find_spec(_PACKAGES.get(name, name)) is None:
                if name in required:
                    pytest.fail(f"{name} is not installed, EDGEKIT_REQUIRE says it must be")
                pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`small_model(engine, name)`: the path of one of the small models, in the engine's format."""
    folder = tmp_path_factory.mktemp("small-models")
    made: dict[tuple[str, str], Path] = {}

    def find(engine: str, name: str) -> Path:
        if (engine, name) not in made:
            own = folder / engine
            own.mkdir(exist_ok=True)
            made[engine, name] = SAVERS[engine](own, name)
        return made[engine, name]

    return find
