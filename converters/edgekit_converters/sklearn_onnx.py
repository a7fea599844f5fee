"""An estimator to ONNX by skl2onnx, with what it gets wrong put right or refused."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit_converters.sklearn_file import estimators_in, is_text_vectorizer
from edgekit_converters.sklearn_model import Interface, address_columns
from edgekit_converters.sklearn_text import EXAMPLES, LOWERCASE_NOTE, prepare

__all__ = ["converted"]

_OPSET = 18
_TREES = (
    "DecisionTree", "ExtraTree", "RandomForest", "GradientBoosting", "HistGradientBoosting",
)  # fmt: skip
_INSTEAD = {
    "HashingVectorizer": "; fit a TfidfVectorizer, which has one",
    "FunctionTransformer": "; its function is Python code: do that before the model",
}
#: rows that the converted model is tried on
_ROWS = 5
_TRIED = 100
_SPANS = ((0.0, 1.0), (-3.0, 3.0), (0.0, 100.0))
#: what float32 may make of scores: an estimator whose values are off by more computes another thing
_RELATIVE = 1e-3


def converted(model: Any, made: Interface, opset: int | None) -> tuple[bytes, dict[str, Any]]:
    """The ONNX model, and `opset`, `domains` and `notes`.

    Raises:
        UsageError: skl2onnx does not write this opset.
        ModelError: an estimator has no converter, or one that computes something else.
    """
    skl2onnx = require("skl2onnx", extra="sklearn")
    most = int(skl2onnx.__max_supported_opset__)
    if opset is not None and not 9 <= opset <= most:
        raise UsageError(f"opset {opset}: skl2onnx writes 9 to {most}")
    ready = copy.deepcopy(model)
    options = _prepare(ready, made)
    wanted = opset or min(_OPSET, most)
    proto = _convert(ready, made, options, wanted)
    sublinear = {
        one.sublinear_tf for one in estimators_in(ready) if type(one).__name__ == "TfidfTransformer"
    }
    if sublinear == {True, False}:
        raise ModelError("sublinear_tf=True and False in one model: fit all with the same")
    if sublinear == {True}:
        _sublinear(proto)
    proto = _of_opset(proto, model, made, wanted, strict=opset is not None)
    domains = sorted({node.domain for node in proto.graph.node if node.domain})
    return proto.SerializeToString(), {
        "opset": next(one.version for one in proto.opset_import if not one.domain),
        "domains": domains,
        "notes": list(_notes(model, made, domains)),
    }


def _of_opset(proto: Any, model: Any, made: Interface, wanted: int, *, strict: bool) -> Any:
    """Finished and compared, as the opset it was written for: skl2onnx states the oldest that has
    all its operators, where others of the same name may mean something else. Those are found by
    comparing."""
    found = next(one for one in proto.opset_import if not one.domain)
    if found.version < wanted:
        raised = copy.deepcopy(proto)
        next(one for one in raised.opset_import if not one.domain).version = wanted
        try:
            _finish(raised, model, made)
            _compare(raised, model, made)
        except ModelError:
            if strict:
                raise
        else:
            return raised
    _finish(proto, model, made)
    _compare(proto, model, made)
    return proto


def _notes(model: Any, made: Interface, domains: list[str]) -> Iterator[str]:
    if domains:
        yield f"operators of {', '.join(domains)}: only ONNX Runtime runs this model"
    names = {type(one).__name__ for one in estimators_in(model)}
    floats = any(spec.dtype == "float32" for spec in made.inputs)
    if floats and any(name.startswith((*_TREES, "KBinsDiscretizer")) for name in names):
        yield (
            "values are compared with thresholds as float32 here; one that only float64 tells from "
            "a threshold may go the other way"
        )
    if any(is_text_vectorizer(one) and one.lowercase for one in estimators_in(model)):
        yield LOWERCASE_NOTE
    label = made.run(made.dummy(2)).get("label")
    classes = getattr(model, "classes_", None)
    if label is not None and isinstance(classes, np.ndarray) and classes.dtype.kind in "fb":
        yield f"labels are int64; scikit-learn's are {classes.dtype}"


# --- before -------------------------------------------------------------------------------------


def _prepare(model: Any, made: Interface) -> dict[Any, Any]:
    """Change the copy into what skl2onnx converts rightly; its options."""
    options: dict[Any, Any] = {}
    for one in list(estimators_in(model)):
        name = type(one).__name__
        if is_text_vectorizer(one) and not hasattr(one, "vocabulary_"):
            raise ModelError(_no_converter(name))
        if is_text_vectorizer(one):
            options[id(one)] = prepare(one)
        if name == "VotingClassifier":
            one.flatten_transform = False  # of transform() only; skl2onnx refuses True
        if name == "ColumnTransformer":
            address_columns(one, made.columns if made.kind == "columns" else None)
        if name.startswith(_TREES) and any(spec.dtype == "float64" for spec in made.inputs):
            raise UsageError(
                f"{name}: trees compare float32 in ONNX; leave float64 out of --inputs"
            )
        categorical = getattr(one, "is_categorical_", None)
        if categorical is not None and np.any(categorical):
            raise ModelError(
                f"{name}: its categorical features are sets in the trees, which skl2onnx converts "
                "to wrong comparisons; one-hot encode them before"
            )
    return options


def _convert(model: Any, made: Interface, options: dict[Any, Any], opset: int) -> Any:
    skl2onnx = require("skl2onnx", extra="sklearn")
    types = require("skl2onnx.common.data_types", extra="sklearn")
    kinds = {
        "string": types.StringTensorType, "float32": types.FloatTensorType,
        "float64": types.DoubleTensorType, "int64": types.Int64TensorType,
        "int32": types.Int32TensorType, "bool": types.BooleanTensorType,
    }  # fmt: skip
    initial = []
    for spec in made.inputs:
        if spec.dtype not in kinds:
            raise UsageError(
                f"input {spec.name!r}: no {spec.dtype}; wanted one of {', '.join(kinds)}"
            )
        shape = [None if isinstance(d, str) else d for d in spec.shape]
        # Texts are flattened in the graph; skl2onnx wants a matrix to begin with.
        initial.append((spec.name, kinds[spec.dtype]([shape[0], 1] if len(shape) == 1 else shape)))
    arguments = {
        "name": "model",  # else a new uuid each time
        "initial_types": initial, "target_opset": {"": opset, "ai.onnx.ml": 3},
    }  # fmt: skip
    base = require("sklearn.base", extra="sklearn")
    # Present and empty: to classifiers without any, pipelines give an option that not all know.
    options |= {id(one): {} for one in estimators_in(model) if base.is_classifier(one)}
    try:
        with warnings.catch_warnings(), _exact_histogram_trees():
            warnings.simplefilter("ignore")
            proto = skl2onnx.convert_sklearn(model, options=options, **arguments)
    except Exception as error:  # its converters raise every kind
        missing = re.search(
            r"Unable to find a (?:shape calculator|converter) .*?\.(\w+)'>", str(error)
        )
        if missing:
            raise ModelError(_no_converter(missing[1])) from error
        nested = re.search(r"Option 'zipmap' not in .* for class '(\w+)'", str(error))
        if nested:
            raise ModelError(
                f"skl2onnx cannot convert {nested[1]} as the last step of a pipeline inside "
                f"{type(model).__name__}; make {type(model).__name__} the last step instead"
            ) from error
        raise ModelError(
            f"skl2onnx cannot convert {type(model).__name__}: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    for node in proto.graph.node:
        if node.op_type == "ZipMap":  # to a map from label to probability: the tensor is wanted
            node.op_type, node.domain = "Identity", ""
            del node.attribute[:]
    for value in proto.graph.output:  # some are stated wrongly; they are found by running it
        value.ClearField("type")
    return proto


def _no_converter(name: str) -> str:
    return f"{name} has no converter to ONNX in skl2onnx{_INSTEAD.get(name, '')}"


@contextmanager
def _exact_histogram_trees() -> Iterator[None]:
    """Two repairs of skl2onnx 1.20 for histogram-based gradient boosting, which nothing of its
    interface reaches: bools where onnx 1.23 takes integers only, and thresholds rounded to the
    nearest float32, which sends values between the two down the other branch."""
    trees: Any = require("skl2onnx.common.tree_ensemble", extra="sklearn")
    original = trees.add_node

    def add_node(  # noqa: PLR0917  (as it is called)
        pairs: Any, is_classifier: Any, tree: Any, weight: Any, node: Any, feature: Any, mode: str,
        value: Any, *rest: Any, nodes_missing_value_tracks_true: Any = 0, **named: Any,
    ) -> Any:  # fmt: skip
        if mode == "BRANCH_LEQ" and not named.get("adjust_threshold_for_sklearn"):
            value = _float32_below(float(value))
        return original(
            pairs, is_classifier, tree, weight, node, feature, mode, value, *rest,
            nodes_missing_value_tracks_true=int(nodes_missing_value_tracks_true), **named,
        )  # fmt: skip

    trees.add_node = add_node
    try:
        yield
    finally:
        trees.add_node = original


def _float32_below(value: float) -> float:
    """The greatest float32 that is not above: `x <= value` for float32 x is `x <=` that."""
    with np.errstate(over="ignore"):
        near = np.float32(value)
    return float(np.nextafter(near, np.float32(-np.inf)) if float(near) > value else near)


# --- after --------------------------------------------------------------------------------------


def _sublinear(proto: Any) -> None:
    """1 + log(tf) for tf > 0, where skl2onnx has log(1 + tf)."""
    onnx = require("onnx", extra="onnx")
    graph = proto.graph
    ones = {one.name for one in graph.initializer if one.name.startswith("ones")}
    repaired = 0
    for add in [n for n in graph.node if n.op_type == "Add" and ones & set(n.input)]:
        log = next((n for n in graph.node if n.op_type == "Log" and n.input[0] in add.output), None)
        if log is None:
            continue
        counts, weights = add.input[0], next(iter(ones & set(add.input)))
        made = [f"{log.output[0]}_{part}" for part in ("atleast1", "log", "any")]
        position = list(graph.node).index(add)
        result = log.output[0]
        graph.node.remove(log)
        graph.node.remove(add)
        for node in (
            onnx.helper.make_node("Add", [made[1], made[2]], [result]),
            onnx.helper.make_node("Min", [counts, weights], [made[2]]),
            onnx.helper.make_node("Log", [made[0]], [made[1]]),
            onnx.helper.make_node("Max", [counts, weights], [made[0]]),
        ):
            graph.node.insert(position, node)
        repaired += 1
    if not repaired:
        raise ModelError("sublinear_tf: skl2onnx writes it in a way that cannot be put right")


def _finish(proto: Any, model: Any, made: Interface) -> None:
    """Give the outputs the names, order and shapes of `made`, and dimensions their names."""
    onnx = require("onnx", extra="onnx")
    graph = proto.graph
    sample = made.dummy(_ROWS)
    wanted, found = made.run(sample), _run(proto, made, sample)
    if len(found) < len(wanted):
        raise ModelError(
            f"{type(model).__name__}: skl2onnx makes {len(found)} outputs of {len(wanted)} "
            f"({', '.join(wanted)})"
        )
    old = [value.name for value in graph.output]
    del graph.output[:]
    for name in wanted:  # skl2onnx calls tensors on the way so, too
        _rename(graph, name, f"{name}_as_made")
    for (name, want), got, before in zip(wanted.items(), found, old, strict=False):
        inner = f"{before}_as_made" if before in wanted else before
        for node in _as_wanted(onnx, inner, name, want, np.asarray(got)):
            graph.node.append(node)
        is_text = want.dtype.kind in "UO"
        kind = "STRING" if is_text else {"int64": "INT64", "float64": "DOUBLE"}.get(
            str(want.dtype), "FLOAT"
        )  # fmt: skip
        dims = (made.inputs[0].shape[0], *map(int, want.shape[1:]))
        element = getattr(onnx.TensorProto, kind)
        graph.output.append(onnx.helper.make_tensor_value_info(name, element, dims))
    inputs = {value.name: value for value in graph.input}
    for spec in made.inputs:
        element = inputs[spec.name].type.tensor_type.elem_type
        inputs[spec.name].CopyFrom(
            onnx.helper.make_tensor_value_info(spec.name, element, list(spec.shape))
        )


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def _as_wanted(onnx: Any, inner: str, name: str, want: Any, got: Any) -> Iterator[Any]:
    """Nodes from what skl2onnx made to what scikit-learn gives."""
    constant = onnx.helper.make_node
    if want.dtype.kind == "f" and got.dtype != want.dtype:
        to = onnx.helper.np_dtype_to_tensor_dtype(want.dtype)
        yield onnx.helper.make_node("Cast", [inner], [f"{name}_cast"], to=to)
        inner = f"{name}_cast"
    if got.shape == want.shape:
        yield onnx.helper.make_node("Identity", [inner], [name])
    elif got.size == want.size:
        shape = onnx.numpy_helper.from_array(np.array([-1, *want.shape[1:]], np.int64))
        yield constant("Constant", [], [f"{name}_shape"], value=shape)
        yield onnx.helper.make_node("Reshape", [inner, f"{name}_shape"], [name])
    elif name == "scores" and want.shape[1] == 1 and got.shape == (len(want), 2):
        # Of two classes scikit-learn gives one score. skl2onnx gives two, that of the second class
        # first or last, as the estimator may be.
        near = [float(np.abs(got[:, c] - want[:, 0]).max()) for c in (0, 1)]
        column = onnx.numpy_helper.from_array(np.array([int(np.argmin(near))], np.int64))
        yield constant("Constant", [], [f"{name}_column"], value=column)
        yield onnx.helper.make_node("Gather", [inner, f"{name}_column"], [name], axis=1)
    else:
        raise ModelError(
            f"skl2onnx makes {name} of shape {got.shape} where scikit-learn makes {want.shape}"
        )


def _compare(proto: Any, model: Any, made: Interface) -> None:
    """Refuse what computes something else: on numbers of no meaning, small, negative and large, and
    on texts where tokenizers differ, which texts made by chance would hardly hit.

    Raises:
        ModelError: an output is off by more than float32 explains.
    """
    samples = [made.dummy(_TRIED, span=span) for span in _SPANS]
    if made.kind == "text":
        shape = (-1, *(1 for _ in made.inputs[0].shape[1:]))
        rows = made.inputs[0].shape[0]
        texts = np.array([*EXAMPLES, *_texts_of(model)], object)
        count = rows if isinstance(rows, int) else len(texts)
        samples = [
            {made.inputs[0].name: np.resize(texts[at : at + count], (count,)).reshape(shape)}
            for at in range(0, len(texts), count)
        ]
    for number, sample in enumerate(samples):
        try:
            wanted = made.run(sample)
        except ModelError:
            if number:
                continue  # it takes no such values
            raise
        found = dict(zip(wanted, _run(proto, made, sample), strict=True))
        clear = np.ones(len(next(iter(wanted.values()))), bool)
        for name in [one for one in wanted if one != "label"]:
            _compare_numbers(name, wanted[name], found[name])
            clear = _decided(wanted[name])
        if "label" in wanted:
            wrong = int((clear & (wanted["label"] != found["label"])).sum())
            if wrong:
                raise ModelError(
                    f"{type(model).__name__}: skl2onnx's labels differ from scikit-learn's in "
                    f"{wrong} of {len(clear)} rows"
                )


def _compare_numbers(name: str, want: Any, got: Any) -> None:
    if not np.array_equal(np.isfinite(want), np.isfinite(got)):
        raise ModelError(f"skl2onnx's {name} are NaN or infinite where scikit-learn's are not")
    finite = np.isfinite(want)
    scale = float(np.abs(want[finite]).max(initial=1e-6))
    off = float(np.abs(want[finite] - got[finite]).max(initial=0.0)) / scale
    if off > _RELATIVE:
        raise ModelError(
            f"skl2onnx's {name} differ from scikit-learn's by {off:.2g} of the greatest value; "
            "with float64 inputs (--inputs X=...:float64) they may not"
        )


def _decided(scores: Any) -> Any:
    """The rows in which rounding cannot make another label the best."""
    scale = _RELATIVE * max(float(np.abs(scores).max(initial=0.0)), 1e-6)
    if scores.shape[1] == 1:
        return np.abs(scores[:, 0]) > scale
    ordered = np.sort(scores, axis=1)
    return (ordered[:, -1] - ordered[:, -2] > scale) & (ordered[:, 1] - ordered[:, 0] > scale)


def _texts_of(model: Any) -> Iterator[str]:
    """Texts of the words that the vectorizers know, some of them several times."""
    rng = np.random.default_rng(0)
    for one in estimators_in(model):
        if is_text_vectorizer(one):
            terms = rng.permutation(sorted(map(str, one.vocabulary_)))
            for at in range(0, min(len(terms), 200), 10):
                counts = rng.integers(1, 4, len(terms[at : at + 10]))
                yield " ".join(np.repeat(terms[at : at + 10], counts))


def _run(proto: Any, made: Interface, sample: Mapping[str, Any]) -> list[Any]:
    ort = require("onnxruntime", extra="onnx")
    given = {value.name for value in proto.graph.input}
    fed = {}
    for spec in made.inputs:
        array = np.asarray(sample[spec.name])
        shaped = array.reshape(-1, 1) if array.ndim == 1 else array
        fed[spec.name] = shaped.astype(object if spec.dtype == "string" else spec.dtype)
        if len(spec.shape) == 1 and _rank(proto, spec.name) == 1:
            fed[spec.name] = fed[spec.name].ravel()
    try:
        quiet = ort.SessionOptions()
        quiet.log_severity_level = 4
        session = ort.InferenceSession(
            proto.SerializeToString(), quiet, providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, {name: a for name, a in fed.items() if name in given}))
    except Exception as error:  # its exceptions have no common base
        double = any(spec.dtype == "float64" for spec in made.inputs)
        hint = "; not every estimator converts with float64 inputs: try float32" if double else ""
        raise ModelError(
            f"ONNX Runtime does not run what skl2onnx makes of it: {one_line(error)}{hint}"
        ) from error


def _rank(proto: Any, name: str) -> int:
    value = next(value for value in proto.graph.input if value.name == name)
    return len(value.type.tensor_type.shape.dim)
