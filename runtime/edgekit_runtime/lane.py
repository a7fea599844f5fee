"""A lane: the buffers one thread at a time runs on, bound once for each set of input shapes.

This is the hot path: for a small model its cost is comparable to the engine's. What does not
change between two calls is decided when the buffers are bound, and kept in closures.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from .engines import Binding, Shapes, numpy_dtype
from .errors import EdgeKitError, EngineCrashed, EngineError, InputError, one_line
from .manifest import TensorSpec

if TYPE_CHECKING:
    from .guard import Guard
    from .hooks import Hooks
    from .session import Session

__all__ = ["Bound", "Lane", "Times", "checked", "retried"]

clock = time.perf_counter_ns

Arrays = Mapping[str, np.ndarray]
Fill = Callable[[Arrays], bool]
#: nanoseconds of a call: until its inputs are in place, of the engine, until its outputs are out
Times = Tuple[int, int, int]


class Lane:
    """Runs on named arrays. `inputs` and `outputs` are our specs in the engine's order."""

    def __init__(
        self,
        bind: Callable[[Shapes], Binding],
        inputs: Tuple[TensorSpec, ...],
        outputs: Tuple[TensorSpec, ...],
        *,
        stateful: bool = False,
        most: int = 4,
    ) -> None:
        self.inputs, self.outputs, self._make, self._most = inputs, outputs, bind, most
        self._stateful = stateful
        self._bindings: OrderedDict[Shapes, Binding] = OrderedDict()
        self._binding: Binding = _NONE
        self._fill: Fill = _never
        self._collect: Callable[[], Dict[str, np.ndarray]] = dict
        #: inputs that were not contiguous and took a slower copy
        self.strided_copies = 0

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray]:
        """Fill, invoke, collect: see `Session.run`."""
        try:
            ready = self._fill(inputs)
        except (LookupError, AttributeError, TypeError):
            ready = False  # fit explains
        if not ready:
            self.fit(inputs)
        try:
            self._binding.invoke()
        except Exception as error:
            self._retry(error)
        return self._collect()

    def run_watched(
        self,
        inputs: Arrays,
        hooks: Hooks,
        guard: Optional[Guard],
        *,
        pre_ns: int = 0,
        finish: Optional[Callable[[Dict[str, np.ndarray]], Any]] = None,
    ) -> Any:
        """As `run`, with hooks and a guard. `pre_ns` was spent on the inputs before; `finish` makes
        the answer from the outputs, and its time counts as theirs."""
        if hooks.starts:
            hooks.start()
        start = clock()
        try:
            ready = self._fill(inputs)
        except (LookupError, AttributeError, TypeError):
            ready = False
        if not ready:
            self.fit(inputs)
        filled = clock()
        try:
            self._binding.invoke()
        except Exception as error:
            self._retry(error)
        done = clock()
        outputs: Any = self._collect()
        if guard is not None:
            guard.check(inputs, outputs)
        if finish is not None:
            outputs = finish(outputs)
        if hooks.ends:
            hooks.end((pre_ns + filled - start, done - filled, clock() - done))
        return outputs

    def fit(self, inputs: Arrays) -> None:
        """Check the inputs, choose or make buffers for their shapes, and fill them.

        Raises:
            InputError: they do not fit the model; the buffers are as they were.
            EngineError: the engine refuses their shapes.
        """
        arrays = checked(self.inputs, inputs)
        binding = self.bound(tuple(array.shape for array in arrays))
        self.strided_copies += sum(not array.flags.c_contiguous for array in arrays)
        for buffer, array in zip(binding.inputs, arrays):
            buffer[...] = array

    def bound(self, shapes: Shapes) -> Binding:
        """The buffers for these shapes, from now on those of `run`."""
        binding = self._bindings.get(shapes)
        if binding is None:
            if len(self._bindings) >= self._most:
                self._forget()  # its buffers, too: what is made now may take their memory
                self._bindings.popitem(last=False)[1].close()
            binding = self._make(shapes)
            if self._stateful:
                binding.invoke = partial(_invoke_afresh, binding, binding.invoke)
            self._bindings[shapes] = binding
        self._bindings.move_to_end(shapes)
        self._binding = binding
        self._fill = self._filler(binding.inputs)
        self._collect = _collector(self.outputs, binding)
        return binding

    def clear(self) -> None:
        """Close all buffers: the next run makes its own."""
        self._forget()
        for binding in self._bindings.values():
            binding.close()
        self._bindings.clear()

    def _forget(self) -> None:
        self._binding, self._fill, self._collect = _NONE, _never, dict

    def _retry(self, error: Exception) -> None:
        retried(self._binding, error)
        self._collect = _collector(self.outputs, self._binding)

    def _filler(self, buffers: Tuple[np.ndarray, ...]) -> Fill:
        """A function that copies inputs which fit these buffers as they are; False if they do not.

        With a case for one input, the usual one.
        """
        # Strings never match: each one of an object array is to be looked at, in `checked`.
        slots = tuple(
            (spec.name, buffer, buffer.shape, None if buffer.dtype == object else buffer.dtype)
            for spec, buffer in zip(self.inputs, buffers)
        )
        count = len(slots)

        def fill(inputs: Arrays) -> bool:
            if len(inputs) != count:
                return False
            for name, buffer, shape, dtype in slots:
                array = inputs[name]
                if array.dtype is not dtype or array.shape != shape or not array.flags.c_contiguous:
                    return False
                buffer[...] = array
            return True

        if count != 1:
            return fill
        only_name, only_buffer, only_shape, only_dtype = slots[0]

        def fill_one(inputs: Arrays) -> bool:
            array = inputs[only_name]
            if (
                array.dtype is not only_dtype
                or array.shape != only_shape
                or len(inputs) != 1
                or not array.flags.c_contiguous
            ):
                return False
            only_buffer[...] = array
            return True

        return fill_one


