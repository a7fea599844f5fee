"""What a deploy costs beyond plain sftp of the same bytes, and what it sends the second time.

python benchmarks/deploy_transfer.py BUNDLE TARGET PYTHON [--rounds N]
python benchmarks/deploy_transfer.py BUNDLE sshd PYTHON        # OpenSSH's, on loopback, in here

Rounds in turn, each on connections of its own: OpenSSH's `sftp` copies the file; `push` is all of a
deploy but the trial (check here, start there, cut, send, hash there, sync there), `unhashed` the
same with the device's hash left out. Ratios are medians of those of the rounds.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from openssh import Server

from edgekit.deploy import connect, install
from edgekit.deploy.lab import keys_for

#: the first word of what `installer` answers is unchanged: only chunks are taken unhashed
TRUSTING = (b"if sha256_of(data).hexdigest() != sha:\n            raise Refused(\"a chunk was",
            b"if False:\n            raise Refused(\"a chunk was")  # fmt: skip


def sftp(target: str, key: str, known: str, source: Path, there: str) -> float:
    place = urlsplit(target)
    with tempfile.NamedTemporaryFile("w") as hosts:
        hosts.write(known)
        hosts.flush()
        start = time.monotonic()
        subprocess.run(
            ["sftp", "-q", "-b", "-", "-P", str(place.port), "-i", key, "-o",
             f"UserKnownHostsFile={hosts.name}", f"{place.username}@{place.hostname}"],
            input=f"put {shlex.quote(str(source))} {there}\n", text=True, check=True,
            capture_output=True,
        )  # fmt: skip
        return time.monotonic() - start


def push(target: str, python: str, bundle: Path, name: str, *, hashed: bool) -> dict[str, float]:
    """Seconds since the beginning, by step."""
    steps, start = {}, time.monotonic()

    def step(what: str) -> None:
        steps[what] = round(time.monotonic() - start, 3)

    with ThreadPoolExecutor(1) as beside:
        ready = beside.submit(install.checked, bundle)
        with connect(target) as there:
            step("connected")
            device = install.Device(there, name, python=python)
            if not hashed:
                source = device._files["edgekit_runtime/installer.py"]
                assert TRUSTING[0] in source
                device._files["edgekit_runtime/installer.py"] = source.replace(*TRUSTING)
            with device:
                step("started")
                one = ready.result()
                state = device.ask(
                    "begin", file=f"1-{'0' * 32}.edgekit", sha256=one.sha256, size=one.size_bytes
                )
                step("begun")
                assert install.send(one, device, fresh=state["fresh"]) == one.size_bytes
                step("sent")
        step("all")
    return steps


@contextlib.contextmanager
def server(target: str) -> Iterator[tuple[str, str, str]]:
    """(target, key, known hosts)."""
    if target != "sshd":
        place = urlsplit(target)
        keys = keys_for(place.hostname, place.port or 22)
        assert keys is not None, "a board of the lab, or sshd"
        yield target, str(keys.key), keys.known_hosts
        return
    with tempfile.TemporaryDirectory() as home, Server(Path(home)) as made, made.as_home():
        yield made.target, str(made.key), made.known_hosts.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("target")
    parser.add_argument("python")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    plain, full, bare = [], [], []
    with server(args.target) as (target, key, known), connect(target) as side:
        for number in range(args.rounds):
            plain.append(sftp(target, key, known, args.bundle, "/tmp/transfer.bin"))
            for kept, hashed in ((full, True), (bare, False)):
                name = f"transfer{number}{int(hashed)}"
                kept.append(push(target, args.python, args.bundle, name, hashed=hashed))
                shell = f"rm -rf ~/.local/share/edgekit/{name} /tmp/transfer.bin"
                side.run(["sh", "-c", shell], timeout_s=60)
    ratios = {
        name: round(statistics.median(o["all"] / s for o, s in zip(kept, plain, strict=True)), 2)
        for name, kept in (("push", full), ("unhashed", bare))
    }
    print(json.dumps({
        "size_bytes": args.bundle.stat().st_size, "ratio": ratios,
        "sftp_s": [round(s, 2) for s in plain], "push": full, "unhashed": bare,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
