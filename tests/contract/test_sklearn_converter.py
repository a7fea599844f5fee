"""scikit-learn to ONNX: what ONNX Runtime computes is what scikit-learn does, or it is refused."""

import json
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from store import fetch_wheel

from edgekit.errors import EdgeKitError, ModelError, UsageError
from edgekit_runtime import load
from edgekit_runtime.arrays import read_npz, write_npz

pytestmark = pytest.mark.needs("sklearn", "skl2onnx", "skops", "onnxruntime")
pytest.importorskip("sklearn")
pytest.importorskip("skl2onnx")

# ruff: noqa: E402  (skipped before these where they are not installed)
import joblib
import sklearn.base
import skops.io
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import Birch, KMeans
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingClassifier,
)
from sklearn.feature_extraction.text import (
    CountVectorizer,
    HashingVectorizer,
    TfidfTransformer,
    TfidfVectorizer,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC, NuSVC
from threadpoolctl import threadpool_limits

from edgekit_converters.sklearn import describe, run, save_live, tensors, to_onnx
from edgekit_converters.sklearn_text import token_expression

TRUST = {"trust_source": True}
CANCER, KIND = load_breast_cancer(return_X_y=True)
CANCER = StandardScaler().fit_transform(CANCER).astype(np.float32)
WORDS = np.array(["benign", "malign"])[KIND]
WINE, WINERY = load_wine(return_X_y=True)
WINE = StandardScaler().fit_transform(WINE).astype(np.float32)
DIABETES, PROGRESS = load_diabetes(return_X_y=True)
DIABETES = DIABETES.astype(np.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):  # OpenMP's threads wait for each other where processors are few
        yield


def saved(model: object, folder: Path) -> str:
    path = folder / "m.joblib"
    joblib.dump(model, path)
    return str(path)


def through_onnx(model, sample, folder, **options):
    """The outputs of the converted model, and the converter's facts; what `describe` says of the
    inputs and outputs is what ONNX Runtime finds."""
    path, target = saved(model, folder), str(folder / "m.onnx")
    facts = to_onnx([path], target, TRUST | options)
    said = describe([path], TRUST | options)
    with load(target) as session:
        for specs, key in ((session.inputs, "inputs"), (session.outputs, "outputs")):
            found = [(s.name, s.dtype, tuple(s.shape)) for s in specs]
            assert found == [(s["name"], s["dtype"], tuple(s["shape"])) for s in said[key]]
        return session.run(sample), facts


def through_run(model, sample, folder, **options):
    path = saved(model, folder)
    write_npz(folder / "i.npz", {f"0/{name}": array for name, array in sample.items()})
    run([path], TRUST | options, str(folder / "i.npz"), str(folder / "o.npz"))
    return {k.partition("/")[2]: v for k, v in read_npz(folder / "o.npz").items()}


# --- estimators ---------------------------------------------------------------------------------

CLASSIFIERS = [
    LogisticRegression(),
    RandomForestClassifier(20, random_state=0),
    GradientBoostingClassifier(n_estimators=10, random_state=0),
    HistGradientBoostingClassifier(max_iter=10),
    KNeighborsClassifier(),
    MLPClassifier((8,), max_iter=50, random_state=0),
    CalibratedClassifierCV(LinearSVC()),
    VotingClassifier([("a", LogisticRegression()), ("b", KNeighborsClassifier())], voting="soft"),
    GridSearchCV(make_pipeline(PCA(5), LogisticRegression()), {"pca__n_components": [3, 5]}),
]  # fmt: skip


@pytest.mark.parametrize("model", CLASSIFIERS, ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore")  # how well they converge is not the matter
@pytest.mark.parametrize("data", [(CANCER, WORDS), (WINE, WINERY)], ids=["two", "three"])
def test_classifiers(model, data, tmp_path) -> None:
    features, labels = data
    model = sklearn.base.clone(model).fit(features, labels)
    found, _ = through_onnx(model, {"X": features}, tmp_path)
    exact = features.astype(np.float64)
    assert (found["label"] == model.predict(exact)).all()
    if hasattr(model, "predict_proba"):
        np.testing.assert_allclose(found["probabilities"], model.predict_proba(exact), atol=1e-5)
    else:
        assert list(found) == ["label"]
    ran = through_run(model, {"X": features}, tmp_path)
    assert list(ran) == list(found)
    for name, array in ran.items():
        assert array.shape == found[name].shape and array.dtype.kind == np.asarray(
            found[name]
        ).dtype.kind.replace("O", "U")


@pytest.mark.parametrize(
    "model",
    [SVC(), NuSVC(), LinearSVC(), SGDClassifier(random_state=0),
     make_pipeline(MinMaxScaler(), LinearSVC())],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_scores_of_two_classes_are_the_decision_function(model, tmp_path) -> None:
    """skl2onnx gives two columns, the second class first (SVC) or last (SGD), or only one."""
    model = sklearn.base.clone(model).fit(CANCER, WORDS)
    found, _ = through_onnx(model, {"X": CANCER}, tmp_path)
    want = model.decision_function(CANCER.astype(np.float64)).reshape(-1, 1)
    np.testing.assert_allclose(found["scores"], want, rtol=1e-4, atol=1e-4)
    assert (found["label"] == model.predict(CANCER)).all()


@pytest.mark.parametrize(
    "model",
    [LinearRegression(), RandomForestRegressor(10, random_state=0),
     HistGradientBoostingRegressor(max_iter=20)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_regressors(model, tmp_path) -> None:
    model = sklearn.base.clone(model).fit(DIABETES, PROGRESS)
    found, _ = through_onnx(model, {"X": DIABETES}, tmp_path)
    want = model.predict(DIABETES.astype(np.float64)).reshape(-1, 1)
    np.testing.assert_allclose(found["variable"], want, rtol=1e-5)


def test_transformers_clusters_and_outliers(tmp_path) -> None:
    exact = WINE.astype(np.float64)
    found, _ = through_onnx(PCA(3).fit(WINE), {"X": WINE}, tmp_path)
    np.testing.assert_allclose(found["variable"], PCA(3).fit_transform(WINE), atol=1e-5)
    clusters = KMeans(3, n_init=1, random_state=0).fit(exact)
    found, _ = through_onnx(clusters, {"X": WINE}, tmp_path)
    assert (found["label"] == clusters.predict(exact)).all()
    np.testing.assert_allclose(found["scores"], clusters.transform(exact), rtol=1e-4)
    forest = IsolationForest(n_estimators=10, random_state=0).fit(exact)
    found, _ = through_onnx(forest, {"X": WINE}, tmp_path)
    np.testing.assert_allclose(
        found["scores"].ravel(), forest.decision_function(exact), atol=1e-5
    )  # fmt: skip


def test_thresholds_of_histogram_trees_are_exact(tmp_path) -> None:
    """skl2onnx rounds them to the nearest float32; values between the two then go astray."""
    features = np.round(CANCER.astype(np.float64), 2)
    model = HistGradientBoostingClassifier(max_iter=30).fit(features, KIND)
    thresholds = model._bin_mapper.bin_thresholds_
    rng = np.random.default_rng(0)
    at = np.stack([rng.choice(one, 2000) for one in thresholds], axis=1)
    near = np.nextafter(at.astype(np.float32), np.float32(rng.choice([-9, 9], at.shape)))
    sample = np.concatenate([at.astype(np.float32), near])
    found, facts = through_onnx(model, {"X": sample}, tmp_path)
    want = model.predict_proba(sample.astype(np.float64))
    np.testing.assert_allclose(found["probabilities"], want, atol=1e-5)
    assert any("thresholds as float32" in note for note in facts["notes"])
    with pytest.raises(UsageError, match="leave float64 out"):
        through_onnx(model, {}, tmp_path, inputs={"X": {"shape": ["N", 30], "dtype": "float64"}})


def test_double_in_double_out(tmp_path) -> None:
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(CANCER, KIND)
    options = {"inputs": {"features": {"shape": [2, 30], "dtype": "float64"}}}
    sample = CANCER[:2].astype(np.float64)
    found, _ = through_onnx(model, {"features": sample}, tmp_path, **options)
    assert found["probabilities"].dtype == np.float64
    np.testing.assert_allclose(found["probabilities"], model.predict_proba(sample), atol=1e-12)


def test_labels_that_are_floats_or_bools_become_integers_and_it_is_said(tmp_path) -> None:
    for labels in (KIND.astype(float), KIND == 1):
        model = LogisticRegression().fit(CANCER, labels)
        found, facts = through_onnx(model, {"X": CANCER}, tmp_path)
        assert found["label"].dtype == np.int64
        assert (found["label"] == model.predict(CANCER)).all()
        assert any("labels are int64" in note for note in facts["notes"])


# --- tables -------------------------------------------------------------------------------------


def table(rows: int = 200) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    age = rng.integers(18, 90, rows)
    town = rng.choice(["Köln", "Wien", "Zürich"], rows)
    grade = rng.integers(0, 4, rows)
    text = rng.choice(["very good", "bad bad", "so so"], rows)
    cells = np.array([*zip(age, town, grade, text, strict=True)], dtype=object)
    columns = {
        "x0": age.astype(np.float32), "x1": town, "x2": grade.astype(np.int64), "x3": text,
    }  # fmt: skip
    return cells, {k: v.reshape(-1, 1) for k, v in columns.items()}, (age > 40) & (town == "Wien")


def test_mixed_columns_are_an_input_each(tmp_path) -> None:
    cells, columns, labels = table()
    chooser = ColumnTransformer([
        ("number", StandardScaler(), [0]), ("town", OneHotEncoder(), [1]),
        ("grade", OneHotEncoder(), [2]), ("text", TfidfVectorizer(), 3),
    ])  # fmt: skip
    model = make_pipeline(chooser, LogisticRegression()).fit(cells, labels)
    found, _ = through_onnx(model, columns, tmp_path)
    np.testing.assert_allclose(found["probabilities"], model.predict_proba(cells), atol=1e-5)
    with pytest.raises(UsageError, match="no column 'x7'; the model has x0, x1, x2, x3"):
        describe([saved(model, tmp_path)], TRUST | {"inputs": {"x7": {"shape": ["N", 1]}}})


def test_columns_of_numbers_stay_one_input(tmp_path) -> None:
    chooser = ColumnTransformer([("a", StandardScaler(), [0, 2])], remainder="drop")
    model = make_pipeline(chooser, LogisticRegression()).fit(WINE, WINERY)
    found, _ = through_onnx(model, {"X": WINE}, tmp_path)
    np.testing.assert_allclose(found["probabilities"], model.predict_proba(WINE), atol=1e-5)
    cells, columns, labels = table()
    model = make_pipeline(OrdinalEncoder(), MultinomialNB()).fit(cells[:, [1, 3]], labels)
    words = np.hstack([columns["x1"], columns["x3"]])
    found, _ = through_onnx(model, {"X": words}, tmp_path)
    np.testing.assert_allclose(
        found["probabilities"], model.predict_proba(cells[:, [1, 3]]), atol=1e-5
    )


@pytest.mark.needs("pandas")
def test_columns_of_a_data_frame_by_name(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    _, columns, labels = table()
    names = {"age": "x0", "town": "x1", "comment": "x3"}
    frame = pandas.DataFrame({n: columns[c].ravel() for n, c in names.items()} | {"unused": 1.0})
    chooser = ColumnTransformer([
        ("number", StandardScaler(), ["age"]), ("town", OneHotEncoder(), ["town"]),
        ("text", CountVectorizer(), "comment"),
    ])  # fmt: skip
    model = make_pipeline(chooser, LogisticRegression()).fit(frame, labels)
    sample = {name: columns[column] for name, column in names.items()}
    found, _ = through_onnx(model, sample, tmp_path)
    np.testing.assert_allclose(found["probabilities"], model.predict_proba(frame), atol=1e-5)


# --- texts --------------------------------------------------------------------------------------


def varied_texts(vocabulary: list[str], count: int) -> list[str]:
    """Sentences of known words and others in every script, with every kind of thing between."""
    rng = random.Random(0)
    between = [" ", ", ", "! ", "-", "_", "'", "  ", "\n", "\t", "…", " — ", "\u00a0", "\u200b",
               "é", ".", "\U0001f44d\U0001f3fd", "#", "½", "日本", "\r\n"]  # fmt: skip
    change = [str, str.upper, str.title, str.swapcase]
    texts = ["", " ", "\n", "a", "I", "#", "##", "é", "_", "__", "x" * 5000, "٣٤ ²³ Ⅻ"]
    while len(texts) < count:
        if len(texts) % 5:
            words = rng.choices(vocabulary, k=rng.randint(1, 14))
            texts.append("".join(rng.choice(change)(w) + rng.choice(between) for w in words))
        else:
            points = [rng.randrange(1, 0xD800) for _ in range(rng.randint(1, 40))]
            texts.append("".join(map(chr, points)))
    # What is known to differ: told in the notes, tested below.
    return [text.replace("İ", "I").replace("Σ", "S") for text in texts]


def profanity_check() -> Pipeline:
    with zipfile.ZipFile(fetch_wheel("alt-profanity-check==1.9.1")) as wheel:
        parts = {}
        for name in ("vectorizer", "model"):
            with wheel.open(f"profanity_check/data/{name}.joblib") as file:
                parts[name] = joblib.load(file)
    return Pipeline(list(parts.items()))


def test_alt_profanity_check_with_its_vectorizer(tmp_path) -> None:
    model = profanity_check()
    texts = varied_texts(sorted(model["vectorizer"].vocabulary_), 1500)
    texts += ["Go to hell, you scum!", "What a lovely day."]
    found, facts = through_onnx(model, {"text": np.array(texts).reshape(-1, 1)}, tmp_path)
    np.testing.assert_allclose(found["probabilities"], model.predict_proba(texts), atol=1e-5)
    assert (found["label"] == model.predict(texts)).all()
    assert found["label"][-2:].tolist() == [1, 0]
    assert any("İ" in note and "C.UTF-8" in note for note in facts["notes"])
    with load(tmp_path / "m.onnx") as session:  # one at a time, as on a device; also none
        for text in texts[:30]:
            alone = session.run({"text": np.array([[text]])})["probabilities"]
            np.testing.assert_allclose(alone, model.predict_proba([text]), atol=1e-5)


DOCUMENTS = [
    "Der Hund ging nach Köln und trank ein Bier", "the cat sat on the mat in new york",
    "un café à Paris, s'il vous plaît! 2 3 4", "dogs and cats and new ideas of york",
    "привет мир и new york city", "hello world hello hello",
] * 5  # fmt: skip
SUBJECTS = [0, 1, 2, 1, 0, 2] * 5


@pytest.mark.parametrize(
    "steps",
    [
        [CountVectorizer(ngram_range=(1, 2), max_features=20)],  # `new york` without `new`
        [TfidfVectorizer(ngram_range=(2, 2))],
        [TfidfVectorizer(sublinear_tf=True, norm=None)],
        [CountVectorizer(), TfidfTransformer(sublinear_tf=True, norm="l1")],
        [CountVectorizer(binary=True, lowercase=False, token_pattern=r"\w+")],
        [TfidfVectorizer(stop_words="english")],
        [TfidfVectorizer(token_pattern=r"[^\s.,!]{2,}", use_idf=False)],
    ],
    ids=["ngrams", "bigrams", "sublinear", "transformer", "binary", "stop", "pattern"],
)
def test_text_vectorizers(steps, tmp_path) -> None:
    model = make_pipeline(*steps, LogisticRegression()).fit(DOCUMENTS, SUBJECTS)
    texts = [*DOCUMENTS[:6], *varied_texts(sorted(steps[0].vocabulary_), 300)]
    sample = {"text": np.array(texts).reshape(-1, 1)}
    found, _ = through_onnx(model, sample, tmp_path)
    np.testing.assert_allclose(found["probabilities"], model.predict_proba(texts), atol=1e-5)


@pytest.mark.parametrize("pattern", [r"(?u)\b\w\w+\b", r"\w+", r"\b\w{3,}\b", r"[a-z]{2,}", r"\S+"])
def test_token_expressions_name_each_character(pattern) -> None:
    """Python's `re` reads the classes made for RE2, too: the same tokens, of every character."""
    import re

    made = token_expression(pattern)
    assert set(re.findall(r"\\(.)", made)) == {"x"}
    plain = re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: f"\\U{int(m[1], 16):08x}", made)
    text = "".join(map(chr, (*range(1, 0xD800), *range(0xE000, 0x20000)))) + "ab abc é_1 x y"
    assert re.findall(plain, text) == re.findall(pattern, text)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (TfidfVectorizer(analyzer="char"), "analyzer='char' has no ONNX operator"),
        (TfidfVectorizer(analyzer="char_wb"), "fit it with analyzer='word'"),
        (TfidfVectorizer(strip_accents="unicode"), "strip_accents"),
        (TfidfVectorizer(stop_words="english", ngram_range=(1, 2)), "stop words are taken out"),
        (TfidfVectorizer(token_pattern=r"[a-z]+|\d"), "cannot be told to ONNX Runtime"),
        (TfidfVectorizer(token_pattern=r"\b[a-z]+\b"), "cannot be told to ONNX Runtime"),
        (HashingVectorizer(n_features=64), "HashingVectorizer has no converter"),
    ],
)
def test_texts_that_cannot_be_the_same_are_refused(step, said, tmp_path) -> None:
    model = make_pipeline(step, LogisticRegression()).fit(DOCUMENTS, SUBJECTS)
    with pytest.raises(ModelError, match=said) as caught:
        to_onnx([saved(model, tmp_path)], str(tmp_path / "m.onnx"), TRUST)
    assert "\n" not in str(caught.value)


# --- refusals -----------------------------------------------------------------------------------


def with_categories() -> HistGradientBoostingClassifier:
    features = np.abs(np.rint(CANCER[:, :4]))
    return HistGradientBoostingClassifier(categorical_features=[0]).fit(features, KIND)


def hard_vote() -> VotingClassifier:
    """skl2onnx takes an SVC's scores of two classes the wrong way round."""
    return VotingClassifier([(str(c), SVC(C=c)) for c in (0.1, 1, 10)], voting="hard")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Birch(n_clusters=2).fit(WINE), "Birch has no converter"),
        (lambda: FunctionTransformer(np.abs).fit(WINE), "FunctionTransformer"),
        (with_categories, "categorical features .* one-hot encode"),
        (lambda: OneVsRestClassifier(LinearSVC()).fit(CANCER, KIND), "scores differ"),
        (lambda: LogisticRegression(), "is not fitted"),
        (lambda: {"model": LinearRegression()}, r"joblib\.dump\(d\['model'\]"),
        (lambda: [1, 2], "holds a builtins.list"),
        (lambda: hard_vote().fit(CANCER, WORDS), "VotingClassifier: skl2onnx's labels differ"),
    ],
)
def test_refused_with_the_name_and_the_reason(model, said, tmp_path) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        to_onnx([saved(model(), tmp_path)], str(tmp_path / "m.onnx"), TRUST)
    assert "\n" not in str(caught.value) and not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": {"X": {"shape": ["N", 4]}}}, "the model takes 30: --inputs X=Nx30:float32"),
        ({"inputs": {"X": {"shape": ["N", 30], "dtype": "int8"}}}, "float32 or float64"),
        ({"inputs": {"a": {}, "b": {}}}, "the model has one input, X"),
        ({"inputs": {"label": {"shape": ["N", 30]}}}, "an input and an output are called 'label'"),
        ({"layout": "nhwc"}, "no layout"),
        ({"signature": "s"}, "no signature"),
        ({"opset": 99}, "skl2onnx writes 9 to"),
    ],
)
def test_options_that_cannot_be_obeyed_are_refused(options, said, tmp_path) -> None:
    path = saved(LogisticRegression().fit(CANCER, KIND), tmp_path)
    with pytest.raises(UsageError, match=said):
        to_onnx([path], str(tmp_path / "m.onnx"), TRUST | options)


