"""The native runner built for this machine, and bundles of real models to run with it."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bundle, make_manifest, make_variant, npz

from edgekit.deploy.capsule import native_runner
from edgekit.errors import MissingToolError
from edgekit_runtime import load
from edgekit_runtime.manifest import Golden, Tolerance


def native_program(target: str = "") -> Path:
    """The runner for this machine, or its build of this name: `sanitized`, `fuzz`."""
    try:
        return native_runner(target or platform.machine())
    except MissingToolError as error:
        pytest.skip(str(error))


def engine_libraries() -> dict[str, str]:
    """The environment with the places of the installed engines' libraries."""
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


class Runner:
    """The program on this machine, with the library of the installed onnxruntime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
        self.path = path
        self.environment = {**os.environ, "EDGEKIT_ONNXRUNTIME": str(library)}

    def __call__(self, *words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.path, *map(str, words)], capture_output=True, text=True, check=False,
            timeout=timeout, env=self.environment,
        )  # fmt: skip

    def started(self, folder: str) -> Path:
        """A command of one word that starts it, for what gives no environment."""
        script = Path(folder, "edgekit-run.sh")
        library = self.environment["EDGEKIT_ONNXRUNTIME"]
        script.write_text(f'#!/bin/sh\nEDGEKIT_ONNXRUNTIME={library} exec {self.path} "$@"\n')
        script.chmod(0o755)
        return script

    def json(self, *words: object) -> dict[str, Any]:
        done = self(*words, "--json")
        assert done.returncode in (0, 1), done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def python_runtime(*words: object, code: int = 0) -> dict[str, Any]:
    """What the Python runtime prints for the same words, as JSON."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "edgekit_runtime", *map(str, words), "--json"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def shape_of(value: Any) -> Any:
    """The fields of a document and their types; numbers that may be missing are `number`."""
    if isinstance(value, dict):
        return {key: shape_of(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    number = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    return "number" if number else type(value).__name__


def bundle_of(
    model: Path, samples: Sequence[Mapping[str, np.ndarray]], path: Path, **changes: Any
) -> Path:
    """A bundle of a plain ONNX model whose golden outputs are what onnxruntime says of samples."""
    with load(model) as session:
        inputs, outputs = session.inputs, session.outputs
        answers = [session.run(dict(one)) for one in samples]
    contents = {
        "a/model.onnx": model.read_bytes(),
        "a/in.npz": npz(**{s.name: np.stack([one[s.name] for one in samples]) for s in inputs}),
        "a/out.npz": npz(**{s.name: np.stack([one[s.name] for one in answers]) for s in outputs}),
    }
    limits = {spec.name: Tolerance(1e-5, 1e-5) for spec in outputs}
    variant = make_variant(
        input_names=tuple(s.name for s in inputs), output_names=tuple(s.name for s in outputs),
        golden=Golden("a/in.npz", "a/out.npz", len(samples), limits),
        **changes.pop("variant", {}),
    )  # fmt: skip
    digest = hashlib.sha256(b"".join(contents.values())).hexdigest()[:32]
    plain = {"inputs": inputs, "outputs": outputs, "variants": (variant,)}
    fields: dict[str, Any] = {"name": model.stem, "bundle_id": digest, **plain, **changes}
    made = make_manifest(contents, **fields)
    path.write_bytes(bundle(made, contents))
    return path
