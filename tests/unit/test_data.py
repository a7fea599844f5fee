"""Laying out data: what is accepted, what is refused and how that is said."""

import numpy as np
import pytest

from edgekit.artifact import TensorSpec
from edgekit.cache import Cache
from edgekit.data import check_calibration, open_dataset, split_samples
from edgekit.errors import InputError, UsageError
from edgekit.pipeline import Pipeline

SPECS = (TensorSpec("x", "float32", ("N", 4)), TensorSpec("n", "int32", (1,)))


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


def save(path, **changes) -> str:
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.random((40, 4), np.float32),
        "n": np.arange(40, dtype=np.int32)[:, None],
        "labels": np.arange(40) % 4,
    }
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return str(path)


def test_samples_come_back_as_they_were(tmp_path, cache) -> None:
    source = save(tmp_path / "d.npz")
    data = open_dataset(source, SPECS, cache)
    with np.load(source) as saved:
        for i in (0, 17, 39):
            sample = data.sample(i, SPECS)
            np.testing.assert_array_equal(sample["x"], saved["x"][i : i + 1])
            np.testing.assert_array_equal(sample["n"], saved["n"][i])
        np.testing.assert_array_equal(data.labels, saved["labels"])
        assert data.ranges["x"] == (saved["x"].min(), saved["x"].max())
    assert data.count == 40


def test_compressed_and_large_arrays(tmp_path, cache) -> None:
    path = tmp_path / "d.npz"
    x = np.random.default_rng(0).random((3000, 4)).astype(np.float32)
    np.savez_compressed(path, x=x, n=np.ones((3000, 1), np.int32))
    data = open_dataset(str(path), SPECS, cache)
    np.testing.assert_array_equal(data.arrays["x"], x)
    assert data.labels is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": None}, r"has the arrays n, labels; the model's inputs are x, n"),
        ({"x": np.zeros((40, 4))}, "dtype float64, the model takes float32"),
        ({"x": np.zeros((40, 5), np.float32)}, r"shape \[1, 5\], the model takes \[N, 4\]"),
        ({"x": np.zeros((39, 4), np.float32)}, "'n' has 40 samples, 'x' has 39"),
        ({"labels": np.zeros(41)}, "'labels' has 41 samples, 'x' has 40"),
        ({"x": np.full((40, 4), np.nan, np.float32)}, "sample 0 of 'x' holds NaN"),
        ({"labels": np.full(40, np.inf)}, "sample 0 of 'labels' holds NaN"),
        ({"n": np.array([{}] * 40, object)}, "holds Python objects"),
        (
            {"x": np.zeros((0, 4), np.float32), "n": np.zeros((0, 1), np.int32), "labels": None},
            "holds no samples",
        ),
        ({"x": np.asfortranarray(np.zeros((40, 4), np.float32))}, "Fortran order"),
        ({"x": np.zeros((), np.float32)}, "holds no samples"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, cache, changes, said) -> None:
    with pytest.raises(InputError, match=said) as caught:
        open_dataset(save(tmp_path / "d.npz", **changes), SPECS, cache)
    assert "\n" not in str(caught.value)
    assert not list(cache.root.rglob("index.json")), "nothing half-written stays in the cache"


def test_nan_is_found_far_inside(tmp_path, cache) -> None:
    x = np.zeros((40, 4), np.float32)
    x[31, 2] = np.inf
    with pytest.raises(InputError, match="sample 31 of 'x'"):
        open_dataset(save(tmp_path / "d.npz", x=x), SPECS, cache)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 truncated"])
def test_damaged_files_are_refused(tmp_path, cache, content) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable"):
        open_dataset(str(path), SPECS, cache)


@pytest.mark.parametrize("name", ["absent.npz", "folder", "data.csv"])
def test_unusable_sources(tmp_path, cache, name) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.csv").write_text("1")
    with pytest.raises(UsageError):
        open_dataset(str(tmp_path / name), SPECS, cache)


def test_function_source(tmp_path, cache) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    for i in range(12):\n"
        "        yield {'x': np.full(4, i, np.float32), 'n': np.array([i], np.int32)}, i % 3\n"
        "def uneven():\n"
        "    yield {'x': np.zeros(4, np.float32), 'n': np.zeros(1, np.int32)}, 0\n"
        "    yield {'x': np.zeros(5, np.float32), 'n': np.zeros(1, np.int32)}, 0\n"
        "def nothing():\n"
        "    return iter(())\n"
    )
    data = open_dataset(f"{file}:rows", SPECS, cache)
    np.testing.assert_array_equal(data.sample(5, SPECS)["x"], np.full((1, 4), 5, np.float32))
    np.testing.assert_array_equal(data.labels, np.arange(12) % 3)
    with pytest.raises(InputError, match="'x' of sample 1"):
        open_dataset(f"{file}:uneven", SPECS, cache)
    with pytest.raises(InputError, match="no samples"):
        open_dataset(f"{file}:nothing", SPECS, cache)
    with pytest.raises(UsageError, match="no function 'absent'"):
        open_dataset(f"{file}:absent", SPECS, cache)


def test_parts_never_overlap_not_even_by_copies(tmp_path, cache) -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(0, 150, (600, 1)).astype(np.float32).repeat(4, axis=1)  # many copies
    n = np.zeros((600, 1), np.int32)
    labels = x[:, 0].astype(np.int64) % 5
    data = open_dataset(save(tmp_path / "d.npz", x=x, n=n, labels=labels), SPECS, cache)
    split = split_samples(data, None)
    parts = [split.calibration, split.selection, split.confirmation]
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    values = [set(x[p, 0].tolist()) for p in parts]
    assert not (values[0] & values[1] or values[0] & values[2] or values[1] & values[2])


