"""Where a session comes from: a model file or a bundle's variant, and how it is to be loaded.

A Source can be opened again: after a crash of the engine's process, and when a newer version of an
installed bundle was activated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from .bundle import Bundle, is_bundle
from .engines import ENGINE_OF_FORMAT, ENGINES, Loaded, Options, load_engine
from .engines.accelerators import split_engine
from .errors import (
    BundleError,
    EdgeKitError,
    EngineCrashed,
    EngineError,
    EngineMissingError,
    EngineTooOldError,
    LimitError,
    LowMemoryError,
    ModelError,
    UsageError,
    WrongDeviceError,
    one_line,
)
from .manifest import Manifest, TensorSpec, Variant
from .placement import Placement, by_macs, enforce

__all__ = [
    "COMPANIONS",
    "FallbackWarning",
    "Opened",
    "Processing",
    "Source",
    "format_of",
    "model_files",
    "processing",
]

_FORMAT_OF_SUFFIX = {".onnx": "onnx", ".tflite": "tflite", ".xml": "openvino", ".param": "ncnn"}
#: files that belong to one with this suffix
COMPANIONS = {".xml": (".bin",), ".param": (".bin", ".json")}
INTENTS = ("latency", "throughput")


class FallbackWarning(UserWarning):
    """Another variant runs than the bundle prefers, or with another placement than it promises."""


class Opened(NamedTuple):
    """A model in an engine, with our names for its inputs and outputs."""

    loaded: Loaded
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    manifest: Optional[Manifest] = None
    variant: Optional[Variant] = None
    fallbacks: Tuple[str, ...] = ()
    streams: int = 1

    def placement(self, *, operators: bool = True) -> Placement:
        """What the engine says it did.

        Raises:
            EngineError: it does not say.
        """
        try:
            found = self.loaded.placement(operators=operators)
            return by_macs(found, self.variant.macs) if self.variant is not None else found
        except EdgeKitError:
            raise
        except Exception as error:
            raise EngineError(
                f"the engine does not say its placement: {one_line(error)}"
            ) from error


@dataclass(frozen=True)
class Source:
    """What to load, and how: the arguments of `load`, which explains them."""

    path: Path
    variant: Optional[str] = None
    threads: Optional[int] = None
    engine: Optional[str] = None
    precision: str = "float32"
    verify: bool = True
    isolate: bool = False
    timeout_s: float = 60.0
    intent: str = "latency"
    #: the file that says which version is active, for installed bundles
    active: Optional[Path] = None

    def open(self, bundle: Optional[Bundle] = None) -> Opened:
        """Load it; `bundle` is the open file, where there is one already."""
        if bundle is not None:
            return self._first_that_loads(bundle, list(self._wanted(bundle.manifest)), [])
        if is_bundle(self.path):
            if self.engine is not None:
                raise UsageError(
                    f"{self.path} is a bundle: choose one of its variants, not the engine"
                )
            with Bundle(self.path) as opened:
                return self.open(opened)
        if self.variant is not None:
            raise ModelError(f"{self.path} is a plain model; only bundles have variants")
        found = format_of(self.path)
        files = model_files(self.path)
        chosen = ENGINE_OF_FORMAT[found] if self.engine is None else self.engine
        engine = split_engine(chosen)[0]
        if engine in ENGINES and found not in ENGINES[engine].formats:
            able = ", ".join(name for name, row in ENGINES.items() if found in row.formats)
            raise UsageError(f"{engine} does not load {self.path.suffix} files; {able} would")
        options = self._options(1, self.precision)
        loaded = self._load(chosen, files, options)
        return Opened(loaded, loaded.inputs, loaded.outputs, streams=options.streams)

    def after(self, crashed: Opened, why: str) -> Opened:
        """What takes over when the engine's process died: the next variant, or the same again."""
        if crashed.manifest is None or crashed.variant is None:
            return self.open()
        with Bundle(self.path) as bundle:
            wanted = list(self._wanted(bundle.manifest))
            ids = [variant.id for variant in wanted]
            later = wanted[ids.index(crashed.variant.id) + 1 :] if crashed.variant.id in ids else []
            if not later:
                return self.open(bundle)
            passed = [*crashed.fallbacks, f"{crashed.variant.id}: {why}"]
            return self._first_that_loads(bundle, later, passed)

    def newer(self) -> Optional[Source]:
        """The source of the version that was activated since; None if this one still is.

        Raises:
            UsageError: this is not an installed bundle.
        """
        if self.active is None:
            raise UsageError("only sessions of open_installed() can be refreshed")
        from .installed import active_path

        path = active_path(self.active)
        return None if path == self.path else dataclasses.replace(self, path=path)

    def _wanted(self, manifest: Manifest) -> Iterator[Variant]:
        return iter(manifest.variants if self.variant is None else [manifest.variant(self.variant)])

    def _first_that_loads(
        self, bundle: Bundle, variants: List[Variant], passed: List[str]
    ) -> Opened:
        """The first variant that runs here as promised. What was passed over is remembered, said
        in a FallbackWarning, and raised when nothing is left."""
        manifest = bundle.manifest
        if self.verify:  # all of it, once, even what is not used
            kept = bundle.verify(keep=variants[0].files)
        failures: List[EdgeKitError] = []
        for number, variant in enumerate(variants):
            try:
                if variant.machines:
                    _check_machine(variant)
                if variant.memory_bytes is not None:
                    _check_memory(variant, variant.memory_bytes, isolated=self.isolate)
                if self.verify and not number:
                    files = kept
                else:
                    files = {path: bundle.read(path, verify=self.verify) for path in variant.files}
                options = self._options(variant.threads, variant.precision)
                by_name = {path.rsplit("/", 1)[-1]: data for path, data in files.items()}
                opened = Opened(
                    self._load(variant.engine, by_name, options),
                    manifest.inputs, manifest.outputs, manifest, variant, tuple(passed),
                    options.streams,
                )  # fmt: skip
                try:
                    self._enforce(opened, variant)
                    if passed:
                        listed = "; not ".join(passed)
                        text = f"{bundle.path}: runs variant {variant.id!r}; not {listed}"
                        warnings.warn(text, FallbackWarning, stacklevel=4)
                except BaseException:  # also a warning that the user made an error
                    opened.loaded.close()
                    raise
            except (EngineMissingError, EngineTooOldError, EngineCrashed, LowMemoryError,
                    WrongDeviceError, _NextVariantError) as error:  # fmt: skip
                failures.append(error)
                passed = [*passed, f"{variant.id}: {one_line(error)}"]
                continue
            return opened
        if len(failures) == 1:
            failure = failures[0]
            raise type(failure)(f"{bundle.path}: {failure}") from failure
        listed = "; ".join(passed)
        raise type(failures[-1])(f"{bundle.path}: no variant runs here: {listed}")

    def _enforce(self, opened: Opened, variant: Variant) -> None:
        """Compare the placement with the contract, and do what that says."""
        usual = {n: s.usual_shape() for n, s in zip(variant.input_names, opened.inputs)}
        with contextlib.suppress(KeyError):  # names that do not fit are the session's to refuse
            opened.loaded.usual_shapes = tuple(usual[s.name] for s in opened.loaded.inputs)
        try:
            enforce(variant.placement, opened.placement(operators=False), variant=variant.id)
        except LimitError as error:
            if variant.on_misplacement == "warn":
                text = str(error).split("; refused: ")[0]
                text += "; the rest runs on the CPU, as the bundle allows"
                warnings.warn(text, FallbackWarning, stacklevel=5)
            elif variant.on_misplacement == "next":
                raise _NextVariantError(str(error)) from None
            else:
                raise

    def _options(self, threads: int, precision: str) -> Options:
        used = threads if self.threads is None else self.threads
        if not self.timeout_s > 0:
            raise UsageError(f"timeout_s is {self.timeout_s:g}; wanted more than 0")
        if not isinstance(used, int):
            raise UsageError(f"threads is {used!r}; wanted a number")
        return Options(used, precision, _streams(self.intent, used))

    def _load(self, engine: str, files: Mapping[str, bytes], options: Options) -> Loaded:
        if not self.isolate:
            return load_engine(engine, files, options)
        from .isolate import load_isolated

        return load_isolated(engine, files, options, timeout_s=self.timeout_s)


