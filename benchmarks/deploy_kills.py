"""Kills the installer at its state-changing system calls, and looks at what is left.

python benchmarks/deploy_kills.py OLD NEW [--most N] [--to TARGET --python PYTHON --quick]

With --quick the trial is `echo` and no engine is asked: emulated machines take a minute for either.
strace must be there, and a kernel that traces (the emulated machine of the lab is one, its boards
are not). For each call: the version that is active must answer and be one of the two, whole; the
next deploy must succeed, and how long it takes is kept.
"""

import argparse
import hashlib
import json
import re
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

from edgekit.deploy import Transport, connect
from edgekit.deploy.install import Device, deploy
from edgekit.errors import TargetError

CALLS = (
    "openat,write,pwrite64,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,chmod,fchmod,"
    "fchmodat,ftruncate,fallocate,fsync,flock"
)
#: those that only read, write to the host, or write to the lock's file who holds it
READS = re.compile(r"openat\(.*O_RDONLY|write\(1,|pwrite64\(3,")
#: a trial that says yes
ACCEPTING = ["sh", "-c", "echo '{\"ok\": true}'"]
LOOK = """import sys, json, hashlib, pathlib, time; sys.path.insert(0, sys.argv[2])
root = pathlib.Path(sys.argv[1])
def sha(p): return hashlib.sha256(p.read_bytes()).hexdigest()
found = {p.name: sha(p) for p in (root / "m/versions").glob("*.edgekit")}
left = [str(p) for pattern in ("m/**/.new-*", "m/incoming/*") for p in root.glob(pattern)]
active = json.loads((root / "m/active.json").read_text())["file"]
y = None
if sys.argv[3] != "quick":
    import numpy; from edgekit_runtime import open_installed
    with open_installed("m", root=root) as session:
        y = session.run({"x": numpy.ones((1, 4), "float32")})["y"].tolist()
print(json.dumps({"active": active, "versions": found, "left": left, "y": y}))
"""


class Place:
    """The target, a root there, and the Python that runs the installer under strace."""

    def __init__(self, transport: Transport, python: str, how: str) -> None:
        self.transport, self.python, self.how = transport, python, how
        self.folder = transport.scratch()
        self.root = f"{self.folder}/root"

    def shell(self, text: str, stdin: bytes = b"") -> str:
        done = self.transport.run(["sh", "-c", text], stdin=stdin, timeout_s=120)
        if done.code:
            raise TargetError(f"{text}: {done.last_words}")
        return done.stdout.decode()

    def traced(self, tail: str) -> str:
        """A Python whose installer runs under strace; trials run plainly."""
        path = f"{self.folder}/python"
        text = (
            f'#!/bin/sh\ncase "$*" in *\' trial \'*) exec {self.python} "$@";; esac\n'
            f'exec strace -qq {tail} {self.python} "$@"\n'
        )
        self.shell(f"cat > {path}; chmod 755 {path}", text.encode())
        return path

    def install(self, bundle: Path, python: str | None = None) -> float:
        start = time.monotonic()
        with Device(self.transport, "m", root=self.root, python=python or self.python) as made:
            if self.how == "quick":
                made.trial = lambda _: ACCEPTING  # type: ignore[method-assign]
            deploy(bundle, made)
            self.runtime = f"{made.folder}/{made.runtime}"
        return time.monotonic() - start

    def look(self) -> dict[str, object]:
        done = self.transport.run(
            [self.python, "-c", LOOK, self.root, self.runtime, self.how], timeout_s=300
        )
        return json.loads(done.stdout) if done.code == 0 else {"fault": done.last_words}

    def reset(self) -> None:
        # what a killed one leaves behind may still end; it holds no lock
        self.shell(f"rm -rf {self.root}; cp -a {self.folder}/start {self.root}")


def points(place: Place, new: Path) -> list[tuple[str, int]]:
    """(call, its number in the process) of every call that changes something."""
    log = f"{place.folder}/calls"
    names = ",".join(f"?{name}" for name in CALLS.split(","))
    place.reset()
    place.install(new, place.traced(f"-o {log} -e trace={shlex.quote(names)}"))
    seen: Counter[str] = Counter()
    found = []
    for line in place.shell(f"cat {log}").splitlines():
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
    parser.add_argument("--to", default="local")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    old, new = (hashlib.sha256(p.read_bytes()).hexdigest() for p in (args.old, args.new))
    with connect(args.to) as transport:
        place = Place(transport, args.python, "quick" if args.quick else "whole")
        place.install(args.old)
        place.shell(f"mv {place.root} {place.folder}/start")
        todo = points(place, args.new)
        count = min(args.most, len(todo))
        sampled = [todo[number * len(todo) // count] for number in range(count)]
        outcomes: Counter[str] = Counter()
        taken, faults = [], []
        for call, number in sampled:
            place.reset()
            inject = f"-o /dev/null -e trace={call} -e inject={call}:signal=SIGKILL:when={number}"
            try:
                place.install(args.new, place.traced(inject))
                outcomes["not killed"] += 1
            except TargetError:
                outcomes["killed"] += 1
            found = place.look()
            versions = found.get("versions", {})
            which = versions.get(found.get("active"))
            if which not in (old, new) or old not in versions.values():
                faults.append((call, number, found))
            if set(versions.values()) - {old, new}:
                faults.append((call, number, "a version is damaged"))
            outcomes["old is active" if which == old else "new is active"] += 1
            try:
                taken.append(place.install(args.new))
            except TargetError as error:
                faults.append((call, number, f"the next deploy: {error}"))
            after = place.look()
            if after.get("left") != [] or after["versions"].get(after["active"]) != new:
                faults.append((call, number, "after the next deploy", after))
        place.shell(f"rm -rf {place.folder}")
    answer = {
        "target": args.to, "quick": args.quick, "calls": len(todo), "tried": len(sampled),
        **outcomes,
        "next_deploy_s": {"median": round(sorted(taken)[len(taken) // 2], 2),
                          "slowest": round(max(taken), 2)},
        "faults": faults,
    }  # fmt: skip
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
