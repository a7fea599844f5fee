"""The bundle's manifest: dataclasses on both sides, JSON in the file, defined here once.

`Manifest.from_json` checks every type and refuses unknown keys and unknown schema versions:
a device must not guess what a newer host meant.

The annotations are read while decoding, and so are not put off as in the other modules
(`from __future__ import annotations`): evaluating them then takes longer than all the rest.
"""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from typing import (
    Any,
    Dict,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
    get_args,
    get_origin,
)

from .errors import BundleError, one_line

__all__ = [
    "SCHEMA",
    "Deflated",
    "FileEntry",
    "Golden",
    "InputSteps",
    "Manifest",
    "StatePair",
    "TensorSpec",
    "Tolerance",
    "Variant",
    "same_interface",
]

SCHEMA = "edgekit.bundle/1"

Dim = Union[int, str]
_MAX_DEPTH = 64  # of free-form values; Python gives up somewhere between 200 and 10,000
#: what a terminal would act on, and halves of characters that cannot be printed
_CONTROL = "[\x00-\x1f\x7f-\x9f\ud800-\udfff]"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    `dtype` is numpy's name (`float32`, `int32`, ...) or `string`. `shape` holds a positive int
    for a fixed dimension and a name for a free one; two dimensions of one name are equal.
    `range` is the closed interval of values and `example` a shape seen in real data, where known.
    """

    name: str
    dtype: str
    shape: Tuple[Dim, ...]
    layout: Optional[str] = None
    range: Optional[Tuple[float, float]] = None
    example: Optional[Tuple[int, ...]] = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"

    def with_batch(self, size: int) -> Tuple[int, ...]:
        """The concrete shape when every free dimension is `size` (usually 1)."""
        return tuple(d if isinstance(d, int) else size for d in self.shape)

    def usual_shape(self) -> Tuple[int, ...]:
        """The shape seen in real data, or 1 for every free dimension."""
        return self.example or self.with_batch(1)

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
class Deflated:
    """A file as it lies in the archive where it is compressed: raw DEFLATE (RFC 1951)."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: its path in the archive, its hashes and its size; `deflated` says
    what lies there if it is compressed."""

    path: str
    sha256: str
    size_bytes: int
    crc32: int
    deflated: Optional[Deflated] = None


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
    specs. `engine` may name an accelerator (`ncnn:vulkan`). `placement` is the least share per
    device (`{"NPU": 1.0}`), of the multiply-accumulates where `macs` has those of each operator,
    else of the operators; `on_misplacement` is what to do when the engine does otherwise: `refuse`,
    `warn`, or `next` (take the next variant). `machines` are those it runs on (`x86_64`, `aarch64`,
    `armv7l`; none: all), `memory_bytes` the peak of a process that runs it. `expected` holds what
    was measured when the bundle was made, with its conditions.
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
    on_misplacement: str = "refuse"
    machines: Tuple[str, ...] = ()
    memory_bytes: Optional[int] = None
    macs: Dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StatePair:
    """A state of a streaming model: this output is the next call's input; zeros at first."""

    input: str
    output: str


@dataclass(frozen=True)
class InputSteps:
    """What makes an input from raw data: see `preprocess.Preprocess`."""

    source: str
    steps: Tuple[Dict[str, Any], ...]


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
    states: Tuple[StatePair, ...] = ()
    preprocess: Dict[str, InputSteps] = field(default_factory=dict)
    postprocess: Tuple[Dict[str, Any], ...] = ()
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
        """The manifest as JSON with sorted keys: the same manifest gives the same bytes.

        Raises:
            BundleError: a number is NaN or infinite, which JSON cannot say.
        """
        raw = dataclasses.asdict(self)
        try:
            return json.dumps(raw, indent=1, sort_keys=True, allow_nan=False) + "\n"
        except ValueError as error:
            raise BundleError(f"the manifest cannot be written: {one_line(error)}") from None

    @classmethod
    def from_json(cls, text: Union[str, bytes]) -> "Manifest":
        """Read and check a manifest.

        Raises:
            BundleError: not JSON, another schema version, a missing, unknown or mistyped field.
        """
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8")  # json would guess UTF-16, too
            raw = json.loads(
                text,
                object_pairs_hook=_no_twins,
                parse_constant=_no_constant,
                parse_int=_short_int,
            )
        except (ValueError, RecursionError) as error:
            raise BundleError(f"manifest.json is not JSON: {one_line(error)}") from None
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise BundleError(
                f"the manifest's schema is {repr(schema)[:60]}, this runtime reads {SCHEMA!r}; "
                "make the bundle again or update edgekit-runtime"
            )
        try:
            manifest = _decode(cls, raw, "manifest")
        except RecursionError:  # json.loads had more stack left than we have
            raise BundleError("the manifest is nested too deeply") from None
        assert isinstance(manifest, Manifest)  # noqa: S101  (for the type checker)
        _check_references(manifest)
        return manifest


_Sides = Sequence[Sequence[TensorSpec]]


def same_interface(ours: _Sides, other: _Sides) -> bool:
    """Whether two models take and give arrays of the same names, dtypes and shapes; what free
    dimensions are called, and what was seen in data, does not matter."""

    def plain(specs: Sequence[TensorSpec]) -> List[Any]:
        sizes = [tuple(d if isinstance(d, int) else None for d in s.shape) for s in specs]
        return [(s.name, s.dtype, size) for s, size in zip(specs, sizes)]

    return [plain(side) for side in ours] == [plain(side) for side in other]


