"""The runtime stays slim, and its command line never shows a traceback."""

import ast
import importlib
import io
import json
import pkgutil
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

import bundles
import numpy as np
import pytest

import edgekit_runtime
from edgekit_runtime.__main__ import main

FOLDER = Path(edgekit_runtime.__file__).parent
SOURCES = sorted(FOLDER.rglob("*.py"))
MODULES = [
    "edgekit_runtime",
    *(name for _, name, _ in pkgutil.walk_packages(edgekit_runtime.__path__, "edgekit_runtime.")),
]


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- slim -----------------------------------------------------------------------------------------


def test_importing_brings_numpy_and_the_standard_library_only() -> None:
    code = """
import sys
before = set(sys.modules)
import {0}
roots = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(roots - set(sys.stdlib_module_names) - {{"numpy", "edgekit_runtime"}}))
"""
    assert _python(code.format(", ".join(MODULES))) == "[]"


@pytest.mark.measures
def test_importing_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 ms where numpy takes 70; machines differ, the ratio hardly."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))  # the first run compiles
    code = (
        "from time import process_time_ns as now; t = [now()]; import numpy; t.append(now());"
        "import edgekit_runtime; t.append(now()); print(t[1] - t[0], t[2] - t[1])"
    )
    taken = [tuple(map(int, _python(code).split())) for _ in range(6)]
    numpy_ns, own_ns = (min(column) for column in zip(*taken, strict=True))
    assert own_ns < 0.3 * numpy_ns


def _code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    text = path.read_text()
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or not body:
            continue
        if ast.get_docstring(node) is not None:
            documentation.update(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*nothing, tokenize.ENDMARKER):
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - documentation)


@pytest.mark.needs("onnxruntime", "onnx")
def test_little_is_loaded(folder: Path) -> None:
    """A verified bundle that runs: what of this package that takes (see docs/adr/0004)."""
    code = (
        "import sys, numpy\nfrom edgekit_runtime import load\n"
        f"session = load(r'{folder}/good.edgekit')\n"
        "session.run({'x': numpy.zeros((1, 4), 'float32')})\n"
        "print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('edgekit_runtime')])"
    )
    loaded = [Path(text) for text in _python(code).split()]
    assert len(loaded) >= 8
    assert sum(map(_code_lines, loaded)) < 2500
    assert not {"isolate", "preprocess", "pool", "installed"} & {path.stem for path in loaded}


