"""What goes into an estimator and what comes out, as arrays by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import ModelError, UsageError, one_line, require
from edgekit_converters.sklearn_file import is_text_vectorizer
from edgekit_runtime.manifest import TensorSpec

__all__ = ["Interface", "Output", "address_columns", "check_options", "interface_of"]

_MOST_OUTPUT_COLUMNS = 1 << 24


@dataclass(frozen=True)
class Output:
    """One output: its name, and how the estimator computes it from what `feed` made."""

    name: str
    compute: Callable[[Any], Any]


@dataclass(frozen=True)
class Interface:
    """What goes in and out of an estimator.

    `kind` is `text` (strings, one column), `matrix` (numbers, one row per sample) or `columns`
    (one input per column of a table). `outputs` are arrays: labels (N,), all else (N, columns).
    """

    kind: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[Output, ...]
    #: all columns of the table, those that nothing uses included
    columns: tuple[str, ...] = ()
    named: bool = False
    dummies: Mapping[str, Any] = field(default_factory=dict)

    def feed(self, sample: Mapping[str, Any]) -> Any:
        """What the estimator's methods take for these inputs.

        Raises:
            MissingExtraError: it was fitted on a DataFrame and pandas is not installed.
            UsageError: an input is missing.
        """
        missing = [spec.name for spec in self.inputs if spec.name not in sample]
        if missing:
            raise UsageError(f"no array for input {missing[0]!r}; found {', '.join(sample)}")
        if self.kind == "text":
            return [str(text) for text in np.asarray(sample[self.inputs[0].name]).ravel()]
        if self.kind == "matrix":
            array = np.asarray(sample[self.inputs[0].name])
            return array.astype(str).astype(object) if array.dtype.kind in "UO" else _wide(array)
        given = {spec.name: _wide(np.asarray(sample[spec.name])).ravel() for spec in self.inputs}
        rows = len(next(iter(given.values())))
        every = {name: given.get(name, np.zeros(rows)) for name in self.columns}
        if self.named:
            return require("pandas", extra="sklearn").DataFrame(every)
        table = np.empty((rows, len(every)), object)
        for number, column in enumerate(every.values()):
            table[:, number] = column
        return table

    def dummy(self, rows: int, *, span: tuple[float, float] = (0.0, 1.0)) -> dict[str, Any]:
        """Inputs of the right types, the values of no meaning; not the same in every row. Numbers
        that the model knows nothing of are in `span`."""
        made: dict[str, Any] = {}
        rng = np.random.default_rng(0)
        for spec in self.inputs:
            shape = tuple(d if isinstance(d, int) else rows for d in spec.shape)
            values = self.dummies.get(spec.name)
            if values is not None:
                made[spec.name] = np.resize(np.asarray(values), shape)
                if spec.dtype != "string":
                    made[spec.name] = made[spec.name].astype(spec.dtype)
            elif spec.dtype == "string":
                made[spec.name] = np.full(shape, "a text")
            else:
                # Not negative: some estimators take no such numbers.
                made[spec.name] = rng.uniform(*span, shape).astype(spec.dtype)
        return made

    def run(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name.

        Raises:
            ModelError: the estimator fails on these inputs.
        """
        fed = self.feed(sample)
        double = self.kind != "text" and all(s.dtype != "float32" for s in self.inputs)
        try:
            return {one.name: _plain(one.compute(fed), one.name, double) for one in self.outputs}
        except ValueError as error:
            # Some of Cython's functions take only the dtype they were fitted with.
            if "Buffer dtype mismatch" not in str(error) or not isinstance(fed, np.ndarray):
                raise ModelError(f"scikit-learn fails on the inputs: {one_line(error)}") from error
            fed = fed.astype(np.float32)
            return {one.name: _plain(one.compute(fed), one.name, double) for one in self.outputs}
        except (AttributeError, TypeError, IndexError, KeyError) as error:
            raise ModelError(
                f"scikit-learn fails on the inputs: {type(error).__name__}: {one_line(error)}"
            ) from error


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing here.

    Raises:
        UsageError: one is set.
    """
    for name in ("signature", "weights", "layout"):
        if options.get(name):
            raise UsageError(f"scikit-learn models have no {name}; leave out --{name}")


def interface_of(model: Any, options: Mapping[str, Any]) -> Interface:
    """What goes in and out, with the shapes and dtypes of `options["inputs"]`.

    Raises:
        UsageError: `options["inputs"]` do not fit, or are needed and absent.
        ModelError: it has no outputs that could be arrays.
    """
    first = _first(model)
    given: Mapping[str, Any] = options.get("inputs") or {}
    table = _table(first)
    dtypes = {dtype for dtype, _ in table.values()}
    is_table = type(first).__name__ == "ColumnTransformer"
    if _reads_text(first):
        made = Interface("text", (_text_input(given),), tuple(_outputs(model)))
    elif dtypes <= {"float32"} or (dtypes == {"string"} and not is_table):
        spec = _matrix_input(model, given, "string" if "string" in dtypes else "float32")
        known = {spec.name: _rows(first, table, int(spec.shape[1]))} if table else {}
        if is_table:  # of a DataFrame's columns by name: an array has numbers
            model = _by_number(model)
        made = Interface("matrix", (spec,), tuple(_outputs(model)), dummies=known)
    else:
        made = _columns(first, table, given, tuple(_outputs(model)))
    both = {spec.name for spec in made.inputs} & {one.name for one in made.outputs}
    if both:
        raise UsageError(
            f"an input and an output are called {min(both)!r}: give the input another name "
            "(--inputs, or the name of the column)"
        )
    return made


# --- what goes in -------------------------------------------------------------------------------


def _first(model: Any) -> Any:
    """The estimator that the inputs reach first."""
    kind = type(model).__name__
    if hasattr(model, "best_estimator_"):
        return _first(model.best_estimator_)
    if kind == "CalibratedClassifierCV" and model.calibrated_classifiers_:
        return _first(model.calibrated_classifiers_[0].estimator)
    if kind in ("FrozenEstimator", "FixedThresholdClassifier"):
        return _first(getattr(model, "estimator_", None) or model.estimator)
    if kind == "Pipeline":
        steps = [step for _, step in model.steps if step not in (None, "passthrough")]
        if steps:
            return _first(steps[0])
    return model


def _reads_text(first: Any) -> bool:
    if type(first).__name__ == "FeatureUnion":
        return all(_reads_text(_first(one)) for _, one in first.transformer_list)
    return is_text_vectorizer(first)


def _declared(given: Mapping[str, Any], name: str, wanted: str) -> tuple[str, Any, str | None]:
    """The one input's name, shape and dtype, if the user said any."""
    if len(given) > 1:
        raise UsageError(
            f"--inputs names {', '.join(given)}; the model has one input, {name}: {wanted}"
        )
    for key, one in given.items():
        return key, one.get("shape"), one.get("dtype")
    return name, None, None


