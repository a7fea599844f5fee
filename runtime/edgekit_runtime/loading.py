"""`load` and `open_installed`: the way in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Optional, Union

from .session import Session
from .source import Source

if TYPE_CHECKING:
    from .guard import Guard

__all__ = ["load", "open_installed"]


def load(
    path: Union[str, Path],
    *,
    variant: Optional[str] = None,
    threads: Optional[int] = None,
    engine: Optional[str] = None,
    precision: str = "float32",
    verify: bool = True,
    intent: str = "latency",
    guard: Optional[str] = None,
    isolate: bool = False,
    timeout_s: float = 60.0,
) -> Session:
    """Load a bundle (`.edgekit`) or a plain model (`.onnx`, `.tflite`, `.xml`, `.param`).

    Every file of a bundle is hashed against its manifest before an engine sees one, and the
    engine is given the verified bytes, not the path. Without `variant`, the first one that runs
    here is taken, in the bundle's order of preference; a FallbackWarning and
    `Session.fallbacks` say what was passed over, and why.

    `threads`, `engine` and `precision` are for plain models; of these only `threads` overrides a
    bundle. `verify=False` skips the hashes (for bundles on a medium that is verified as a whole).
    `intent` is `latency`, or `throughput`: then `submit` and `run_batch` run as many calls side by
    side as the processors allow. `guard` is `raise` or `warn`: outputs that hold NaN, infinities
    or one value only are refused or said.

    `isolate=True` runs the engine in a process of its own: a crash there, or no answer within
    `timeout_s`, becomes `EngineCrashed` here, and the bundle's next variant takes over for the
    calls that follow. It costs some ten microseconds and two copies a call.

    Raises:
        BundleError: the bundle is damaged, hostile or of another schema.
        ModelError: the model is missing or the engine refuses it.
        EngineMissingError: no engine is installed that could run it.
        EngineTooOldError: the engine does not know the model's operator versions.
        EngineCrashed: the engine died while loading it (`isolate=True`).
        LowMemoryError: it needs more memory than is free.
        WrongDeviceError: the bundle is for another kind of processor.
        LimitError: the engine did not place the model as the bundle promises.
        UsageError: an option that does not exist, or not for this kind of file.
    """
    watcher = _guard(guard)  # before anything is loaded
    source = Source(
        Path(path), variant, threads, engine, precision, verify, isolate, timeout_s, intent
    )
    return Session(source, source.open(), guard=watcher)


def open_installed(
    name: str,
    *,
    root: Union[str, Path, None] = None,
    variant: Optional[str] = None,
    threads: Optional[int] = None,
    intent: str = "latency",
    guard: Optional[str] = None,
    isolate: bool = False,
    timeout_s: float = 60.0,
) -> Session:
    """Load what is active under this name on this device; `Session.refresh` moves to what was
    activated since. `root` is the folder of installed bundles (see `installed.root_folder`).

    Raises:
        BundleError: nothing is installed under this name.
        EdgeKitError: what `load` raises.
    """
    from .installed import active_file, active_path

    watcher = _guard(guard)
    active = active_file(name, root)
    source = Source(
        active_path(active), variant, threads, isolate=isolate, timeout_s=timeout_s,
        intent=intent, active=active,
    )  # fmt: skip
    return Session(source, source.open(), guard=watcher)


def _guard(mode: Optional[str]) -> Optional[Guard]:
    if mode is None:
        return None
    from .guard import Guard

    return Guard(mode)
