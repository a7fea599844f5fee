"""Hooks around each call, and measuring with them. Without any, a call does nothing for them."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Optional, Tuple, Type, Union

from .errors import UsageError
from .lane import Times

if TYPE_CHECKING:
    from .machine import Reading

__all__ = ["Hooks", "Measuring"]

OnStart = Callable[[], Any]
OnEnd = Callable[[Times], Any]


class Hooks:
    """Functions called before and after each call of `run`, `predict`, `submit` and streams.

    `on_end` gets `(pre_ns, infer_ns, post_ns)`: until the inputs are in the engine's buffers
    (preprocessing included, for `predict`), the engine, until the outputs are out. They run while
    the session is locked: keep them short, and call nothing of the session. One that raises is
    taken out with a warning: it never costs an inference.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed, self._lock = changed, threading.Lock()
        self._pairs: Tuple[Tuple[Optional[OnStart], Optional[OnEnd]], ...] = ()
        self.starts: Tuple[OnStart, ...] = ()
        self.ends: Tuple[OnEnd, ...] = ()

    def add(
        self, on_start: Optional[OnStart] = None, on_end: Optional[OnEnd] = None
    ) -> Callable[[], None]:
        """Add a pair; returns the function that takes it out again."""
        pair = (on_start, on_end)
        with self._lock:
            self._pairs = (*self._pairs, pair)
            self._sort()
        return lambda: self._remove(pair)

    def start(self) -> None:
        """Call every `on_start`."""
        for call in self.starts:
            try:
                call()
            except Exception as error:  # noqa: PERF203  (there are one or two)
                self._fault(call, error)

    def end(self, times: Times) -> None:
        """Call every `on_end`."""
        for call in self.ends:
            try:
                call(times)
            except Exception as error:  # noqa: PERF203  (there are one or two)
                self._fault(call, error)

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def _remove(self, pair: Tuple[Optional[OnStart], Optional[OnEnd]]) -> None:
        with self._lock:
            self._pairs = tuple(one for one in self._pairs if one is not pair)
            self._sort()

    def _sort(self) -> None:
        self.starts = tuple(one[0] for one in self._pairs if one[0] is not None)
        self.ends = tuple(one[1] for one in self._pairs if one[1] is not None)
        self._changed()

    def _fault(self, call: Any, error: Exception) -> None:
        for pair in self._pairs:
            if call in pair:
                self._remove(pair)
        warnings.warn(f"a hook was taken out: it raised {error!r}", RuntimeWarning, stacklevel=4)


class Measuring:
    """What `session.measure()` gives: the last calls in a ring buffer, and the machine before and
    after.

    `samples` are `(pre_ns, infer_ns, post_ns)`. After the context, `summary()` has percentiles of
    each part, `before` and `after` are Readings; `save(path)` keeps all of it.
    """

    def __init__(
        self,
        hooks: Hooks,
        capacity: int,
        energy_j: Optional[Callable[[], float]],
        about: Callable[[], Dict[str, Any]] = dict,
    ) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise UsageError(f"capacity is {capacity!r}; wanted a number of calls")
        self.samples: Deque[Times] = deque(maxlen=capacity)
        self.before: Optional[Reading] = None
        self.after: Optional[Reading] = None
        self._hooks = hooks
        self._energy, self._about = energy_j, about
        self._stop: Callable[[], None] = lambda: None

    def __enter__(self) -> Measuring:
        self.before = self._read()
        self._stop = self._hooks.add(on_end=self.samples.append)
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._stop()
        self.after = self._read()

    def _read(self) -> Reading:
        from .machine import energy_joules, read_machine

        return read_machine(self._energy or energy_joules)

    def save(self, path: Union[str, Path]) -> None:
        """Write the calls and the machine's readings as JSON (schema edgekit.measure/1), which
        `edgekit compare` and `edgekit report` take. The file is complete or not there.

        Raises:
            OSError: it cannot be written.
        """
        from .fieldfile import write

        write(Path(path), self, self._about())

    def summary(self) -> Dict[str, Any]:
        """`{total, pre, infer, post}` in nanoseconds (see `timing.summary`), and what changed on
        the machine: `cpu_ns`, `wall_ns`, `rss_bytes`, `temperature_c`, `frequency_mhz`,
        `energy_j`. Empty parts when nothing ran."""
        from .timing import summary

        taken = list(self.samples)
        parts: Dict[str, List[int]] = {
            name: [one[i] for one in taken] for i, name in enumerate(("pre", "infer", "post"))
        }
        parts = {"total": [sum(one) for one in taken], **parts}
        out: Dict[str, Any] = {name: summary(ns) if ns else None for name, ns in parts.items()}
        if self.before is None:
            return out
        after = self.after or self._read()
        out["wall_ns"] = after.wall_ns - self.before.wall_ns
        out["cpu_ns"] = after.cpu_ns - self.before.cpu_ns
        energy = None
        if after.energy_j is not None and self.before.energy_j is not None:
            energy = after.energy_j - self.before.energy_j
        out["energy_j"] = energy
        for name in ("rss_bytes", "temperature_c", "frequency_mhz"):
            out[name] = {"before": getattr(self.before, name), "after": getattr(after, name)}
        return out
