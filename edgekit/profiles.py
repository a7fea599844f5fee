"""Finds, reads and writes device profiles; what is wrong with one is said in a line per fault."""

from __future__ import annotations

import difflib
import re
import tomllib
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from edgekit.device import SCHEMA, DeviceProfile
from edgekit.errors import UsageError, one_line
from edgekit.operators import known_operators, operator_table_ids
from edgekit_runtime.engines import ENGINES

__all__ = [
    "THIS_MACHINE",
    "catalogue_ids",
    "load_profile",
    "parse_profile",
    "profile_faults",
    "profile_ids",
    "profile_toml",
    "profiles_of",
    "read_profile_text",
]

THIS_MACHINE = "this-machine"


def profile_ids() -> list[str]:
    """The ids of all profiles, `this-machine` first."""
    return [THIS_MACHINE, *catalogue_ids()]


def catalogue_ids() -> list[str]:
    """The ids of the profiles that come with EdgeKit."""
    files = resources.files("edgekit_device_profiles").iterdir()
    return sorted(f.name[:-5] for f in files if f.name.endswith(".toml"))


def load_profile(profile_id: str) -> DeviceProfile:
    """A profile by id, or from a TOML file.

    Raises:
        UsageError: no such profile (the known ones are listed), or the file is not a valid one.
    """
    if profile_id == THIS_MACHINE:
        from edgekit.facts import this_machine

        return this_machine()
    return parse_profile(_text_of(profile_id), profile_id)


def profiles_of(model: str) -> list[str]:
    """Profiles of the device that calls itself so ("Raspberry Pi 5 Model B Rev 1.0")."""
    return [one for one in profile_ids() if model.startswith(load_profile(one).name)]


def parse_profile(text: str, called: str) -> DeviceProfile:
    """A profile from its TOML text.

    Raises:
        UsageError: it is not a valid one: the first fault, and how many more there are.
    """
    faults = profile_faults(text)
    if faults:
        more = f" (and {len(faults) - 1} more; edgekit devices validate lists them)"
        raise UsageError(f"{called}: {faults[0]}{more if len(faults) > 1 else ''}")
    return DeviceProfile.model_validate(tomllib.loads(text))


def profile_faults(text: str) -> list[str]:
    """What is wrong with a profile, one line each, the field named; empty if it is valid."""
    if len(text) > _MOST_TEXT or any(_dots(line) > _MOST_DEPTH for line in text.splitlines()):
        return ["not a device profile: too long, or tables too deep"]
    try:
        stated = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, brackets of brackets
        return [f"not TOML: {one_line(error)}"]
    try:
        return _faults_in(stated)
    except (OverflowError, RecursionError) as error:
        return [f"a number in it is out of all bounds: {one_line(error)}"]


#: far above any profile; Python's TOML reader takes quadratic memory for keys like a.a.a.a
_MOST_TEXT, _MOST_DEPTH = 1_000_000, 20


def _dots(line: str) -> int:
    return line.partition("=")[0].count(".") if not line.lstrip().startswith("#") else 0


def _faults_in(stated: dict[str, Any]) -> list[str]:
    faults = [] if stated.get("schema") == SCHEMA else [_schema_fault(stated.get("schema"))]
    if faults and stated.get("schema") is not None:
        return faults  # what another schema's keys mean is not known here
    try:
        profile = DeviceProfile.model_validate({**stated, "schema": SCHEMA})
    except ValidationError as error:
        return [*faults, *dict.fromkeys(_in_words(one) for one in error.errors())]
    return [*faults, *_unknown_names(profile)]


#: engines that EdgeKit runs, judges, or knows the accelerators of
_ENGINES = (*ENGINES, "tflm", "ethos-u", "rknn", "stedgeai", "tensorrt")
_ALSO_CALLED = {
    "tflite": "litert", "tensorflow-lite": "litert", "tflite-runtime": "litert", "vela": "ethos-u",
    "ort": "onnxruntime", "onnx-runtime": "onnxruntime", "tflite-micro": "tflm",
}  # fmt: skip


