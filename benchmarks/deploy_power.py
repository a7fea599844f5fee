"""Power cuts of a machine that keeps its disk, during deploys; and a clock that is far off.

python benchmarks/deploy_power.py power|clock [--times N]     (root; a machine of the lab)

power   the machine is killed at a random moment of a deploy, started again from what its disk has
        kept, looked at (the version that is active must be the last or the one that was coming,
        whole, and answer), deployed to again, and so on
clock   ten years early and late: deploy, use, roll back
"""

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from deploy_bundles import maker
from deploy_kills import ACCEPTING, LOOK

from edgekit.cache import file_sha256
from edgekit.deploy import Transport, connect, lab
from edgekit.deploy.install import Device, deploy
from edgekit.deploy.lab import Running
from edgekit.errors import TargetError

ROOT = "/home/pi/installed"


def install(machine: Running, bundle: Path, *, quick: bool = False) -> str:
    """The folder of the runtime there. `quick`: the trial is `echo`, which leaves the time of a
    deploy to what writes."""
    with (
        connect(machine.target) as there,
        Device(there, "m", root=ROOT, python=machine.python) as made,
    ):
        if quick:
            made.trial = lambda _: ACCEPTING  # type: ignore[method-assign]
        deploy(bundle, made)
        return f"{made.folder}/{made.runtime}"


def look(there: Transport, python: str, runtime: str, how: str = "whole") -> dict[str, Any]:
    done = there.run([python, "-c", LOOK, ROOT, runtime, how], timeout_s=300)
    return dict(json.loads(done.stdout)) if done.code == 0 else {"fault": done.last_words}


def power(work: Path, times: int) -> dict[str, Any]:
    rng, noise = random.Random(4), np.random.default_rng(4)
    make, seen, faults, taken = maker(work / "b"), Counter[str](), [], []
    disk = work / "disk.qcow2"
    machine = lab.up("raspberry-pi-4", keep=disk)
    last = make(1, extra=noise.bytes(300_000))
    runtime = install(machine, last)
    coming = make(2, extra=noise.bytes(300_000))
    start = time.monotonic()
    install(machine, coming, quick=True)
    last, whole_s = coming, time.monotonic() - start
    for number in range(3, times + 3):
        coming = make(number, extra=noise.bytes(300_000))
        at_s = rng.uniform(0.3, 1.0) * whole_s  # before, it is connecting
        switch = threading.Timer(at_s, lambda one=machine: lab.down(str(one.port)))
        switch.start()
        try:
            install(machine, coming, quick=True)
            seen["was through"] += 1
        except TargetError as error:
            seen["cut"] += 1
            if "\n" in str(error):
                faults.append([number, str(error)])
        switch.join()
        machine = lab.up("raspberry-pi-4", keep=disk)
        allowed = {file_sha256(last): "old is active", file_sha256(coming): "new is active"}
        with connect(machine.target) as there:
            found = look(there, machine.python, runtime, "quick")
        active = found.get("versions", {}).get(found.get("active"))
        seen[allowed.get(active, "neither is active")] += 1
        kept = file_sha256(last) in found.get("versions", {}).values()
        if active not in allowed or not kept:
            faults.append([number, round(at_s, 1), found])
        start = time.monotonic()
        try:
            install(machine, coming, quick=True)
            whole_s = time.monotonic() - start
            taken.append(round(whole_s, 1))
            last = coming
        except TargetError as error:
            faults.append([number, "the next deploy", str(error)])
    with connect(machine.target) as there:
        found = look(there, machine.python, runtime)
    right = bool(np.allclose(found.get("y", [[0]]), make.right, rtol=1e-4))
    lab.down(str(machine.port))
    return {"times": times, **seen, "next_deploy_s": taken, "answers in the end": right,
            "faults": faults}  # fmt: skip


def clock(work: Path, _: int) -> dict[str, Any]:
    make, found = maker(work / "b"), {}
    machine = lab.up("raspberry-pi-4", keep=work / "disk.qcow2")
    runtime = install(machine, make(1))
    for number, years in ((2, 10), (3, -10)):
        with connect(machine.target.replace("pi@", "root@")) as there:
            now = time.time() + years * 365.25 * 86400
            assert there.run(["date", "-s", f"@{int(now)}"], timeout_s=60).code == 0
            says = there.run(["date", "-u", "+%Y-%m-%d"], timeout_s=60).stdout.decode().strip()
        install(machine, make(number), quick=number == 3)
        with (
            connect(machine.target) as there,
            Device(there, "m", root=ROOT, python=machine.python) as made,
        ):
            seen = look(there, machine.python, runtime)
            back = made.ask("rollback")["active"]
        install(machine, make(number), quick=True)
        np.testing.assert_allclose(seen["y"], make.right, rtol=1e-4)
        found[says] = {"active": seen["active"], "rolled back to": back, "left over": seen["left"]}
    lab.down(str(machine.port))
    return found


def main() -> None:
    kinds = {"power": power, "clock": clock}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--times", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps({args.kind: kinds[args.kind](Path(work), args.times)}, indent=1))


if __name__ == "__main__":
    main()