def test_opset_and_facts(tmp_path) -> None:
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(CANCER, WORDS)
    for opset in (9, 13, 18):
        _, facts = through_onnx(model, {"X": CANCER}, tmp_path, opset=opset)
        assert facts["opset"] == opset and "ai.onnx.ml" in facts["domains"]
    assert through_onnx(model, {"X": CANCER}, tmp_path)[1]["opset"] == 18
    said = describe([saved(model, tmp_path)], TRUST)["facts"]
    assert said["framework"] == f"scikit-learn {sklearn.__version__}"
    assert said["layers"] == {"Pipeline": 1, "StandardScaler": 1, "LogisticRegression": 1}
    assert said["parameters"] == 3 * 30 + 30 + 1  # mean, scale, variance; weights, bias
    assert said["classes"] == ["benign", "malign"]
    assert tensors([saved(model, tmp_path)], TRUST) == []


def test_an_older_scikit_learn_is_told(tmp_path, monkeypatch) -> None:
    model = LogisticRegression().fit(CANCER, KIND)
    with monkeypatch.context() as patch:
        patch.setattr(sklearn.base, "__version__", "1.2.3")
        path = saved(model, tmp_path)
    notes = describe([path], TRUST)["facts"]["notes"]
    assert len(notes) == 1 and "saved with scikit-learn 1.2.3" in notes[0]
    assert to_onnx([path], str(tmp_path / "m.onnx"), TRUST)["notes"][0] == notes[0]


