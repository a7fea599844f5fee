"""PyTorch in every form: the same numbers come out, names stay, and nothing runs unasked."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import sandbox
from edgekit.errors import UsageError
from edgekit_runtime import load
from edgekit_runtime.arrays import read_npz, write_npz

pytestmark = pytest.mark.needs("torch")

FACTORIES = Path(__file__).parent.parent / "torch_models.py"
TRUSTED = {"trust_source": True}
TORCH, SCRIPT = "edgekit_converters.torch:", "edgekit_converters.torchscript:"

Job = tuple[str, dict[str, Any]]


def steps(jobs: dict[str, Job], timeout_s: float = 300) -> dict[str, Any]:
    """All in one child: importing PyTorch takes longer than these models."""
    found = sandbox.call(
        "torch_models:steps",
        {"jobs": list(jobs.values())},
        limits=sandbox.Limits(timeout_s=timeout_s),
    )
    return dict(zip(jobs, found, strict=True))


def message(result: Any) -> str:
    """The text of a refusal, one line."""
    assert isinstance(result, dict) and "error" in result, result
    _, text = result["error"]
    assert "\n" not in text
    return str(text)


def factory(name: str, function: str = "describe_factory", **more: Any) -> Job:
    options = more.pop("options", TRUSTED)
    return TORCH + function, {"source": [f"{FACTORIES}:{name}"], "options": options, **more}


def shapes(described: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes by name."""
    inputs, outputs = described["inputs"], described["outputs"]
    return {s["name"]: s["shape"] for s in inputs}, {s["name"]: s["shape"] for s in outputs}


