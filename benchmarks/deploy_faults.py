"""Deploys while things go wrong, many times over; counts what is left.

python benchmarks/deploy_faults.py host|cuts|disk|flips|archives|swaps [--times N]

host      the command is killed at a random moment (30)
cuts      the network is cut at a random byte, one in ten silently (100; an ssh server in here)
disk      a disk that is full to 0, 1, ... 99 % (100; root)
flips     one bit of a bundle flipped (2,000): refused here, and by the runtime
archives  crafted archives (60): refused here, and by the runtime, each with its reason
swaps     the file replaced by a damaged one while it is verified and loaded (200)
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
from hostile import archives
from ssh_home import Link, Server

import edgekit_runtime.source
from edgekit.deploy import Transport, connect
from edgekit.deploy.install import Device, deploy
from edgekit.errors import EdgeKitError, TargetError
from edgekit_runtime import load, open_installed


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
        shutil.copytree(self.start, self.root)

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
        except Exception as error:
            self.faults.append([what, f"{type(error).__name__}: {error}"])

    def report(self) -> dict[str, Any]:
        after = (
            {"next_deploy_s": {"median": round(statistics.median(self.next_s), 2),
                               "slowest": round(max(self.next_s), 2)}}
            if self.next_s else {}
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
    taken = []
    for _ in range(5):
        start = time.monotonic()
        load(stage.new).close()
        taken.append(time.monotonic() - start)
    for number in range(times):
        path.write_bytes(good)
        delay = random.Random(number).uniform(0, min(taken))

        def swap(number: int = number, delay: float = delay) -> None:
            time.sleep(delay)
            if number % 2:
                other.write_bytes(evil)
                other.replace(path)
            else:
                with path.open("r+b") as file:
                    file.seek(where)
                    file.write(evil[where : where + 1])

        thread = threading.Thread(target=swap)
        thread.start()
        try:
            with load(path):
                seen["loaded, verified"] += 1
        except EdgeKitError:
            seen["refused"] += 1
        thread.join()
    unverified = sum(one != right for one in given)
    return {"tries": times, **seen, "unverified loads": unverified}


def main() -> None:
    kinds = {
        "host": (host, 30), "cuts": (cuts, 100), "disk": (disk, 100), "flips": (flips, 2000),
        "archives": (crafted, 60), "swaps": (swaps, 200),
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
