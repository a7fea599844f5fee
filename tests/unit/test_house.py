"""Rules of the house that a machine can check."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgekit
import edgekit_converters

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    name
    for package in (edgekit, edgekit_converters)
    for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)
HEAVY = (
    "onnx", "onnxruntime", "openvino", "nncf", "tensorflow", "keras", "torch", "ai_edge_litert",
    "litert_quantizer", "onnx2tf", "plotly", "sklearn", "PIL", "coremltools",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_listed_and_exist(name) -> None:
    module = importlib.import_module(name)
    if not module.__name__.endswith(("compress", "measure")):
        listed = module.__all__
        assert [n for n in listed if not hasattr(module, n)] == []
        defined = {
            node.name
            for node in ast.parse(Path(module.__file__ or "").read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        assert defined - set(listed) == set()


def test_no_module_imports_anything_heavy() -> None:
    code = (
        f"import importlib, sys\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_no_numpy_and_no_verb() -> None:
    code = (
        "import sys\nfrom edgekit.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: code = e.code\n"
        "print(code, [m for m in sys.modules if m.split('.')[0] in ('numpy', 'pydantic')"
        " or m == 'edgekit.optimize'], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"
    assert "optimize" in done.stdout


def test_modules_stay_readable() -> None:
    files = [
        p for folder in ("edgekit", "converters", "runtime") for p in (ROOT / folder).rglob("*.py")
    ]
    assert [str(p) for p in files if len(p.read_text().splitlines()) > 600] == []
