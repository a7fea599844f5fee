"""The two distributions: what is in them and what they pull in."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(folder: Path, out: Path, *kinds: str) -> list[Path]:
    # Without isolation: the build backend is among the test requirements, nothing is fetched.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out),
         str(folder)],
        check=True, capture_output=True,
    )  # fmt: skip
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("dist")
    (runtime,) = build(ROOT / "runtime", out / "runtime", "--wheel")
    files = build(ROOT, out / "sdk")  # the sdist, and the wheel made from it
    return runtime, next(f for f in files if f.suffix == ".whl")


def metadata(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/METADATA"))
        return archive.read(name).decode().splitlines()


def test_runtime_needs_numpy_and_nothing_else(wheels) -> None:
    lines = metadata(wheels[0])
    needed = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needed == ["Requires-Dist: numpy>=1.19"]
    assert "Requires-Python: >=3.9" in lines
    assert wheels[0].stat().st_size < 150_000  # ADR 0004


def test_runtime_wheel_holds_the_runtime_only(wheels) -> None:
    with zipfile.ZipFile(wheels[0]) as archive:
        roots = {name.split("/")[0] for name in archive.namelist()}
    assert {r for r in roots if not r.endswith(".dist-info")} == {"edgekit_runtime"}


def test_sdk_wheel_from_the_sdist_is_complete(wheels) -> None:
    with zipfile.ZipFile(wheels[1]) as archive:
        names = set(archive.namelist())
    wanted = {
        path.relative_to(base).as_posix()
        for base, package in (
            (ROOT, "edgekit"),
            (ROOT / "converters", "edgekit_converters"),
            (ROOT / "device_profiles", "edgekit_device_profiles"),
            (ROOT / "runtime", "edgekit_runtime"),
        )
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted - names == set()
    assert any(name.endswith(".toml") for name in wanted)


def test_runtime_installed_alone_runs_a_bundle(wheels, tmp_path) -> None:
    """In a folder of its own, with the engine and numpy of this environment."""
    import onnxruntime  # noqa: F401  (the engine it will use)

    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import edgekit_runtime as r, sys; print(r.__file__); assert 'edgekit' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert str(tmp_path) in done.stdout
