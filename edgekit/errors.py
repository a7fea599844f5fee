"""The host's errors: the runtime's tree (see `edgekit_runtime.errors`) and two of its own.

MissingToolError
+-- MissingExtraError     an optional library is not installed
EdgeKitError
+-- ChildError            a child process crashed, hung or went over its memory
+-- InterruptedRunError   the user stopped it before there was anything to return
UsageError
+-- OutOfSpaceError       a disk is full
"""

from __future__ import annotations

import importlib
from types import ModuleType

from edgekit_runtime.errors import (
    BundleError,
    EdgeKitError,
    EngineError,
    EngineMissingError,
    InputError,
    LimitError,
    MissingToolError,
    ModelError,
    TargetError,
    UsageError,
    one_line,
)

__all__ = [
    "BundleError",
    "ChildError",
    "EdgeKitError",
    "EngineError",
    "EngineMissingError",
    "InputError",
    "InterruptedRunError",
    "LimitError",
    "MissingExtraError",
    "MissingToolError",
    "ModelError",
    "OutOfSpaceError",
    "TargetError",
    "UsageError",
    "by_name",
    "one_line",
    "pip_install",
    "require",
]


class MissingExtraError(MissingToolError):
    """An optional library is not installed; the message holds the exact install line."""

    def __init__(self, message: str, extra: str = "") -> None:
        super().__init__(message)
        self.extra = extra


class ChildError(EdgeKitError):
    """A child process crashed, hung or used more memory than allowed."""

    exit_code = 3


class InterruptedRunError(EdgeKitError):
    """The user stopped the run before there was anything to return."""

    exit_code = 130  # what shells report for Ctrl-C


class OutOfSpaceError(UsageError):
    """A disk is full. Never taken for the fault of one candidate."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional library, or say how to install it.

    A library that is there but fails to import is not "missing": its own error stays visible.

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module != missing and not module.startswith(missing + "."):
            raise MissingToolError(
                f"{module} is installed but broken: it needs {missing}, which is not; "
                f"pip install --force-reinstall '.[{extra}]'"
            ) from error
        raise MissingExtraError(
            f"{module} is not installed; in EdgeKit's folder: {pip_install(extra)}", extra
        ) from None
    except ImportError as error:
        raise MissingToolError(f"{module} is installed but broken: {one_line(error)}") from error


def pip_install(extra: str) -> str:
    """What to type for an extra. The versions are those of the tests: without them, PyTorch comes
    with several gigabytes of CUDA."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def by_name(name: str, message: str) -> EdgeKitError:
    """The error a child process reported, as the same type here."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, EdgeKitError):
        return kind(message)
    return ChildError(message)