def _unknown_names(profile: DeviceProfile) -> Iterator[str]:
    """Names that are valid TOML and mean nothing: engines, tables and operators nobody knows."""
    used = {one.engine for one in profile.accelerators.values()}
    for engine in profile.engines:
        meant = _ALSO_CALLED.get(engine)
        if meant or (engine not in _ENGINES and engine not in used):
            hint = f"; did you mean {meant}?" if meant else f"; known: {', '.join(_ENGINES)}"
            yield f"engines.{engine}: no such engine{hint}"
    for name, one in profile.accelerators.items():
        where = f"accelerators.{name}"
        if one.operator_table and one.operator_table not in operator_table_ids():
            known = ", ".join(operator_table_ids())
            yield f"{where}.operator_table: no table {one.operator_table!r}; known: {known}"
        names = known_operators(one.operator_format) if one.operator_format else frozenset()
        for operator in one.operators or []:
            if operator not in names:
                close = difflib.get_close_matches(operator, names, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                yield f"{where}.operators: no {one.operator_format} operator {operator!r}{hint}"


def profile_toml(profile: DeviceProfile) -> str:
    """The profile as a TOML file; unknown facts are left out."""
    import tomli_w

    stated = profile.model_dump(by_alias=True, exclude_unset=True, exclude_none=True)
    return tomli_w.dumps(stated, multiline_strings=False)


def _text_of(profile_id: str) -> str:
    if profile_id.endswith(".toml"):
        return read_profile_text(Path(profile_id))
    known = profile_ids()
    if profile_id in known:
        file = resources.files("edgekit_device_profiles") / f"{profile_id}.toml"
        return file.read_text(encoding="utf-8")
    meant = [THIS_MACHINE] if profile_id in ("local", "localhost", "here") else []
    meant = meant or [one for one in known if profile_id.lower() in one]
    meant = meant or difflib.get_close_matches(profile_id, known, n=2)
    if meant:
        hint = f"did you mean {' or '.join(meant[:4])}? edgekit devices list has all"
        raise UsageError(f"no device profile {profile_id!r}; {hint}")
    raise UsageError(
        f"no device profile {profile_id!r}; known: {', '.join(known)}, or a .toml file"
    )


def read_profile_text(path: Path) -> str:
    """The text of a profile.

    Raises:
        UsageError: there is no such file, or it is no text.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"cannot read {path}: not a file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text (UTF-8), so no TOML") from None


def _schema_fault(schema: Any) -> str:
    if schema is None:
        return f'schema is missing; wanted schema = "{SCHEMA}"'
    name, _, version = str(schema).partition("/")
    own_name, _, own_version = SCHEMA.partition("/")
    if (
        name == own_name
        and re.fullmatch(r"[0-9]{1,6}", version)
        and int(version) > int(own_version)
    ):
        return f"schema is {schema}, of a newer EdgeKit; this one reads {SCHEMA}: update EdgeKit"
    return f"schema is {schema!r}; wanted {SCHEMA!r}"


def _in_words(error: Any) -> str:
    """One of pydantic's errors as a line: field, what was found, what was wanted."""
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    kind, found = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return f"{where}: no such key{_hint(error['loc'])}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "value_error":
        words = str(error["msg"]).removeprefix("Value error, ")
        return f"{where}: {words}" if where else words
    if kind == "literal_error":
        return f"{where}: {found!r}; wanted {error['ctx']['expected']}"
    if kind == "string_pattern_mismatch":
        wanted = "numbers and points" if where.endswith(_VERSIONS) else "small letters, digits, -"
    else:
        wanted = _WANTED.get(kind) or str(error["msg"])
    unit = _unit(where)
    number = _number_meant(found) if kind in ("int_type", "int_from_float") else None
    meant = f", such as {number}" if number else ""
    return f"{where}: {found!r}; wanted {wanted}{f' of {unit}' if unit else ''}{meant}"


def _number_meant(found: Any) -> int | None:
    """The number in `"4 GB"`, `"2.4 GHz"` or `1.8e9`; memory is counted in powers of two."""
    if isinstance(found, float):
        return int(found) if found.is_integer() and found > 0 else None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?B|Hz|)\s*", str(found))
    if match is None:
        return None
    base = 1000 if match[3] == "Hz" else 1024
    scale: int = base ** " KMGT".index(match[2].upper() or " ")
    return round(float(match[1]) * scale)


_VERSIONS = ("minimum", "version", "python")
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "greater_than": "more than 0: a number",
    "greater_than_equal": "0 or more: a number",
}
_UNITS = {
    "_bytes": "bytes", "_hz": "hertz", "_bits": "bits", "_w": "watts", "_c": "degrees Celsius",
    "_bytes_per_s": "bytes per second", "_ops_per_s": "operations per second",
}  # fmt: skip


def _unit(field: str) -> str:
    endings = [ending for ending in _UNITS if field.endswith(ending)]
    return _UNITS[max(endings, key=len)] if endings else ""


def _hint(where: tuple[int | str, ...]) -> str:
    """What an unknown key may have meant: names of the same table that are close, or that differ
    in the unit only."""
    names = _keys_at(where[:-1])
    key = str(where[-1])
    stem = key.rpartition("_")[0] or key
    close = [n for n in names if n.rpartition("_")[0] == stem and _unit(n)]
    close = close or difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    if close:
        unit = _unit(close[0])
        return f"; did you mean {close[0]}{f' (in {unit})' if unit else ''}?"
    return f"; known here: {', '.join(names)}"


def _keys_at(where: tuple[int | str, ...]) -> list[str]:
    kind: Any = DeviceProfile
    for part in where:
        fields = getattr(kind, "model_fields", None)
        if fields is None or part not in fields:
            continue  # a name the user gave, or an index
        kind = _model_in(fields[str(part)].annotation)
    return [field.alias or name for name, field in kind.model_fields.items()]


def _model_in(annotation: Any) -> Any:
    """The model inside `dict[str, X]`, `list[X]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