def test_the_live_model_and_its_file_give_the_same_bytes(tmp_path) -> None:
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(CANCER, KIND)
    save_live(model, str(tmp_path / "live.joblib"), {})
    for name, path in (("a", str(tmp_path / "live.joblib")), ("b", saved(model, tmp_path))):
        to_onnx([path], str(tmp_path / f"{name}.onnx"), TRUST)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# --- trust --------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.parametrize("name", ["m.joblib", "m.pkl", "m.skops"])
@pytest.mark.parametrize("call", [describe, run, to_onnx], ids=lambda f: f.__name__)
def test_a_pickle_is_not_read_without_trust(name, call, tmp_path) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({bomb!r})"], check=True)
    assert canary.exists(), "the bomb is a dud"
    canary.unlink()
    path = tmp_path / name
    path.write_bytes(bomb)
    others = {"run": ("i.npz", "o.npz")}.get(call.__name__, ("t",) * (call is to_onnx))
    arguments = [[str(path)], {}, *others] if call is not to_onnx else [[str(path)], *others, {}]
    with pytest.raises(UsageError, match="--trust-source"):
        call(*arguments)
    assert not canary.exists()


def test_skops_of_known_types_needs_no_trust_and_others_are_listed(tmp_path) -> None:
    from crafted_sources import live_skops, zipped

    path = tmp_path / "m.skops"
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(CANCER, KIND)
    skops.io.dump(model, path)
    to_onnx([str(path)], str(tmp_path / "m.onnx"), {})
    with load(tmp_path / "m.onnx") as session:
        found = session.run({"X": CANCER})["probabilities"]
    np.testing.assert_allclose(found, model.predict_proba(CANCER), atol=1e-5)
    for protocol in (0, 1, 2):  # old ones are read by other code
        canary = tmp_path / "canary"
        data = zipped(path, {"schema.json": json.dumps(live_skops(canary, protocol)).encode()})
        with pytest.raises(EdgeKitError, match="io.open, operator.call.*--trust-source"):
            describe([str(path)], {})
        assert not canary.exists()
        skops.io.load(data, trusted=skops.io.get_untrusted_types(file=data)).close()
        assert canary.exists(), "the schema is a dud"
        canary.unlink()
