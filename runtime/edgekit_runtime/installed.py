"""Bundles installed on a device: versions side by side, one of them active (see `place`).

Activating is one rename, so there is no moment without an active version, and a power cut leaves
either the former or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union

from .bundle import Bundle
from .errors import BundleError, EdgeKitError, UsageError, one_line
from .manifest import same_interface
from .place import SCHEMA, Lock, Place, Refused, is_name, is_version, sync
from .source import processing

__all__ = ["activate", "active_file", "active_path", "install", "root_folder"]


def root_folder() -> Path:
    """Where bundles are installed: `EDGEKIT_ROOT`, else `~/.local/share/edgekit`."""
    given = os.environ.get("EDGEKIT_ROOT")
    return Path(given) if given else Path.home() / ".local" / "share" / "edgekit"


def active_file(name: str, root: Union[str, Path, None] = None) -> Path:
    """The file that says which version is active; whether it exists or not.

    Raises:
        UsageError: no name for an installed bundle.
    """
    if not is_name(name):
        raise UsageError(
            f"{name!r} is no name for an installed bundle; wanted letters, digits, '.', '_', '-'"
        )
    return Path(root or root_folder()) / name / "active.json"


def active_path(active: Path) -> Path:
    """The bundle that an `active.json` names.

    Raises:
        BundleError: it is missing or damaged, or names anything but a version beside it.
    """
    name = active.parent.name
    try:
        raw = json.loads(active.read_text())
    except FileNotFoundError:
        others = ", ".join(sorted(p.parent.name for p in active.parents[1].glob("*/active.json")))
        raise BundleError(
            f"nothing is installed under {name!r} in {active.parents[1]}; there is: "
            f"{others or 'nothing'}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"cannot read {active}: {one_line(error)}") from None
    file = raw.get("file") if isinstance(raw, dict) and raw.get("schema") == SCHEMA else None
    if not isinstance(file, str) or not is_version(file):
        raise BundleError(f"{active} is damaged; install the bundle again")
    path = active.parent / "versions" / file
    try:
        found = path.is_file()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {one_line(error)}") from None
    if not found:
        raise BundleError(f"{active} names {file}, which is not there; install the bundle again")
    return path


def install(
    source: Union[str, Path],
    name: str,
    *,
    root: Union[str, Path, None] = None,
    activate_it: bool = True,
) -> Path:
    """Copy a bundle to the device's store, verify the copy, and activate it; returns its path.
    What was active is the version before, as after `edgekit deploy`.

    Raises:
        BundleError: the copy is not a sound bundle; what was active stays so.
        UsageError: it has other inputs or outputs than what is active under this name, or is
            older: programs in the field would stumble over it. `activate` goes back.
        EdgeKitError: it cannot be written, or somebody else is installing under this name.
    """
    source, active = Path(source), active_file(name, root)
    if activate_it and active.exists():
        _compare(source, active)
    with _changing(active, f"cannot install {source} as {name!r}") as place:
        part = Path(place.incoming, f"{os.getpid()}.part")
        try:
            shutil.copyfile(source, part)
            sync(str(part))
            file = _verified_name(part, source)
            place.keep(str(part), file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        if activate_it:
            place.activate(file)
    return Path(place.versions, file)


def activate(path: Path, name: str, *, root: Union[str, Path, None] = None) -> None:
    """Make an installed version the one that `open_installed` loads.

    Raises:
        UsageError: it is not among the versions of this name.
        EdgeKitError: it cannot be written, or somebody else is installing under this name.
    """
    active = active_file(name, root)
    if path.parent != active.parent / "versions" or not is_version(path.name):
        raise UsageError(f"{path} is not installed under {name!r}; install it first")
    with _changing(active, f"cannot activate {path.name} as {name!r}") as place:
        place.activate(path.name)


@contextmanager
def _changing(active: Path, what: str) -> Iterator[Place]:
    """The folder of a name, under its lock; errors of the system as one of ours."""
    place = Place(str(active.parents[1]), active.parent.name)
    try:
        place.make()
        lock = Lock(place, f"process {os.getpid()} there", beats=False)
        try:
            yield place
        finally:
            lock.close()
    except Refused as error:
        raise EdgeKitError(str(error)) from None
    except OSError as error:
        raise EdgeKitError(f"{what}: {one_line(error)}") from None


def _compare(source: Path, active: Path) -> None:
    try:
        with Bundle(active_path(active)) as old:
            theirs = old.manifest
    except BundleError:
        return  # what is active is damaged: this is the cure
    with Bundle(source) as new:
        ours = new.manifest
    if not same_interface((ours.inputs, ours.outputs), (theirs.inputs, theirs.outputs)):
        raise UsageError(
            f"{source} has other inputs or outputs than the version active under "
            f"{active.parent.name!r}; install it under another name"
        )
    if ours.sequence < theirs.sequence:
        raise UsageError(
            f"{source} (sequence {ours.sequence}) is older than the version active under "
            f"{active.parent.name!r} ({theirs.sequence}); activate() goes back to installed ones"
        )


def _verified_name(copy: Path, source: Path) -> str:
    """What a sound copy is to be called; what is wrong with it is said of what was copied."""
    try:
        with Bundle(copy) as bundle:
            bundle.verify()
            processing(bundle.manifest)
            name = f"{bundle.manifest.sequence}-{bundle.manifest.bundle_id}.edgekit"
    except BundleError as error:
        raise BundleError(f"{source}: {str(error).replace(f'{copy}: ', '', 1)}") from None
    if not is_version(name):
        raise BundleError(f"{source}: sequence and id give the name {name[:80]!r}, which is unfit")
    return name
