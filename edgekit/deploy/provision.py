"""Numpy and engines for a device that has none: wheels resolved here, unpacked there.

The device needs no access to any package index. What pip unpacks here goes as one file through the
same store as everything else, so that a second time sends nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekit.cache import Cache, content_key
from edgekit.deploy.workbench import Workbench
from edgekit.errors import MissingToolError, TargetError, UsageError
from edgekit.facts import Facts
from edgekit.observer import Observer
from edgekit.sandbox import child_environment
from edgekit_runtime.engines import ENGINES
from edgekit_runtime.engines.accelerators import split_engine

__all__ = ["bring_packages", "missing_packages", "pip_platforms"]

_PIP_S = 900
#: glibc versions that wheels are built for (PEP 600); 17 is manylinux2014
_GLIBC = (17, 24, 26, 27, 28, 31, 34, 35, 36, 38, 39)
_UNPACK = """import os, sys, zipfile
archive, folder = sys.argv[1:]
new = f"{folder}.new-{os.getpid()}"
zipfile.ZipFile(archive).extractall(new)
os.sync()
os.path.isdir(folder) or os.replace(new, folder)
link = os.path.join(os.path.dirname(folder), "packages")
os.symlink(folder, f"{link}.new-{os.getpid()}")
os.replace(f"{link}.new-{os.getpid()}", link)
"""


def missing_packages(engines: Sequence[str], packages: Mapping[str, str]) -> list[str]:
    """What an interpreter with these packages lacks for the engines, by pip's names."""
    wanted = [("numpy",), *(ENGINES[name].distributions for name in _bases(engines))]
    return [names[0] for names in wanted if not packages.keys() & set(names)]


def _bases(engines: Sequence[str]) -> list[str]:
    """Each engine once, without its accelerator: that comes with the device, not from here."""
    return [*dict.fromkeys(split_engine(name)[0] for name in engines)]


def bring_packages(
    bench: Workbench, engines: Sequence[str], facts: Facts, observer: Observer
) -> str:
    """Have numpy and the engines on the device; returns the folder there, for PYTHONPATH.

    Raises:
        UsageError: no wheels are made for such a device.
        MissingToolError: pip does not work here.
        TargetError: the device has no room, or is lost.
    """
    names = ["numpy", *(ENGINES[name].distributions[0] for name in _bases(engines))]
    observer.phase(f"resolving {', '.join(names)} for {facts.arch}, Python {facts.python}")
    archive = _archive(names, facts)
    folder = f"{bench.folder}/packages-{archive.parent.name[:16]}"
    if bench.call(["test", "-d", folder]).code:
        observer.phase(f"bringing {archive.stat().st_size / 1e6:.0f} MB of packages")
        placed = bench.put({"packages": {"packages.zip": archive}})["packages"]
        done = bench.call([bench.python, "-c", _UNPACK, f"{placed}/packages.zip", folder])
        if done.code:
            raise TargetError(f"{bench.target}: the packages were not unpacked: {done.words}")
    return folder


def pip_platforms(facts: Facts) -> list[str]:
    """The platforms whose wheels run there, as pip names them, by architecture and glibc.

    Raises:
        UsageError: it is a system for which there are no wheels.
    """
    found = re.match(r"glibc 2\.(\d+)", facts.libc or "")
    if facts.system != "Linux" or found is None:
        raise UsageError(
            f"wheels are for Linux with glibc; the device has {facts.system or 'an unknown system'}"
            f" with {facts.libc or 'an unknown libc'}: install numpy and an engine there, and name "
            "the interpreter with --python"
        )
    minor = int(found[1])
    names = [f"manylinux_2_{one}_{facts.arch}" for one in reversed(_GLIBC) if one <= minor]
    return [*names, f"manylinux2014_{facts.arch}", f"linux_{facts.arch}"]


def _archive(names: Sequence[str], facts: Facts) -> Path:
    """What pip unpacks for the device as one file, made once for the names and the platform."""
    platforms = pip_platforms(facts)
    version = ".".join((facts.python or "").split(".")[:2])
    key = content_key(kind="packages", recipe=1, names=list(names), platforms=platforms,
                      python=version)  # fmt: skip

    def make(folder: Path) -> None:
        unpacked = folder / "unpacked"
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-compile", "--target", str(unpacked), "--implementation", "cp",
            "--python-version", version, "--only-binary=:all:",
        ]  # fmt: skip
        for one in platforms:
            command += ["--platform", one]
        done = subprocess.run(
            [*command, *names], capture_output=True, text=True, check=False, timeout=_PIP_S,
            env=child_environment(),
        )  # fmt: skip
        if done.returncode:
            lines = [one for one in done.stderr.splitlines() if one.startswith("ERROR")]
            why = lines[-1].removeprefix("ERROR: ") if lines else done.stderr.strip()[-200:]
            raise MissingToolError(f"pip finds no wheels for {facts.arch}: {why or 'it failed'}")
        _zip(unpacked, folder / "packages.zip")

    return Cache().folder(key, make) / "packages.zip"


def _zip(folder: Path, out: Path) -> None:
    """The same files give the same bytes; not deflated, so that chunks of it are found again."""
    import shutil

    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o100644 << 16
            with path.open("rb") as source, packed.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    shutil.rmtree(folder)
