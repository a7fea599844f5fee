"""What all suites share: the `needs` marker, and small models in every engine's format."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import LACKING, SAVERS

# A shell's background jobs ignore Ctrl-C, and so does all they start: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session")
def keras_cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Keras CNN trained on digits, as TFLite with a free batch, and 1,200 digits it never saw."""
    import numpy as np
    from store import mnist

    folder = tmp_path_factory.mktemp("keras")
    images, labels = mnist()
    pick = np.random.default_rng(1).permutation(len(images))
    images = images.reshape(-1, 28, 28, 1)
    for name, chosen in (("train", pick[:5000]), ("evaluation", pick[5000:6200])):
        np.savez(folder / f"{name}.npz", image=images[chosen], labels=labels[chosen])
    script = Path(__file__).parent / "keras_cnn.py"
    made = folder / "keras.tflite"
    subprocess.run(
        [sys.executable, str(script), str(folder / "train.npz"), str(made)],
        check=True, capture_output=True,
    )  # fmt: skip
    return made, folder / "evaluation.npz"
