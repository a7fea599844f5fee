"""Sessions: a verified model on an engine, buffers bound once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Type, Union

import numpy as np

from .bundle import Bundle, is_bundle
from .engines import (
    ENGINE_OF_FORMAT,
    ENGINES,
    Binding,
    Loaded,
    Options,
    Shapes,
    load_engine,
    numpy_dtype,
)
from .errors import (
    EdgeKitError,
    EngineError,
    EngineMissingError,
    InputError,
    ModelError,
    UsageError,
    one_line,
)
from .manifest import Dim, Manifest, TensorSpec, Variant
from .placement import Placement, enforce

__all__ = ["Bound", "Session", "format_of", "load", "model_files", "open_variant"]

_CLOSED = "the session is closed; load the model again"
_FORMAT_OF_SUFFIX = {".onnx": "onnx", ".tflite": "tflite", ".xml": "openvino"}


def load(
    path: Union[str, Path],
    *,
    variant: Optional[str] = None,
    threads: Optional[int] = None,
    engine: Optional[str] = None,
    precision: str = "float32",
) -> Session:
    """Load a bundle (`.edgekit`) or a plain model (`.onnx`, `.tflite`, `.xml`).

    Every file of a bundle is hashed against its manifest before an engine sees one, and the
    engine is given the verified bytes, not the path. Without `variant`, the first variant whose
    engine is installed is taken, in the bundle's order of preference. `threads`, `engine` and
    `precision` are for plain models; of these only `threads` overrides a bundle.

    Raises:
        BundleError: the bundle is damaged, hostile or of another schema.
        ModelError: the model is missing or the engine refuses it.
        EngineMissingError: no engine is installed that could run it.
        LimitError: the engine did not place the model as the bundle promises.
        UsageError: an option that does not exist, or not for this kind of file.
    """
    file = Path(path)
    if is_bundle(file):
        if engine is not None:
            raise UsageError(f"{file} is a bundle: choose one of its variants, not the engine")
        with Bundle(file) as bundle:
            return open_variant(bundle, variant, threads=threads)
    if variant is not None:
        raise ModelError(f"{file} is a plain model; only bundles have variants")
    found = format_of(file)
    files = model_files(file)
    chosen = ENGINE_OF_FORMAT[found] if engine is None else engine
    if chosen in ENGINES and found not in ENGINES[chosen][3]:
        able = ", ".join(name for name, row in ENGINES.items() if found in row[3])
        raise UsageError(f"{chosen} does not load {file.suffix} files; {able} would")
    loaded = load_engine(chosen, files, Options(1 if threads is None else threads, precision))
    return Session(loaded, loaded.inputs, loaded.outputs)


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
    paths = [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]
    files = {}
    for one in paths:
        try:
            files[one.name] = one.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"cannot read {str(one)!r}: {reason}") from None
        if not files[one.name] and one is path:
            raise ModelError(f"{one} is empty")
    return files


def open_variant(
    bundle: Bundle, variant_id: Optional[str] = None, *, threads: Optional[int] = None
) -> Session:
    """A session on one variant of an open bundle, after verifying all of it."""
    manifest = bundle.manifest
    wanted = list(manifest.variants) if variant_id is None else [manifest.variant(variant_id)]
    kept = bundle.verify(keep=tuple(path for v in wanted for path in v.files))
    missing: List[EngineMissingError] = []
    for variant in wanted:
        files = {path.rsplit("/", 1)[-1]: kept[path] for path in variant.files}
        options = Options(variant.threads if threads is None else threads, variant.precision)
        try:
            loaded = load_engine(variant.engine, files, options)
        except EngineMissingError as error:
            missing.append(error)
            continue
        enforce(variant.placement, _placement(loaded), variant=variant.id)
        return Session(
            loaded, manifest.inputs, manifest.outputs, manifest=manifest, variant=variant
        )
    raise EngineMissingError(f"{bundle.path}: {'; '.join(map(str, missing))}")


class Session:
    """A loaded model. `run` may be called from any thread; calls are serialised by a lock.

    `inputs` and `outputs` are TensorSpecs. `manifest` and `variant` are None for plain models.
    """

    def __init__(
        self,
        loaded: Loaded,
        inputs: Tuple[TensorSpec, ...],
        outputs: Tuple[TensorSpec, ...],
        *,
        manifest: Optional[Manifest] = None,
        variant: Optional[Variant] = None,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.manifest, self.variant = manifest, variant
        self.engine_version = loaded.version
        self._loaded: Optional[Loaded] = loaded
        self._lock = threading.Lock()
        # Position in the engine's order -> our spec; engines may order or name things otherwise.
        self._ordered = _match(
            inputs, loaded.inputs, variant.input_names if variant else None, "input"
        )
        ordered_outputs = _match(
            outputs, loaded.outputs, variant.output_names if variant else None, "output"
        )
        self._output_names = tuple(spec.name for spec in ordered_outputs)
        self._bindings: OrderedDict[Shapes, Binding] = OrderedDict()
        self._unbind()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Run once; the arrays returned are the caller's own.

        Other shapes than last time rebind the buffers, where the model leaves them free.

        Raises:
            InputError: a name, dtype or shape does not fit; nothing ran.
            EngineError: the engine failed, or the session is closed.
        """
        with self._lock:
            try:
                ready = self._fill(inputs)
            except (LookupError, AttributeError, TypeError):
                ready = False  # _fit explains
            if not ready:
                self._fit(inputs)
            try:
                self._invoke()
            except Exception as error:
                raise EngineError(f"the engine failed: {one_line(error)}") from error
            return self._collect()

    def bind(self, shapes: Optional[Mapping[str, Tuple[int, ...]]] = None) -> Bound:
        """Buffers of your own for running without copies; free dimensions default to the bundle's
        example, else to 1.

        The buffers stay valid until the session is closed or bound to other shapes.

        Raises:
            InputError: a name or shape does not fit the model's inputs.
            EngineError: the engine refuses the shapes, or the session is closed.
        """
        given = shapes or {}
        known = tuple(s.name for s in self._ordered)
        if not set(given) <= set(known):
            raise InputError(
                f"shapes are given for {', '.join(map(str, given))}; wanted: {', '.join(known)}"
            )
        wanted = tuple(
            tuple(given[s.name]) if s.name in given else s.usual_shape() for s in self._ordered
        )
        for spec, shape in zip(self._ordered, wanted):
            if not spec.accepts(shape) or any(size < 1 for size in shape):
                raise InputError(f"input {spec} does not take the shape {list(shape)}")
        with self._lock:
            loaded = self._engine()
            binding = _bind(loaded, wanted)
            if loaded.max_bindings == 1:
                self._unbind()
        return Bound(binding, known, self._output_names, lambda: self._loaded is None)

    @property
    def placement(self) -> Placement:
        """Which device and delegate the engine really uses."""
        with self._lock:
            return _placement(self._engine())

    def close(self) -> None:
        """Free the engine's memory. A closed session refuses to run."""
        with self._lock:
            if self._loaded is not None:
                self._unbind()
                self._loaded.close()
                self._loaded = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def _engine(self) -> Loaded:
        if self._loaded is None:
            raise EngineError(_CLOSED)
        return self._loaded

    def _unbind(self) -> None:
        """Forget all buffers: the next run makes its own."""
        self._bindings.clear()
        self._fill: Callable[[Mapping[str, np.ndarray]], bool] = lambda _: False
        self._invoke: Callable[[], None] = lambda: None
        self._collect: Callable[[], Dict[str, np.ndarray]] = dict

    def _fit(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Check the inputs, choose or make buffers for their shapes, and fill them."""
        loaded = self._engine()
        arrays = _checked(self._ordered, inputs)
        shapes = tuple(array.shape for array in arrays)
        binding = self._bindings.get(shapes)
        if binding is None:
            binding = _bind(loaded, shapes)
            while len(self._bindings) >= loaded.max_bindings:
                self._bindings.popitem(last=False)
            self._bindings[shapes] = binding
        self._bindings.move_to_end(shapes)
        self._fill = _filler(tuple(spec.name for spec in self._ordered), binding.inputs)
        self._invoke = binding.invoke
        self._collect = _collector(self._output_names, binding)
        for buffer, array in zip(binding.inputs, arrays):
            buffer[...] = array


class Bound:
    """Buffers for running without copies: fill `inputs`, call, read `outputs`.

    >>> bound = session.bind()                       # doctest: +SKIP
    >>> bound.inputs["x"][...] = x; bound(); bound.outputs["y"]   # doctest: +SKIP

    `outputs` are overwritten by the next call. Not thread-safe: one Bound per thread.
    """

    def __init__(
        self,
        binding: Binding,
        input_names: Tuple[str, ...],
        output_names: Tuple[str, ...],
        closed: Callable[[], bool],
    ) -> None:
        self._binding, self._output_names = binding, output_names
        # Read-only: an array put here in place of a buffer would never reach the engine.
        self.inputs = MappingProxyType(dict(zip(input_names, binding.inputs)))
        self._invoke, self._closed = binding.invoke, closed

    def __call__(self) -> None:
        """Run on what is in `inputs`.

        Raises:
            EngineError: the engine failed, or the session is closed or bound to other shapes.
        """
        if self._closed():
            raise EngineError(_CLOSED)
        try:
            self._invoke()
        except Exception as error:
            raise EngineError(f"the engine failed: {one_line(error)}") from error

    @property
    def outputs(self) -> Dict[str, np.ndarray]:
        """The engine's output buffers after the last call."""
        return dict(zip(self._output_names, self._binding.outputs))


def _filler(
    names: Tuple[str, ...], buffers: Tuple[np.ndarray, ...]
) -> Callable[[Mapping[str, np.ndarray]], bool]:
    """A function that copies inputs which fit these buffers as they are; False if they do not.

    A closure with a case for one input, the usual one: this is the hot path, and for a small
    model its cost is comparable to the engine's.
    """
    # Strings never match: each one of an object array is to be looked at, in _checked.
    slots = tuple(
        (name, buffer, buffer.shape, None if buffer.dtype == object else buffer.dtype)
        for name, buffer in zip(names, buffers)
    )
    count = len(slots)

    def fill(inputs: Mapping[str, np.ndarray]) -> bool:
        if len(inputs) != count:
            return False
        for name, buffer, shape, dtype in slots:
            array = inputs[name]
            if array.dtype is not dtype or array.shape != shape:
                return False
            buffer[...] = array
        return True

    if count != 1:
        return fill
    only_name, only_buffer, only_shape, only_dtype = slots[0]

    def fill_one(inputs: Mapping[str, np.ndarray]) -> bool:
        array = inputs[only_name]
        if array.dtype is not only_dtype or array.shape != only_shape or len(inputs) != 1:
            return False
        only_buffer[...] = array
        return True

    return fill_one


def _collector(names: Tuple[str, ...], binding: Binding) -> Callable[[], Dict[str, np.ndarray]]:
    """A function that gives the outputs as the caller's own arrays."""
    if len(names) == 1:
        name = names[0]
        if binding.fresh_outputs:
            return lambda: {name: binding.outputs[0]}
        return lambda: {name: binding.outputs[0].copy()}
    if binding.fresh_outputs:
        return lambda: dict(zip(names, binding.outputs))
    return lambda: {name: out.copy() for name, out in zip(names, binding.outputs)}


def _bind(loaded: Loaded, shapes: Shapes) -> Binding:
    try:
        return loaded.bind(shapes)
    except Exception as error:
        listed = ", ".join(str(list(s)) for s in shapes)
        raise EngineError(f"the engine refused the shapes {listed}: {one_line(error)}") from error


def _placement(loaded: Loaded) -> Placement:
    try:
        return loaded.placement()
    except EdgeKitError:
        raise
    except Exception as error:
        raise EngineError(f"the engine does not say its placement: {one_line(error)}") from error


def _match(
    ours: Tuple[TensorSpec, ...],
    engines: Tuple[TensorSpec, ...],
    names: Optional[Tuple[str, ...]],
    what: str,
) -> Tuple[TensorSpec, ...]:
    """Our specs in the engine's order; `names` are the engine's names in our order."""
    wanted = dict(zip(names or tuple(s.name for s in ours), ours))
    matched = []
    for spec in engines:
        if spec.name not in wanted:
            raise ModelError(f"the model has the {what} {spec.name!r}, the manifest does not")
        mine = wanted.pop(spec.name)
        if mine.dtype != spec.dtype or not _compatible(mine.shape, spec.shape):
            raise ModelError(f"the model's {what} is {spec}, the manifest says {mine}")
        matched.append(mine)
    if wanted:
        raise ModelError(f"the manifest has the {what} {next(iter(wanted))!r}, the model does not")
    return tuple(matched)


def _compatible(ours: Tuple[Dim, ...], engines: Tuple[Dim, ...]) -> bool:
    """Whether fixed dimensions agree; a free one goes with any."""
    pairs = zip(ours, engines)
    return len(ours) == len(engines) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in pairs
    )


