"""The manifest: what goes in comes out, and nothing else gets in."""

import copy
import dataclasses
import json
import string
import sys
from collections.abc import Iterator
from typing import Any

import bundles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit_runtime import BundleError, Manifest, TensorSpec
from edgekit_runtime.manifest import (
    Deflated,
    FileEntry,
    Golden,
    InputSteps,
    StatePair,
    Tolerance,
    Variant,
)

CONTENTS = {"a/in.npz": b"i", "a/model.onnx": b"m", "a/out.npz": b"o", "b.tflite": b"t"}
FULL = bundles.make_manifest(
    CONTENTS,
    inputs=(
        TensorSpec("x", "float32", ("N", 4), layout="NC", range=(-1.5, 2.0), example=(2, 4)),
        TensorSpec("k", "int32", ()),
    ),
    variants=(
        bundles.make_variant(
            input_names=("x", "k"), expected={"latency_ns": {"p50": 5}, "deep": [[1, None]]}
        ),
        bundles.make_variant(
            id="b",
            engine="litert",
            format="tflite",
            files=("b.tflite",),
            input_names=("k", "x"),
            on_misplacement="next",
            machines=("x86_64", "aarch64"),
            memory_bytes=1 << 20,
        ),
    ),
    states=(StatePair("x", "y"),),
    preprocess={"x": InputSteps("image", ({"op": "resize", "size": [8, 8]},))},
    postprocess=({"op": "softmax"},),
    labels=("cat", "größte Katze", "\U0001f408"),
    provenance={"tools": {"onnx": "1.19"}, "commands": ["edgekit optimize\n"]},
    signature="none yet",
)
FULL = dataclasses.replace(
    FULL, files=(dataclasses.replace(FULL.files[0], deflated=Deflated(7, "0" * 64)),
                 *FULL.files[1:]),
)  # fmt: skip
RAW: dict[str, Any] = json.loads(FULL.to_json())

Path = tuple[str | int, ...]


def refusal(raw: Any) -> str:
    text = raw if isinstance(raw, (str, bytes)) else json.dumps(raw)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- round trip -----------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    text = FULL.to_json()
    assert Manifest.from_json(text) == FULL
    assert Manifest.from_json(text.encode()) == FULL
    assert Manifest.from_json(text).to_json() == text


def test_the_same_manifest_gives_the_same_bytes() -> None:
    shuffled = json.dumps(dict(reversed(RAW.items())))
    assert Manifest.from_json(shuffled).to_json() == FULL.to_json()


def test_integers_are_good_floats() -> None:
    raw = copy.deepcopy(RAW)
    raw["inputs"][0]["range"] = [0, 1]
    manifest = Manifest.from_json(json.dumps(raw))
    assert manifest.inputs[0].range == (0.0, 1.0)
    assert all(type(v) is float for v in manifest.inputs[0].range)


def test_optional_fields_have_defaults() -> None:
    raw = copy.deepcopy(RAW)
    for key in ("labels", "provenance", "signature"):
        del raw[key]
    for key in ("layout", "range", "example"):
        del raw["inputs"][0][key]
    del raw["variants"][0]["expected"]
    del raw["variants"][0]["golden"]["synthetic"]
    manifest = Manifest.from_json(json.dumps(raw))
    assert (manifest.labels, manifest.provenance, manifest.signature) == (None, {}, None)
    assert manifest.inputs[0] == TensorSpec("x", "float32", ("N", 4))
    assert manifest.variants[0].expected == {}
    assert manifest.variants[0].golden.synthetic is True


