"""Every deliberate error of EdgeKit, on the host and on the device.

    EdgeKitError                exit code
    +-- LimitError                  1      a stated limit was not met (accuracy, golden outputs)
    +-- UsageError                  2      wrong usage or unusable input
    |   +-- InputError              2      an array does not fit the model's inputs
    |   +-- ModelError              2      a model file is missing, damaged or not understood
    |   +-- BundleError             2      a bundle is damaged, hostile or of another schema
    +-- MissingToolError            3      a tool or an extra is missing or broken
    |   +-- EngineMissingError      3      the engine a model needs is not installed
    |   +-- EngineError             3      the engine refused or failed
    +-- TargetError                 4      the target failed or cannot be reached

A message says what was found, what was wanted and what to do next, on one line.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "EdgeKitError",
    "EngineError",
    "EngineMissingError",
    "InputError",
    "LimitError",
    "MissingToolError",
    "ModelError",
    "TargetError",
    "UsageError",
    "one_line",
]


class EdgeKitError(Exception):
    """Base of every error EdgeKit raises on purpose; `exit_code` is what the CLI returns."""

    exit_code = 2


class LimitError(EdgeKitError):
    """A limit the user stated was not met."""

    exit_code = 1


class UsageError(EdgeKitError):
    """Wrong usage or unusable input."""


class InputError(UsageError):
    """An input array does not fit the model (name, dtype, shape)."""


class ModelError(UsageError):
    """A model file is missing, damaged or in a format that is not understood."""


class BundleError(UsageError):
    """A bundle is damaged, hostile or of an unknown schema version."""


class MissingToolError(EdgeKitError):
    """A tool, an extra or an engine is missing or broken."""

    exit_code = 3


class EngineMissingError(MissingToolError):
    """The engine that a model needs is not installed."""


class EngineError(MissingToolError):
    """The engine refused the model or failed while running it."""


class TargetError(EdgeKitError):
    """The target device failed or cannot be reached."""

    exit_code = 4


def one_line(error: BaseException, *, limit: int = 300) -> str:
    """What an exception says, on one line of at most `limit` printable characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
