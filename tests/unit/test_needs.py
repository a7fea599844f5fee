"""The `needs` marker: skips what is not installed, unless CI says that it must be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SUITE = """
import pytest

@pytest.mark.needs("numpy", "surely_not_installed")
def test_needs_too_much():
    assert False, "ran all the same"

@pytest.mark.needs("numpy")
def test_needs_numpy():
    pass
"""


@pytest.mark.parametrize(
    ("required", "outcome", "code"),
    [
        ("numpy, other", "1 passed, 1 skipped", 0),
        ("other,surely_not_installed", "1 passed, 1 error", 1),
    ],
)
def test_required_is_not_skipped(tmp_path: Path, required: str, outcome: str, code: int) -> None:
    for name in ("conftest.py", "small_models.py"):
        shutil.copy(TESTS / name, tmp_path)
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    (tmp_path / "test_it.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"EDGEKIT_REQUIRE": required},
    )  # fmt: skip
    assert outcome in done.stdout
    assert "surely_not_installed is not installed" in done.stdout
    assert done.returncode == code