def test_modules_stay_readable() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert max(lengths.values()) < 600
    assert len(SOURCES) >= 14


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_it_is_python_3_9(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    first = next(node for node in tree.body if not isinstance(node, ast.Expr))
    if path.name != "manifest.py":  # reads its annotations; it says so
        assert isinstance(first, ast.ImportFrom)  # else `X | None` in a signature fails on 3.9
        assert first.module == "__future__"
    for node in ast.walk(tree):  # of 3.10; the grammar cannot know
        if isinstance(node, ast.keyword):
            assert node.arg not in ("slots", "kw_only", "strict"), f"line {node.value.lineno}"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_listed_and_exist(name: str) -> None:
    module = importlib.import_module(name)
    listed = module.__all__
    assert len(set(listed)) == len(listed)
    assert [one for one in listed if not hasattr(module, one)] == []
    defined = {
        node.name
        for node in ast.parse(Path(module.__file__ or "").read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined - set(listed) == set()


# --- the command line -----------------------------------------------------------------------------

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a bundle of it, a bundle with other golden outputs, and inputs good and bad."""
    pytest.importorskip("onnx")
    from small_models import linear, save_onnx

    folder = tmp_path_factory.mktemp("cli")
    model = save_onnx(folder, "linear")
    x = np.random.default_rng(0).standard_normal((2, 1, 4)).astype(np.float32)
    for name, golden in (
        ("good", linear(x)),
        ("drifted", linear(x) + 1),
        ("nan", np.full((2, 1, 3), np.nan)),
    ):
        contents = {
            "a/in.npz": bundles.npz(x=x),
            "a/model.onnx": model.read_bytes(),
            "a/out.npz": bundles.npz(y=golden),
        }
        data = bundles.bundle(bundles.make_manifest(contents), contents)
        (folder / f"{name}.edgekit").write_bytes(data)
    (folder / "damaged.edgekit").write_bytes(data.replace(b"MatMul", b"MatMux"))
    (folder / "broken.onnx").write_bytes(model.read_bytes()[:50])
    (folder / "model.txt").write_text("a model")
    np.savez(folder / "x.npz", x=x[0])
    np.savez(folder / "samples.npz", x=x)
    np.savez(folder / "nan.npz", x=np.full((1, 4), np.nan, np.float32))
    np.savez(folder / "z.npz", z=x[0])
    np.savez(folder / "f64.npz", x=x[0].astype(np.float64))
    np.savez(folder / "uneven.npz", x=x, z=x[:1])
    np.savez(folder / "scalar.npz", x=np.float32(1))
    np.savez(folder / "objects.npz", x=np.array([{}], object))
    np.savez(folder / "none.npz")
    np.save(folder / "x.npy", x)
    whole = (folder / "x.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-30])
    (folder / "torn.npz").write_bytes(whole.replace(b"NUMPY", b"numpy"))
    (folder / "empty.npz").write_bytes(b"")
    (folder / "text.npz").write_text("x")
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    def start(line: str, **options: object) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [sys.executable, "-m", "edgekit_runtime", *line.split()],
            cwd=folder, capture_output=True, text=True, timeout=60, check=False, **options,
        )  # type: ignore[call-overload]  # fmt: skip
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done

    return start


def test_help_lists_the_verbs() -> None:
    for line in ("--help", "run --help", "bench --help"):
        done = subprocess.run(
            [sys.executable, "-m", "edgekit_runtime", *line.split()],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "usage: edgekit-runtime" in done.stdout
        if line == "--help":
            assert "{run,check,bench,info,serve-stdin}" in done.stdout
            assert "worker" not in done.stdout
        assert done.stderr == ""


@pytest.mark.needs("onnxruntime", "onnx")
def test_run_computes(run: Run, folder: Path) -> None:
    from small_models import linear

    wanted = linear(np.load(folder / "x.npz")["x"])
    for model in ("linear.onnx", "good.edgekit"):
        done = run(f"run {model} --input x.npz --json")
        assert (done.returncode, done.stderr) == (0, "")
        document = json.loads(done.stdout)
        assert document["schema"] == "edgekit.run/1"
        np.testing.assert_allclose(document["outputs"]["y"], wanted, rtol=1e-5)
    done = run("run linear.onnx --input x.npz --output out.npz")
    assert (done.returncode, done.stdout) == (0, "")
    np.testing.assert_allclose(np.load(folder / "out.npz")["y"], wanted, rtol=1e-5)
    done = run("run linear.onnx --input x.npz")
    assert done.stdout.startswith("y float32 [1, 3]\n")


@pytest.mark.needs("onnxruntime", "onnx")
def test_json_has_no_nan(run: Run) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    done = run("run linear.onnx --input nan.npz --json")
    document = json.loads(done.stdout, parse_constant=no_constant)
    assert document["outputs"]["y"] == [[None] * 3]
    done = run("check nan.edgekit --json")
    assert done.returncode == 1
    (output,) = json.loads(done.stdout, parse_constant=no_constant)["outputs"]
    assert (output["max_abs"], output["note"]) == (None, "NaN or Inf")


@pytest.mark.needs("onnxruntime", "onnx")
def test_check_tells_good_from_drifted(run: Run) -> None:
    done = run("check good.edgekit")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("y: ok")
    done = run("check drifted.edgekit --json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["schema"], document["ok"]) == ("edgekit.check/1", False)
    assert document["outputs"][0]["max_abs"] == pytest.approx(1, rel=1e-3)


@pytest.mark.needs("onnxruntime", "onnx")
def test_bench_measures(run: Run) -> None:
    done = run("bench good.edgekit --runs 20 --json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["schema"]) == (0, "edgekit.bench/1")
    latency = document["latency_ns"]
    assert latency["label"] == "measured"
    assert latency["samples"] == len(document["samples_ns"]) == 20
    assert 0 < latency["min"] <= latency["p50"]
    assert latency["p90"] is None  # 20 samples say nothing of it
    assert latency["min"] == min(document["samples_ns"])
    assert document["peak_rss_bytes"] > 10_000_000
    assert "measured here" in run("bench linear.onnx --runs 5 --input samples.npz").stdout
    done = run("bench good.edgekit --cold --json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["schema"]) == (0, "edgekit.cold/1")
    assert document["load_ns"] > 0
    assert document["first_run_ns"] > 0


@pytest.mark.needs("onnxruntime", "onnx")
def test_info_shows_what_is_inside(run: Run, folder: Path) -> None:
    done = run("info good.edgekit --json")
    assert json.loads(done.stdout)["schema"] == "edgekit.bundle/1"
    done = run("info linear.onnx --json")
    document = json.loads(done.stdout)
    assert document["schema"] == "edgekit.info/1"
    assert document["inputs"][0]["shape"] == ["N", 4]
    assert "CPU 100 %" in document["placement"]
    shown = run("info good.edgekit").stdout
    assert "input    x: float32 [N, 4]" in shown
    assert "variant  a: onnxruntime, fp32, threads 1" in shown
    assert "output   y: float32 [N, 3]" in run("info linear.onnx").stdout


@pytest.mark.needs("onnxruntime", "onnx")
def test_worker_answers_until_told_to_stop(run: Run) -> None:
    commands = '{"cmd": "sample", "count": 4}\n{"cmd": "close"}\n{"cmd": "sample", "count": 1}\n'
    done = run("worker good.edgekit --input samples.npz", input=commands)
    hello, answer = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, hello["ready"]) == (0, True)
    assert hello["placement"]["shares"] == {"CPU": 1.0}
    assert (hello["variant"], hello["passed_over"]) == ("a", "")
    assert len(answer["samples"]) == 4
    assert all(ns > 0 for ns in answer["samples"])
    done = run("worker broken.onnx", input="")
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 2


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("run linear.onnx --input missing.npz", 2, "missing.npz"),
        ("run linear.onnx --input z.npz", 2, "named z; wanted: x"),
        ("run linear.onnx --input f64.npz", 2, "float64; wanted float32"),
        ("run linear.onnx --input samples.npz", 2, "shape [2, 1, 4]"),
        ("run linear.onnx --input none.npz", 2, "named nothing; wanted: x"),
        ("run linear.onnx --input x.npy", 2, "shape [2, 1, 4]"),
        ("run linear.onnx --input cut.npz", 2, "cannot read cut.npz"),
        ("run linear.onnx --input torn.npz", 2, "cannot read torn.npz"),
        ("run linear.onnx --input empty.npz", 2, "cannot read empty.npz"),
        ("run linear.onnx --input text.npz", 2, "cannot read text.npz"),
        ("run linear.onnx --input objects.npz", 2, "cannot read objects.npz"),
        ("run linear.onnx --input .", 2, "Is a directory"),
        ("run linear.onnx --input x.npz --output no/such/folder.npz", 2, "No such file"),
        ("run linear.onnx --input x.npz --output .", 2, "Is a directory"),
        ("run missing.onnx --input x.npz", 2, "missing.onnx"),
        ("run model.txt --input x.npz", 2, "known: .edgekit, .onnx"),
        ("run broken.onnx --input x.npz", 2, "onnxruntime cannot load the model"),
        ("run damaged.edgekit --input x.npz", 2, "damaged"),
        ("run good.edgekit --input x.npz --variant b", 2, "it has: a"),
        ("run linear.onnx --input x.npz --variant b", 2, "only bundles have variants"),
        ("run linear.onnx --input x.npz --threads 0", 2, "wanted at least 1"),
        ("run linear.onnx --input x.npz --threads 99999", 2, "wanted 1 to 1024"),
        ("run linear.onnx --input x.npz --engine nope", 3, "known: onnxruntime"),
        ("run linear.onnx --input x.npz --engine litert", 2, "does not load .onnx"),
        ("run good.edgekit --input x.npz --engine openvino", 2, "choose one of its variants"),
        ("check linear.onnx", 2, "plain model"),
        ("check missing.edgekit", 2, "No such file"),
        ("check damaged.edgekit", 2, "damaged"),
        ("check good.edgekit --engine openvino", 2, "plain models"),
        ("check .", 2, "plain model"),
        ("bench broken.onnx", 2, "cannot load"),
        ("bench linear.onnx --runs 0", 2, "wanted at least 1"),
        ("bench linear.onnx --input x.npy", 2, "wanted an .npz"),
        ("bench linear.onnx --input none.npz", 2, "no samples"),
        ("bench linear.onnx --input scalar.npz", 2, "no samples"),
        ("bench linear.onnx --input uneven.npz", 2, "of one length"),
        ("bench linear.onnx --precision int3", 2, "known: float32"),
        ("bench linear.onnx --precision bfloat16", 2, "computes floats in float32"),
        ("bench linear.onnx --cold --engine nope", 3, "known: onnxruntime"),
        ("bench missing.edgekit --cold", 2, "No such file"),
        ("info missing.onnx", 2, "missing.onnx"),
        ("info damaged.edgekit", 0, ""),  # shows what it says of itself, verifies no file
        ("info broken.onnx", 2, "cannot load"),
        ("info .", 2, "not a model"),
        ("nonsense linear.onnx", 2, "invalid choice"),
        ("run linear.onnx", 2, "--input"),
        ("run linear.onnx --input x.npz --threads many", 2, "invalid int"),
        ("", 2, "required"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    line: str,
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(folder)
    try:
        found: object = main(line.split())
    except SystemExit as stop:  # argparse's own
        found = stop.code
    out, err = capfd.readouterr()
    assert found == code, err
    assert says in err
    if err and "usage:" not in err:
        assert err.count("\n") == 1
        assert err.startswith("edgekit-runtime: ")
        assert out == ""


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("check drifted.edgekit", 1),
        ("check damaged.edgekit", 2),
        ("run linear.onnx --input torn.npz", 2),
        ("bench linear.onnx --engine nope", 3),
    ],
)
def test_exit_codes_reach_the_shell(run: Run, line: str, code: int) -> None:
    assert run(line).returncode == code


def test_a_missing_engine_says_what_to_install(folder: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"  # as if it were not installed
        "from edgekit_runtime.__main__ import main\n"
        f"print([main([v, r'{folder}/good.edgekit']) for v in ('check', 'bench')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[3, 3]"
    assert done.stderr.count("pip install onnxruntime") == 2


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    script = f"'{sys.executable}' -m edgekit_runtime info '{folder}/good.edgekit' | true; "
    done = subprocess.run(
        ["bash", "-c", script + 'echo "${PIPESTATUS[0]}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("0", "")


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize("name", ["file", "allow_pickle", "arr_0", "a/b"])
def test_outputs_of_any_name_are_saved(tmp_path: Path, name: str) -> None:
    from small_models import onnx_model

    model = onnx_model(
        [("Add", ["x", "x"], [name], {})], {"x": ("float32", (2,))}, {name: ("float32", (2,))}
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    np.savez(tmp_path / "x.npz", x=np.array([1, 2], np.float32))
    paths = [str(tmp_path / part) for part in ("m.onnx", "x.npz", "out.npz")]
    assert main(["run", paths[0], "--input", paths[1], "--output", paths[2]]) == 0
    with np.load(paths[2]) as saved:
        assert saved.files == [name]
        assert saved[name].tolist() == [2, 4]
