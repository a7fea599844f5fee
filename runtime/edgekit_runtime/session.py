"""Sessions: a verified model on an engine, buffers bound once.

What runs side by side: `run`, `stream().run`, `predict` and `refresh` of one session take turns
(they share a lock). Each `Bound` has buffers of its own: different ones may run in different
threads at once, one must not. Calls made with `submit` and `run_batch` run beside all of them,
as many at once as the session has streams (`load(..., intent="throughput")`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
    Type,
)

import numpy as np

from .engines import Binding, Loaded, Shapes
from .errors import (
    ClosedError,
    EdgeKitError,
    EngineCrashed,
    EngineError,
    InputError,
    ModelError,
    UsageError,
    one_line,
)
from .hooks import Hooks, Measuring
from .lane import Bound, Lane
from .manifest import Dim, TensorSpec, same_interface
from .placement import Placement
from .source import Opened, Processing, Source, processing

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .guard import Guard
    from .pool import Pool
    from .stream import Stream

__all__ = ["Bound", "Session"]

_CLOSED = "the session is closed; load the model again"
_FORKED = (
    "the session was loaded before this process was forked, and engines do not survive that; "
    "load the model again here, or start processes with the method 'spawn'"
)
_MAX_CRASHES = 3
#: what `os.register_at_fork` must find; it cannot be told to forget a session
_ALIVE: weakref.WeakSet[Session] = weakref.WeakSet()
_REGISTERED: List[bool] = []


class Session:
    """A loaded model. All methods may be called from any thread.

    `inputs` and `outputs` are TensorSpecs. `manifest` and `variant` are None for plain models.
    `fallbacks` says which of the bundle's variants were passed over, and why.
    """

    def __init__(self, source: Source, opened: Opened, *, guard: Optional[Guard] = None) -> None:
        me = weakref.ref(self)  # not itself: a session without users ends at once, not some day
        self.hooks = Hooks(lambda: _do(me, "_watch"))
        self._source = source
        # Calls take turns by the first; the second is for making buffers, which workers do, too;
        # the third for the workers themselves: `refresh` and `close` wait until they are done.
        self._lock, self._binding_lock = threading.RLock(), threading.RLock()
        self._pool_lock = threading.Lock()
        self._guard = guard
        self._bindings: weakref.WeakSet[Binding] = weakref.WeakSet()
        self._crashes = 0
        self._closed: Optional[str] = None
        self._pool: Optional[Pool] = None
        self._loaded: Optional[Loaded] = None
        self._watch()
        try:
            self._install(opened, processing(opened.manifest), self._new_lane(opened))
        except BaseException:
            opened.loaded.close()
            raise
        _survive_fork(self)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Run once; the arrays returned are the caller's own.

        Other shapes than last time rebind the buffers, where the model leaves them free. A model
        that keeps state inside the engine forgets it first: use `stream` to keep it.

        Raises:
            InputError: a name, dtype or shape does not fit; nothing ran.
            EngineError: the engine failed, or the session is closed.
            GuardError: an output is not sound, and the session was loaded with `guard="raise"`.
        """
        with self._lock:
            try:
                if self._watched:
                    found: Dict[str, np.ndarray]
                    found = self._lane.run_watched(inputs, self.hooks, self._guard)
                    return found
                return self._lane.run(inputs)
            except EngineCrashed as crash:
                raise self._take_over(crash) from None

    def run_batch(
        self, samples: Iterable[Mapping[str, np.ndarray]]
    ) -> Iterator[Dict[str, np.ndarray]]:
        """The outputs of each sample, in order, while later ones already run. Samples are taken
        from the iterable as places become free, so that it may be endless.

        Raises:
            InputError, EngineError, GuardError: as `run`, when the sample's turn comes.
        """
        return self._workers().map(samples)

    def submit(
        self, inputs: Mapping[str, np.ndarray], *, timeout_s: Optional[float] = None
    ) -> Future[Dict[str, np.ndarray]]:
        """Run in the background; waits for a place in the queue (two per stream).

        The inputs are copied: the caller may change them at once.

        Raises:
            InputError: they do not fit the model; what fails later is raised by the future.
            QueueFullError: no place became free within `timeout_s` (None: wait).
        """
        try:
            return self._workers().submit(inputs, timeout_s=timeout_s)
        except ClosedError:  # the workers of a former version, perhaps
            return self._workers().submit(inputs, timeout_s=timeout_s)

    def predict(self, raw: Any) -> Dict[str, Any]:
        """From raw data to a readable answer, through the bundle's own pre- and postprocessing.

        `raw` maps input names to what the bundle's preprocessing takes (a path or the bytes of an
        image or a `.wav`, text, or arrays where there is none); with one input, just that.

        Raises:
            InputError: the data cannot be decoded or does not fit.
            EngineError, GuardError: as `run`.
        """
        with self._lock:
            return self._predict(raw)

    def preprocess(self, raw: Any) -> Dict[str, np.ndarray]:
        """What `predict` gives to the model for one sample."""
        if isinstance(raw, Mapping):
            named = raw
        elif len(self.inputs) == 1:
            named = {self.inputs[0].name: raw}
        else:
            wanted = ", ".join(spec.name for spec in self.inputs)
            raise InputError(f"one value is given for the inputs {wanted}; wanted a dict by name")
        ready = {}
        for name, value in named.items():
            steps = self._preprocess.get(name)
            try:
                array = value if steps is None else steps(value)
            except InputError as error:
                raise InputError(f"input {name!r}: {error}") from None
            spec = next((one for one in self.inputs if one.name == name), None)
            if steps is not None and spec is not None and array.ndim == len(spec.shape) - 1:
                array = array[None]
            ready[name] = array
        return ready

    def postprocess(self, outputs: Mapping[str, np.ndarray]) -> Dict[str, Any]:
        """The bundle's answer from the model's outputs; the outputs as they are without one."""
        return self._postprocess(outputs)

    def bind(self, shapes: Optional[Mapping[str, Tuple[int, ...]]] = None) -> Bound:
        """Buffers of your own for running without copies; free dimensions default to the bundle's
        example, else to 1. They stay valid until the session is closed.

        Raises:
            InputError: a name or shape does not fit the model's inputs.
            EngineError: the engine refuses the shapes, or the session is closed.
        """
        with self._lock, self._survival():
            return Bound(self, self._bind(self._shapes(shapes)), self._lane)

    def stream(
        self,
        states: Optional[Mapping[str, str]] = None,
        *,
        shapes: Optional[Mapping[str, Tuple[int, ...]]] = None,
    ) -> Stream:
        """State kept from call to call, apart from every other stream's.

        `states` maps inputs to the outputs fed back into them; the bundle's by default. State
        inside the model (TFLite variables, OpenVINO's `ReadValue`) is kept as well. `shapes` are
        those of states whose free dimensions follow from nothing the model says; else they are
        taken from the other inputs, the bundle's example, or 1.

        Raises:
            UsageError: neither the bundle nor `states` says what the state is.
            InputError: they do not fit the model.
        """
        from .stream import Stream, state_pairs

        with self._lock:
            loaded = self._engine()
            pairs = state_pairs(self.manifest, states, self.inputs, self.outputs)
            if not pairs and not loaded.stateful:
                where = "the bundle" if self.manifest is not None else "a plain model"
                raise UsageError(
                    f"{where} names no state; say which output is fed back into which input: "
                    "stream({INPUT: OUTPUT}); inputs "
                    f"{', '.join(s.name for s in self.inputs)}; outputs "
                    f"{', '.join(s.name for s in self.outputs)}"
                )
            return Stream(self, pairs, self._lane.inputs, self._lane.outputs, shapes or {})

    def warm_up(
        self, shapes: Optional[Mapping[str, Tuple[int, ...]]] = None, *, runs: int = 3
    ) -> None:
        """Run on zeros, so that the first real call does not pay for what engines do lazily."""
        with self._lock:
            wanted = self._shapes(shapes)
            zeros = {
                spec.name: np.zeros(shape, object if spec.dtype == "string" else spec.dtype)
                for spec, shape in zip(self._lane.inputs, wanted)
            }
            for spec in self.inputs:
                if spec.dtype == "string":
                    zeros[spec.name][...] = ""
            with self._survival():
                for _ in range(runs):
                    self._lane.run(zeros)

    def measure(self, *, capacity: int = 100_000, energy_j: Any = None) -> Measuring:
        """Measure calls while the context lasts: `with session.measure() as m: ...`.

        Keeps the last `capacity` calls. `energy_j` is a function that reads a meter in joules;
        without one, the machine's own (RAPL) is read where it may be.
        """
        return Measuring(self.hooks, capacity, energy_j, self._about)

    def _about(self) -> Dict[str, Any]:
        """What a file of measured calls says of the model."""
        placement = self.placement
        return {
            "model": self._source.path.name,
            "variant": self.variant.id if self.variant is not None else None,
            "engine_version": self.engine_version,
            "placement": {
                "shares": placement.shares,
                "delegate": placement.delegate,
                "precision": placement.precision,
            },
        }

    def refresh(self) -> bool:
        """Move to the version that was activated since, if there is one; whether it did.

        For sessions from `open_installed`. Streams, Bounds and queued calls of the former version
        end with it.

        Raises:
            UsageError: the session is not of an installed bundle.
            EdgeKitError: the new version cannot be loaded; the session goes on with the former.
        """
        newer = self._source.newer()
        if newer is None:
            return False
        opened = newer.open()
        try:
            with self._pool_lock, self._lock:
                self._engine()
                if not same_interface((opened.inputs, opened.outputs), (self.inputs, self.outputs)):
                    raise ModelError(
                        f"{newer.path} has other inputs or outputs than the version in use; "
                        "load it anew"
                    )
                steps, lane = processing(opened.manifest), self._new_lane(opened)
                pool, self._pool = self._pool, None
                if pool is not None:  # its workers take no lock but to make buffers
                    self._lock.release()
                    try:
                        pool.close()
                    finally:
                        self._lock.acquire()
                self._uninstall()
                self._source = newer
                self._install(opened, steps, lane)
        except EdgeKitError:
            opened.loaded.close()
            raise
        return True

    @property
    def placement(self) -> Placement:
        """Which device and delegate the engine really uses."""
        with self._lock:
            self._engine()
            with self._survival(), self._binding_lock:
                return self._opened.placement()

    @property
    def streams(self) -> int:
        """How many submitted calls run at once: with `intent="throughput"` the processors divided
        by the threads of each call."""
        return self._opened.streams

    def __repr__(self) -> str:
        what = self.variant.id if self.variant is not None else self._source.path.name
        return f"<Session {what}: {', '.join(map(str, self.inputs))}>"

    @property
    def takes_raw(self) -> bool:
        """Whether the bundle brings preprocessing."""
        return bool(self._preprocess)

    @property
    def strided_copies(self) -> int:
        """How many inputs were not contiguous, and took a slower copy."""
        return self._lane.strided_copies

    def close(self) -> None:
        """Free the engine's memory. A closed session refuses to run; queued calls end first."""
        with self._pool_lock:
            pool, self._pool = self._pool, None
            if pool is not None:
                pool.close()
            with self._lock:
                if self._closed is None:
                    self._closed = _CLOSED
                    self._uninstall()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    # --- the parts share these; the lock is held ------------------------------------------------

    def _install(self, opened: Opened, steps: Processing, lane: Lane) -> None:
        self._version = object()
        self._opened, self._loaded = opened, opened.loaded
        self.inputs, self.outputs = opened.inputs, opened.outputs
        self.manifest, self.variant = opened.manifest, opened.variant
        self.fallbacks, self.engine_version = opened.fallbacks, opened.loaded.version
        (self._preprocess, self._postprocess), self._lane = steps, lane

    def _uninstall(self) -> None:
        if self._loaded is None:
            return
        self._loaded.retire()
        self._lane.clear()
        with self._binding_lock:
            for binding in list(self._bindings):
                binding.close()
            self._loaded.close()
            self._loaded = None
        self._opened = self._opened._replace(loaded=_NOTHING)

    def _new_lane(self, opened: Opened) -> Lane:
        """Buffers for one more thread."""
        variant, loaded = opened.variant, opened.loaded
        ins, outs = (variant.input_names, variant.output_names) if variant else (None, None)
        me = weakref.ref(self)
        return Lane(
            lambda shapes: _do(me, "_bind", shapes),
            _match(opened.inputs, loaded.inputs, ins, "input"),
            _match(opened.outputs, loaded.outputs, outs, "output"),
            stateful=loaded.stateful,
            most=loaded.max_bindings,
        )

    def _watch(self) -> None:
        """Runs whenever hooks come or go: without any, `run` does nothing for them."""
        self._watched = bool(self.hooks) or self._guard is not None

    def _run_beside(self, lane: Lane, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """A call by a worker, on buffers of its own; the session is not locked."""
        try:
            if self._watched:
                found: Dict[str, np.ndarray] = lane.run_watched(inputs, self.hooks, self._guard)
                return found
            return lane.run(inputs)
        except EngineCrashed as crash:
            raise self._take_over(crash) from None

    def _run_stream(
        self, stream: Stream, inputs: Mapping[str, np.ndarray]
    ) -> Dict[str, np.ndarray]:
        with self._lock:
            self._engine()
            self.hooks.start()
            start = time.perf_counter_ns()
            try:
                outputs = stream._call(inputs)
            except EngineCrashed as crash:
                raise self._take_over(crash) from None
            if self._watched:
                self.hooks.end((0, time.perf_counter_ns() - start, 0))
                if self._guard is not None:
                    self._guard.check(inputs, outputs)
            return outputs

    def _predict(self, raw: Any) -> Dict[str, Any]:
        start = time.perf_counter_ns()
        inputs = self.preprocess(raw)
        pre_ns = time.perf_counter_ns() - start
        try:
            answer: Dict[str, Any] = self._lane.run_watched(
                inputs, self.hooks, self._guard, pre_ns=pre_ns, finish=self.postprocess
            )
        except EngineCrashed as crash:
            raise self._take_over(crash) from None
        return answer

    def _workers(self) -> Pool:
        with self._pool_lock:
            self._engine()
            if self._pool is None:
                from .pool import Pool  # threads and queues: not paid for at import

                self._pool = Pool(self, self._opened.streams)
            return self._pool

    @contextlib.contextmanager
    def _survival(self) -> Iterator[None]:
        """What a crash of the engine's process means for every kind of call."""
        try:
            yield
        except EngineCrashed as crash:
            raise self._take_over(crash) from None

    def _take_over(self, crash: EngineCrashed) -> EngineCrashed:
        """After the engine's process died: load the next variant, or this one again. Returns what
        to raise: the call that was lost is never repeated, it may be what kills the engine."""
        with self._lock:
            if crash.loaded is not self._loaded:
                return crash  # another thread has seen to it
            self._uninstall()
            self._crashes += 1
            try:
                if self._crashes > _MAX_CRASHES:
                    raise EngineError(f"it has died {self._crashes} times")
                opened = self._source.after(self._opened, str(crash))
                self._install(opened, processing(opened.manifest), self._new_lane(opened))
            except Exception as error:  # also a FallbackWarning that the user made an error
                self._closed = f"{crash}; nothing takes over: {one_line(error)}"
                return EngineCrashed(self._closed)
            name = "the model" if self.variant is None else f"variant {self.variant.id!r}"
            return EngineCrashed(f"{crash}; {name} was loaded for the calls that follow")

    def _abandon(self) -> None:
        """In a forked child: the engine's threads are not here, so not even its destructors may
        run."""
        self._lock, self._binding_lock = threading.RLock(), threading.RLock()
        self._pool_lock, self._closed, self._pool = threading.Lock(), _FORKED, None
        for binding in list(self._bindings):
            binding.invoke = _refuse_forked
            _keep_for_ever(binding)
        _keep_for_ever(self._opened)  # and with it what it holds of the engine
        self._lane = Lane(self._bind, self._lane.inputs, ())

    def _engine(self) -> Loaded:
        if self._closed is not None:
            raise ClosedError(self._closed)
        assert self._loaded is not None  # noqa: S101  (for the type checker)
        return self._loaded

    def _bind(self, shapes: Shapes) -> Binding:
        loaded = self._engine()
        try:
            with self._binding_lock:
                binding = loaded.bind(shapes)
                self._bindings.add(binding)
        except EngineCrashed:
            raise
        except Exception as error:
            listed = ", ".join(str(list(s)) for s in shapes)
            raise EngineError(
                f"the engine refused the shapes {listed}: {one_line(error)}"
            ) from error
        return binding

    def _shapes(self, given: Optional[Mapping[str, Tuple[int, ...]]]) -> Shapes:
        """Concrete shapes in the engine's order."""
        specs, given = self._lane.inputs, given or {}
        if not isinstance(given, Mapping) or not all(
            isinstance(shape, (tuple, list))
            and all(isinstance(d, (int, np.integer)) for d in shape)
            for shape in given.values()
        ):
            raise InputError("shapes are tuples by input name, for instance {'x': (1, 4)}")
        if not set(given) <= {spec.name for spec in specs}:
            raise InputError(
                f"shapes are given for {', '.join(map(str, given))}; wanted: "
                f"{', '.join(spec.name for spec in specs)}"
            )
        wanted = tuple(
            tuple(map(int, given[s.name])) if s.name in given else s.usual_shape() for s in specs
        )
        for spec, shape in zip(specs, wanted):
            if not spec.accepts(shape) or any(size < 1 for size in shape):
                raise InputError(f"input {spec} does not take the shape {list(shape)}")
        return wanted


_NOTHING: Any = None  # what a closed session holds of the engine


def _do(session: weakref.ref[Session], method: str, *arguments: Any) -> Any:
    """Call a method of a session that may be gone."""
    found = session()
    if found is None:
        raise ClosedError(_CLOSED)
    return getattr(found, method)(*arguments)


def _survive_fork(session: Session) -> None:
    if not _REGISTERED and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
        _REGISTERED.append(True)
    _ALIVE.add(session)


def _after_fork() -> None:
    for session in list(_ALIVE):
        session._abandon()


def _refuse_forked() -> None:
    raise ClosedError(_FORKED)


def _keep_for_ever(value: object) -> None:
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _match(
    ours: Tuple[TensorSpec, ...],
    engines: Tuple[TensorSpec, ...],
    names: Optional[Tuple[str, ...]],
    what: str,
) -> Tuple[TensorSpec, ...]:
    """Our specs in the engine's order; `names` are the engine's names in our order."""
    wanted = dict(zip(names or tuple(s.name for s in ours), ours))
    matched: List[TensorSpec] = []
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
