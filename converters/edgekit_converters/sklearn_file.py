"""scikit-learn estimators in files: which may be read, and what was found.

A `.joblib`, `.pkl` or `.pickle` runs whatever its author put into it while it is read, so it needs
`--trust-source`. A `.skops` names the types it is made of: with nothing but scikit-learn's, NumPy's
and SciPy's it is read without, else the error lists the others. What a file is, its content says:
a pickle that is called `.skops` is a pickle.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ModelError, UsageError, one_line, require

__all__ = ["Loaded", "check_estimator", "estimators_in", "is_text_vectorizer", "load"]

_TEXT = ("CountVectorizer", "TfidfVectorizer", "HashingVectorizer")
#: constructor arguments that hold fitted estimators; others hold what was fitted a copy of
_FITTED_ARGUMENTS = {
    "Pipeline": ("steps",), "FeatureUnion": ("transformer_list",),
    "FrozenEstimator": ("estimator",),
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """An estimator, and what happened while it was read."""

    model: Any
    notes: tuple[str, ...] = ()


def load(path: Path, *, trust_source: bool) -> Loaded:
    """The estimator in a file.

    Raises:
        UsageError: reading it could run code, and `trust_source` is not set.
        ModelError: it is damaged, needs what is not installed, or holds no fitted estimator.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if not data:
        raise ModelError(f"{path} is empty")
    require("sklearn", extra="sklearn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if _is_skops(path):
            model = _load_skops(path, data, trust_source=trust_source)
        elif trust_source:
            model = _unpickle(path)
        else:
            raise UsageError(
                f"{path} is a pickle, which can run any code while it is read; if you trust who "
                "made it, add --trust-source, or save the model with skops.io.dump instead"
            )
    check_estimator(model, str(path))
    return Loaded(model, tuple(_version_notes(caught)))


def check_estimator(model: Any, called: str) -> None:
    """Refuse what cannot be run.

    Raises:
        ModelError: it is no estimator, not fitted, or reads files by itself.
    """
    base = require("sklearn.base", extra="sklearn")
    validation = require("sklearn.utils.validation", extra="sklearn")
    if isinstance(model, Mapping):
        inside = [str(k) for k, v in model.items() if isinstance(v, base.BaseEstimator)]
        hint = f"; save the estimator alone: joblib.dump(d[{inside[0]!r}], ...)" if inside else ""
        raise ModelError(f"{called} holds a dict with {', '.join(map(repr, model))[:100]}{hint}")
    if not isinstance(model, base.BaseEstimator) or not (
        hasattr(model, "predict") or hasattr(model, "transform")
    ):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise ModelError(
            f"{called} holds a {kind}; wanted a scikit-learn estimator or Pipeline with predict "
            "or transform"
        )
    try:
        validation.check_is_fitted(model)
    except Exception as error:  # also what attributes of crafted files raise
        raise ModelError(f"{called} is not fitted: {one_line(error)}") from None
    for one in estimators_in(model):
        if is_text_vectorizer(one) and getattr(one, "input", "content") != "content":
            raise ModelError(
                f"{type(one).__name__}(input={one.input!r}) reads files; fit it with "
                "input='content'"
            )


def estimators_in(model: Any) -> Iterator[Any]:
    """The estimator and all fitted ones inside it, outer ones first, each once."""
    base = require("sklearn.base", extra="sklearn")
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        if isinstance(one, (list, tuple)):
            waiting[:0] = one
        elif isinstance(one, dict):
            waiting[:0] = one.values()
        elif isinstance(one, np.ndarray) and one.dtype == object:
            waiting[:0] = one.ravel().tolist()
        elif isinstance(one, base.BaseEstimator):
            seen.add(id(one))
            yield one
            arguments = set(type(one)._get_param_names())
            arguments -= set(_FITTED_ARGUMENTS.get(type(one).__name__, ()))
            waiting[:0] = [v for k, v in vars(one).items() if k not in arguments]
        elif type(one).__module__.startswith("sklearn.") and hasattr(one, "__dict__"):
            seen.add(id(one))
            waiting[:0] = vars(one).values()


def is_text_vectorizer(one: Any) -> bool:
    """Whether it turns texts into numbers."""
    return any(kind.__name__ in _TEXT for kind in type(one).__mro__)


def _is_skops(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "schema.json" in archive.namelist()
    except Exception:  # zipfile lets through struct.error, UnicodeDecodeError and others
        return False


def _load_skops(path: Path, data: bytes, *, trust_source: bool) -> Any:
    skops = require("skops.io", extra="sklearn")
    try:
        types = skops.get_untrusted_types(data=data)
        if types and not trust_source:
            listed = ", ".join(types)
            raise UsageError(
                f"{path} holds types beyond those skops trusts: {listed[:300]}; if you trust who "
                "made it, add --trust-source"
            )
        return skops.loads(data, trusted=types)
    except UsageError:
        raise
    except ImportError as error:
        raise ModelError(f"{path} needs {error.name}, which is not installed") from None
    except Exception as error:  # what a damaged schema leads to is not documented
        raise ModelError(f"{path} is damaged: {one_line(error)}") from error


def _unpickle(path: Path) -> Any:
    joblib = require("joblib", extra="sklearn")
    try:
        return joblib.load(path)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{path} needs the module {error.name!r}, which is not installed here"
        ) from error
    except AttributeError as error:
        found = re.search(r"get attribute '([^']+)' on <module '([^']+)'", str(error))
        if found is None:
            raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
        raise ModelError(
            f"{path} needs {found[2]}.{found[1]}, which is not there: code of the script that "
            "made it; keep to scikit-learn's own classes"
        ) from error
    except Exception as error:  # unpickling raises whatever its objects do
        kind = type(error).__name__
        raise ModelError(f"{path} cannot be read: {kind}: {one_line(error)}") from error


def _version_notes(caught: list[warnings.WarningMessage]) -> Iterator[str]:
    exceptions = require("sklearn.exceptions", extra="sklearn")
    versions = {
        (one.message.original_sklearn_version, one.message.current_sklearn_version)
        for one in caught
        if isinstance(one.message, exceptions.InconsistentVersionWarning)
    }
    for saved, here in sorted(versions):
        yield (
            f"saved with scikit-learn {saved}, read by {here}, which may compute other values; "
            f"to be sure, install scikit-learn=={saved}"
        )
