"""Every deliberate error of EdgeKit, on the host and on the device.

    EdgeKitError                exit code
    +-- LimitError                  1      a stated limit was not met (accuracy, golden, placement)
    |   +-- GuardError              1      an output is NaN, infinite or constant, and guarded
    |   +-- LowMemoryError          1      the device has less memory than the model needs
    |   +-- QueueFullError          1      no place in the queue within the time allowed
    +-- UsageError                  2      wrong usage or unusable input
    |   +-- InputError              2      an array does not fit the model's inputs
    |   +-- ModelError              2      a model file is missing, damaged or not understood
    |   +-- BundleError             2      a bundle is damaged, hostile or of another schema
    |   +-- WrongDeviceError        2      a bundle holds nothing for this kind of processor
    +-- MissingToolError            3      a tool or an extra is missing or broken
    |   +-- EngineMissingError      3      the engine a model needs is not installed
    |   +-- EngineTooOldError       3      the engine does not know the model's operator versions
    |   +-- EngineError             3      the engine refused or failed
    |       +-- ClosedError         3      the session is closed, or was loaded before a fork
    |       +-- EngineCrashed       3      the engine's process died or hung (isolate=True)
    +-- TargetError                 4      the target failed or cannot be reached

A message says what was found, what was wanted and what to do next, on one line.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "ClosedError",
    "EdgeKitError",
    "EngineCrashed",
    "EngineError",
    "EngineMissingError",
    "EngineTooOldError",
    "GuardError",
    "InputError",
    "LimitError",
    "LowMemoryError",
    "MissingToolError",
    "ModelError",
    "QueueFullError",
    "TargetError",
    "UsageError",
    "WrongDeviceError",
    "one_line",
]


class EdgeKitError(Exception):
    """Base of every error EdgeKit raises on purpose; `exit_code` is what the CLI returns."""

    exit_code = 2


class LimitError(EdgeKitError):
    """A limit the user stated was not met."""

    exit_code = 1


class GuardError(LimitError):
    """An output holds NaN, an infinity, or one value only, and the session guards against it."""


class LowMemoryError(LimitError):
    """Less memory is free than the model was measured to need."""


class QueueFullError(LimitError):
    """No place in the queue became free within the time allowed."""


class UsageError(EdgeKitError):
    """Wrong usage or unusable input."""


class InputError(UsageError):
    """An input array does not fit the model (name, dtype, shape)."""


class ModelError(UsageError):
    """A model file is missing, damaged or in a format that is not understood."""


class BundleError(UsageError):
    """A bundle is damaged, hostile or of an unknown schema version."""


class WrongDeviceError(UsageError):
    """A bundle has no variant for this kind of processor."""


class MissingToolError(EdgeKitError):
    """A tool, an extra or an engine is missing or broken."""

    exit_code = 3


class EngineMissingError(MissingToolError):
    """The engine that a model needs is not installed."""


class EngineError(MissingToolError):
    """The engine refused the model or failed while running it."""


class ClosedError(EngineError):
    """The session is closed, or belongs to the process this one was forked from."""


class EngineCrashed(EngineError):  # noqa: N818  (what happened, not what was wrong)
    """The engine's own process died, or was killed because it hung."""

    #: what it held, for the session that goes on
    loaded: object = None


class EngineTooOldError(MissingToolError):
    """The model needs operator versions that the installed engine does not have."""


class TargetError(EdgeKitError):
    """The target device failed or cannot be reached."""

    exit_code = 4


def one_line(error: BaseException, *, limit: int = 300) -> str:
    """What an exception says, on one line of at most `limit` printable characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2  # engines name the place first and the reason last
    return f"{text[:half]} ... {text[-half:]}"
