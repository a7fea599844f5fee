"""The native runner, an engine and a C library in one folder, for devices without Python.

Built on this machine: the runner from its sources with a cross compiler, ONNX Runtime's library out
of its wheel, glibc and libstdc++ out of Debian's packages. What is in a capsule names it; a device
keeps one, and every bundle there uses it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgekit.cache import Cache, content_key, file_sha256
from edgekit.errors import MissingToolError
from edgekit.observer import Observer
from edgekit.sandbox import child_environment

__all__ = [
    "Capsule", "capsule", "engine_version", "litert_addon", "litert_version", "native_headers",
    "native_runner", "native_sources", "runner_command",
]  # fmt: skip

#: of this SDK's tests; any from 1.21 on has the API that the runner asks for
_ENGINE_VERSION = "1.31.1"
#: whose C interface the runner declares
_LITERT_VERSION = "2.3.0"
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_LOADER = "ld-linux-aarch64.so.1"
#: what the runner and the engine are linked to; not one more
_LIBRARIES = (
    _LOADER, "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1",
    "libstdc++.so.6", "libgcc_s.so.1",
)  # fmt: skip
_TOOLS = {
    "make": "make", "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu", "dpkg-deb": "dpkg",
    "apt-get": "apt",
}  # fmt: skip
_PACKAGES = ("libonnxruntime-dev", "libc6", "libstdc++6", "libgcc-s1")
_BUILD_S = 900


@dataclass(frozen=True)
class Capsule:
    """A capsule that is built: `name` on devices, and its files by their path in it."""

    name: str
    folder: Path
    engine: str
    engine_version: str

    @property
    def files(self) -> dict[str, Path]:
        """Path in the capsule -> file here."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.files.values())


def capsule(observer: Observer | None = None) -> Capsule:
    """The capsule for 64-bit Arm, built first if it is not in the cache (a minute or two).

    Raises:
        MissingToolError: this machine has no compiler for Arm, or a download failed.
    """
    observer = observer or Observer()
    version, sources = engine_version(), native_sources()
    key = content_key(kind="capsule", recipe=3, engine=version, sources=_sources_hash(sources))

    def make(folder: Path) -> None:
        runner = native_runner("aarch64", observer)
        parts = _parts(version, sources, observer)
        whole = folder / "capsule"
        (whole / "lib").mkdir(parents=True)
        shutil.copy(runner, whole / "edgekit-run")
        for name in _LIBRARIES:
            shutil.copy(_library(parts / "debian", name), whole / "lib" / name)
        shutil.copy(parts / "libonnxruntime.so.1", whole / "lib" / "libonnxruntime.so.1")
        for path in whole.rglob("*"):
            path.chmod(0o755)

    made = Cache().folder(key, make) / "capsule"
    listed = [path for path in sorted(made.rglob("*")) if path.is_file()]
    digest = hashlib.sha256()
    for path in listed:
        digest.update(f"{path.relative_to(made).as_posix()} {file_sha256(path)}\n".encode())
    return Capsule(f"capsule-{digest.hexdigest()[:16]}", made, "onnxruntime", version)


def litert_addon(observer: Observer | None = None) -> Capsule:
    """LiteRT's library for 64-bit Arm, for a capsule to find beside it; fetched first if it is not
    in the cache.

    Raises:
        MissingToolError: the download failed.
    """
    observer = observer or Observer()
    key = content_key(kind="capsule-addon", recipe=1, litert=_LITERT_VERSION)

    def make(folder: Path) -> None:
        observer.phase(f"fetching LiteRT {_LITERT_VERSION} for Arm (once)")
        work = folder / "wheels"
        library = _from_wheel(f"ai-edge-litert=={_LITERT_VERSION}", "/libLiteRt.so", work)
        shutil.rmtree(work)
        (folder / "addon").mkdir()
        (folder / "addon" / "libLiteRt.so").write_bytes(library)

    made = Cache().folder(key, make) / "addon"
    digest = file_sha256(made / "libLiteRt.so")
    return Capsule(f"litert-{digest[:16]}", made, "litert", _LITERT_VERSION)