def _check_references(manifest: Manifest) -> None:
    if not manifest.variants:
        raise BundleError("the manifest has no variant")
    for what, names in (
        ("variant", [v.id for v in manifest.variants]),
        ("input", [s.name for s in manifest.inputs]),
        ("output", [s.name for s in manifest.outputs]),
    ):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise BundleError(f"the manifest names the {what} {twice[0]!r} twice")
    for spec in (*manifest.inputs, *manifest.outputs):
        if any(isinstance(dim, int) and dim < 1 for dim in spec.shape):
            raise BundleError(f"{spec.name!r} has the shape {list(spec.shape)}, wanted 1 or more")
        if spec.example is not None and not spec.accepts(spec.example):
            raise BundleError(f"{spec.name!r} has the example {list(spec.example)}, not its shape")
        if spec.range is not None and spec.range[0] > spec.range[1]:
            raise BundleError(f"{spec.name!r} has the range {list(spec.range)}, wanted low, high")
    ins, outs = ({s.name for s in specs} for specs in (manifest.inputs, manifest.outputs))
    for state in manifest.states:
        if state.input not in ins or state.output not in outs:
            raise BundleError(
                f"the state {state.input!r} fed by {state.output!r} is not the model's"
            )
    strange = sorted(set(manifest.preprocess) - ins)
    if strange:
        raise BundleError(f"there is preprocessing for {strange[0]!r}, which is no input")
    known = {entry.path for entry in manifest.files}
    for variant in manifest.variants:
        _check_variant(variant, manifest, known)


def _check_variant(variant: Variant, manifest: Manifest, known: Set[str]) -> None:
    golden, what = variant.golden, f"variant {variant.id!r}"
    wanted = (*variant.files, golden.inputs, golden.outputs)
    missing = [path for path in wanted if path not in known]
    if missing:
        raise BundleError(f"{what} needs {missing[0]!r}, not listed in files")
    if len({path.rsplit("/", 1)[-1] for path in variant.files}) != len(variant.files):
        raise BundleError(f"{what} has two files of one name: {list(variant.files)}")
    for names, specs in (
        (variant.input_names, manifest.inputs),
        (variant.output_names, manifest.outputs),
    ):
        if len(set(names)) != len(specs) or len(names) != len(specs):
            raise BundleError(f"{what} names other inputs or outputs than the model: {list(names)}")
    name = variant.id
    if not name or name.startswith(".") or "/" in name or "\\" in name:  # it becomes a folder's
        raise BundleError(f"the variant's id {name[:60]!r} is no name for a folder")
    if any(not 0 <= count < 2**63 for count in variant.macs.values()):
        raise BundleError(f"{what} has macs out of range")
    if variant.threads < 1:
        raise BundleError(f"{what} wants {variant.threads} threads")
    if variant.on_misplacement not in ("refuse", "warn", "next"):
        raise BundleError(
            f"{what} says {variant.on_misplacement!r} on misplacement; known: refuse, warn, next"
        )
    if golden.samples < 1:
        raise BundleError(f"{what} has {golden.samples} golden samples, wanted 1 or more")
    if set(golden.tolerance) != {spec.name for spec in manifest.outputs}:
        raise BundleError(
            f"{what} has tolerances for {sorted(golden.tolerance)}, "
            f"wanted one for each output: {sorted(s.name for s in manifest.outputs)}"
        )
    if any(t.atol < 0 or t.rtol < 0 for t in golden.tolerance.values()):
        raise BundleError(f"{what} has a negative tolerance")


def _no_twins(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """A JSON object; a key given twice could be read two ways."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _short_int(digits: str) -> int:
    if len(digits) > 20:  # 64 bits have 20 digits; converting millions of them takes minutes
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _decode(wanted: Any, value: Any, where: str) -> Any:
    """`value` (parsed JSON) as the type `wanted`, or a BundleError that names the field."""
    if dataclasses.is_dataclass(wanted):
        return _decode_dataclass(wanted, value, where)
    if wanted is Any:
        _check_depth(value, where)
        return value
    origin, args = get_origin(wanted), get_args(wanted)
    if origin is Union:
        return _decode_union(args, value, where)
    if (
        wanted is str
        and isinstance(value, str)
        and not value.isprintable()
        and re.search(_CONTROL, value)
    ):
        raise BundleError(f"{where} holds control characters: {json.dumps(value)[:60]}")
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value))
            return tuple(_decode(kind, v, f"{where}[{i}]") for i, (kind, v) in pairs)
    elif origin is dict and isinstance(value, dict):
        keys = [_decode(str, key, f"a key of {where}") for key in value]
        return {key: _decode(args[1], value[key], f"{where}.{key}") for key in keys}
    elif origin is None and _fits(wanted, value):
        return wanted(value)
    raise BundleError(f"{where} is {json.dumps(value)[:60]}, wanted {_type_name(wanted)}")


def _decode_union(options: Tuple[Any, ...], value: Any, where: str) -> Any:
    kinds = [kind for kind in options if kind is not type(None)]
    if value is None and len(kinds) < len(options):
        return None
    if len(kinds) == 1:  # an Optional: let the error say what is wrong inside
        return _decode(kinds[0], value, where)
    for kind in kinds:  # plain types: a dimension is a number or a name
        if _fits(kind, value):
            return value
    names = " or ".join(_type_name(kind) for kind in kinds)
    raise BundleError(f"{where} is {json.dumps(value)[:60]}, wanted {names}")


def _check_depth(value: Any, where: str) -> None:
    """Refuse what later could not be walked, written or shown."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        nested = [one for one in level if isinstance(one, (dict, list))]
        level = [x for one in nested for x in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    raise BundleError(f"{where} is nested more than {_MAX_DEPTH} deep")


def _fits(wanted: Any, value: Any) -> bool:
    if wanted is float:  # 1e999 is infinite when parsed
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is wanted


def _type_name(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")


def _decode_dataclass(wanted: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {type(value).__name__}, wanted an object")
    hints = wanted.__annotations__
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
