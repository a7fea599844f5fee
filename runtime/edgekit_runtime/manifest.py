"""The bundle's manifest: dataclasses on both sides, JSON in the file, defined here once.

`Manifest.from_json` checks every type and refuses unknown keys and unknown schema versions:
a device must not guess what a newer host meant.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple, Union, get_args, get_origin, get_type_hints

from .errors import BundleError

__all__ = ["SCHEMA", "FileEntry", "Golden", "Manifest", "TensorSpec", "Tolerance", "Variant"]

SCHEMA = "edgekit.bundle/1"

Dim = Union[int, str]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    `dtype` is numpy's name (`float32`, `int32`, ...) or `string`. `shape` holds a positive int
    for a fixed dimension and a name for a free one; two dimensions of one name are equal.
    `range` is the closed interval of values seen in real data, where it is known.
    """

    name: str
    dtype: str
    shape: Tuple[Dim, ...]
    layout: Optional[str] = None
    range: Optional[Tuple[float, float]] = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"

    def with_batch(self, size: int) -> Tuple[int, ...]:
        """The concrete shape when every free dimension is `size` (usually 1)."""
        return tuple(d if isinstance(d, int) else size for d in self.shape)

    def accepts(self, shape: Tuple[int, ...]) -> bool:
        """Whether an array of this shape fits; free dimensions of one name must agree."""
        if len(shape) != len(self.shape):
            return False
        free: Dict[str, int] = {}
        for wanted, found in zip(self.shape, shape):
            if isinstance(wanted, int):
                if wanted != found:
                    return False
            elif free.setdefault(wanted, found) != found:
                return False
        return True


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: its path in the archive, its hash and its size."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Tolerance:
    """`|got - want| <= atol + rtol * |want|`, elementwise, as in `numpy.allclose`."""

    atol: float
    rtol: float


@dataclass(frozen=True)
class Golden:
    """Inputs and the outputs one variant gave for them; both files are `.npz`.

    Arrays are named as in the specs and have a leading axis over the samples; each sample is
    run alone. `synthetic` inputs are seeded noise, never the user's data.
    """

    inputs: str
    outputs: str
    samples: int
    tolerance: Dict[str, Tolerance]
    synthetic: bool = True


@dataclass(frozen=True)
class Variant:
    """One way to run the model: files for one engine, and what was promised of it.

    `input_names`/`output_names` are the engine's own names, in the order of the manifest's
    specs. `placement` is the least share of operators per device (`{"CPU": 1.0}`).
    `expected` holds what was measured when the bundle was made, with its conditions.
    """

    id: str
    engine: str
    format: str
    files: Tuple[str, ...]
    scheme: str
    threads: int
    precision: str
    input_names: Tuple[str, ...]
    output_names: Tuple[str, ...]
    placement: Dict[str, float]
    golden: Golden
    expected: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. Variants are in order of preference."""

    schema: str
    bundle_id: str
    sequence: int
    name: str
    created: str
    profiles: Tuple[str, ...]
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    variants: Tuple[Variant, ...]
    files: Tuple[FileEntry, ...]
    labels: Optional[Tuple[str, ...]] = None
    provenance: Dict[str, Any] = field(default_factory=dict)
    signature: Optional[str] = None

    def variant(self, variant_id: Optional[str] = None) -> Variant:
        """The variant of that id, or the first choice.

        Raises:
            BundleError: no variant has that id.
        """
        if variant_id is None:
            return self.variants[0]
        for variant in self.variants:
            if variant.id == variant_id:
                return variant
        known = ", ".join(v.id for v in self.variants)
        raise BundleError(f"no variant {variant_id!r} in this bundle; it has: {known}")

    def to_json(self) -> str:
        """The manifest as JSON with sorted keys: the same manifest gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: Union[str, bytes]) -> Manifest:
        """Read and check a manifest.

        Raises:
            BundleError: not JSON, another schema version, a missing, unknown or mistyped field.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"manifest.json is not JSON: {error}") from None
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise BundleError(
                f"the manifest's schema is {schema!r}, this runtime reads {SCHEMA!r}; "
                "make the bundle again or update edgekit-runtime"
            )
        manifest = _decode(cls, raw, "manifest")
        assert isinstance(manifest, Manifest)  # noqa: S101  (for the type checker)
        _check_references(manifest)
        return manifest


def _check_references(manifest: Manifest) -> None:
    known = {entry.path for entry in manifest.files}
    if not manifest.variants:
        raise BundleError("the manifest has no variant")
    for what, names in (
        ("variant", [v.id for v in manifest.variants]),
        ("input", [s.name for s in manifest.inputs]),
        ("output", [s.name for s in manifest.outputs]),
    ):
        if len(set(names)) != len(names):
            raise BundleError(f"the manifest names an {what} twice: {', '.join(names)}")
    for variant in manifest.variants:
        wanted = (*variant.files, variant.golden.inputs, variant.golden.outputs)
        missing = [path for path in wanted if path not in known]
        if missing:
            raise BundleError(f"variant {variant.id!r} needs {missing[0]!r}, not listed in files")
        if len(variant.input_names) != len(manifest.inputs) or len(variant.output_names) != len(
            manifest.outputs
        ):
            raise BundleError(f"variant {variant.id!r} names other inputs or outputs than the model")
        if variant.threads < 1:
            raise BundleError(f"variant {variant.id!r} wants {variant.threads} threads")


def _decode(wanted: Any, value: Any, where: str) -> Any:
    """`value` (parsed JSON) as the type `wanted`, or a BundleError that names the field."""
    if dataclasses.is_dataclass(wanted):
        return _decode_dataclass(wanted, value, where)
    if wanted is Any:
        return value
    origin, args = get_origin(wanted), get_args(wanted)
    if origin is Union:
        for option in args:
            if option is type(None):
                if value is None:
                    return None
                continue
            try:
                return _decode(option, value, where)
            except BundleError:
                if len([a for a in args if a is not type(None)]) == 1:
                    raise
    elif origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    elif origin is dict and isinstance(value, dict):
        return {k: _decode(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif wanted in (int, str, bool) and type(value) is wanted:
        return value
    raise BundleError(f"{where} is {json.dumps(value)[:60]}, wanted {getattr(wanted, '__name__', wanted)}")


def _decode_dataclass(wanted: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {type(value).__name__}, wanted an object")
    hints = get_type_hints(wanted, vars(sys.modules[__name__]))
    fields = dataclasses.fields(wanted)
    unknown = sorted(set(value) - {f.name for f in fields})
    if unknown:
        raise BundleError(f"{where} has the unknown key {unknown[0]!r}")
    found = {}
    for one in fields:
        if one.name in value:
            found[one.name] = _decode(hints[one.name], value[one.name], f"{where}.{one.name}")
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise BundleError(f"{where} has no {one.name!r}")
    return wanted(**found)