def native_runner(machine: str, observer: Observer | None = None) -> Path:
    """The runner alone, for `x86_64` or `aarch64`, or as `make` calls its other builds: `sanitized`
    and `fuzz`; built first if it is not in the cache.

    Raises:
        MissingToolError: as `capsule`.
    """
    observer, sources = observer or Observer(), native_sources()
    key = content_key(kind="native-runner", target=machine, sources=_sources_hash(sources))

    def make(folder: Path) -> None:
        _need_tools()
        headers = native_headers(observer)
        observer.phase(f"building the runner for {machine} (once)")
        _run(["make", "-C", str(sources), f"BUILD={folder}", f"HEADERS={headers}", machine],
             "the runner")  # fmt: skip

    (found,) = (Cache().folder(key, make) / machine).glob("edgekit-*")
    return found


def native_headers(observer: Observer | None = None) -> Path:
    """The folder of ONNX Runtime's C headers, fetched first if they are not in the cache.

    Raises:
        MissingToolError: as `capsule`.
    """
    parts = _parts(engine_version(), native_sources(), observer or Observer())
    return parts / "debian/usr/include/onnxruntime"


def _sources_hash(sources: Path) -> str:
    return file_sha256(*sorted(path for path in sources.iterdir() if path.is_file()))


def native_sources() -> Path:
    """The folder of the runner's sources: in the repository, or in the installed package.

    Raises:
        MissingToolError: they are in neither.
    """
    here = Path(__file__).parent
    for folder in (here / "native", here.parents[1] / "runtime" / "native"):
        if (folder / "main.c").is_file():
            return folder
    raise MissingToolError("the sources of the native runner are not here; install EdgeKit again")


def runner_command(folder: str, addons: Sequence[str] = ()) -> list[str]:
    """What starts the runner of a capsule in a folder on a device, with its own C library and the
    libraries in the folders of `addons`."""
    places = ":".join([f"{folder}/lib", *addons])
    loader = [f"{folder}/lib/{_LOADER}", "--inhibit-cache", "--library-path", places]
    return [*loader, f"{folder}/edgekit-run"]


def litert_version() -> str:
    """That of the LiteRT that `litert_addon` holds."""
    return _LITERT_VERSION


def engine_version() -> str:
    """That of the ONNX Runtime in the capsule: the one installed here, or the tests'."""
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return _ENGINE_VERSION


def _parts(version: str, sources: Path, observer: Observer) -> Path:
    """What others made: Debian's libraries and headers, the engine."""
    script = sources / "debian.sh"
    key = content_key(kind="capsule-parts", recipe=1, engine=version, script=file_sha256(script))

    def make(folder: Path) -> None:
        observer.phase(f"fetching onnxruntime {version} and Debian's C library for Arm (once)")
        _run(
            ["bash", str(script), "arm64", str(folder / "debian"), *_PACKAGES], "Debian's packages"
        )
        library = _from_wheel(
            f"onnxruntime=={version}", "/capi/libonnxruntime.so", folder / "wheels"
        )
        (folder / "libonnxruntime.so.1").write_bytes(library)
        for left in ("wheels", "debian/usr/share", "debian/usr/lib/aarch64-linux-gnu/gconv"):
            shutil.rmtree(folder / left, ignore_errors=True)

    return Cache().folder(key, make)


def _need_tools() -> None:
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]
    if missing:
        raise MissingToolError(
            "the native runner is built with Debian's cross compiler, and here is no "
            f"{', '.join(missing)}: apt-get install {' '.join(missing)} libc6-dev-arm64-cross"
        )


def _library(root: Path, name: str) -> Path:
    for folder in ("usr/lib/aarch64-linux-gnu", "lib/aarch64-linux-gnu", "usr/lib", "lib"):
        if (root / folder / name).is_file():
            return root / folder / name
    raise MissingToolError(f"Debian's packages for Arm hold no {name}")


def _from_wheel(requirement: str, part: str, work: Path) -> bytes:
    """The library whose name has this part, out of the wheel for 64-bit Arm."""
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11",  # noqa: E501
            "--dest", str(work)]  # fmt: skip
    for one in _PLATFORMS:
        line += ["--platform", one]
    _run([*line, requirement], f"{requirement} for aarch64")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        (inside,) = (n for n in opened.namelist() if part in n)
        return opened.read(inside)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_BUILD_S,
        env=child_environment(),
    )  # fmt: skip
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()] or said
        raise MissingToolError(f"{what} cannot be had: {errors[0][:200] if errors else 'no word'}")
