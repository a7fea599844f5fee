"""The native runner, built once for all from the sources as they are."""

import os
import platform
import subprocess
from pathlib import Path

import pytest
from store import store

SOURCES = Path(__file__).parents[1] / "runtime" / "native"


def built(target: str = "", program: str = "edgekit-run") -> Path:
    """The program of a target of its Makefile: this machine's, `sanitized`, `fuzz`."""
    target = target or platform.machine()
    with store() as folder:
        place = folder / "native"
        line = ["make", "-s", "-C", str(SOURCES), f"BUILD={place}", target]
        if (given := os.environ.get("EDGEKIT_ORT_HEADERS")) is not None:
            line.append(f"HEADERS={given}")
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no make here")
        if done.returncode == 127 or "not found" in done.stderr:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr
    return place / target / program


def environment() -> dict[str, str]:
    """Where the libraries of the installed engines are."""
    from importlib.util import find_spec

    found = dict(os.environ)
    for name, package, pattern in (
        ("EDGEKIT_ONNXRUNTIME", "onnxruntime", "capi/libonnxruntime.so.*"),
        ("EDGEKIT_LITERT", "ai_edge_litert", "libLiteRt.so"),
    ):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            for library in Path(place).glob(pattern):
                found[name] = str(library)
    return found