def _inputs(**given: list[Any]) -> dict[str, Any]:
    return {"inputs": {name: {"shape": shape} for name, shape in given.items()}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with samples; children find torch_models while it is there."""
    folder = tmp_path_factory.mktemp("torch")
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 1, 3, 12, 16)).astype(np.float32)
    write_npz(folder / "samples.npz", {f"{i}/image": image[i] for i in range(2)})
    write_npz(folder / "tokens.npz", {"0/tokens": TOKENS})
    write_npz(
        folder / "script.npz",
        {f"{i}/{k}": v for i, g in enumerate(GAINS) for k, v in (("image", image[0]), ("gain", g))},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FACTORIES.parent))
        yield folder


TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2]])
GAINS = [np.array([3.0], np.float32), np.array([0.5], np.float32)]
FREE = _inputs(picture=["N", 3, "H", "W"])


@pytest.fixture(scope="module")
def made(work: Path) -> dict[str, Any]:
    """What a child made of the factories, and its answers by the name of the job."""
    file = {path.name: str(path) for path in work.iterdir()}

    def at(name: str) -> str:
        return str(work / name)

    def pt2(function: str, source: str, **more: Any) -> Job:
        options = more.pop("options", {})
        return TORCH + function, {"source": [at(source)], "options": options, **more}

    def export(name: str, target: str, **options: Any) -> Job:
        return factory(name, "factory_to_pt2", target=at(target), options={**TRUSTED, **options})

    plain = {**TRUSTED, "weights": at("plain.pt")}
    samples = file["samples.npz"]
    jobs: dict[str, Job] = {
        "files": ("torch_models:save_files", {"folder": str(work)}),
        "cnn": export("cnn", "cnn.pt2", weights=at("plain.pt")),
        "reference": factory("cnn", "run_factory", options=plain, inputs=samples,
                             outputs=at("reference.npz")),
        "factory": factory("cnn", options=plain),
        "pt2": pt2("describe", "cnn.pt2"),
        "tensors": pt2("tensors", "cnn.pt2"),
        "run": pt2("run", "cnn.pt2", inputs=samples, outputs=at("run.npz")),
        "live": ("torch_models:train_and_save", {"folder": str(work)}),
        "filed": export("cnn", "filed.pt2"),
        "recurrent": factory("recurrent"),
        "free recurrent": export("recurrent", "recurrent.pt2",
                                 **_inputs(x=["B", 4], state=[1, "B", 2])),
        "described recurrent": pt2("describe", "recurrent.pt2"),
        "dense": export("dense", "dense.pt2"),
        "dense run": pt2("run", "dense.pt2", inputs=file["tokens.npz"], outputs=at("dense.npz")),
        "renamed": export("cnn", "renamed.pt2", **FREE),
        "described renamed": pt2("describe", "renamed.pt2"),
        "half": pt2("describe", "renamed.pt2", options=_inputs(picture=[1, 3, "H", 20])),
        "unsized": pt2("pt2_to_ncnn", "renamed.pt2", target=at("renamed.param")),
        "untrusted": factory("cnn", options={}),
        "branching": factory("branching"),
        "no model": factory("no_model"),
        "fails": factory("fails"),
        "missing": factory("missing"),
        "two names": factory("cnn", options={**TRUSTED, **_inputs(a=[1], b=[1])}),
        "signature": factory("cnn", options={**TRUSTED, "signature": "serving_default"}),
        "other name": pt2("describe", "cnn.pt2", options=_inputs(x=[1])),
        "other size": pt2("describe", "cnn.pt2", options=_inputs(image=[1, 3, 9, 9])),
        "layout": pt2("describe", "cnn.pt2", options={"layout": "nhwc"}),
    }  # fmt: skip
    for name in (*WEIGHTS, *BAD_WEIGHTS):
        jobs[name] = export("cnn", f"{name}.pt2", weights=at(name))
    for name in WEIGHTS:
        jobs[f"run {name}"] = pt2("run", f"{name}.pt2", inputs=samples, outputs=at(f"{name}.npz"))
    script = {**TRUSTED, **_inputs(image=["N", 3, "H", "W"], gain=[1])}
    for name, source, function, options in (
        ("script untrusted", "script.pt", "describe", {}),
        ("script unshaped", "script.pt", "describe", TRUSTED),
        ("script", "script.pt", "describe", script),
        ("script onnx", "script.pt", "to_onnx", script),
        ("script weights", "plain.pt", "describe", TRUSTED),
        ("counting", "counting.pt", "describe", TRUSTED),
        ("inner", "counting.pt", "describe",
         {**TRUSTED, **_inputs(input=["N", 4]), "signature": "inner"}),
    ):  # fmt: skip
        target = {"target": at("script.onnx")} if function == "to_onnx" else {}
        jobs[name] = SCRIPT + function, {"source": [at(source)], "options": options, **target}
    jobs["script run"] = SCRIPT + "run", {
        "source": [at("script.pt")], "options": script, "inputs": file["script.npz"],
        "outputs": at("script-out.npz"),
    }  # fmt: skip
    return steps(jobs)


WEIGHTS = {
    "legacy.pth": [],
    "weights.safetensors": [],
    "parallel.pt": ["'module.' removed from the names of the weights"],
    "checkpoint.ckpt": ["weights taken from 'state_dict' in checkpoint.ckpt"],
}
BAD_WEIGHTS = {
    "short.pt": "2 missing (head.bias, head.weight)",
    "other.pt": "head.weight",
    "whole.pt": "torch_models.Cnn",
    "none.pt": "no file",
}


def check(work: Path, made: Path) -> None:
    """Another engine computes what the module did."""
    samples, wanted = read_npz(work / "samples.npz"), read_npz(work / "reference.npz")
    with load(made) as session:
        assert [s.name for s in session.inputs] == ["image"]
        assert [s.name for s in session.outputs] == ["logits", "features"]
        for i in range(2):
            found = session.run({"image": samples[f"{i}/image"]})
            for name, value in found.items():
                np.testing.assert_allclose(value, wanted[f"{i}/{name}"], rtol=1e-4, atol=1e-5)


def test_factory_and_pt2_are_described(made: dict[str, Any], work: Path) -> None:
    for name in ("factory", "pt2"):
        outputs = {"logits": ["N", 5], "features": ["N", 8]}
        assert shapes(made[name]) == ({"image": ["N", 3, 12, 16]}, outputs)
        assert made[name]["facts"]["parameters"] == 869
    assert made["factory"]["facts"]["layers"]["Conv2d"] == 2
    assert made["pt2"]["facts"]["layers"]["conv2d"] == 2
    reference, run = read_npz(work / "reference.npz"), read_npz(work / "run.npz")
    for key, value in reference.items():
        np.testing.assert_allclose(run[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.needs("onnxscript")
@pytest.mark.needs("onnxruntime")
def test_onnx(made: dict[str, Any], work: Path) -> None:
    """Same numbers, inside too; a live export gives what its file gives."""
    names = [tensor["name"] for tensor in made["tensors"]]
    assert made["tensors"][0] == {"name": "conv2d", "node": "stem.0 (Conv2d)", "inputs": ["image"]}
    assert {"logits", "features", "batch_norm", "add"} <= set(names)
    at = {name: str(work / name) for name in ("samples.npz", "taps.npz", "onnx-taps.npz")}
    found = steps({
        **{name: (TORCH + "pt2_to_onnx", {"source": [str(work / f"{name}.pt2")],
                                          "target": str(work / f"{name}.onnx"),
                                          "options": {"opset": 18} if name == "cnn" else {}})
           for name in ("cnn", "live", "filed")},
        "names": ("torch_models:onnx_names", {"path": str(work / "cnn.onnx")}),
        "taps": (TORCH + "run", {"source": [str(work / "cnn.pt2")], "options": {}, "taps": names,
                                 "inputs": at["samples.npz"], "outputs": at["taps.npz"]}),
        "onnx taps": ("torch_models:onnx_taps",
                      {"path": str(work / "cnn.onnx"), "inputs": at["samples.npz"],
                       "names": names, "outputs": at["onnx-taps.npz"]}),
    })  # fmt: skip
    assert found["cnn"]["opset"] == 18
    # the exporter folds what it can, and what is left bears its name of the .pt2
    shared = found["names"]["tensors"]
    assert len(shared) >= 5 and set(shared) <= set(names)
    assert str(FACTORIES.parent) not in found["names"]["text"]
    taps, inside = read_npz(work / "taps.npz"), read_npz(work / "onnx-taps.npz")
    assert set(inside) == set(shared)
    for name, value in inside.items():
        np.testing.assert_allclose(value, taps[f"0/{name}"], rtol=1e-4, atol=1e-5, err_msg=name)
    check(work, work / "cnn.onnx")
    assert made["live"]["training"], "the user's model is as it was"
    image = read_npz(work / "samples.npz")["0/image"]
    answers = []
    for name in ("live", "filed"):
        with load(work / f"{name}.onnx") as session:
            answers.append(session.run({"image": image}))
    for name in ("logits", "features"):
        np.testing.assert_array_equal(answers[0][name], answers[1][name])


@pytest.mark.needs("litert_torch")
def test_tflite(made: dict[str, Any], work: Path) -> None:
    job = {"source": [str(work / "cnn.pt2")], "target": str(work / "cnn.tflite"), "options": {}}
    facts = steps({"tflite": (TORCH + "pt2_to_tflite", job)})["tflite"]
    assert facts["notes"] == ["the batch size is fixed to 1"]
    check(work, work / "cnn.tflite")


@pytest.mark.needs("ncnn")
@pytest.mark.needs("pnnx")
def test_ncnn(made: dict[str, Any], work: Path) -> None:
    """From a .pt2, with integers in another, and from a script that has control flow."""
    small = {**TRUSTED, **_inputs(image=[1, 3, 8, 8], gain=[1])}
    found = steps({
        "cnn": (TORCH + "pt2_to_ncnn", {"source": [str(work / "cnn.pt2")], "options": {},
                                        "target": str(work / "cnn.param")}),
        "dense": (TORCH + "pt2_to_ncnn", {"source": [str(work / "dense.pt2")], "options": {},
                                          "target": str(work / "dense.param")}),
        "script": (SCRIPT + "to_ncnn", {"source": [str(work / "script.pt")], "options": small,
                                        "target": str(work / "script.param")}),
    })  # fmt: skip
    assert found["cnn"]["notes"] == ["the batch size is fixed to 1"]
    check(work, work / "cnn.param")
    assert "as int32" in found["dense"]["notes"][1]
    with load(work / "dense.param") as session:
        scores = session.run({"tokens": TOKENS.astype(np.int32)})["output"]
    np.testing.assert_allclose(scores, read_npz(work / "dense.npz")["0/output"], rtol=1e-4)
    assert "control flow (prim::If)" in message(found["script"])


@pytest.mark.needs("ncnn")
@pytest.mark.needs("pnnx")
@pytest.mark.needs("onnx")
def test_onnx_to_ncnn(tmp_path: Path) -> None:
    from cnn import cnn_scores, small_cnn

    source = small_cnn(tmp_path / "cnn.onnx")
    before = source.read_bytes()
    job = {"source": [str(source)], "target": str(tmp_path / "cnn.param"), "options": {}}
    sandbox.call("edgekit_converters.pnnx:onnx_to_ncnn", job)
    assert source.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cnn.bin", "cnn.json", "cnn.onnx", "cnn.param"
    ]  # fmt: skip
    images = np.random.default_rng(0).normal(size=(1, 1, 12, 12)).astype(np.float32)
    with load(tmp_path / "cnn.param") as session:
        found = session.run({"image": images})["scores"]
    np.testing.assert_allclose(found, cnn_scores(images), rtol=1e-4, atol=1e-5)


def test_free_dimensions(made: dict[str, Any]) -> None:
    """A first axis that is no batch, and names and sizes from the command line."""
    assert shapes(made["recurrent"])[0] == {"x": [1, 4], "state": [1, 1, 2]}
    assert "batch size is fixed" in made["recurrent"]["facts"]["notes"][0]
    assert shapes(made["described recurrent"]) == (
        {"x": ["B", 4], "state": [1, "B", 2]},
        {"output_0": ["B", 2], "output_1": [1, "B", 2]},
    )
    assert made["renamed"]["notes"] == ["inputs renamed in order: image is picture"]
    assert shapes(made["described renamed"])[0] == {"picture": ["N", 3, "H", "W"]}
    assert shapes(made["half"])[0] == {"picture": [1, 3, "H", 20]}
    assert "--inputs picture=1x3x224x224:float32" in message(made["unsized"])


def test_weights(made: dict[str, Any], work: Path) -> None:
    reference = read_npz(work / "reference.npz")["1/logits"]
    for name, notes in WEIGHTS.items():
        assert made[name]["notes"] == notes
        np.testing.assert_allclose(read_npz(work / f"{name}.npz")["1/logits"], reference, rtol=1e-5)
    for name, part in BAD_WEIGHTS.items():
        assert part in message(made[name])


def test_what_cannot_be_is_refused(made: dict[str, Any]) -> None:
    parts = {
        "untrusted": "--trust-source",
        "branching": "torch_models.py:",
        "no model": "wanted (model, example_inputs)",
        "fails": "no such thing",
        "missing": "has no function 'missing'; it has branching, cnn,",
        "two names": "the model takes image",
        "signature": "--signature does not go",
        "other name": "cnn.pt2 has image",
        "other size": "was exported for image",
        "layout": "--layout does not go",
        "script untrusted": "--trust-source",
        "script unshaped": "--inputs image=1x3x224x224:float32 gain=",
        "script weights": "state dict of 11 tensors (stem.0.weight",
        "counting": "(calls) when it runs",
    }
    for name, part in parts.items():
        assert part in message(made[name])
    assert "torch.where" in message(made["branching"])
    assert "--signature inner" in message(made["counting"])


@pytest.mark.needs("onnxruntime")
def test_torchscript(made: dict[str, Any], work: Path) -> None:
    inputs, outputs = shapes(made["script"])
    assert inputs == {"image": ["N", 3, "H", "W"], "gain": [1]}
    assert outputs["output_1"] == ["N", 4]
    assert shapes(made["inner"]) == ({"input": ["N", 4]}, {"output": ["N", 2]})
    wanted = read_npz(work / "script-out.npz")
    image = read_npz(work / "script.npz")["0/image"]
    with load(work / "script.onnx") as session:
        for i, gain in enumerate(GAINS):  # both branches
            found = session.run({"image": image, "gain": gain})
            for name, value in found.items():
                np.testing.assert_allclose(value, wanted[f"{i}/{name}"], rtol=1e-5, atol=1e-6)


def test_pickles_are_explained_without_unpickling(
    made: dict[str, Any], work: Path, tmp_path: Path
) -> None:
    from edgekit_converters.pickles import explain_pickle

    canary = tmp_path / "canary"
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps(Evil(canary)))
    parts = {
        "plain.pt": "a state dict of 11 tensors (stem.0.weight, stem.0.bias, stem.1.weight, ...)",
        "legacy.pth": "a state dict of 11 tensors (stem.0.weight",
        "checkpoint.ckpt": "a training checkpoint (state_dict, optimizer, epoch)",
        "whole.pt": "a whole pickled object (torch_models.Cnn)",
        "script.pt": "is TorchScript",
        "cnn.pt2": "is an exported program",
        "expected.npz": "nothing that PyTorch wrote",
        str(evil): "system",
        str(FACTORIES): "neither a PyTorch file nor a pickle",
    }
    for name, part in parts.items():
        assert part in explain_pickle(str(work / name))
    assert not canary.exists()


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def _edited(source: Path, target: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of a .pt2 with its entries (without the folder) changed."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].split("/")[0]
        entries = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    edit(entries)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"{root}/{name}", data)
    return target


def _json(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def edit(entries: dict[str, bytes]) -> None:
        raw = json.loads(entries[name])
        change(raw)
        entries[name] = json.dumps(raw).encode()

    return edit


def _attacks(canary: Path) -> dict[str, Callable[[dict[str, bytes]], None]]:
    """Each makes torch.export.load, or what follows it, create the file (torch 2.13)."""
    code = f"__import__('os').system('touch {canary}')"
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:  # as torch.save writes it
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(canary), protocol=2))
        archive.writestr("archive/version", "3\n")
    evil = stored.getvalue()
    model = "models/model.json"

    def sample_inputs(entries: dict[str, bytes]) -> None:
        entries["data/sample_inputs/model.pt"] = evil

    def weight(entries: dict[str, bytes]) -> None:
        entries["data/weights/weight_0"] = evil
        config = json.loads(entries["data/weights/model_weights_config.json"])
        next(iter(config["config"].values()))["use_pickle"] = True
        entries["data/weights/model_weights_config.json"] = json.dumps(config).encode()

    def old_weights(entries: dict[str, bytes]) -> None:
        entries["data/weights/model.pt"] = evil

    def constant(entries: dict[str, bytes]) -> None:
        entries["data/constants/opaque_obj_0"] = pickle.dumps(Evil(canary))
        meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True,
                "tensor_meta": None}  # fmt: skip
        entries["data/constants/model_constants_config.json"] = json.dumps(
            {"config": {"c": meta}}
        ).encode()

    def expression(raw: Any) -> None:
        for meta in raw["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = f"[{code}, 2][1]"

    def guards(raw: Any) -> None:
        raw["guards_code"] = [f"{code} == 0"]

    def operator(raw: Any) -> None:
        node = raw["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.os.system"
        argument = {"as_string": f"touch {canary}"}
        node["inputs"] = [{"name": "", "arg": argument, "kind": 1}]

    def writer(raw: Any) -> None:
        node = raw["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [
            {"name": "filename", "arg": {"as_string": str(canary)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 4}, "kind": 1},
        ]

    def placeholder(raw: Any) -> None:
        text = json.dumps(raw).replace('"image"', json.dumps(f"image={code}"))
        raw.clear()
        raw.update(json.loads(text))

    def context(raw: Any) -> None:
        call = raw["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(call["out_spec"])
        spec[1]["context"] = json.dumps({"__enum__": True, "fqn": "antigravity:X", "name": "Y"})
        call["out_spec"] = json.dumps(spec)

    changes = {f.__name__: _json(model, f) for f in (expression, guards, operator, writer,
                                                     placeholder, context)}  # fmt: skip
    pickles = (sample_inputs, weight, old_weights, constant)
    return {**changes, **{f.__name__: f for f in pickles}}


def test_no_pt2_runs_code(made: dict[str, Any], work: Path, tmp_path: Path) -> None:
    """Without --trust-source; with it most of the attacks work, so there is something to stop."""
    jobs: dict[str, Job] = {}
    for options in ({}, TRUSTED):
        for name in _attacks(tmp_path):
            label = f"{name} trusted" if options else name
            edit = _attacks(tmp_path / f"canary of {label}".replace(" ", "-"))[name]
            path = _edited(work / "cnn.pt2", tmp_path / f"{label}.pt2", edit)
            jobs[label] = TORCH + "run", {
                "source": [str(path)], "options": options, "inputs": str(work / "samples.npz"),
                "outputs": str(tmp_path / "out.npz"),
            }  # fmt: skip
    found = steps(jobs)
    ran = {path.name.removeprefix("canary-of-") for path in tmp_path.glob("canary*")}
    real = ("expression", "writer", "placeholder", "sample_inputs", "weight", "old_weights")
    assert ran >= {f"{name}-trusted" for name in real}
    assert all(name.endswith("-trusted") for name in ran)
    # what is not needed is dropped, and the model is as good as before
    harmless = {"guards", "sample_inputs"}
    for name in _attacks(tmp_path):
        if name in harmless:
            assert found[name] is None
        else:
            assert "--trust-source" in message(found[name]), name


def test_cut_and_edited_files_are_clear_errors(
    made: dict[str, Any], work: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    jobs: dict[str, Job] = {}
    for name, module in (("cnn.pt2", TORCH), ("script.pt", SCRIPT)):
        whole = (work / name).read_bytes()
        for share in (0.0, 0.3, 0.999):
            (tmp_path / f"{share}{name}").write_bytes(whole[: int(len(whole) * share)])
        for i in range(12):
            edited = bytearray(whole)
            for at in rng.integers(len(whole), size=8):
                edited[at] = rng.integers(256)
            (tmp_path / f"edited{i}{name}").write_bytes(bytes(edited))
        options = {**TRUSTED, **_inputs(image=[1, 3, 8, 8], gain=[1])} if module == SCRIPT else {}
        for path in sorted(tmp_path.glob(f"*{name}")):
            jobs[path.name] = module + "describe", {"source": [str(path)], "options": options}
    for name, result in steps(jobs).items():
        if "inputs" not in result:  # an edit may change a weight only
            message(result)
        assert "inputs" not in result or name.startswith("edited")


def test_live_export_refuses_what_it_cannot_use() -> None:
    from edgekit_converters.torch import save_live

    with pytest.raises(UsageError, match="signature does not go"):
        save_live(object(), None, "x.pt2", {"signature": "a"})