class _None(Binding):
    inputs = outputs = ()
    invoke = staticmethod(lambda: None)


_NONE = _None()


def _never(_: Arrays) -> bool:
    return False


def _invoke_afresh(binding: Binding, invoke: Callable[[], Any]) -> None:
    binding.reset()
    invoke()


class Bound:
    """Buffers for running without copies: fill `inputs`, call, read `outputs`.

    >>> bound = session.bind()                       # doctest: +SKIP
    >>> bound.inputs["x"][...] = x; bound(); bound.outputs["y"]   # doctest: +SKIP

    `outputs` are overwritten by the next call. One thread at a time. Hooks and guards are not for
    this path: nothing is between the caller and the engine.
    """

    def __init__(self, session: Session, binding: Binding, lane: Lane) -> None:
        self._session, self._binding = session, binding
        self._names = tuple(spec.name for spec in lane.outputs)
        # Read-only: an array put here in place of a buffer would never reach the engine.
        self.inputs = MappingProxyType(
            {spec.name: buffer for spec, buffer in zip(lane.inputs, binding.inputs)}
        )
        self._fixed: Optional[Mapping[str, np.ndarray]] = None
        # What the engine keeps for it goes with it, without waiting for the garbage collector.
        weakref.finalize(self, binding.close).atexit = False

    def __call__(self) -> None:
        """Run on what is in `inputs`.

        Raises:
            EngineError: the engine failed, or the session is closed.
        """
        try:
            self._binding.invoke()
        except EngineCrashed as crash:
            raise self._session._take_over(crash) from None
        except Exception as error:
            self._fixed = None  # the outputs may be others from now on
            retried(self._binding, error)

    @property
    def outputs(self) -> Mapping[str, np.ndarray]:
        """The engine's output buffers after the last call."""
        if self._fixed is not None:
            return self._fixed
        named = MappingProxyType(dict(zip(self._names, self._binding.outputs)))
        if self._binding.fixed_outputs:
            self._fixed = named
        return named


def retried(binding: Binding, error: Exception) -> None:
    """Let the engine try in another way after `error`.

    Raises:
        EngineError: it cannot, or failed again.
    """
    try:
        binding.retry(error)
    except EdgeKitError:
        raise
    except Exception as again:
        raise EngineError(f"the engine failed: {one_line(again)}") from again


def _collector(
    specs: Tuple[TensorSpec, ...], binding: Binding
) -> Callable[[], Dict[str, np.ndarray]]:
    """A function that gives the outputs as the caller's own arrays."""
    names = tuple(spec.name for spec in specs)
    if len(names) == 1:
        name = names[0]
        if binding.fresh_outputs:
            return lambda: {name: binding.outputs[0]}
        return lambda: {name: binding.outputs[0].copy()}
    if binding.fresh_outputs:
        return lambda: dict(zip(names, binding.outputs))
    return lambda: {name: array.copy() for name, array in zip(names, binding.outputs)}


def checked(specs: Tuple[TensorSpec, ...], inputs: Mapping[str, np.ndarray]) -> List[np.ndarray]:
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
