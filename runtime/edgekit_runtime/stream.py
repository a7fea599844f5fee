"""Streams: models that carry state from call to call, a separate state for every stream."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Dict, List, Mapping, Optional, Tuple

import numpy as np

from .engines import Binding, Shapes
from .errors import ClosedError, EngineCrashed, EngineError, InputError, UsageError
from .lane import checked, retried
from .manifest import Manifest, TensorSpec

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Stream", "state_pairs"]


def state_pairs(
    manifest: Optional[Manifest],
    given: Optional[Mapping[str, str]],
    inputs: Tuple[TensorSpec, ...],
    outputs: Tuple[TensorSpec, ...],
) -> Dict[str, str]:
    """Input -> the output fed back into it: as given, else as the bundle says.

    Raises:
        UsageError: a name is not the model's, or the two are of different type.
    """
    if given is not None:
        if not isinstance(given, Mapping):
            raise UsageError("states are a dict: {INPUT: OUTPUT fed back into it}")
        pairs = dict(given)
    else:
        pairs = {one.input: one.output for one in manifest.states} if manifest else {}
    ins, outs = {s.name: s for s in inputs}, {s.name: s for s in outputs}
    for name, fed_by in pairs.items():
        if name not in ins or fed_by not in outs:
            raise UsageError(
                f"the state {name!r} fed by {fed_by!r} is not this model's: inputs "
                f"{', '.join(ins)}; outputs {', '.join(outs)}"
            )
        if ins[name].dtype != outs[fed_by].dtype:
            raise UsageError(f"the state {ins[name]} cannot be fed by {outs[fed_by]}")
    return pairs


class Stream:
    """Calls that follow each other: state goes from one to the next, from zeros at first.

    >>> voice = session.stream()                    # doctest: +SKIP
    >>> for frame in frames: voice.run({"input": frame})["output"]   # doctest: +SKIP

    State inputs and outputs are not seen: `inputs` and `outputs` are the others. Many streams
    run on one loaded model; each is for one thread at a time.
    """

    def __init__(
        self,
        session: Session,
        pairs: Dict[str, str],
        inputs: Tuple[TensorSpec, ...],
        outputs: Tuple[TensorSpec, ...],
        given: Mapping[str, Tuple[int, ...]],
    ) -> None:
        unknown = sorted(set(given) - set(pairs))
        if unknown and unknown[0] not in {spec.name for spec in inputs}:
            raise InputError(f"{unknown[0]!r} is no state; there is: {', '.join(pairs) or 'none'}")
        for spec in inputs:
            shape = given.get(spec.name)
            if shape is not None and spec.name not in pairs:
                raise InputError(f"{spec.name!r} is no state, so its shape is that of each call")
            if shape is not None and not spec.accepts(tuple(shape)):
                raise InputError(f"the state {spec} does not take the shape {list(shape)}")
        self._given = {name: tuple(shape) for name, shape in given.items()}
        self.inputs = tuple(spec for spec in inputs if spec.name not in pairs)
        self.outputs = tuple(spec for spec in outputs if spec.name not in pairs.values())
        self._session, self._pairs, self._specs = session, pairs, inputs
        self._names = tuple(spec.name for spec in outputs)
        self._binding: Optional[Binding] = None
        self._shapes: Shapes = ()
        self._version = session._version
        self._buffers: Tuple[np.ndarray, ...] = ()

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Run once on the state as it is, and keep the new one; the outputs are yours.

        Raises:
            InputError: a name, dtype or shape does not fit, or free dimensions changed within
                the stream: call `reset` first. The state is as it was.
            EngineError: the engine failed, or the session is closed.
        """
        return self._session._run_stream(self, inputs)

    def reset(self) -> None:
        """Begin anew: all state is zeros."""
        self._shapes = ()
        self._states: Dict[str, np.ndarray] = {}
        if self._binding is not None:
            self._binding.close()
            self._binding = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # what the engine keeps for it goes with it
            self.reset()

    def _call(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Runs while the session is locked."""
        if self._session._version is not self._version:
            raise ClosedError("the stream belongs to a former version of the model; open a new one")
        arrays = checked(self.inputs, inputs)
        shapes = tuple(array.shape for array in arrays)
        first = self._binding is None
        if first or shapes != self._shapes:
            self._begin(shapes, self._given)
        try:
            named = self._invoke(arrays)
        except EngineError as error:
            free = [s for s in self._specs if s.name in self._pairs and s.name not in self._given]
            if (
                not first
                or isinstance(error, EngineCrashed)
                or not any(isinstance(d, str) for spec in free for d in spec.shape)
            ):
                raise
            taken = ", ".join(f"{n} {list(s.shape)}" for n, s in self._states.items())
            self.reset()
            raise EngineError(
                f"{error}; the state's free sizes may be others (taken: {taken}): say so with "
                "stream(shapes={STATE: SHAPE})"
            ) from error
        found = {name: named[fed_by].shape for name, fed_by in self._pairs.items()}
        if first and any(state.shape != found[name] for name, state in self._states.items()):
            # A state's free dimensions may follow from the other inputs in ways no name tells.
            self.reset()
            self._begin(shapes, found)
            named = self._invoke(arrays)
        # All are copied before any is written: an output may be one of the input's buffers.
        fed = {name: named[self._pairs[name]].copy() for name in self._states}
        for name, state in self._states.items():
            after = fed[name]
            if state.shape != after.shape:
                raise UsageError(
                    f"the state {name!r} went in as {list(state.shape)} and came out as "
                    f"{list(after.shape)}: the model does not carry it"
                )
        for name, state in self._states.items():
            state[...] = fed[name]
        for fed_by in set(self._pairs.values()):
            del named[fed_by]
        if self._binding is not None and self._binding.fresh_outputs:
            return named
        return {name: array.copy() for name, array in named.items()}

    def _invoke(self, arrays: List[np.ndarray]) -> Dict[str, np.ndarray]:
        binding = self._binding
        assert binding is not None  # noqa: S101  (for the type checker)
        for buffer, array in zip(self._buffers, arrays):
            buffer[...] = array
        try:
            binding.invoke()
        except EngineCrashed:
            raise
        except Exception as error:
            retried(binding, error)
        return dict(zip(self._names, binding.outputs))

    def _begin(self, shapes: Shapes, states: Mapping[str, Tuple[int, ...]]) -> None:
        """Buffers for these shapes of the other inputs; all state is zeros."""
        if self._shapes:
            raise InputError(
                f"the stream runs on inputs of shapes {[list(s) for s in self._shapes]}, "
                f"found {[list(s) for s in shapes]}; reset() it, or open another stream"
            )
        # A state's free dimensions are those of the other inputs, where they have the name.
        free: Dict[str, int] = {}
        for spec, shape in zip(self.inputs, shapes):
            free.update((d, n) for d, n in zip(spec.shape, shape) if isinstance(d, str))
        known = {**dict(zip((spec.name for spec in self.inputs), shapes)), **states}
        wanted = []
        for spec in self._specs:
            usual = spec.usual_shape()
            filled = tuple(
                d if isinstance(d, int) else free.get(d, usual[i]) for i, d in enumerate(spec.shape)
            )
            wanted.append(known.get(spec.name, filled))
        binding = self._session._bind(tuple(wanted))
        by_name = {spec.name: buffer for spec, buffer in zip(self._specs, binding.inputs)}
        for name in self._pairs:
            by_name[name][...] = 0
        self._buffers = tuple(by_name[spec.name] for spec in self.inputs)
        self._states = {name: by_name[name] for name in self._pairs}
        self._binding, self._shapes = binding, shapes
