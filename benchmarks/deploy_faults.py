"""Deploys while things go wrong, many times over; counts what is left.

python benchmarks/deploy_faults.py host|cuts|disk|flips|archives|swaps|bad [--times N]

host      the command is killed at a random moment (30)
cuts      the network is cut at a random byte, one in ten silently (100; an ssh server in here)
disk      a disk that is full to 0, 1, ... 99 % (100; root)
flips     one bit of a bundle flipped (2,000): refused here, and by the runtime
archives  crafted archives (60): refused here, and by the runtime, each with its reason
swaps     the file replaced by a damaged one while it is verified and loaded (200)
bad       sound bundles of models that are not: NaN, wrong golden, over memory, ten times slower
          than promised; three tries each, and a fourth
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from deploy_bundles import maker

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from deployable import Maker, scaled
from hostile import archives
from ssh_home import Link, Server

import edgekit_runtime.source
from edgekit.bundle import latency_limits
from edgekit.deploy import Transport, connect
from edgekit.deploy.install import Device, deploy
from edgekit.errors import EdgeKitError, TargetError
from edgekit_runtime import load, open_installed
from edgekit_runtime.bundle import Bundle
from edgekit_runtime.machine import machine_name
from edgekit_runtime.timing import sample, summary


class Stage:
    """A device of which version 1 is active, a version 2, and what was seen."""

    def __init__(self, work: Path, extra: int = 500_000) -> None:
        noise = np.random.default_rng(0)
        self.make = maker(work / "bundles")
        self.old = self.make(1, extra=noise.bytes(1000))
        self.new = self.make(2, extra=noise.bytes(extra))
        self.root, self.start = work / "root", work / "start"
        self.install(self.old, root=self.start)
        self.seen: Counter[str] = Counter()
        self.faults: list[Any] = []
        self.next_s: list[float] = []
        self.plain_s: list[float] = []

    def install(
        self, bundle: Path, transport: Transport | None = None, root: Path | None = None
    ) -> Any:
        with (
            transport or connect("local") as here,
            Device(here, "m", root=str(root or self.root), python=sys.executable) as made,
        ):
            return deploy(bundle, made)

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.start, self.root, dirs_exist_ok=True)

    def look(self, what: object, *, again: bool = True) -> None:
        """The old or the new one is active, whole, and answers; then a deploy."""
        try:
            active = json.loads((self.root / "m" / "active.json").read_text())["file"]
            self.seen[f"{active[0]} is active"] += 1
            found = {p.name: p.read_bytes() for p in (self.root / "m/versions").glob("*.edgekit")}
            assert self.old.read_bytes() in found.values(), "the old one is lost"
            assert found[active] in (self.old.read_bytes(), self.new.read_bytes())
            with open_installed("m", root=self.root) as session:
                answer = session.run({"x": np.ones((1, 4), np.float32)})["y"]
            np.testing.assert_allclose(answer, self.make.right, rtol=1e-5)
            if again:
                start = time.monotonic()
                done = self.install(self.new)
                self.next_s.append(time.monotonic() - start)
                assert done.file[0] == "2"
                assert not list(self.root.glob("m/**/.new-*"))
                assert not list(self.root.glob("m/incoming/*"))
                if len(self.next_s) % 4 == 0:
                    self.reset()
                    start = time.monotonic()
                    self.install(self.new)
                    self.plain_s.append(time.monotonic() - start)
        except Exception as error:
            self.faults.append([what, f"{type(error).__name__}: {error}"])

    def report(self) -> dict[str, Any]:
        after = (
            {
                f"{name}_deploy_s": {
                    "median": round(statistics.median(taken), 2), "slowest": round(max(taken), 2)
                }
                for name, taken in (("next", self.next_s), ("plain", self.plain_s)) if taken
            }
        )  # fmt: skip
        return {**self.seen, **after, "faults": self.faults}


def host(work: Path, times: int) -> dict[str, Any]:
    stage, rng = Stage(work, 3_000_000), random.Random(1)
    line = ["deploy", str(stage.new), "--to", "local", "--root", str(stage.root), "--as", "m"]
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", *line]
    stage.reset()
    start = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    whole_s = time.monotonic() - start
    for number in range(times):
        stage.reset()
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(rng.uniform(0.2, 1.0) * whole_s)
        stage.seen["killed" if child.poll() is None else "was through"] += 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        stage.look(number)
    return stage.report()


def cuts(work: Path, times: int) -> dict[str, Any]:
    stage, rng = Stage(work), random.Random(2)
    os.environ["HOME"] = str(work)
    server = Server(work)
    stage.reset()
    with Link(server.port) as link:
        stage.install(stage.new, connect(server.knows(link.port)))
        total = link.bytes
    for number in range(times):
        stage.reset()
        silent = number % 10 == 9
        with Link(server.port, rng.randrange(total), silent=silent) as link:
            try:
                stage.install(stage.new, connect(server.knows(link.port)))
                stage.seen["was through"] += 1
            except TargetError as error:
                stage.seen["cut silently" if silent else "cut"] += 1
                if "\n" in str(error):
                    stage.faults.append([number, str(error)])
            stage.look(number)
    server.cut()
    return {"bytes_of_a_deploy": total, **stage.report()}


def disk(work: Path, times: int) -> dict[str, Any]:
    stage = Stage(work)
    stage.root.mkdir()
    need = 2 * stage.new.stat().st_size + 2_000_000
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={need}", "tmpfs", str(stage.root)], check=True
    )
    try:
        for percent in range(times):
            for path in stage.root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.copytree(stage.start, stage.root, dirs_exist_ok=True)
            free, filler = shutil.disk_usage(stage.root).free, stage.root / "filler"
            filler.write_bytes(bytes(free * percent // times))
            try:
                stage.install(stage.new)
                stage.seen["deployed"] += 1
            except TargetError as error:
                said = "no room" if "no room for it" in str(error) else "full"
                stage.seen[f"refused ({said})"] += 1
                if "\n" in str(error) or (said == "full" and "is full" not in str(error)):
                    stage.faults.append([percent, str(error)])
            filler.unlink()
            stage.look(percent)
    finally:
        subprocess.run(["umount", "-l", str(stage.root)], check=True)
    return stage.report()


@contextlib.contextmanager
def engines_counted() -> Iterator[list[str]]:
    """What is given to an engine."""
    given: list[str] = []
    real = edgekit_runtime.source.load_engine

    def counted(name: str, *rest: Any) -> Any:
        given.append(name)
        return real(name, *rest)

    edgekit_runtime.source.load_engine = counted  # type: ignore[assignment]
    try:
        yield given
    finally:
        edgekit_runtime.source.load_engine = real


def refuse(cases: Iterator[tuple[str, bytes]], work: Path) -> dict[str, Any]:
    """What a deploy and the runtime say to each; none may reach an engine or the device."""
    stage, bad = Stage(work), work / "bad.edgekit"
    stage.reset()
    reasons: Counter[str] = Counter()
    with (
        engines_counted() as given,
        connect("local") as here,
        Device(here, "m", root=str(stage.root)) as made,
    ):
        for what, data in cases:
            bad.write_bytes(data)
            for by, action in (("host", lambda: deploy(bad, made)), ("runtime", lambda: load(bad))):
                try:
                    action()
                    stage.faults.append([what, f"taken by the {by}"])
                except EdgeKitError as error:
                    stage.seen[f"refused by the {by}"] += 1
                    if "\n" in str(error) or error.exit_code != 2:
                        stage.faults.append([what, by, str(error)])
                    reasons[str(error).replace(str(bad), "").replace(what, "...")[:60]] += 1
        assert made.ask("status")["versions"] == [
            p.name for p in (stage.root / "m/versions").iterdir()
        ]
    return {**stage.report(), "reached an engine": len(given), "different reasons": len(reasons)}


def flips(work: Path, times: int) -> dict[str, Any]:
    good = maker(work / "good")(2).read_bytes()
    rng = random.Random(3)

    def cases() -> Iterator[tuple[str, bytes]]:
        for _ in range(times):
            data, bit = bytearray(good), rng.randrange(8 * len(good))
            data[bit // 8] ^= 1 << bit % 8
            yield f"bit {bit}", bytes(data)

    return refuse(cases(), work)


def crafted(work: Path, _: int) -> dict[str, Any]:
    return refuse(iter(archives(maker(work / "good")(2).read_bytes())), work)


def swaps(work: Path, times: int) -> dict[str, Any]:
    """Rename and overwrite a bundle with one whose model differs while it is loaded."""
    stage = Stage(work, 2_000_000)
    stage.reset()
    good = stage.new.read_bytes()
    with zipfile.ZipFile(io.BytesIO(good)) as opened:
        where = opened.getinfo("a/model.onnx").header_offset + 200_000
    evil = bytearray(good)
    evil[where] ^= 1
    path, other = work / "there.edgekit", work / "other"
    seen: Counter[str] = Counter()
    given: list[bytes] = []
    real = edgekit_runtime.source.load_engine

    def kept(name: str, files: Any, *rest: Any) -> Any:
        given.extend(files.values())
        return real(name, files, *rest)

    edgekit_runtime.source.load_engine = kept  # type: ignore[assignment]
    with zipfile.ZipFile(io.BytesIO(good)) as opened:
        right = opened.read("a/model.onnx")

    def swap(number: int, delay_s: float) -> None:
        time.sleep(delay_s)
        if number % 2:
            other.write_bytes(evil)
            other.replace(path)
        else:
            with path.open("r+b") as file:
                file.seek(where)
                file.write(evil[where : where + 1])

    moments = [*_moments(stage.new), None]  # None: at a random time, in a thread
    for number in range(times):
        path.write_bytes(good)
        moment = moments[number // 2 % len(moments)]
        thread = threading.Thread(target=swap, args=(number, random.Random(number).random() / 200))
        with contextlib.ExitStack() as over:
            if moment is None:
                thread.start()
                over.callback(thread.join)
            else:
                over.enter_context(_afterwards(*moment, lambda number=number: swap(number, 0)))
            try:
                load(path).close()
                seen[f"loaded, verified ({_called(moment)})"] += 1
            except EdgeKitError:
                seen[f"refused ({_called(moment)})"] += 1
    unverified = sum(one != right for one in given)
    return {"tries": times, **seen, "unverified loads": unverified}


def _moments(path: Path) -> list[tuple[str, int]]:
    """Each read of the bundle's files while it is loaded: (method, its number)."""
    count: Counter[str] = Counter()
    with contextlib.ExitStack() as over:
        for name in ("_stored", "_stream_hash", "verify"):
            real = getattr(Bundle, name)

            def counted(self: Bundle, *rest: Any, _as: Any = (name, real), **more: Any) -> Any:
                count[_as[0]] += 1
                return _as[1](self, *rest, **more)

            setattr(Bundle, name, counted)
            over.callback(setattr, Bundle, name, real)
        load(path).close()
    return [(name, number) for name in sorted(count) for number in range(1, count[name] + 1)]


