"""Mutated bundles and models: what reaches an engine, what it does, and that nobody here dies.

Bundles are read in this process: each mutation is refused before an engine is asked for, or leaves
the bundle's meaning as it was. Models go to the engines in processes of their own, those of
`load(..., isolate=True)`, which are used again until they die: a death or a hang is one
EngineCrashed here.

    python benchmarks/mutations.py [--count 5000] [--seed 0] [--formats onnx openvino tflite ncnn]
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import bundles
import cnn
from small_models import LACKING, SAVERS

from edgekit_runtime import EdgeKitError, EngineCrashed, source
from edgekit_runtime.bundle import Bundle
from edgekit_runtime.isolate import _Child
from edgekit_runtime.loading import load

ENGINE_OF = {"onnx": "onnxruntime", "openvino": "openvino", "tflite": "litert", "ncnn": "ncnn"}
TIMEOUT_S = 10.0


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One of: flipped bits, other bytes, extreme numbers, a cut, a doubled, moved or lost piece."""
    out = bytearray(data)
    kind = max(0, int(rng.integers(-5, 7)))  # half of them flip a few bits
    spot = int(rng.integers(len(out)))
    size = int(rng.integers(1, max(2, min(64, len(out)))))
    if kind == 0:
        for place in rng.integers(0, len(out), int(rng.integers(1, 4))):
            out[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        out[spot : spot + size] = rng.bytes(size)
    elif kind == 2:
        extreme = [0, -1, 1 << 31, (1 << 31) - 1, 1 << 63, 0x7F800000, 0x7FC00000]
        value = extreme[int(rng.integers(len(extreme)))] & ((1 << 64) - 1)
        width = 4 if value < 1 << 32 else 8
        out[spot : spot + width] = value.to_bytes(width, "little")
    elif kind == 3:
        del out[spot:]
    elif kind == 4:
        out[spot:spot] = out[spot : spot + size]
    elif kind == 5:
        other = int(rng.integers(len(out)))
        out[other : other + size] = out[spot : spot + size]
    else:
        del out[spot : spot + size]
    return bytes(out)


def bundle_mutations(count: int, seed: int, folder: Path) -> collections.Counter[str]:
    """What becomes of mutated bundles. `engine` counts those that reached an engine although
    their bytes differ: it must stay away."""
    model = SAVERS["onnxruntime"](folder, "linear")
    contents = {
        "a/in.npz": bundles.npz(x=np.zeros((2, 1, 4), np.float32)),
        "a/model.onnx": model.read_bytes(),
        "a/out.npz": bundles.npz(y=np.zeros((2, 1, 3), np.float32)),
    }
    good = bundles.bundle(bundles.make_manifest(contents), contents)
    path = folder / "m.edgekit"
    outcomes: collections.Counter[str] = collections.Counter()

    def reached(*_: object) -> object:
        outcomes["engine"] += 1
        raise EdgeKitError("an engine was asked for")

    real, source.load_engine = source.load_engine, reached  # type: ignore[assignment]
    try:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            data = mutated(good, rng)
            path.write_bytes(data)
            if data == good:
                outcomes["unchanged"] += 1
                continue
            start = time.monotonic()
            try:
                load(path)
            except EdgeKitError as error:
                outcomes[type(error).__name__] += 1
            outcomes["slow"] += time.monotonic() - start > TIMEOUT_S
    finally:
        source.load_engine = real
    with Bundle(_written(path, good)) as bundle:
        bundle.verify()  # the reader does not just refuse everything
    return outcomes


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _models(fmt: str, folder: Path) -> Iterator[dict[str, bytes]]:
    engine = ENGINE_OF[fmt]
    for name in ("linear", "two", "conv", "where"):
        if name in LACKING.get(engine, {}):
            continue
        path = SAVERS[engine](folder, name)
        beside = [path.with_suffix(s) for s in (".bin", ".json")] if fmt != "onnx" else []
        yield {p.name: p.read_bytes() for p in (path, *beside) if p.exists()}
    if fmt in ("onnx", "openvino"):
        path = cnn.small_cnn(folder / "cnn.onnx")
        if fmt == "openvino":
            import openvino

            openvino.save_model(openvino.convert_model(path), folder / "cnn.xml", False)
            files = [folder / "cnn.xml", folder / "cnn.bin"]
        else:
            files = [path]
        yield {p.name: p.read_bytes() for p in files}


def model_mutations(fmt: str, count: int, seed: int, folder: Path) -> collections.Counter[str]:
    """What mutated models do to their engine: `refused`, `ran`, `failed` (while running), `died`,
    `hung`."""
    rng = np.random.default_rng(seed)
    models = list(_models(fmt, folder))
    outcomes: collections.Counter[str] = collections.Counter()
    child: _Child | None = None
    slowest_s = 0.0
    try:
        for number in range(count):
            files = dict(models[number % len(models)])
            name = sorted(files)[int(rng.integers(len(files)))]
            if not files[name]:
                name = next(one for one, data in files.items() if data)
            files[name] = mutated(files[name], rng)
            child = child or _Child(TIMEOUT_S)
            start = time.monotonic()
            outcome = _try(child, ENGINE_OF[fmt], files)
            slowest_s = max(slowest_s, time.monotonic() - start)
            outcomes[outcome] += 1
            if outcome in ("died", "hung"):
                child = None
    finally:
        if child is not None:
            child.close()
    outcomes["slowest_ms"] = round(1000 * slowest_s)
    return outcomes


def _try(child: _Child, engine: str, files: dict[str, bytes]) -> str:
    options = {"threads": 1, "precision": "float32", "streams": 1}
    listed = [[name, len(data)] for name, data in files.items()]
    loaded = False
    try:
        reply = child.ask(
            {"do": "load", "engine": engine, "options": options, "files": listed}, *files.values()
        )
        loaded = True
        shapes = [
            [d if isinstance(d, int) else 6 for d in spec["shape"]] for spec in reply["inputs"]
        ]
        if sum(int(np.prod(shape, dtype=object)) for shape in shapes) > 1 << 22:
            return "too large to run"
        bound = child.ask({"do": "bind", "shapes": shapes})
        child.ask({"do": "invoke", "id": bound["id"]})
        child.ask({"do": "unbind", "id": bound["id"]})
    except EngineCrashed as crash:
        return "hung" if "did not answer" in str(crash) else "died"
    except EdgeKitError:
        return "failed" if loaded else "refused"
    return "ran"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="*", default=list(ENGINE_OF))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        print("bundles ", dict(bundle_mutations(args.count, args.seed, folder)), flush=True)
        for fmt in args.formats:
            own = folder / fmt  # files of the same name are another format's
            own.mkdir()
            outcomes = model_mutations(fmt, args.count, args.seed, own)
            print(f"{fmt:<8}", dict(outcomes), flush=True)


if __name__ == "__main__":
    main()