Processing = Tuple[
    Dict[str, Callable[[Any], np.ndarray]], Callable[[Mapping[str, np.ndarray]], Dict[str, Any]]
]


def processing(manifest: Optional[Manifest]) -> Processing:
    """The bundle's steps before the model, by input, and after it.

    Raises:
        BundleError: a step is unknown or has wrong options.
    """
    before: Dict[str, Callable[[Any], np.ndarray]] = {}
    after: Callable[[Mapping[str, np.ndarray]], Dict[str, Any]] = dict
    try:
        if manifest is not None and manifest.preprocess:
            from .preprocess import Preprocess  # most have none: not paid for at import

            for name, one in manifest.preprocess.items():
                before[name] = Preprocess(one.source, one.steps)
        if manifest is not None and manifest.postprocess:
            from .postprocess import Postprocess

            names = [spec.name for spec in manifest.outputs]
            after = Postprocess(manifest.postprocess, names, manifest.labels)
    except UsageError as error:
        raise BundleError(f"the bundle's processing is not understood: {error}") from None
    return before, after


class _NextVariantError(LimitError):
    """A placement that the contract answers with the next variant."""


def _check_machine(variant: Variant) -> None:
    from .machine import machine_name

    machine = machine_name()
    if machine not in variant.machines:
        raise WrongDeviceError(
            f"variant {variant.id!r} is for {', '.join(variant.machines)}, this is {machine}"
        )