def test_parts_have_the_proportions_of_the_classes(tmp_path, cache) -> None:
    labels = np.repeat(np.arange(4), [400, 200, 100, 20])
    x = np.random.default_rng(6).random((720, 4)).astype(np.float32)
    n = np.zeros((720, 1), np.int32)
    data = open_dataset(save(tmp_path / "d.npz", x=x, n=n, labels=labels), SPECS, cache)
    split = split_samples(data, None)
    for kind in range(4):
        a, b = ((labels[p] == kind).sum() for p in (split.selection, split.confirmation))
        assert abs(int(a) - int(b)) <= 1
    assert 170 <= len(split.calibration) <= 181
    again = split_samples(data, None)
    np.testing.assert_array_equal(split.selection, again.selection)


def test_own_calibration_data_loses_what_the_evaluation_holds(tmp_path, cache) -> None:
    evaluation = save(tmp_path / "d.npz")
    with np.load(evaluation) as saved:
        x = np.concatenate([saved["x"][:10], saved["x"][:5] + 1])
        n = np.concatenate([saved["n"][:10], saved["n"][:5]])
    other = save(tmp_path / "c.npz", x=x, n=n, labels=None)
    data, own = (open_dataset(s, SPECS, cache) for s in (evaluation, other))
    split = split_samples(data, own)
    assert sorted(split.calibration.tolist()) == list(range(10, 15))
    assert "10 calibration samples" in split.note
    assert len(split.selection) + len(split.confirmation) == 40
    with pytest.raises(InputError, match="every sample of"):
        split_samples(data, data)


def test_too_few_samples_are_refused_with_the_number_needed(tmp_path, cache) -> None:
    source = save(
        tmp_path / "d.npz",
        x=np.zeros((5, 4), np.float32), n=np.zeros((5, 1), np.int32), labels=None,
    )  # fmt: skip
    with pytest.raises(InputError, match="1 different samples; at least 8"):
        split_samples(open_dataset(source, SPECS, cache), None)


# --- texts and names of classes -----------------------------------------------------------------

TEXTS = (TensorSpec("text", "string", ("N", 1)),)


def test_texts_are_a_column(tmp_path, cache) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, text=np.array(["good", "a longer one", "ä"]), labels=np.array([0, 1, 1]))
    data = open_dataset(str(path), TEXTS, cache)
    assert data.sample(1, TEXTS)["text"].tolist() == [["a longer one"]]


@pytest.mark.parametrize(
    ("specs", "arrays", "said"),
    [
        (TEXTS, {"text": np.zeros((4, 1), np.float32)}, "the model takes texts"),
        (SPECS[:1], {"x": np.array([["a"] * 4] * 3)}, "holds texts, the model takes float32"),
        (SPECS[:1], {"x": np.zeros((3, 4), np.complex64)}, "complex64, which no model takes"),
        (TEXTS, {"text": np.array(["a", None], object)}, r"numpy.array\(texts, dtype=str\)"),
    ],
)
def test_inputs_of_another_kind_are_refused(tmp_path, cache, specs, arrays, said) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputError, match=said):
        open_dataset(str(tmp_path / "d.npz"), specs, cache)


def test_names_of_classes_become_their_numbers(tmp_path, cache) -> None:
    pipeline = Pipeline(labels=("cat", "dog"))
    names = np.array(["dog", "cat"] * 20)
    data = open_dataset(save(tmp_path / "d.npz", labels=names), SPECS, cache, pipeline)
    assert data.labels.tolist() == [1, 0] * 20
    names[7] = "dgo"
    wrong = save(tmp_path / "e.npz", labels=names)
    with pytest.raises(InputError, match=r"label of sample 7 is 'dgo'.*did you mean 'dog'"):
        open_dataset(wrong, SPECS, cache, pipeline)


# --- calibration --------------------------------------------------------------------------------

WIDE = (TensorSpec("x", "float32", ("N", 20)),)


def wide(tmp_path, cache, x, labels=None):
    arrays = {"x": x} if labels is None else {"x": x, "labels": labels}
    np.savez(tmp_path / "wide.npz", **arrays)
    return open_dataset(str(tmp_path / "wide.npz"), WIDE, cache)


def test_good_calibration_samples_need_no_words(tmp_path, cache) -> None:
    x = np.random.default_rng(0).random((60, 20)).astype(np.float32)
    data = wide(tmp_path, cache, x, np.arange(60) % 3)
    assert check_calibration(data, np.arange(60)) == []


def test_few_calibration_samples_and_missing_classes_are_told(tmp_path, cache) -> None:
    x = np.random.default_rng(0).random((60, 20)).astype(np.float32)
    data = wide(tmp_path, cache, x, np.arange(60) // 20)
    few, missing = check_calibration(data, np.arange(25), ["cat", "dog", "cow"])
    assert "only 25 samples" in few
    assert "32" in few
    assert "of the classes cow:" in missing
    (missing,) = check_calibration(data, np.arange(60), known=np.array([0, 1, 2, 9]))
    assert "of the classes 9:" in missing


def test_calibration_samples_that_tell_nothing_are_refused(tmp_path, cache) -> None:
    x = np.random.default_rng(0).random((40, 20)).astype(np.float32)
    x[17] = 0.5
    data = wide(tmp_path, cache, x)
    with pytest.raises(InputError, match="sample 17 of 'x' is 0.5 everywhere"):
        check_calibration(data, np.arange(40))
    assert check_calibration(data, np.delete(np.arange(40), 17)) == []
    with pytest.raises(InputError, match="no samples to calibrate with"):
        check_calibration(data, np.zeros(0, np.int64))
    same = wide(tmp_path, cache, np.tile(x[:1], (40, 1)))
    with pytest.raises(InputError, match="all 40 calibration samples are the same"):
        check_calibration(same, np.arange(40))
