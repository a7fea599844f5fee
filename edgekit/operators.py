"""Which operators an engine or an accelerator takes, and up to which version: tables of facts.

One TOML file each in `edgekit_device_profiles/operators`, with its source. An engine has one table
per version that was looked at; the newest that is not newer than the one asked for counts.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from edgekit.device import Count, Facts, Source, Version
from edgekit.errors import UsageError
from edgekit_runtime.engines import ENGINES

__all__ = [
    "OperatorTable",
    "engine_table",
    "known_operators",
    "operator_table",
    "operator_table_ids",
]


class OperatorTable(Facts):
    """What is taken: `operators` maps a name in `format`'s terms to the highest version of it
    (ONNX: the opset its definition is from; TFLite: the operator version), 0 where versions mean
    nothing. ONNX operators of other domains are written `domain:Name`.

    `opset` is the highest ONNX opset accepted, `opset_least` the lowest that is promised.
    `engine`, `distribution` and `version` say which package the table is about; None for
    accelerators.
    """

    schema_: Literal["edgekit.operators/1"] = Field(alias="schema")
    id: str
    format: Literal["onnx", "tflite", "openvino", "ncnn"]
    engine: str | None = None
    distribution: str | None = None
    version: Version | None = None
    opset: Count | None = None
    opset_least: Count | None = None
    operators: dict[str, Annotated[int, Field(ge=0)]]
    source: Source

    @property
    def called(self) -> str:
        """What the table is about, for messages."""
        return f"{self.distribution} {self.version}" if self.distribution else self.id


def operator_table_ids() -> list[str]:
    """The ids of all tables."""
    folder = resources.files("edgekit_device_profiles") / "operators"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


@cache
def operator_table(table_id: str) -> OperatorTable:
    """A table by id.

    Raises:
        UsageError: there is none (the known ones are listed).
    """
    known = operator_table_ids()
    if table_id not in known:
        raise UsageError(f"no operator table {table_id!r}; known: {', '.join(known)}")
    file = resources.files("edgekit_device_profiles") / "operators" / f"{table_id}.toml"
    try:
        return OperatorTable.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UsageError(f"operator table {table_id}: {error.errors()[0]['msg']}") from None


@cache
def known_operators(fmt: str) -> frozenset[str]:
    """Every operator of a format that any table has: what is not among them is no operator."""
    tables = map(operator_table, operator_table_ids())
    return frozenset(name for one in tables if one.format == fmt for name in one.operators)


def engine_table(
    engine: str, *, version: str | None = None, distribution: str | None = None
) -> OperatorTable | None:
    """The newest table of an engine's package that is not newer than `version` (None: newest).

    `distribution` is the package where several provide the engine (None: the usual one). Where
    only newer versions are known, the oldest of them. None if there is no table of the engine.
    """
    if distribution is None and engine in ENGINES:
        distribution = ENGINES[engine].distributions[0]
    tables = [operator_table(one) for one in operator_table_ids()]
    own = [t for t in tables if t.engine == engine and distribution in (None, t.distribution)]
    own.sort(key=lambda t: _numbers(t.version or "0"))
    if not own:
        return None
    if version is None:
        return own[-1]
    old_enough = [t for t in own if _numbers(t.version or "0") <= _numbers(version)]
    return old_enough[-1] if old_enough else own[0]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
