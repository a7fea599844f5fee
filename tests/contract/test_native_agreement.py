"""The native runner says what the Python runtime says: of models, of bundles, of neither."""

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from native_runner import bundle_of, engine_libraries, native_program

from edgekit_runtime import BundleError, Session, load
from edgekit_runtime.bundle import Bundle

CONTENTS = {"a/in.npz": b"in" * 20, "a/model.onnx": bytes(range(256)), "a/out.npz": b"out" * 20}
MODELS = ("linear", "two", "conv", "scalar")
Said = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def native() -> Callable[..., Said]:
    program, where = native_program(), engine_libraries()

    def run(*words: object) -> Said:
        return subprocess.run(
            [program, *map(str, words)], capture_output=True, text=True, check=False,
            timeout=120, env=where,
        )  # fmt: skip

    return run


def python(*words: object) -> Said:
    return subprocess.run(
        [sys.executable, "-m", "edgekit_runtime", *map(str, words)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def sample_of(session: Session) -> dict[str, np.ndarray]:
    """Noise; what is free is 6."""
    rng = np.random.default_rng(0)
    return {
        spec.name: rng.uniform(0, 4, spec.with_batch(6)).astype(spec.dtype)
        for spec in session.inputs
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("onnxruntime", marks=pytest.mark.needs("onnxruntime", "onnx")),
        pytest.param("litert", marks=pytest.mark.needs("litert")),
    ],
)
def test_models_give_the_same_outputs(native, small_model, tmp_path, engine, name) -> None:
    model = small_model(engine, name)
    with load(model) as session:
        sample = sample_of(session)
        wanted = session.run(sample)
    np.savez(tmp_path / "in.npz", **sample)
    if engine == "litert":  # its C interface says sizes, not which of them are free: bundles do
        changes = {"engine": engine, "format": "tflite"}
        model = bundle_of(model, [sample], tmp_path / "m.edgekit", variant=changes)
    done = native(
        "run", model, "--input", tmp_path / "in.npz", "--tensors", "--output", tmp_path / "o.npz"
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "o.npz") as found:
        assert sorted(found.files) == sorted(wanted)
        for key, value in wanted.items():
            assert found[key].dtype == value.dtype and found[key].shape == value.shape
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5)


def test_a_schema_that_c_would_take_for_ours_is_refused(native, tmp_path) -> None:
    raw = json.loads(bundles.make_manifest(CONTENTS).to_json())
    raw["schema"] += TAIL + "x"
    path, text = tmp_path / "x.edgekit", json.dumps(raw).encode()
    path.write_bytes(bundles.archive([("manifest.json", text), *CONTENTS.items()]))
    assert verdicts(native, path) == (False, False)


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize("verb", [("info",), ("bench", "--runs", "40"), ("bench", "--cold")])
def test_json_has_the_same_shape(native, small_model, verb) -> None:
    model = small_model("onnxruntime", "linear")
    words = (verb[0], model, *verb[1:], "--json")
    ours, theirs = native(*words), python(*words)
    assert ours.returncode == theirs.returncode == 0, ours.stderr
    found = json.loads(ours.stdout)
    if "--cold" in words:  # a program knows when it was started
        assert found.pop("import_ns") > 0
    assert shape(found) == shape(json.loads(theirs.stdout))


def shape(value: Any) -> Any:
    """Its keys and kinds, without what differs from run to run."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value[:1]]
    return "number or none" if value is None or isinstance(value, (int, float)) else "text"


def verdicts(native: Callable[..., Said], path: Path) -> tuple[bool, bool]:
    """Whether Python, and whether the native runner, take the file for a bundle."""
    try:
        with Bundle(path):
            accepted = True
    except BundleError:
        accepted = False
    done = native("info", path)
    assert done.returncode in (0, 2), done.stderr
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1
    return accepted, done.returncode == 0


def test_any_change_of_a_byte_is_found(native, tmp_path) -> None:
    good = bundles.bundle(bundles.make_manifest(CONTENTS), CONTENTS)
    path, chance = tmp_path / "x.edgekit", random.Random(7)
    for _ in range(120):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 3))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        if bytes(data) == good:
            continue
        path.write_bytes(data)
        done = native("check", path)
        assert done.returncode == 2, "a changed bundle was accepted"


#: whole numbers beyond 64 bits are left out: Python takes some that the native runner refuses
WRONG = (None, True, -1, 0, 1.5, 1e300, "", "x", "a\nb", [], [0], {}, {"x": 1}, 2**62)
TAIL = "\0"  # where C would take a text to end


def changes(raw: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a manifest: keys and indices on the way to each value."""
    items = (
        raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from changes(value, (*path, key))


def changed(raw: Any, path: tuple[Any, ...], chance: random.Random) -> Any:
    made = copy.deepcopy(raw)
    place = made
    for key in path[:-1]:
        place = place[key]
    kind = chance.randrange(7)
    if kind == 0:
        del place[path[-1]]
    elif kind == 2 and isinstance(place[path[-1]], str):
        place[path[-1]] += TAIL + "x"
    elif kind == 1 and isinstance(place, dict):
        place["strange"] = 1
    else:
        place[path[-1]] = chance.choice(WRONG)
    return made


def test_manifests_are_taken_or_refused_alike(native, tmp_path) -> None:
    whole = bundles.make_manifest(
        CONTENTS, labels=("a", "b"),
        variants=(bundles.make_variant(machines=("x86_64",), memory_bytes=1, expected={"a": [1]}),),
        postprocess=({"op": "softmax"},),
        preprocess={"x": {"source": "tensor", "steps": [{"op": "scale", "by": 2.0}]}},
    )  # fmt: skip
    raw, chance = json.loads(whole.to_json()), random.Random(3)
    places, path = list(changes(raw)), tmp_path / "x.edgekit"
    accepted = refused = 0
    for _ in range(300):
        made = changed(raw, chance.choice(places), chance)
        text = json.dumps(made).encode()
        path.write_bytes(bundles.archive([("manifest.json", text), *CONTENTS.items()]))
        python_says, native_says = verdicts(native, path)
        assert python_says == native_says, text.decode()
        accepted, refused = accepted + python_says, refused + (not python_says)
    assert accepted > 10 and refused > 100
