"""Where models are measured: on this machine, or on a target, with the same figures of both."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.deploy.runner import Done, Runner, Talk
from edgekit.device import DeviceProfile
from edgekit.errors import TargetError
from edgekit.facts import this_machine
from edgekit.measure.conditions import Moment, Read, conditions, conditions_there, moment
from edgekit.measure.worker import Contender, Worker, command, fastest, processors
from edgekit.observer import Observer
from edgekit.sandbox import child_environment
from edgekit_runtime.source import COMPANIONS

__all__ = ["HERE", "Site", "There"]

_SLOW_S = 300.0  # an emulated board takes minutes for what a device does in a second


class Site(ABC):
    """A place to measure in. `label` is that of its latencies; `target` the kind of place."""

    label = "measured"
    target = "local"
    name = "this machine"

    #: what was brought there for the interpreter, if anything
    packages_folder = ""

    @property
    def simulated(self) -> bool:
        """Whether time there is not that of hardware."""
        return self.label != "measured"

    @property
    @abstractmethod
    def profile(self) -> DeviceProfile:
        """What the machine says of itself."""

    @abstractmethod
    def need(self, engines: Sequence[str], observer: Observer) -> None:
        """Have these engines there, before anything is measured.

        Raises:
            TargetError: they are not, and must not be brought, or cannot be.
        """

    def fault_of(self, engine: str) -> str | None:
        """None if the engine can be used there, else why not."""
        return None

    @abstractmethod
    def session(self) -> AbstractContextManager[None]:
        """Measuring takes place inside of one."""

    @abstractmethod
    def bring(self, contenders: Sequence[Contender], inputs: Path | None) -> None:
        """Have all their files there at once; `worker` and `cold_start` do so one by one."""

    @abstractmethod
    def worker(
        self, contender: Contender, inputs: Path | None, *, cpus: Sequence[int] | None = None,
        intent: str = "latency",
    ) -> Worker:  # fmt: skip
        """A process that measures one contender, as a context."""

    @abstractmethod
    def cold_start(self, contender: Contender) -> dict[str, Any]:
        """Import, load and first run in a fresh process: nanoseconds, and the memory after each
        (`edgekit_runtime.machine.memory_bytes`).

        Raises:
            EdgeKitError: the model does not load.
        """

    @abstractmethod
    def call(
        self, verb: str, contender: Contender, inputs: Sequence[tuple[str, Path]] = (),
        options: Sequence[str] = (),
    ) -> Done:  # fmt: skip
        """A verb of the runtime (`run`, `check`) in a process of its own: what it says in JSON.
        `inputs` are files by input (the name may be empty), `options` further ones of the verb."""

    @abstractmethod
    def processors(self, threads: int) -> list[int] | None:
        """Those that contenders of so many threads share (see `worker.processors`)."""

    @abstractmethod
    def conditions(self) -> dict[str, Any]:
        """What is known of it now."""

    @property
    def read(self) -> Read | None:
        """How its files are read; None for this machine."""
        return None

    def moment(self, *, watch_s: float = 0.0) -> Moment:
        """It now."""
        return moment(watch_s=watch_s, read=self.read)


class _Here(Site):
    @property
    def profile(self) -> DeviceProfile:
        return this_machine()

    def need(self, engines: Sequence[str], observer: Observer) -> None:
        pass  # what is not here is said by the one that needs it

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def bring(self, contenders: Sequence[Contender], inputs: Path | None) -> None:
        pass

    def worker(
        self, contender: Contender, inputs: Path | None, *, cpus: Sequence[int] | None = None,
        intent: str = "latency",
    ) -> Worker:  # fmt: skip
        return Worker(contender, inputs, cpus=cpus, intent=intent)

    def cold_start(self, contender: Contender) -> dict[str, Any]:
        start = time.perf_counter_ns()
        verb = command("bench", contender)[len(contender.launched) :]
        done = subprocess.run(
            [sys.executable, "-P", "-c", _COLD, *verb, "--cold"],
            capture_output=True, env=child_environment(), timeout=600, check=False,
        )  # fmt: skip
        return _phases(_done(done, start), contender)

    def call(
        self, verb: str, contender: Contender, inputs: Sequence[tuple[str, Path]] = (),
        options: Sequence[str] = (),
    ) -> Done:  # fmt: skip
        start = time.perf_counter_ns()
        done = subprocess.run(
            [*command(verb, contender), *_given(inputs), "--json", *options],
            capture_output=True, env=child_environment(), timeout=600, check=False,
        )  # fmt: skip
        return _done(done, start)

    def processors(self, threads: int) -> list[int] | None:
        return processors(threads)

    def conditions(self) -> dict[str, Any]:
        return conditions()


#: the clock starts before anything is imported
_COLD = (
    "import time; started_ns = time.perf_counter_ns(); import sys;"
    "from edgekit_runtime.__main__ import main; sys.exit(main(started_ns=started_ns))"
)

HERE: Site = _Here()


class There(Site):
    """A target. `opened` starts a session with its runtime, `profile` is what was read of it."""

    def __init__(
        self, opened: Callable[[], AbstractContextManager[Runner]], profile: DeviceProfile, *,
        target: str, label: str = "measured",
    ) -> None:  # fmt: skip
        self._opened, self._profile = opened, profile
        self.target, self.label, self.name = target, label, profile.name
        self._runner: Runner | None = None
        self._places: dict[Path, str] = {}

    @property
    def profile(self) -> DeviceProfile:
        return self._profile

    def need(self, engines: Sequence[str], observer: Observer) -> None:
        pass  # as here

    @property
    def runner(self) -> Runner:
        """The runtime there, in a session."""
        if self._runner is None:
            raise TargetError(f"{self.name}: no session with it is open")
        return self._runner

    @contextmanager
    def session(self) -> Iterator[None]:
        if self._runner is not None:
            yield
            return
        try:
            with self._opened() as self._runner:
                yield
        finally:
            self._runner, self._places = None, {}

    def bring(self, contenders: Sequence[Contender], inputs: Path | None) -> None:
        wanted = dict.fromkeys([*(one.path for one in contenders), *([inputs] if inputs else [])])
        new = [path for path in wanted if path not in self._places]
        if not new:
            return
        named = {f"{len(self._places) + n}": _files(path) for n, path in enumerate(new)}
        placed = self.runner.put(named)
        for (folder, files), path in zip(named.items(), new, strict=True):
            self._places[path] = f"{placed[folder]}/{next(iter(files))}"

    def worker(
        self, contender: Contender, inputs: Path | None, *, cpus: Sequence[int] | None = None,
        intent: str = "latency",
    ) -> Worker:  # fmt: skip
        self.bring([contender], inputs)
        there = Path(self._places[inputs]) if inputs else None
        return _WorkerThere(self.runner, self._moved(contender), there, cpus=cpus, intent=intent)

    def cold_start(self, contender: Contender) -> dict[str, Any]:
        self.bring([contender], None)
        verb = self._verb("bench", contender)
        done = self.runner.run([*verb, "--cold"], timeout_s=_SLOW_S, cold=True)
        return _phases(done, contender)

    def call(
        self, verb: str, contender: Contender, inputs: Sequence[tuple[str, Path]] = (),
        options: Sequence[str] = (),
    ) -> Done:  # fmt: skip
        self.bring([contender], None)
        for _, path in inputs:
            self.bring([], path)
        given = _given([(name, Path(self._places[path])) for name, path in inputs])
        line = [*self._verb(verb, contender), "--json", *given, *options]
        return self.runner.run(line, timeout_s=_SLOW_S)

    def _verb(self, name: str, contender: Contender) -> list[str]:
        moved = self._moved(contender)
        return command(name, moved)[len(moved.launched) :]

    def processors(self, threads: int) -> list[int] | None:
        folder = "/sys/devices/system/cpu"
        files = self.runner.read(
            [f"{folder}/online", f"{folder}/cpu[0-9]*/cpu_capacity",
             f"{folder}/cpu[0-9]*/cpufreq/cpuinfo_max_freq"]
        )  # fmt: skip
        return fastest(_capacities(files), threads)

    def conditions(self) -> dict[str, Any]:
        return conditions_there(self._profile, self.runner.read, target=self.target)

    @property
    def read(self) -> Read | None:
        return self.runner.read

    def _moved(self, contender: Contender) -> Contender:
        return replace(contender, path=Path(self._places[contender.path]))


class _WorkerThere(Worker):
    """A worker whose process is on the target."""

    def __init__(
        self, runner: Runner, contender: Contender, inputs: Path | None, *,
        cpus: Sequence[int] | None, intent: str,
    ) -> None:  # fmt: skip
        super().__init__(contender, inputs, timeout_s=_SLOW_S, cpus=cpus, intent=intent)
        self._runner = runner

    def __enter__(self) -> Worker:
        verb = self._command[len(self._contender.launched) :]
        self._talk: Talk = self._runner.talk(verb, timeout_s=self._timeout_s, cpus=self._cpus)
        self._begin(self._talk.hello)
        return self

    def __exit__(self, *_: object) -> None:
        self._talk.close()

    def _exchange(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        return self._talk.ask(request, timeout_s=timeout_s)


def _given(inputs: Sequence[tuple[str, Path]]) -> Iterator[str]:
    for name, path in inputs:
        yield from ("--input", f"{name}={path}" if name else str(path))


def _done(done: subprocess.CompletedProcess[bytes], start_ns: int) -> Done:
    out, words = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    last = [line for line in words.splitlines() if line.strip()][-1:]
    return Done(done.returncode, out, "".join(last), time.perf_counter_ns() - start_ns)


def _phases(done: Done, contender: Contender) -> dict[str, Any]:
    phases = done.document(contender.id)
    phases.pop("schema", None)
    return {**phases, "process_ns": done.wall_ns}


def _files(path: Path) -> dict[str, Path]:
    """Its files by the name they get there: letters that every system takes, and what belongs
    to a model beside it; the model first."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)[:40].lstrip("-") or "model"
    found = {f"{stem}{path.suffix}": path}
    for suffix in COMPANIONS.get(path.suffix, ()):
        if path.with_suffix(suffix).is_file():
            found[f"{stem}{suffix}"] = path.with_suffix(suffix)
    return found


def _capacities(files: Mapping[str, str]) -> dict[int, int]:
    """How fast each processor that is on is beside the others, as Linux says; else 0."""
    online = files.get("/sys/devices/system/cpu/online", "").strip()
    found = {}
    for part in filter(None, online.split(",")):
        first, _, last = part.partition("-")
        found.update(dict.fromkeys(range(int(first), int(last or first) + 1), 0))
    for number in found:
        for ending in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
            text = files.get(f"/sys/devices/system/cpu/cpu{number}/{ending}", "").strip()
            if text.isdigit():
                found[number] = int(text)
                break
    return found