def _text_input(given: Mapping[str, Any]) -> TensorSpec:
    wanted = "--inputs text=Nx1:string"
    name, shape, dtype = _declared(given, "text", wanted)
    if dtype not in (None, "string"):
        raise UsageError(f"input {name!r} is text; --inputs says {dtype}, wanted {wanted}")
    if shape and len(shape) != 1 and (len(shape) != 2 or shape[1] != 1):
        raise UsageError(f"input {name!r} is one text per row; --inputs says {shape}: {wanted}")
    return TensorSpec(name, "string", tuple(shape or ("N", 1)))


def _matrix_input(model: Any, given: Mapping[str, Any], usual: str) -> TensorSpec:
    features = getattr(model, "n_features_in_", None)
    wanted = f"--inputs X=Nx{features or 'FEATURES'}:{usual}"
    name, shape, dtype = _declared(given, "X", wanted)
    if features is None and not shape:
        raise UsageError(
            f"{type(model).__name__} does not say how many features it takes: {wanted}"
        )
    if shape and (len(shape) != 2 or not isinstance(shape[1], int)):
        raise UsageError(f"input {name!r} is a row of features per sample; wanted {wanted}")
    if shape and features is not None and shape[1] != features:
        raise UsageError(f"--inputs says {shape[1]} features, the model takes {features}: {wanted}")
    able = ("string",) if usual == "string" else ("float32", "float64")
    if dtype not in (None, *able):
        raise UsageError(f"input {name!r} is {' or '.join(able)}; --inputs says {dtype}")
    return TensorSpec(name, dtype or usual, tuple(shape or ("N", int(features or 0))))


def _rows(first: Any, table: Mapping[str, tuple[str, Any]], features: int) -> Any:
    """Rows of values that the columns know, where they know some."""
    rng = np.random.default_rng(0)
    names = _column_names(first)
    columns = [
        np.resize(np.asarray(table[name][1]), 5)
        if name in table and table[name][1]
        else rng.uniform(size=5)
        for name in names[:features]
    ]
    return np.stack(columns, axis=1)


def _by_number(model: Any) -> Any:
    """A copy whose first ColumnTransformer addresses columns by number."""
    made = copy.deepcopy(model)
    first = _first(made)
    address_columns(first, None)
    return made


def address_columns(transformer: Any, names: tuple[str, ...] | None) -> None:
    """Make a copied ColumnTransformer address columns by these names, or by number."""
    resolved = transformer._transformer_to_input_indices
    new = []
    for label, step, columns in transformer.transformers_:
        found: list[Any] = [int(index) for index in resolved.get(label, [])]
        if names is not None:
            found = [names[index] for index in found]
        # A vectorizer gets its column as a series: the column is not in a list then.
        scalar = isinstance(columns, (str, int)) and len(found) == 1
        new.append((label, step, found[0] if scalar else found))
    transformer.transformers_ = new
    if names is None and hasattr(transformer, "feature_names_in_"):
        del transformer.feature_names_in_


