"""A day of the example service: it answers while versions are activated and taken back."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from deployable import Maker

from edgekit.deploy import Conversation, Transport
from edgekit.deploy.install import Device, deploy

SERVE = Path(__file__).parents[1] / "examples" / "service" / "serve.py"
#: asks all the time; says on demand how many answers came, of which kinds in which order
CLIENT = """import json, socket, sys, threading, time
counts = {"answers": 0, "failed": 0, "slowest_s": 0.0, "kinds": []}
def ask():
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.settimeout(60)
                one.connect(sys.argv[1])
                stream = one.makefile("rwb")
                while True:
                    start = time.monotonic()
                    stream.write(b'{"x": [[1, 1, 1, 1]]}\\n')
                    stream.flush()
                    answer = [round(v, 4) for v in json.loads(stream.readline())["y"][0]]
                    taken = time.monotonic() - start
                    counts["slowest_s"] = max(counts["slowest_s"], taken)
                    counts["answers"] += 1
                    if counts["kinds"][-1:] != [answer]:
                        counts["kinds"].append(answer)
                    time.sleep(0.002)
        except Exception as error:
            counts["failed"] += 1
            counts["why"] = repr(error)
            time.sleep(0.1)
threading.Thread(target=ask, daemon=True).start()
for _ in sys.stdin:
    print(json.dumps(counts), flush=True)
"""


class Story:
    """The service on a target, with a client that never stops asking.

    `first` and `second` make bundles of models that answer differently.
    """

    def __init__(self, transport: Transport, python: str, root: str, name: str) -> None:
        self.transport, self.python, self.name = transport, python, name
        self.root, self.folder = root, transport.scratch()
        self.socket = f"{self.folder}/socket"

    def device(self) -> Device:
        return Device(self.transport, self.name, root=self.root, python=self.python)

    def install(self, bundle: Path, **options: Any) -> None:
        with self.device() as device:
            deploy(bundle, device, **options)
            self.runtime = f"{device.folder}/{device.runtime}"
            self.active = f"{device.facts['root']}/{self.name}/versions/"
            self.active += device.ask("status")["active"]

    def start(self) -> None:
        self.transport.push(SERVE, f"{self.folder}/serve.py")
        environment = ["env", f"PYTHONPATH={self.runtime}", f"EDGEKIT_ROOT={self.root}"]
        program = [self.python, "-u", f"{self.folder}/serve.py", self.name, self.socket]
        self.service = self.transport.converse([*environment, *program])
        wait = ["sh", "-c", f"while ! test -S {self.socket}; do sleep 0.1; done"]
        self.transport.run(wait, timeout_s=120)
        self.client = self.transport.converse([self.python, "-c", CLIENT, self.socket])

    def counts(self) -> dict[str, Any]:
        return dict(json.loads(self.client.ask("counts", timeout_s=120)))

    def until_kinds(self, count: int) -> dict[str, Any]:
        """Until that many changes of the answers were seen."""
        late = time.monotonic() + 120
        while len((found := self.counts())["kinds"]) < count:
            assert time.monotonic() < late, found
            time.sleep(0.3)
        return found

    def runtime_verb(self, *words: str) -> dict[str, Any]:
        verb, *rest = words
        line = [self.python, self.runtime, verb, self.active, *rest, "--json"]
        done = self.transport.run(line, timeout_s=300)
        assert done.code == 0, done.last_words
        return dict(json.loads(done.stdout))

    def tell(self, first: Maker, second: Maker) -> dict[str, Any]:
        """deploy, check, bench, deploy the next, roll back; returns the client's counts."""
        self.install(first(1))
        self.start()
        self.until_kinds(1)
        assert self.runtime_verb("check")["ok"]
        assert self.runtime_verb("bench", "--runs", "5")["latency_ns"]["samples"] == 5
        self.install(second(2))
        self.until_kinds(2)
        with self.device() as device:
            device.ask("rollback")
        found = self.until_kinds(3)
        talks: tuple[Conversation, ...] = (self.client, self.service)
        for talk in talks:
            talk.close()
        one, two = (np.round(maker.right[0], 4).tolist() for maker in (first, second))
        np.testing.assert_allclose(found["kinds"], [one, two, one], atol=2e-4)
        assert one != two and found["failed"] == 0, found
        return found
