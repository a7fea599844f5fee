"""Mutated, truncated and crafted model files: what reading and converting them does, and that
nobody here dies, waits or runs what an attacker wrote.

Files go the way `edgekit inspect` and `edgekit convert` take them: this process looks at them and
asks children to read and convert. Here a child is asked again until it dies. Crafted files would
create a canary if anything in them ran; they come without --trust-source.

    python benchmarks/source_mutations.py [--count 200] [--seed 0] [--share 1.0] [--formats ...]
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgekit import sandbox
from edgekit.artifact import SOURCES, open_model
from edgekit.cache import Cache
from edgekit.convert import convert
from edgekit.errors import ChildError, EdgeKitError, by_name, one_line
from edgekit.execute import run_samples
from edgekit.inspection import inspect_model
from edgekit.noise import noise_sets
from edgekit.reading import Reading

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from crafted_sources import crafted_files, prove_live, unzipped, zipped  # noqa: E402
from mutations import mutated  # noqa: E402

TIMEOUT_S = 60.0
MEMORY_BYTES = 6_000_000_000
#: a child that has answered so often makes room for a new one: frameworks never give memory back
LIFE = 100
FORMATS = ("keras", "h5", "savedmodel", "pt2", "torchscript", "joblib", "skops", "onnx", "tflite",
           "xml")  # fmt: skip
#: formats of which a well-meant file is refused without trust, so that mutants are read with it
TRUSTED = ("torchscript", "joblib")
#: input shapes that a file does not say
DECLARED = {"torchscript": "input=Nx4"}
#: what else than ONNX is tried of those that engines load
FURTHER = {"onnx": "openvino", "tflite": "onnx"}


class Reused:
    """`edgekit.sandbox.call` with one child for many calls."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.seen: set[str] = set()
        self.faults: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._answers = 0

    def call(
        self,
        target: str,
        arguments: dict[str, Any],
        *,
        limits: sandbox.Limits | None = None,
        progress: Callable[[int, int], None] | None = None,
        what: str = "",
    ) -> Any:
        """As `sandbox.call`, within TIMEOUT_S and MEMORY_BYTES."""
        process = self._process or self._start()
        assert process.stdin is not None
        request = json.dumps({"target": target, "arguments": arguments}).encode() + b"\n"
        with suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
        line = self._wait(process, time.monotonic() + TIMEOUT_S)
        if not line:
            code = process.poll()
            self.close()
            self.seen.add("over" if code is None else "died")
            self.faults.append(f"{target}: {'over the limit' if code is None else code}")
            raise ChildError(f"{what}: over a limit or crashed ({code})")
        answer = json.loads(line)
        self._answers += 1
        if self._answers >= LIFE:
            self.close()
        if "result" in answer:
            return answer["result"]
        if "crash" in answer:
            self.seen.add("unforeseen")
            self.faults.append(f"{target}: {answer['crash'][:150]}")
            raise ChildError(f"{what}: {answer['crash']}")
        raise by_name(answer["kind"], answer["error"])

    def _start(self) -> subprocess.Popen[bytes]:
        self._answers = 0
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / Path(__file__).name), "--child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=sandbox.child_environment(), cwd=self.scratch, start_new_session=True,
        )  # fmt: skip
        self._lines = lines = queue.Queue()

        def read(stream: IO[bytes]) -> None:
            for line in stream:
                lines.put(line)
            lines.put(b"")

        assert process.stdout is not None
        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        return process

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """The answer; nothing if the child died (its code is known then) or broke a limit."""
        import psutil

        while time.monotonic() < deadline:
            with suppress(queue.Empty):
                line = self._lines.get(timeout=0.2)
                if not line:
                    process.wait(10)
                return line
            with suppress(psutil.Error):
                if psutil.Process(process.pid).memory_info().rss > MEMORY_BYTES:
                    return b""
        return b""

    def close(self) -> None:
        """End the child, and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, 9)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def child() -> None:
    """Answer requests, one a line, until there are no more."""
    import importlib

    sandbox._die_with_parent()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            module, _, name = request["target"].partition(":")
            function = getattr(importlib.import_module(module), name)
            answer = {"result": function(**request["arguments"])}
            text = json.dumps(answer)
        except EdgeKitError as error:
            text = json.dumps({"error": str(error), "kind": type(error).__name__})
        except BaseException as error:
            text = json.dumps({"crash": f"{type(error).__name__}: {one_line(error)}"})
        channel.write(text + "\n")
        channel.flush()
    os._exit(0)


@contextmanager
def reused_children(folder: Path) -> Iterator[Reused]:
    """Within it, EdgeKit asks one child for everything."""
    reused = Reused(folder)
    original, sandbox.call = sandbox.call, reused.call  # type: ignore[assignment]
    try:
        yield reused
    finally:
        sandbox.call = original
        reused.close()


# --- what is mutated ----------------------------------------------------------------------------


def make(folder: Path, formats: Sequence[str], canary: Path) -> None:
    """Runs in a process of its own: a small model in each format, and files with code in them."""
    import warnings

    warnings.simplefilter("ignore")
    wanted = set(formats)
    if wanted & {"joblib", "skops", "onnx", "xml"}:
        _make_sklearn(folder)
    if wanted & {"pt2", "torchscript"}:
        _make_torch(folder)
    if wanted & {"keras", "h5", "savedmodel", "tflite"}:
        _make_keras(folder, canary)


def _make_sklearn(folder: Path) -> None:
    import cnn
    import joblib
    import openvino
    import skops.io
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    features, labels = load_iris(return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, labels)
    joblib.dump(model, folder / "m.joblib")
    skops.io.dump(model, folder / "m.skops")
    skops.io.dump(DecisionTreeClassifier(max_depth=3).fit(features, labels), folder / "tree.skops")
    path = cnn.small_cnn(folder / "m.onnx")
    openvino.save_model(openvino.convert_model(path), folder / "m.xml", False)


def _make_torch(folder: Path) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    example = torch.ones(2, 4)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "m.pt2")
    torch.jit.trace(model, example).save(folder / "m.pt")


def _make_keras(folder: Path, canary: Path) -> None:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([
        layers.Input((8, 8, 1), name="image"), layers.Conv2D(3, 3, activation="relu"),
        layers.Flatten(), layers.Dense(2),
    ])  # fmt: skip
    model.save(folder / "m.keras")
    model.save(folder / "m.h5")
    model.export(folder / "savedmodel", verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "savedmodel"))
    (folder / "m.tflite").write_bytes(converter.convert())

    path = str(canary)
    crafted = folder / "crafted"
    trap = keras.Sequential([
        layers.Input((4,)),
        layers.Lambda(lambda x: [x, __import__("io").open(path, "w")][0]), layers.Dense(2),
    ])  # fmt: skip
    trap.save(crafted / "lambda.keras")
    trap.save(crafted / "lambda.h5")

    class Writes(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, "x")])
        def serve(self, x: Any) -> Any:
            with tf.control_dependencies([tf.io.write_file(path, "ran")]):
                return tf.identity(x)

    writes = Writes()
    tf.saved_model.save(writes, str(crafted / "writes"), {"serving_default": writes.serve})


def sources(fmt: str, folder: Path) -> Path:
    """The unharmed model."""
    names = {"torchscript": "m.pt", "savedmodel": "savedmodel"}
    return folder / names.get(fmt, f"m.{fmt}")


def mutant(good: Path, target: Path, rng: np.random.Generator) -> Path:
    """A copy of which something is changed: bytes of the file, or of one inside the archive or
    folder, whose checksums are right then."""
    if good.is_dir():
        files = sorted(one for one in good.rglob("*") if one.is_file() and one.stat().st_size)
        chosen = files[int(rng.integers(len(files)))]
        for one in files:
            copy = target / one.relative_to(good)
            copy.parent.mkdir(parents=True, exist_ok=True)
            data = one.read_bytes()
            copy.write_bytes(mutated(data, rng) if one == chosen else data)
        return target
    if good.suffix == ".xml":
        weights = good.with_suffix(".bin").read_bytes()
        both = [good.read_bytes(), weights]
        place = int(rng.random() < 0.2)
        both[place] = mutated(both[place], rng)
        target.with_suffix(".bin").write_bytes(both[1])
        target.write_bytes(both[0])
    elif zipfile.is_zipfile(good) and rng.random() < 0.7:
        contents = unzipped(good)
        names = [name for name, data in contents.items() if data]
        name = names[int(rng.integers(len(names)))]
        zipped(target, contents | {name: mutated(contents[name], rng)})
    else:
        target.write_bytes(mutated(good.read_bytes(), rng))
    return target


# --- what becomes of them -----------------------------------------------------------------------


def read_and_convert(path: str, reading: Reading, cache: Cache, fmt: str = "") -> str:
    """What `edgekit inspect` and `convert` do with a model: `converted`, or why it is refused."""
    try:
        artifact = open_model(path, reading=reading)
        document = inspect_model(artifact, cache)
        if artifact.format in SOURCES and document["graph_of"] is None:
            return str(document["graph_missing"])
        if fmt in FURTHER:
            convert(artifact, FURTHER[fmt], cache=cache)
    except EdgeKitError as error:
        assert "\n" not in str(error), f"an error of several lines: {error}"
        return str(error)
    return "converted"


def mutations_of(
    fmt: str, count: int, seed: int, folder: Path, reused: Reused, canary: Path
) -> dict[str, Any]:
    """What became of `count` mutants: numbers of `converted` and `refused` ones and of those that
    ended otherwise, and `slowest_s`."""
    from edgekit.reading import parse_inputs

    rng = np.random.default_rng(seed + FORMATS.index(fmt))
    good = sources(fmt, folder)
    inputs = parse_inputs([DECLARED[fmt]]) if fmt in DECLARED else {}
    reading = Reading(inputs=inputs, trust_source=fmt in TRUSTED)
    outcomes: collections.Counter[str] = collections.Counter()
    slowest_s = 0.0
    with tempfile.TemporaryDirectory() as text:
        cache = Cache(Path(text) / "cache")
        unharmed = read_and_convert(str(good), reading, cache, fmt)
        assert unharmed == "converted", f"{fmt}: {unharmed}"
        reused.faults.clear()
        for number in range(count):
            path = mutant(good, Path(text) / f"{number}{good.suffix}", rng)
            reused.seen.clear()
            start = time.monotonic()
            try:
                outcome = _short(read_and_convert(str(path), reading, cache, fmt))
            except Exception as error:  # this is what must not be
                outcome = "host"
                print(f"{fmt} {number}: {type(error).__name__}: {one_line(error)}", flush=True)
            slowest_s = max(slowest_s, time.monotonic() - start)
            bad = reused.seen & {"died", "over"} or reused.seen
            outcomes[outcome if outcome == "host" or not bad else min(bad)] += 1
            assert not canary.exists(), f"{fmt} {number} ran code"
    faults = collections.Counter(reused.faults)
    return dict(outcomes) | {"slowest_s": round(slowest_s, 1), "faults": dict(faults)}


def _short(outcome: str) -> str:
    return outcome if outcome == "converted" else "refused"


def crafted_outcomes(
    folder: Path, reused: Reused, canary: Path, share: float, seed: int
) -> dict[str, Any]:
    """What became of files with code in them; `ran` counts those that created the canary."""
    prove_live(canary)
    rng = np.random.default_rng(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    ran = []
    for path in crafted_files(folder, canary):
        # One of each kind always: those made by rule differ in the number at their end.
        if re.search(r"[1-9]\d*\.\w+$", path) and rng.random() > share:
            continue
        with tempfile.TemporaryDirectory() as text:
            cache = Cache(Path(text))
            reused.seen.clear()
            try:
                outcome = _short(read_and_convert(path, Reading(), cache))
                if outcome == "converted":
                    artifact = open_model(path)
                    _, samples = next(noise_sets(artifact.inputs, {}, count=1))
                    run_samples(artifact, samples)
            except EdgeKitError:
                outcome = "refused"
            except Exception as error:  # this is what must not be
                outcome = "host"
                print(f"{path}: {type(error).__name__}: {one_line(error)}", flush=True)
        outcomes[min(reused.seen) if reused.seen and outcome != "host" else outcome] += 1
        if canary.exists():
            ran.append(Path(path).name)
            canary.unlink()
    return dict(outcomes) | {"ran": ran}


def run(
    formats: Sequence[str], count: int, seed: int, share: float, folder: Path
) -> dict[str, dict[str, Any]]:
    """Outcomes by format, and under `crafted`."""
    canary = folder / "CANARY"
    (folder / "crafted").mkdir(parents=True)
    scratch = folder / "scratch"
    scratch.mkdir()
    paths = [str(HERE.parent / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = sandbox.child_environment() | {"PYTHONPATH": os.pathsep.join(paths)}
    environment["TF_USE_LEGACY_KERAS"] = "0"
    done = subprocess.run(  # its words are shown below
        [sys.executable, str(HERE / Path(__file__).name), "--make", str(folder), *formats],
        env=environment, cwd=scratch, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    canary.unlink(missing_ok=True)  # making the Lambda layer ran it
    found: dict[str, dict[str, Any]] = {}
    with reused_children(scratch) as reused:
        found["crafted"] = crafted_outcomes(folder, reused, canary, share, seed)
        print(f"{'crafted':<12}", found["crafted"], flush=True)
        for fmt in formats:
            part = max(1, round(count * share))
            found[fmt] = mutations_of(fmt, part, seed, folder, reused, canary)
            print(f"{fmt:<12}", found[fmt], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants and crafted files")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
    elif args.make:
        folder = Path(args.make[0])
        make(folder, args.make[1:], folder / "CANARY")
    else:
        with tempfile.TemporaryDirectory() as text:
            found = run(args.formats, args.count, args.seed, args.share, Path(text) / "it")
        failed = found["crafted"]["ran"] or any(one.get("host") for one in found.values())
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