def _table(first: Any) -> dict[str, tuple[str, Any]]:
    """The columns that are used, by name: dtype, and values known of them. Empty where nothing
    tells columns apart."""
    names = _column_names(first)
    if hasattr(first, "categories_"):
        return {name: _column_type(first, place) for place, name in enumerate(names)}
    if type(first).__name__ != "ColumnTransformer":
        return {}
    used: dict[str, tuple[str, Any]] = {}
    for label, transformer, _ in first.transformers_:
        if isinstance(transformer, str) and transformer == "drop":
            continue
        indices = list(first._transformer_to_input_indices.get(label, []))
        for place, index in enumerate(indices):
            found = _column_type(transformer, place)
            before = used.get(names[index])
            if before is None or found[0] == "string" or before[1] is None:
                used[names[index]] = found
    return {name: used[name] for name in names if name in used}


def _column_names(first: Any) -> list[str]:
    named = getattr(first, "feature_names_in_", None)
    if named is not None:
        return [str(name) for name in named]
    return [f"x{number}" for number in range(getattr(first, "n_features_in_", 0))]


def _column_type(transformer: Any, place: int) -> tuple[str, Any]:
    first = _first(transformer)
    if _reads_text(first):
        return "string", None
    known = getattr(first, "categories_", None)
    if known is None:
        filled = getattr(first, "statistics_", None)
        if filled is not None and isinstance(filled[place], str):
            return "string", [filled[place]]
        return "float32", None
    categories = np.asarray(known[place])
    values = [one for one in categories.tolist() if one is not None and one == one]  # noqa: PLR0124  (NaN)
    if any(isinstance(one, str) for one in values):
        return "string", [str(one) for one in values]
    if categories.dtype.kind in "iub" or all(isinstance(one, (int, np.integer)) for one in values):
        return "int64", [int(one) for one in values]
    return "float32", values


def _columns(
    first: Any,
    table: Mapping[str, tuple[str, Any]],
    given: Mapping[str, Any],
    outputs: tuple[Output, ...],
) -> Interface:
    unknown = [name for name in given if name not in table]
    if unknown:
        raise UsageError(f"no column {unknown[0]!r}; the model has {', '.join(table)[:200]}")
    specs = []
    for name, (dtype, _) in table.items():
        said = given.get(name, {})
        shape = said.get("shape") or ("N", 1)
        if len(shape) != 2 or shape[1] != 1:
            raise UsageError(f"column {name!r} is Nx1; --inputs says {'x'.join(map(str, shape))}")
        specs.append(TensorSpec(name, said.get("dtype") or dtype, tuple(shape)))
    known = {name: values for name, (_, values) in table.items() if values}
    named = getattr(first, "feature_names_in_", None) is not None
    return Interface("columns", tuple(specs), outputs, tuple(_column_names(first)), named, known)


def _wide(array: Any) -> Any:
    """float32 as float64, as which scikit-learn computes in; floats only."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


# --- what comes out -----------------------------------------------------------------------------


def _outputs(model: Any) -> Iterator[Output]:
    base = require("sklearn.base", extra="sklearn")
    if base.is_classifier(model):
        yield Output("label", model.predict)
        if hasattr(model, "predict_proba"):
            yield Output("probabilities", model.predict_proba)
        elif hasattr(model, "decision_function"):
            yield Output("scores", model.decision_function)
    elif base.is_regressor(model):
        yield Output("variable", model.predict)
    elif base.is_outlier_detector(model):
        yield Output("label", model.predict)
        yield Output("scores", model.decision_function)
    elif hasattr(model, "predict_proba"):  # mixtures
        yield Output("label", model.predict)
        yield Output("probabilities", model.predict_proba)
    elif hasattr(model, "predict"):
        yield Output("label", model.predict)
        if hasattr(model, "transform"):
            yield Output("scores", model.transform)
    else:
        yield Output("variable", model.transform)


def _plain(value: Any, name: str, double: bool) -> Any:
    """A dense array: labels (N,) of int64 or strings, everything else floats (N, columns)."""
    if isinstance(value, list) or getattr(value, "ndim", 0) not in (1, 2):
        raise ModelError("models with several targets are not converted; convert one per target")
    if hasattr(value, "toarray"):
        if value.shape[1] > _MOST_OUTPUT_COLUMNS:
            raise ModelError(f"{value.shape[1]:,} columns are too many for a dense output")
        value = value.toarray()
    array = np.asarray(value)
    if name == "label":
        if array.ndim != 1:
            raise ModelError("models with several labels are not converted; convert one per label")
        return _labels(array)
    if array.dtype == object or array.dtype.kind in "US":
        raise ModelError(f"output {name!r} is not numbers; only numbers and labels are converted")
    array = array.reshape(len(array), -1)
    return array.astype(np.float64 if double else np.float32)


def _labels(array: Any) -> Any:
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    if array.dtype.kind == "f" and (array == np.rint(array)).all():
        return array.astype(np.int64)  # classes like 0.0 and 1.0 become integers in ONNX
    if array.dtype.kind in "UO" and all(isinstance(one, str) for one in array.tolist()):
        return array.astype(str)
    raise ModelError(f"labels are of dtype {array.dtype}; wanted integers or strings")
