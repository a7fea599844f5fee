"""What will be tried: engines x schemes that the profile allows, printable before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from edgekit.accelerate import engines_of
from edgekit.artifact import FORMAT_NAMES
from edgekit.compress.prune import Pruning
from edgekit.compress.quantizers import candidate_schemes, fitted, quantizer_for, readable_as
from edgekit.compress.scheme import Scheme, broken_rule
from edgekit.convert import install_line, missing_extra, path_between
from edgekit.device import Accelerator, DeviceProfile, Quantization
from edgekit.errors import UsageError
from edgekit.fit import Fit
from edgekit.precision import broken_promise
from edgekit_runtime.engines import ENGINE_OF_FORMAT, ENGINES
from edgekit_runtime.engines.accelerators import split_engine

__all__ = [
    "Candidate", "Ruling", "engine_rulings", "make_plan", "source_ruling", "with_accelerators",
    "with_pruned", "without_bf16",
]  # fmt: skip

#: kinds of schemes in the order they are tried
_ORDER = ("fp32", "int8-static", "int8-dynamic", "int8-weights", "bf16", "fp16")
#: those that are also tried on a pruned model
_PRUNED = ("fp32", "int8-static")
#: schemes that the model as it came is run under
_NOT_MADE = ("fp32", "bf16")
#: processors that multiply bfloat16, in Linux's words
_BF16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


@dataclass(frozen=True)
class Ruling:
    """A rule of the device's profile that forbids a candidate, and the rule's source."""

    profile: str
    field: str
    why: str
    source: str

    def __str__(self) -> str:
        return f"ruled out by {self.profile}: {self.why} ({self.field}; {self.source})"


@dataclass(frozen=True)
class Candidate:
    """One thing to build, evaluate and measure. `skip` says why it will not be, if so, and
    `ruling` which rule of the profile says so.

    `fixed_shapes`: built with every free dimension set to what the data has. `pruning`: what goes
    before anything else is done to it. `reference_only`: what the others are compared with, but
    nothing that may be chosen for this device. `target`: the engine there, where `engine` only
    stands in for it on this machine. `accelerator`: the profile's name of what it is for (`htp`),
    where `engine` says how it is reached (`onnxruntime:qnn`), and `compiler_target` what it is
    compiled for.
    """

    id: str
    engine: str
    format: str
    scheme: Scheme
    threads: int
    skip: str | None = None
    ruling: Ruling | None = None
    fixed_shapes: bool = False
    reference_only: bool = False
    pruning: Pruning | None = None
    target: str = ""
    accelerator: str = ""
    compiler_target: str | None = None

    @property
    def family(self) -> str:
        """What the names of its repairs begin with."""
        engine = (self.target or self.engine).replace(":", "-")
        return f"{engine}-{self.pruning.id}+" if self.pruning else f"{engine}-"

    @property
    def as_it_came(self) -> bool:
        """Whether nothing is stored differently: only what floats are computed in may be."""
        return self.scheme.kind in _NOT_MADE or (
            bool(self.accelerator) and self.scheme.kind == "fp16"
        )

    @property
    def precision(self) -> str:
        """What its engine is told to compute floats in."""
        if self.accelerator and self.scheme.kind == "fp16":
            return "float16"
        return "bfloat16" if self.scheme.kind == "bf16" else "float32"


def make_plan(
    source_format: str,
    profile: DeviceProfile,
    *,
    threads: int,
    engine_faults: Mapping[str, str | None],
    free_dimensions: bool = False,
    source_activations: frozenset[str] = frozenset(["float32"]),
    engine_rulings: Mapping[str, Ruling] | None = None,
    source_ruling: Ruling | None = None,
    source_quantized: str | None = None,
    came: str = "",
) -> tuple[Candidate, ...]:
    """Candidates in the order they are built, most promising first.

    The first is always the reference: the model as it came, in its own format's engine.
    `engine_faults` holds why an engine cannot be used here (None: its probe ran), `engine_rulings`
    what is already known to keep the model from an engine on the device. `free_dimensions`: the
    model's inputs have some; `source_activations`: the types it computes in as it came;
    `source_quantized`: what shows that it is quantized already, which is never done twice; `came`:
    the format it came in, where `source_format` is what it became.
    """
    native = ENGINE_OF_FORMAT[source_format]
    found = []
    for engine, entry in ENGINES.items():
        fmt = entry.formats[0]
        facts = profile.engines.get(engine)
        fixed = free_dimensions and facts is not None and facts.static_shapes
        schemes = candidate_schemes(fmt, profile.quantization, came)
        features = set((profile.cpu.features if profile.cpu else None) or ())
        if engine == "openvino" and _BF16 & features:
            schemes += (Scheme("bf16"),)
        for scheme in schemes:
            name = f"{engine}-{scheme.id}{'-fixed' if fixed and scheme.kind == 'fp32' else ''}"
            one = Candidate(name, engine, fmt, scheme, threads, fixed_shapes=fixed)
            ruling = (
                _absent(engine, profile)
                or (engine_rulings or {}).get(engine)
                or _illegal(scheme, fmt, profile, source_activations, came)
                or (source_ruling if scheme.kind == "fp32" else None)
            )
            skip = str(ruling) if ruling else None
            skip = skip or _why_not(one, source_format, came, engine_faults.get(engine))
            if source_quantized and scheme.kind != "fp32":
                skip = f"the model is quantized already: {source_quantized}"
            found.append(replace(one, skip=skip, ruling=ruling))
    # By scheme first: fp32 everywhere tells early which engines work at all.
    found.sort(key=lambda c: (_ORDER.index(c.scheme.kind), c.scheme.id, c.engine != native))
    first, fault = found[0], engine_faults.get(native)
    if first.fixed_shapes:
        free = replace(first, id=f"{native}-fp32", skip=fault, ruling=None, fixed_shapes=False)
        found.insert(0, replace(free, reference_only=True))
    elif first.ruling:
        found[0] = replace(first, skip=fault, reference_only=True)
    return tuple(found)


def without_bf16(plan: tuple[Candidate, ...], device: DeviceProfile) -> tuple[Candidate, ...]:
    """The plan, without what needs instructions that the device in reach lacks."""
    if _BF16 & set(device.cpu.features or ()):
        return plan
    why = "the device has no bfloat16 instructions"
    return tuple(
        replace(one, skip=why) if one.scheme.kind == "bf16" and not one.skip else one
        for one in plan
    )


def with_accelerators(
    plan: tuple[Candidate, ...], profile: DeviceProfile, *, faults: Mapping[str, str | None],
    source_format: str, came: str = "", free_dimensions: bool = False,
    source_quantized: str | None = None, wanted: str | None = None,
) -> tuple[Candidate, ...]:  # fmt: skip
    """The plan, and behind it what is tried on the profile's accelerators; on one alone if it is
    `wanted`. `faults` holds why an engine does not reach its accelerator here (None: its probe
    ran); the rest is as for `make_plan`."""
    found = []
    for name, engines in engines_of(profile).items():
        one = profile.accelerators[name]
        for engine in engines if wanted in (None, name) else ():
            base, key = split_engine(engine)
            fmt = ENGINES[base].formats[0]
            for scheme in _accelerated_schemes(one, engine, fmt):
                made = Candidate(
                    f"{base}-{key}-{scheme.id}", engine, fmt, scheme, plan[0].threads,
                    fixed_shapes=free_dimensions and one.static_shapes, accelerator=name,
                    compiler_target=one.compiler_target,
                )  # fmt: skip
                skip = faults.get(engine)
                if skip is None and path_between(source_format, fmt) is None:
                    skip = f"no way to {FORMAT_NAMES[fmt]} in this version"
                if skip is None and source_quantized and not made.as_it_came:
                    skip = f"the model is quantized already: {source_quantized}"
                skip = skip or _why_not(made, source_format, came, None)
                found.append(replace(made, skip=skip))
    return (*plan, *found)


def _accelerated_schemes(one: Accelerator, engine: str, fmt: str) -> list[Scheme]:
    """What is tried on an accelerator, by the types it takes: 8 bits where it computes in them,
    and floats."""
    types = one.dtypes or ["float32"]
    whole = [dtype for dtype in types if dtype in ("uint8", "int8")]
    found = []
    if whole and one.kind != "gpu":  # GPUs compute 8-bit models in floats
        rules = Quantization(activations=list(whole))
        plain = Scheme("int8-static")
        with suppress(UsageError):
            found.append(fitted(plain, quantizer_for(plain, fmt, source=""), rules))
    if {"float32", "float16"} & set(types):
        found.append(Scheme("fp32"))
    if "float16" in types and engine in ("ncnn:vulkan", "litert:gpu"):
        found.append(Scheme("fp16"))
    return found


def with_pruned(
    plan: tuple[Candidate, ...], prunings: Sequence[Pruning], source_format: str
) -> tuple[Candidate, ...]:  # fmt: skip
    """The plan, and behind it the float and int8-static candidates that may be built, each made of
    a pruned model (`litert-channels-30%+int8-static`). Pruning works on ONNX."""
    found = []
    for pruning in prunings:
        for one in plan:
            unfit = one.skip or one.reference_only or one.accelerator
            if unfit or one.scheme.kind not in _PRUNED:
                continue
            made = replace(one, pruning=pruning)
            name = f"{one.engine}-{pruning.id}"
            plain = one.scheme.kind == "fp32"
            made = replace(made, id=name if plain else f"{name}+{one.scheme.id}")
            if path_between(source_format, "onnx") is None and source_format != "onnx":
                made = replace(made, skip="pruning works on ONNX, and there is no way to it")
            elif not plain and not _quantizes(one.scheme, one.format):
                continue  # its tool takes the model as it came
            if path_between("onnx", one.format) is not None:
                found.append(made)
    return (*plan, *found)


def _quantizes(scheme: Scheme, fmt: str) -> bool:
    """Whether a model of the format itself can be quantized so."""
    try:
        return quantizer_for(scheme, fmt, source="").takes == fmt
    except UsageError:
        return False


def engine_rulings(fit: Fit) -> dict[str, Ruling]:
    """Engines whose table says that they do not take one of the model's operators."""
    found = {}
    for place in fit.places:
        refusals = fit.reasons(place, "no")
        if place.kind == "cpu" and refusals:
            reason, paths = next(iter(refusals.items()))
            more = sum(map(len, refusals.values())) - 1
            why = f"{reason} ({paths[0]}{f' and {more} more' if more else ''})"
            found[place.engine] = Ruling(fit.profile.id, f"engines.{place.id}", why, place.by)
    return found