@contextlib.contextmanager
def _afterwards(name: str, number: int, action: Any) -> Iterator[None]:
    """Do it right after the `number`th call of a method of Bundle."""
    real, seen = getattr(Bundle, name), [0]

    def called(self: Bundle, *rest: Any, **more: Any) -> Any:
        found = real(self, *rest, **more)
        seen[0] += 1
        if seen[0] == number:
            action()
        return found

    setattr(Bundle, name, called)
    try:
        yield
    finally:
        setattr(Bundle, name, real)


def _called(moment: tuple[str, int] | None) -> str:
    return "at random" if moment is None else f"after {moment[0].strip('_')} {moment[1]}"


def chain(layers: int) -> bytes:
    """x (N, 4) -> y (N, 3) through so many products with a matrix of 512 x 512 (ONNX)."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    sizes = {"first": (4, 512), "again": (512, 512), "last": (512, 3)}
    held = [
        numpy_helper.from_array(rng.normal(0, 0.04, size).astype(np.float32), name)
        for name, size in sizes.items()
    ]
    names = ["first", *["again"] * layers, "last"]
    through = ["x", *(f"t{number}" for number in range(len(names) - 1)), "y"]
    nodes = [
        helper.make_node("MatMul", [through[number], name], [through[number + 1]])
        for number, name in enumerate(names)
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])]
        for name, width in (("x", 4), ("y", 3))
    )
    graph = helper.make_graph(nodes, "chain", inputs, outputs, held)
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def bad(work: Path, _: int) -> dict[str, Any]:
    stage = Stage(work)
    stage.reset()
    promised, slow = (Maker(chain(layers), work / f"chain{layers}") for layers in (20, 200))
    with load(promised.folder / "plain.onnx") as session:
        quick = summary(sample(lambda: session.run({"x": promised.inputs[0]}), 50))
    limits = latency_limits(quick, {"target": "local", "arch": machine_name()})
    cases = {
        "NaN": stage.make(11, model=scaled(stage.make.model, float("nan"))),
        "wrong golden": stage.make(12, off=0.1),
        "over memory": stage.make(13, memory_bytes=1_000_000),
        "ten times slower": slow(14, expected=limits),
    }
    sound = promised(15, expected=limits)
    found: dict[str, Any] = {}
    for what, bundle in cases.items():
        said, taken = [], []
        for _number in range(4):
            start = time.monotonic()
            try:
                stage.install(bundle)
                stage.faults.append([what, "taken"])
            except TargetError as error:
                said.append(str(error))
            taken.append(round(time.monotonic() - start, 2))
            stage.look(what, again=False)
        found[what] = {"says": said[0], "fourth": said[3], "seconds": taken}
    return {**found, "as fast as promised": stage.install(sound).state, **stage.report()}


def main() -> None:
    kinds = {
        "host": (host, 30), "cuts": (cuts, 100), "disk": (disk, 100), "flips": (flips, 2000),
        "archives": (crafted, 60), "swaps": (swaps, 200),
        "bad": (bad, 1),
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--times", type=int)
    args = parser.parse_args()
    action, times = kinds[args.kind]
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps({args.kind: action(Path(work), args.times or times)}, indent=1))


if __name__ == "__main__":
    main()