def _check_memory(variant: Variant, memory_bytes: int, *, isolated: bool) -> None:
    from .machine import free_memory_bytes, rss_bytes

    free = free_memory_bytes()
    own = 0 if isolated else rss_bytes() or 0  # a process of its own begins with nothing
    if free is not None and memory_bytes - own > free:
        raise LowMemoryError(
            f"variant {variant.id!r} needs {(memory_bytes - own) / 1e6:.0f} MB more, "
            f"{free / 1e6:.0f} MB are free"
        )


def format_of(path: Path) -> str:
    """The format a model file's name says.

    Raises:
        ModelError: the suffix is not one the runtime knows.
    """
    found = _FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if found is None:
        known = ", ".join((".edgekit", *_FORMAT_OF_SUFFIX))
        raise ModelError(f"{path} is not a model the runtime loads; known: {known}")
    return found


def model_files(path: Path) -> Dict[str, bytes]:
    """A plain model's files by name, read into memory; an `.xml` brings its `.bin`.

    Raises:
        ModelError: a file is missing, empty or cannot be read. A `.bin` may be empty: a model
            without weights has such a one.
    """
    files = {}
    for one in (path, *(path.with_suffix(s) for s in COMPANIONS.get(path.suffix.lower(), ()))):
        try:
            files[one.name] = one.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            if one.suffix == ".json" and one is not path:
                continue  # the engine says what it misses
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"cannot read {str(one)!r}: {reason}") from None
        if not files[one.name] and one is path:
            raise ModelError(f"{one} is empty")
    return files


def _streams(intent: str, threads: int) -> int:
    """How many calls run side by side: one for `latency`; as many as the processors allow for
    `throughput`.

    Raises:
        UsageError: no such intent.
    """
    if intent not in INTENTS:
        raise UsageError(f"no intent {intent!r}; known: {', '.join(INTENTS)}")
    if intent == "latency":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // max(1, threads))
