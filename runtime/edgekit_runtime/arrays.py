"""Arrays by name in `.npz` files: read without unpickling, written under any name."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Dict, Mapping, Union

import numpy as np

from .errors import InputError, one_line

__all__ = ["read_npy", "read_npz", "write_npz"]


def read_npz(source: Union[Path, IO[bytes]]) -> Dict[str, np.ndarray]:
    """All arrays of an `.npz`.

    Raises:
        InputError: it is missing, damaged, not an `.npz`, or holds Python objects.
    """
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:  # numpy forgets to close what it cannot read
                return _read(file)
        return _read(source)
    except Exception as error:  # numpy lets through what zipfile, zlib and tokenize raise
        what = source if isinstance(source, Path) else "the .npz"
        raise InputError(f"cannot read {what}: {one_line(error)}") from None


def read_npy(path: Path) -> np.ndarray:
    """The array of an `.npy`.

    Raises:
        InputError: it is missing, damaged, not an `.npy`, or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            raise InputError("it is an .npz; wanted an .npy")
    except Exception as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from None


def _read(file: IO[bytes]) -> Dict[str, np.ndarray]:
    opened = np.load(file, allow_pickle=False)
    if isinstance(opened, np.ndarray):
        raise InputError("it is one .npy array without a name; wanted an .npz")
    with opened as archive:
        return {name: archive[name] for name in archive.files}


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz`; unlike `numpy.savez` also for arrays named `file`. Strings become `<U`.

    Raises:
        OSError: the file cannot be written.
    """
    import zipfile

    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            plain = array.astype(str) if array.dtype == object else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, plain, allow_pickle=False)
