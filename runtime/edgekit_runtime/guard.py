"""Guards outputs against what a broken model, engine or accelerator gives instead of an answer."""

from __future__ import annotations

import warnings
import zlib
from typing import Mapping

import numpy as np

from .errors import GuardError, UsageError

__all__ = ["Guard", "GuardWarning"]

MODES = ("raise", "warn")
_STUCK_AFTER = 3


class GuardWarning(UserWarning):
    """An output is not sound; the session was loaded with `guard="warn"`."""


class Guard:
    """Looks at every output: NaN, infinities, all values zero or all the same, and outputs that
    stay the same to the bit while the inputs change (3 times in a row).

    `mode` is `raise` or `warn`. Outputs of fewer than 2 values may be constant.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise UsageError(f"no guard {mode!r}; known: {', '.join(MODES)}")
        self._raise = mode == "raise"
        self._last = (0, 0)
        self._same = 0

    def check(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Look at the outputs of one call.

        Raises:
            GuardError: one is not sound and the mode is `raise`.
        """
        for name, array in outputs.items():
            fault = _fault(array)
            if fault:
                return self._say(f"output {name!r} {fault}")
        long = {name: array for name, array in outputs.items() if array.size >= 2}
        if not long:  # a class number may well be the same for a while
            return None
        now = (_sum(inputs), _sum(long))
        if now[0] != self._last[0]:
            self._same = self._same + 1 if now[1] == self._last[1] else 0
        self._last = now
        if self._same >= _STUCK_AFTER:
            return self._say(
                f"the outputs have not changed in {self._same + 1} calls with different inputs"
            )
        return None

    def _say(self, text: str) -> None:
        if self._raise:
            raise GuardError(f"{text}; loaded with guard='raise'")
        warnings.warn(text, GuardWarning, stacklevel=6)


def _fault(array: np.ndarray) -> str:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "holds NaN" if np.isnan(array).any() else "holds an infinity"
    if array.size >= 2 and array.dtype.kind in "fiub":
        first = array.flat[0]
        if (array == first).all():
            return "is all zeros" if first == 0 else f"holds the value {first} everywhere"
    return ""


def _sum(arrays: Mapping[str, np.ndarray]) -> int:
    total = 0
    for array in arrays.values():
        plain = array.astype(str) if array.dtype == object else array
        total = zlib.crc32(np.ascontiguousarray(plain).tobytes(), total)
    return total
