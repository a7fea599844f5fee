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
from deploy_kills import LOOK

from edgekit.cache import file_sha256
from edgekit.deploy import Transport, connect, lab
from edgekit.deploy.install import Device, deploy
from edgekit.deploy.lab import Running
from edgekit.errors import TargetError

ROOT = "/home/pi/installed"


def install(machine: Running, bundle: Path) -> str:
    """The folder of the runtime there."""
    with (
        connect(machine.target) as there,
        Device(there, "m", root=ROOT, python=machine.python) as made,
    ):
        deploy(bundle, made, allow_older=True)
        return f"{made.folder}/{made.runtime}"


def look(there: Transport, python: str, runtime: str) -> dict[str, Any]:
    done = there.run([python, "-c", LOOK, ROOT, runtime], timeout_s=300)
    return dict(json.loads(done.stdout)) if done.code == 0 else {"fault": done.last_words}


def power(work: Path, times: int) -> dict[str, Any]:
    rng, noise = random.Random(4), np.random.default_rng(4)
    make, seen, faults, taken = maker(work / "b"), Counter[str](), [], []
    disk = work / "disk.qcow2"
    machine = lab.up("raspberry-pi-4", keep=disk)
    runtime = install(machine, make(1, extra=noise.bytes(300_000)))
    last, whole_s = make.folder / "1.edgekit", 0.0
    for number in range(2, times + 2):
        coming = make(number, extra=noise.bytes(300_000))
        if not whole_s:  # how long one takes, and what it is like to be looked at
            start = time.monotonic()
            install(machine, coming)
            last, whole_s = coming, time.monotonic() - start
            coming = make(number + 1000, extra=noise.bytes(300_000))
        at_s = rng.uniform(0.05, 1.0) * whole_s
        switch = threading.Timer(at_s, lambda one=machine: lab.down(str(one.port)))
        switch.start()
        try:
            install(machine, coming)
            seen["was through"] += 1
        except TargetError as error:
            seen["cut"] += 1
            if "\n" in str(error):
                faults.append([number, str(error)])
        switch.join()
        machine = lab.up("raspberry-pi-4", keep=disk)
        allowed = {file_sha256(last): "old is active", file_sha256(coming): "new is active"}
        with connect(machine.target) as there:
            found = look(there, machine.python, runtime)
        active = found.get("versions", {}).get(found.get("active"))
        seen[allowed.get(active, "neither is active")] += 1
        right = np.allclose(found.get("y", [[0]]), make.right, rtol=1e-4)
        if (
            active not in allowed
            or file_sha256(last) not in found["versions"].values()
            or not right
        ):
            faults.append([number, round(at_s, 1), found])
        start = time.monotonic()
        try:
            install(machine, coming)
            taken.append(round(time.monotonic() - start, 1))
            last = coming
        except TargetError as error:
            faults.append([number, "the next deploy", str(error)])
    lab.down(str(machine.port))
    return {"times": times, "a_deploy_s": round(whole_s, 1), **seen, "next_deploy_s": taken,
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
        install(machine, make(number))
        with (
            connect(machine.target) as there,
            Device(there, "m", root=ROOT, python=machine.python) as made,
        ):
            seen = look(there, machine.python, runtime)
            back = made.ask("rollback")["active"]
            install_again = make(number)
            deploy(install_again, made)
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
