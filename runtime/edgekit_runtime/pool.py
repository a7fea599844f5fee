"""Calls in the background: a bounded queue and as many workers as the session has streams."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Deque, Dict, Iterable, Iterator, Mapping, Optional, Tuple

import numpy as np

from .errors import ClosedError, QueueFullError
from .lane import Lane, checked

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Pool"]

_PLACES_PER_STREAM = 2

Outputs = Dict[str, np.ndarray]


class Pool:
    """Workers with buffers of their own; they run beside each other and beside `Session.run`."""

    def __init__(self, session: Session, streams: int) -> None:
        self._session, self._streams = session, streams
        self._places = threading.BoundedSemaphore(_PLACES_PER_STREAM * streams)
        self._executor = ThreadPoolExecutor(streams, thread_name_prefix="edgekit")
        self._lanes: SimpleQueue[Tuple[object, Lane]] = SimpleQueue()

    def submit(
        self, inputs: Mapping[str, np.ndarray], *, timeout_s: Optional[float] = None
    ) -> Future[Outputs]:
        """See `Session.submit`."""
        names = [spec.name for spec in self._session.inputs]
        arrays = checked(self._session.inputs, inputs)
        own = {name: array.copy() for name, array in zip(names, arrays)}
        if not self._places.acquire(timeout=timeout_s):
            raise QueueFullError(
                f"all {_PLACES_PER_STREAM * self._streams} places of the queue are taken after "
                f"{timeout_s} s; wait for results"
                + ("" if self._streams > 1 else ", or load with intent='throughput'")
            )
        try:
            future = self._executor.submit(self._run, own)
        except BaseException as error:
            self._places.release()
            if isinstance(error, RuntimeError):  # the executor was shut down meanwhile
                raise ClosedError("the session is closed; load the model again") from None
            raise
        # The place is free when the call is over, also when it never ran.
        future.add_done_callback(lambda _: self._places.release())
        return future

    def map(self, samples: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Outputs]:
        """See `Session.run_batch`."""
        waiting: Deque[Future[Outputs]] = deque()
        try:
            for sample in samples:
                if len(waiting) >= _PLACES_PER_STREAM * self._streams:
                    yield waiting.popleft().result()
                waiting.append(self._session.submit(sample))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Let queued calls end, then end the workers."""
        inside = threading.current_thread().name.startswith("edgekit")  # a future's callback
        self._executor.shutdown(wait=not inside)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> Outputs:
        version, lane = self._lane()
        try:
            return self._session._run_beside(lane, inputs)
        finally:
            self._lanes.put((version, lane))

    def _lane(self) -> Tuple[object, Lane]:
        """Buffers nobody uses now, for the version of the model that is loaded now."""
        session = self._session
        while True:
            try:
                version, lane = self._lanes.get_nowait()
            except Empty:
                break
            if version is session._version:
                return version, lane
            lane.clear()
        with session._lock:
            session._engine()
            return session._version, session._new_lane(session._opened)
