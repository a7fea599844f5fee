"""The older `tflite_runtime` really runs: the engines' suite again, in an environment that has it
instead of `ai_edge_litert` (it needs numpy 1, so it cannot live beside the others)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import save_tflite
from store import store

ROOT = Path(__file__).parents[2]
NEEDS = ("tflite-runtime==2.14.0", "numpy==1.26.4", "pytest==9.2.0", "pytest-timeout==2.4.0")

#: what the environment cannot do: the first two need the other engines' files; tflite_runtime does
#: not verify files and dies of damaged ones, which is below
LEFT_OUT = ("another_engines_file", "unfit_engines", "truncated_models", "garbage_is_refused")

pytestmark = [
    pytest.mark.needs("litert"),  # to write the models with its schema
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11), reason="tflite_runtime 2.14 has wheels up to Python 3.11"
    ),
]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with tflite_runtime, made once."""
    with store() as folder:
        own = folder / "tflite-runtime"
        found, stamp = own / "bin" / "python", own / "complete"
        if not stamp.exists() or stamp.read_text() != " ".join(NEEDS):
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(own)], check=True)
            subprocess.run(
                [str(found), "-m", "pip", "install", "-q", "--disable-pip-version-check", *NEEDS],
                check=True,
            )
            stamp.write_text(" ".join(NEEDS))
    return found


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ready")
    (folder / "litert").mkdir()
    for name in ("linear", "two", "stubborn", "conv", "where", "scalar"):
        save_tflite(folder / "litert", name)
    return folder


def _environment(ready: Path) -> dict[str, str]:
    return {
        **os.environ, "PYTHONPATH": str(ROOT / "runtime"), "EDGEKIT_SMALL_MODELS": str(ready),
        "EDGEKIT_REQUIRE": "litert",
    }  # fmt: skip


@pytest.mark.timeout(900)
def test_the_engine_suite_passes_on_it(python: Path, ready: Path) -> None:
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "tests/contract/test_engines.py", "tests/contract/test_sessions.py",
         "-k", f"litert and not ({' or '.join(LEFT_OUT)})"],
        cwd=ROOT, env=_environment(ready), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 80


def test_a_later_operator_version_is_refused_by_name(
    python: Path, ready: Path, tmp_path: Path
) -> None:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    data = (ready / "litert" / "linear.tflite").read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytearray(data), 0))
    model.operatorCodes[0].version = 12  # FULLY_CONNECTED as TensorFlow 2.21 writes it
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path = tmp_path / "new.tflite"
    path.write_bytes(bytes(builder.Output()))
    code = (
        "from edgekit_runtime import load, EngineTooOldError\n"
        f"try: load({str(path)!r})\n"
        "except EngineTooOldError as error: print(error)\n"
    )
    done = subprocess.run(
        [str(python), "-c", code], env=_environment(ready), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "needs a newer litert than the 2.14.0 installed" in done.stdout
    assert "FULLY_CONNECTED" in done.stdout
    assert "'12'" in done.stdout


def test_damaged_files_kill_only_the_process_of_the_engine(
    python: Path, ready: Path, tmp_path: Path
) -> None:
    whole = (ready / "litert" / "linear.tflite").read_bytes()
    for cut in (51, 100, 200, len(whole) // 2, len(whole) - 9):
        (tmp_path / f"{cut}.tflite").write_bytes(whole[:cut])
    code = (
        "import sys; from pathlib import Path\n"
        "from edgekit_runtime import load, EngineCrashed, ModelError\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.tflite')):\n"
        "    try: load(path, isolate=True).close(); print('loaded')\n"
        "    except (EngineCrashed, ModelError) as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [str(python), "-c", code, str(tmp_path)], env=_environment(ready), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 5
    assert "EngineCrashed the engine's process died of SIGSEGV" in done.stdout
