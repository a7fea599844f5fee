"""What drivers print while they load: heard, since some say nowhere else what they took, and kept
from stdout, which belongs to the caller."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from typing import Iterator, List

__all__ = ["hearing"]

#: LiteRT's and Abseil's log lines, ncnn's device list, QNN's thread-local note
_CHATTER = re.compile(
    r"^(INFO|WARNING): |^[IWE]\d{4} |^[\u2514\u251c\u2502]|^\[\d+ |^ ?# LIBNATIVE"
)


@contextlib.contextmanager
def hearing(said: List[str]) -> Iterator[None]:
    """Collect the lines that this process writes to stdout and stderr meanwhile, whoever writes.
    Those that are no chatter are passed on to where they were meant for, afterwards."""
    with contextlib.ExitStack() as stack:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
                stack.enter_context(_heard(number, said))
        yield


@contextlib.contextmanager
def _heard(number: int, said: List[str]) -> Iterator[None]:
    with tempfile.TemporaryFile() as log:
        before = os.dup(number)  # OSError: it is closed
        os.dup2(log.fileno(), number)
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # what C's stdio still holds back
                ctypes.CDLL(None).fflush(None)
            os.dup2(before, number)
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            said += lines
            rest = "".join(f"{one}\n" for one in lines if one and not _CHATTER.match(one))
            os.write(before, rest.encode())
            os.close(before)