def source_ruling(fit: Fit) -> Ruling | None:
    """What forbids the model as it came: its size, or a rule that it was quantized against."""
    profile = fit.profile
    for field, words in fit.too_big(fit.needs[0]):
        return Ruling(profile.id, field, words, _title(profile, field))
    rules = profile.quantization
    quantized = rules.model_copy(update={"activations": None, "weights": None})
    broken = broken_promise(fit.graph, quantized)
    if broken is None:
        return None
    field = "quantization.per_channel" if "per channel" in broken else "quantization.symmetric"
    return Ruling(profile.id, field, broken, _title(profile, field))


def _title(profile: DeviceProfile, field: str) -> str:
    source = profile.source_of(field)
    return source.title if source else "no source"


def _absent(engine: str, profile: DeviceProfile) -> Ruling | None:
    if engine in profile.engines:
        return None
    source = profile.source_of("engines") or profile.source_of(f"engines.{engine}")
    others = ", ".join(profile.engines) or "none"
    return Ruling(
        profile.id, "engines", f"{engine} is not among its engines ({others})",
        source.title if source else "the engines it lists",
    )  # fmt: skip


def _illegal(
    scheme: Scheme, fmt: str, profile: DeviceProfile, source_activations: frozenset[str], came: str
) -> Ruling | None:
    broken = broken_rule(scheme, profile.quantization, source_activations)
    if broken is None and scheme.kind not in _NOT_MADE:
        try:
            quantizer_for(scheme, fmt, source=readable_as(came))
        except UsageError as error:  # the rules completed it to something that no tool makes
            broken = "quantization", str(error)
    if broken is None:
        return None
    return Ruling(profile.id, broken[0], broken[1], _title(profile, broken[0]))


def _why_not(candidate: Candidate, source_format: str, came: str, fault: str | None) -> str | None:
    if fault is not None:
        return f"{candidate.engine}: {fault}"
    path = path_between(source_format, candidate.format)
    if path is None:
        return (
            f"no way from {FORMAT_NAMES[source_format]} to {FORMAT_NAMES[candidate.format]} "
            "in this version"
        )
    for edge in path:
        missing = missing_extra(edge)
        if missing:
            return f"converting needs {missing}: {install_line(edge)}"
    if not candidate.as_it_came:
        return quantizer_for(candidate.scheme, candidate.format, source=readable_as(came)).missing()
    return None
