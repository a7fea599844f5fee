"""Kills the installer at each of its state-changing system calls, and looks at what is left.

python benchmarks/deploy_kills.py BUNDLE_OLD BUNDLE_NEW [--most N]     (strace must be installed)

For each call: the version that is active must load and be one of the two, whole; the next deploy
must succeed, and how long it takes is kept.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from edgekit.deploy import connect
from edgekit.deploy.install import Device, deploy
from edgekit.errors import TargetError
from edgekit_runtime import open_installed

CALLS = "openat,write,pwrite64,rename,unlink,mkdir,chmod,fchmod,ftruncate,fallocate,fsync"
#: those that only read, or write to the host
READS = re.compile(r"openat\(.*O_RDONLY|write\(1,")


def wrapper(folder: Path, tail: str, *, receiving: bool) -> str:
    """A Python that runs the installer (or its receiver) under strace, the rest plainly."""
    path = folder / "python"
    traced = f"exec strace -qq {tail} '{sys.executable}' \"$@\""
    plain = f"exec '{sys.executable}' \"$@\""
    chosen = "*--receive*" if receiving else "*installer-*"
    spared = "" if receiving else f'case "$*" in *--receive*) {plain};; esac\n'
    path.write_text(f'#!/bin/sh\n{spared}case "$*" in {chosen}) {traced};; esac\n{plain}\n')
    path.chmod(0o755)
    return str(path)


def install(root: Path, bundle: Path, python: str | None = None) -> None:
    with connect("local") as here, Device(here, "m", root=str(root), python=python) as made:
        deploy(bundle, made)


def points(work: Path, start: Path, new: Path, *, receiving: bool) -> list[tuple[str, int]]:
    """(call, its number in the process) of every call that changes something."""
    root, log = work / "root", work / "calls"
    shutil.copytree(start, root)
    install(root, new, wrapper(work, f"-o {log} -e trace={CALLS}", receiving=receiving))
    shutil.rmtree(root)
    seen: Counter[str] = Counter()
    found = []
    for line in log.read_text().splitlines():
        call = line.partition("(")[0]
        seen[call] += 1
        if call in CALLS.split(",") and not READS.match(line):
            found.append((call, seen[call]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--most", type=int, default=1000, help="sample so many of the calls")
    args = parser.parse_args()
    whole = {hashlib.sha256(p.read_bytes()).hexdigest() for p in (args.old, args.new)}
    with tempfile.TemporaryDirectory() as made:
        work, start = Path(made), Path(made, "start")
        install(start, args.old)
        old = json.loads((start / "m" / "active.json").read_text())["file"]
        todo = [
            (receiving, *one)
            for receiving in (False, True)
            for one in points(work, start, args.new, receiving=receiving)
        ]
        todo = todo[:: max(1, len(todo) // args.most)]
        killed, was_old, slowest, faults = 0, 0, 0.0, []
        for receiving, call, number in todo:
            root = work / "root"
            shutil.copytree(start, root)
            inject = f"-o /dev/null -e trace={call} -e inject={call}:signal=SIGKILL:when={number}"
            try:
                install(root, args.new, wrapper(work, inject, receiving=receiving))
            except TargetError:
                killed += 1
            file = json.loads((root / "m" / "active.json").read_text())["file"]
            was_old += file == old
            bytes_ = (root / "m" / "versions" / file).read_bytes()
            try:
                if hashlib.sha256(bytes_).hexdigest() not in whole:
                    faults.append((call, number, "neither the old nor the new one"))
                if not (root / "m" / "versions" / old).exists():
                    faults.append((call, number, "the old one is lost"))
                open_installed("m", root=root).close()
                began = time.monotonic()
                install(root, args.new)
                slowest = max(slowest, time.monotonic() - began)
                if list(root.glob("m/**/.new-*")) or list(root.glob("m/incoming/*")):
                    faults.append((call, number, "something is left"))
            except Exception as error:
                faults.append((call, number, f"{type(error).__name__}: {error}"))
            shutil.rmtree(root)
        answer = {
            "calls": len(todo), "killed": killed, "old_after_kill": was_old,
            "new_after_kill": len(todo) - was_old, "slowest_next_deploy_s": round(slowest, 2),
            "faults": faults, "strace": subprocess.run(
                ["strace", "-V"], capture_output=True, text=True, check=True
            ).stdout.split("\n")[0],
        }  # fmt: skip
        print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