def _checked(specs: Tuple[TensorSpec, ...], inputs: Mapping[str, np.ndarray]) -> List[np.ndarray]:
    """The arrays in order, or an InputError that says what was found and wanted."""
    wanted = ", ".join(spec.name for spec in specs)
    if not isinstance(inputs, Mapping):
        raise InputError(f"run() takes a dict of arrays by input name ({wanted})")
    if set(inputs) != {spec.name for spec in specs}:
        found = ", ".join(map(str, inputs)) or "nothing"
        raise InputError(f"the inputs are named {found}; wanted: {wanted}")
    arrays = []
    for spec in specs:
        array = inputs[spec.name]
        if not isinstance(array, np.ndarray):
            kind = type(array).__name__
            raise InputError(f"input {spec.name!r} is a {kind}; wanted a numpy {spec.dtype} array")
        if spec.dtype == "string":
            if not all(isinstance(one, str) for one in array.flat):
                raise InputError(f"input {spec.name!r} has dtype {array.dtype}; wanted strings")
        elif array.dtype != numpy_dtype(spec.dtype):
            raise InputError(
                f"input {spec.name!r} has dtype {_dtype_name(array.dtype)}; wanted {spec.dtype}: "
                f"use .astype(numpy.{spec.dtype})"
            )
        if not spec.accepts(array.shape):
            raise InputError(
                f"input {spec.name!r} has shape {list(array.shape)}; wanted "
                f"[{', '.join(map(str, spec.shape))}]"
            )
        if array.size == 0:
            raise InputError(f"input {spec.name!r} is empty: shape {list(array.shape)}")
        arrays.append(array)
    return arrays


def _dtype_name(dtype: Any) -> str:
    return str(dtype.name) if dtype.isnative else f"{dtype.name} of foreign byte order"
