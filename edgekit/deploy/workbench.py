"""The runtime on a device that has Python, beside what is installed there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edgekit.cache import file_sha256
from edgekit.deploy.install import Device, Hashed, send
from edgekit.deploy.runner import Done, Runner, Talk, checked
from edgekit.deploy.transport import Transport
from edgekit.errors import ChildError, EdgeKitError, TargetError
from edgekit.observer import Observer

__all__ = ["PLACE", "Workbench"]

#: under the root, beside the installed bundles: files that were measured, for the next time
PLACE = "_measured"
_SLOW_S = 300.0  # an emulated board takes minutes for what a device does in a second
#: the clock starts before anything is imported
_COLD = (
    "import time; started_ns = time.perf_counter_ns();"
    "import sys; sys.path.insert(0, sys.argv.pop(1));"
    "from edgekit_runtime.__main__ import main; sys.exit(main(started_ns=started_ns))"
)


class Workbench(Device, Runner):
    """`edgekit_runtime.workbench` on a target. `packages` is a folder there with numpy and engines
    that the interpreter does not have.

    Raises:
        TargetError: as `Device`; or another measures there, who is named.
    """

    modules = ("place", "installer", "workbench")

    def __init__(
        self, transport: Transport, *, root: str | None = None, python: str | None = None,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(transport, PLACE, root=root, python=python)
        self.target = transport.target
        self.sent_bytes = 0
        self._owed = 0  # answers: Ctrl-C leaves some that nobody waits for any more
        self._observer = observer or Observer()

    def __enter__(self) -> Workbench:
        super().__enter__()
        try:
            self.bring()
        except BaseException:
            self._talk.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(EdgeKitError):  # it cleans up, which a process that is killed could not
            self.ask("bye", timeout_s=20)
        super().__exit__(kind, error, trace)

    def ask(self, do: str, *, timeout_s: float = _SLOW_S, **facts: Any) -> dict[str, Any]:
        while self._owed:
            with suppress(EdgeKitError):
                self.hear(timeout_s=timeout_s)
        return super().ask(do, timeout_s=timeout_s, **facts)

    def tell(self, do: str, data: bytes = b"", **facts: Any) -> None:
        self._owed += 1
        super().tell(do, data, **facts)

    def hear(self, *, timeout_s: float = _SLOW_S) -> dict[str, Any]:
        try:
            found = super().hear(timeout_s=timeout_s)
        except EdgeKitError:
            self._owed -= 1
            raise
        self._owed -= 1
        return found

    def read(self, patterns: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = self.ask("read", patterns=list(patterns))["files"]
        return found

    def put(self, folders: Mapping[str, Mapping[str, Path]]) -> dict[str, str]:
        files = [file for named in folders.values() for file in named.values()]
        hashes = {file: file_sha256(file) for file in files}
        kept = {sha256: f"0-{sha256[:32]}.edgekit" for sha256 in hashes.values()}
        asked = self.ask("there", files=[[name, sha256] for sha256, name in kept.items()])
        here = dict(zip(kept, asked["there"], strict=True))
        for file, sha256 in hashes.items():
            if not here[sha256]:
                self._send(file, sha256, kept[sha256])
                here[sha256] = True
        self.ask(
            "lay",
            files=[
                [kept[hashes[file]], folder, name]
                for folder, named in folders.items() for name, file in named.items()
            ],
        )  # fmt: skip
        return {folder: f"{asked['scratch']}/{folder}" for folder in folders}

    def _send(self, file: Path, sha256: str, name: str) -> None:
        size = file.stat().st_size
        if not size:
            raise TargetError(f"{file} is empty")
        state = self.ask("begin", file=name, sha256=sha256, size=size)
        if state["state"] == "wanted":
            whole = Hashed(file, sha256, size)
            self.sent_bytes += send(whole, self, fresh=state["fresh"], observer=self._observer)
            self.ask("keep", file=name, sha256=sha256)

    def run(self, verb: Sequence[str], *, timeout_s: float = _SLOW_S, cold: bool = False) -> Done:
        line = self.command(verb)
        if cold:
            line[1:1] = ["-c", _COLD]
        return self.call(line, timeout_s=timeout_s)

    def call(self, command: Sequence[str], *, timeout_s: float = _SLOW_S) -> Done:
        """Run any command there to its end, with the packages that were brought.

        Raises:
            ChildError: it did not end in time.
        """
        self.tell(
            "call", command=list(command), environment=self.environment(), timeout_s=timeout_s
        )
        found = self.hear(timeout_s=timeout_s + 30)
        if found["code"] is None:
            raise ChildError(f"{self.target}: {command[-1]} did not end within {timeout_s:.0f} s")
        return Done(found["code"], found["out"], found["words"], found["wall_ns"])

    def talk(
        self, verb: Sequence[str], *, timeout_s: float = _SLOW_S, cpus: Sequence[int] | None = None
    ) -> Talk:
        return _Process(self, verb, timeout_s, cpus)

    def command(self, verb: Sequence[str]) -> list[str]:
        """What runs a verb there."""
        return [self.python, f"{self.folder}/{self.runtime}", *verb]

    def environment(self) -> dict[str, str]:
        """What is to be added to its environment."""
        return {"PYTHONPATH": self.packages} if self.packages else {}


class _Process(Talk):
    def __init__(
        self, bench: Workbench, verb: Sequence[str], timeout_s: float, cpus: Sequence[int] | None
    ) -> None:
        self._bench, self._id, self._what = bench, uuid.uuid4().hex[:12], " ".join(verb[:2])
        self.hello = self._exchange(
            "start", timeout_s, command=bench.command(verb), environment=bench.environment(),
            cpus=list(cpus) if cpus else None,
        )  # fmt: skip

    def ask(self, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        return self._exchange("ask", timeout_s, line=json.dumps(request))

    def _exchange(self, do: str, timeout_s: float, **facts: Any) -> dict[str, Any]:
        self._bench.tell(do, id=self._id, timeout_s=timeout_s, **facts)
        found = self._bench.hear(timeout_s=timeout_s + 30)
        if found.get("late"):
            raise ChildError(f"{self._what}: no answer within {timeout_s:.0f} s")
        if "line" not in found:
            said = f" ({found['words']})" if found["words"] else ""
            raise ChildError(f"{self._what}: the engine's process ended, {found['ended']}{said}")
        return checked(json.loads(found["line"]), self._what)

    def close(self) -> None:
        with suppress(EdgeKitError):
            self._bench.ask("stop", id=self._id, timeout_s=20)