names = st.text(string.ascii_letters + " éß猫", min_size=1, max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.integers(0, 2**62)
specs = st.builds(
    TensorSpec,
    names,
    st.sampled_from(["float32", "int8", "string"]),
    st.lists(st.integers(1, 2**31) | names, max_size=5).map(tuple),
    st.none() | names,
    st.none() | st.tuples(finite, finite).map(lambda pair: tuple(sorted(pair))),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | finite | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    inputs, outputs = (
        tuple(draw(st.lists(specs, min_size=1, max_size=3, unique_by=lambda s: s.name)))
        for _ in range(2)
    )
    paths = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    path = st.sampled_from(paths)
    tolerances = st.builds(Tolerance, finite.map(abs), finite.map(abs))

    def variant(name: str) -> Variant:
        golden = Golden(
            draw(path), draw(path), draw(st.integers(1, 9)),
            {s.name: draw(tolerances) for s in outputs}, draw(st.booleans()),
        )  # fmt: skip
        return Variant(
            name, draw(names), draw(names), tuple({draw(path)}), draw(names),
            draw(st.integers(1, 64)), draw(names),
            tuple(f"engine {s.name}" for s in inputs), tuple(s.name for s in outputs),
            draw(st.dictionaries(names, finite, max_size=2)), golden,
            draw(st.dictionaries(names, anything, max_size=2)),
        )  # fmt: skip

    variants = draw(st.lists(names, min_size=1, max_size=2, unique=True))
    return bundles.make_manifest(
        {}, name=draw(names), sequence=draw(sizes), inputs=inputs, outputs=outputs,
        files=tuple(FileEntry(p, draw(names), draw(sizes), draw(sizes)) for p in paths),
        variants=tuple(variant(name) for name in variants),
        labels=draw(st.none() | st.lists(names, max_size=3).map(tuple)),
        provenance=draw(st.dictionaries(names, anything, max_size=2)),
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(manifests())
def test_any_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    text = manifest.to_json()
    again = Manifest.from_json(text)
    assert again == manifest
    assert again.to_json() == text


# --- wrong types, missing and unknown keys --------------------------------------------------------

#: what is free-form: inside these, any JSON is right
_FREE = ("expected", "provenance", "postprocess", "steps")


def _walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value of the JSON tree with its path, free-form ones not entered."""
    yield path, value
    if path and path[-1] in _FREE:
        return
    children: Any = value.items() if isinstance(value, dict) else ()
    for key, child in enumerate(value) if isinstance(value, list) else children:
        yield from _walk(child, (*path, key))


def _replaced(path: Path, value: Any) -> Any:
    if not path:
        return value
    raw = copy.deepcopy(RAW)
    place = raw
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    return raw


def _kind(value: Any) -> str:
    """The JSON type, whole numbers apart."""
    return {
        type(None): "null", bool: "bool", int: "int", float: "float", str: "text",
        list: "list", dict: "object",
    }[type(value)]  # fmt: skip


#: kinds that fit a field; the others take the kind they have in RAW only
_KINDS = {
    "labels": {"null", "list"},
    "variants.#.memory_bytes": {"null", "int"},
    "files.#.deflated": {"null", "object"},
    "signature": {"null", "text"},
    "inputs.#.layout": {"null", "text"},
    "inputs.#.range": {"null", "list"},
    "inputs.#.range.#": {"int", "float"},
    "inputs.#.example": {"null", "list"},
    "inputs.#.example.#": {"int"},
    "inputs.#.shape.#": {"int", "text"},
    "variants.#.placement.CPU": {"int", "float"},
    "variants.#.golden.tolerance.y.atol": {"int", "float"},
    "variants.#.golden.tolerance.y.rtol": {"int", "float"},
}


def _right_kinds(path: Path, value: Any) -> set[str]:
    field = ".".join("#" if isinstance(key, int) else key for key in path)
    return _KINDS.get(field.replace("outputs.", "inputs."), {_kind(value)})


WRONG: list[Any] = [None, True, 7, 0.5, "text", [], ["x", None], {}, {"x": 1}]
CASES = [
    (path, wrong)
    for path, value in _walk(RAW)
    if path
    for wrong in WRONG
    if _kind(wrong) not in _right_kinds(path, value)
]


def test_every_field_of_every_class_is_among_the_cases() -> None:
    reached = {key for path, _ in CASES for key in path if isinstance(key, str)}
    for kind in (
        Manifest, Variant, Golden, Tolerance, FileEntry, Deflated, TensorSpec, StatePair,
        InputSteps,
    ):  # fmt: skip
        assert {field.name for field in dataclasses.fields(kind)} <= reached
    assert len(CASES) > 500


def test_wrong_types_are_refused_by_name() -> None:
    """One test for all cases: they are many and take microseconds."""
    for path, wrong in CASES:
        message = refusal(_replaced(path, wrong))
        last = path[-1]
        assert (f"[{last}]" if isinstance(last, int) else last) in message, (path, wrong, message)
    for wrong in WRONG:
        assert "schema" in refusal(json.dumps(wrong))


def _objects() -> list[tuple[Path, dict[str, Any]]]:
    return [
        (path, value)
        for path, value in _walk(RAW)
        if isinstance(value, dict)
        and (not path or path[-1] not in (*_FREE, "placement", "preprocess", "macs"))
        and "tolerance" not in path[-1:]
    ]  # fmt: skip


def test_unknown_keys_are_refused_by_name() -> None:
    assert len(_objects()) >= 12
    for path, value in _objects():
        message = refusal(_replaced(path, {**value, "surprise": 1}))
        assert "unknown key 'surprise'" in message


def test_missing_keys_are_refused_by_name() -> None:
    optional = {
        "labels",
        "provenance",
        "signature",
        "layout",
        "range",
        "example",
        "expected",
        "synthetic",
        "states",
        "preprocess",
        "postprocess",
        "on_misplacement",
        "machines",
        "memory_bytes",
        "macs",
        "deflated",
    }
    tried = 0
    for path, value in _objects():
        for key in set(value) - optional:
            message = refusal(_replaced(path, {k: v for k, v in value.items() if k != key}))
            assert key in message
            tried += 1
    assert tried > 50


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_random_json_anywhere_is_right_or_refused(data: st.DataObject) -> None:
    path, _ = data.draw(st.sampled_from(list(_walk(RAW))))
    text = json.dumps(_replaced(path, data.draw(anything)))
    try:
        manifest = Manifest.from_json(text)
    except BundleError as error:
        assert "\n" not in str(error)
    else:
        assert Manifest.from_json(manifest.to_json()) == manifest


# --- not JSON, or not quite -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "nope", FULL.to_json()[:-3], FULL.to_json() + "x", "\ufeff" + FULL.to_json()],
    ids=["empty", "blank", "brace", "word", "cut", "more", "mark"],
)
def test_what_is_not_json_is_refused(text: str) -> None:
    assert "not JSON" in refusal(text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_refused(encoding: str) -> None:
    text = json.dumps(RAW, ensure_ascii=False).replace("\U0001f408", "!")
    assert "not JSON" in refusal(text.encode(encoding))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_json_has_no_nan(number: str) -> None:
    for old in ('"p50": 5', '"atol": 1e-05'):
        text = FULL.to_json()
        assert old in text
        assert number in refusal(text.replace(old, f"{old.split(':')[0]}: {number}", 1))


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400, "9" * 5000])
def test_huge_numbers_are_refused(number: str) -> None:
    for field in ("atol", "samples", "threads", "sequence", "size_bytes"):
        start = FULL.to_json().index(f'"{field}": ') + len(field) + 4
        end = min(FULL.to_json().index(c, start) for c in ",\n")
        refusal(FULL.to_json()[:start] + number + FULL.to_json()[end:])


def test_nothing_infinite_is_written() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(BundleError, match="cannot be written"):
            dataclasses.replace(FULL, provenance={"drop": value}).to_json()


def test_deep_nesting_is_refused() -> None:
    for depth in (2_000, 1_000_000):
        for left, right in (("[", "]"), ('{"a":', "}")):
            deep = left * depth + "1" + right * depth
            refusal(deep)
            text = FULL.to_json()
            refusal(text.replace('"small"', deep))
            refusal(text.replace('"CPU": 1.0', f'"CPU": {deep}'))


def test_nesting_that_just_parses_is_no_other_error() -> None:
    """Between what json can parse and what we can walk: an answer or a BundleError."""
    limit = sys.getrecursionlimit()
    for depth in (*range(10, limit, limit // 20), *range(limit - 250, limit)):
        text = FULL.to_json().replace('"small"', "[" * depth + "]" * depth)
        refusal(text)


@pytest.mark.parametrize("depth", [63, 64, 65, 150, 5_000])
def test_free_form_values_are_nested_within_reason(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    text = json.dumps(RAW).replace('{"onnx": "1.19"}', deep)
    if depth <= 64:
        assert Manifest.from_json(text).to_json().count("[") >= depth
    else:
        refusal(text)


def test_a_key_twice_is_refused() -> None:
    text = FULL.to_json().replace('"scheme": "fp32"', '"scheme": "fp32", "scheme": "int8"', 1)
    assert "twice" in refusal(text)


@pytest.mark.parametrize("schema", ["edgekit.bundle/2", "edgekit.bundle/10", "", None, 1, ["x"]])
def test_another_schema_is_refused_before_anything_else(schema: Any) -> None:
    message = refusal({"schema": schema, "what": "a newer host wrote"})
    assert repr(schema) in message
    assert "'edgekit.bundle/1'" in message
    assert "update" in message


def test_control_characters_are_refused_where_they_would_be_printed() -> None:
    for bad in ("a\nb", "\x1b[2J", "\x00", "\x9b", "\ud800", "\x7f"):
        for path in (("name",), ("variants", 0, "id"), ("labels", 0), ("inputs", 0, "name")):
            message = refusal(_replaced(path, bad))
            assert "control characters" in message
            assert message.isprintable()
        assert "control characters" in refusal(
            _replaced(("variants", 0, "placement"), {"CPU" + bad: 1.0})
        )


# --- what must fit together -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("variants",), [], "no variant"),
        (("variants", 1, "id"), "a", "the variant 'a' twice"),
        (("inputs", 1, "name"), "x", "the input 'x' twice"),
        (("outputs",), [RAW["outputs"][0]] * 2, "the output 'y' twice"),
        (("variants", 0, "files"), ["gone.onnx"], "'a' needs 'gone.onnx'"),
        (("variants", 0, "files"), ["a/model.onnx", "a/model.onnx"], "two files of one name"),
        (("variants", 1, "golden", "inputs"), "gone.npz", "'b' needs 'gone.npz'"),
        (("variants", 1, "golden", "outputs"), "gone.npz", "'b' needs 'gone.npz'"),
        (("variants", 0, "input_names"), ["x"], "other inputs or outputs"),
        (("variants", 0, "input_names"), ["x", "x"], "other inputs or outputs"),
        (("variants", 0, "output_names"), ["y", "z"], "other inputs or outputs"),
        (("variants", 0, "output_names"), [], "other inputs or outputs"),
        (("variants", 0, "threads"), 0, "0 threads"),
        (("variants", 0, "threads"), -4, "-4 threads"),
        (("variants", 0, "golden", "samples"), 0, "0 golden samples"),
        (("variants", 0, "golden", "tolerance"), {}, "tolerances"),
        (("variants", 0, "golden", "tolerance"), {"z": {"atol": 1, "rtol": 1}}, "tolerances"),
        (("variants", 0, "golden", "tolerance", "y", "atol"), -1e-9, "negative tolerance"),
        (("variants", 0, "golden", "tolerance", "y", "rtol"), -1, "negative tolerance"),
        (("inputs", 0, "shape"), ["N", 0], "shape"),
        (("outputs", 0, "shape"), [-1, 3], "shape"),
        (("inputs", 0, "range"), [1.0, 0.5], "range"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(path: Path, value: Any, says: str) -> None:
    assert says in refusal(_replaced(path, value))


def test_two_files_of_one_name_in_two_folders_are_refused() -> None:
    contents = {**CONTENTS, "c/model.onnx": b"m"}
    variant = bundles.make_variant(files=("a/model.onnx", "c/model.onnx"))
    manifest = bundles.make_manifest(contents, variants=(variant,))
    assert "two files of one name" in refusal(manifest.to_json())


def test_variants_are_found_by_id() -> None:
    assert FULL.variant().id == "a"
    assert FULL.variant("b").engine == "litert"
    with pytest.raises(BundleError, match="no variant 'c' in this bundle; it has: a, b"):
        FULL.variant("c")


# --- TensorSpec -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "given", "accepted"),
    [
        (("N", 4), (7, 4), True),
        (("N", 4), (7, 5), False),
        (("N", 4), (4,), False),
        (("N", 4), (1, 1, 4), False),
        (("N", "N"), (3, 3), True),
        (("N", "N"), (3, 4), False),
        (("N", "M"), (3, 4), True),
        ((), (), True),
        ((), (1,), False),
    ],
)
def test_specs_accept_what_fits(shape: Any, given: Any, accepted: bool) -> None:
    assert TensorSpec("x", "float32", shape).accepts(given) is accepted


def test_specs_are_shown_and_filled() -> None:
    spec = TensorSpec("x", "float32", ("N", 3, "H", "H"))
    assert str(spec) == "x: float32 [N, 3, H, H]"
    assert spec.with_batch(2) == (2, 3, 2, 2)
