"""Makes the profile of a device by asking it: what it says of itself, and what it can do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgekit.deploy import Transport, connect
from edgekit.deploy.phone import RUNNER_ENGINES, PhoneWorkbench
from edgekit.deploy.runtime_archive import runtime_archive
from edgekit.device import DeviceProfile
from edgekit.errors import ChildError, EdgeKitError, MissingToolError, TargetError, one_line
from edgekit.facts import Facts, probe_engine, profile_of, read_facts
from edgekit.measure.android import with_runner
from edgekit.measure.probe_models import ProbeModel, probe_models
from edgekit.measure.roofline import FULL, ProbeFailure, Run, measure_roofline, run_local, run_on
from edgekit.measure.target import facts_of, label_of
from edgekit.observer import Observer
from edgekit_runtime import __version__
from edgekit_runtime.probe import ONNX_MODEL, tflite_model

__all__ = ["probe_device", "slug"]

_SLOW_S = 300.0  # an emulated board takes minutes for what a device does in a second
_PROBE = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    "from edgekit_runtime.probe import probe; print(probe(sys.argv[2]))"
)


def probe_device(
    target: str,
    *,
    python: str | None = None,
    profile_id: str | None = None,
    measured: bool = True,
    observer: Observer | None = None,
) -> DeviceProfile:
    """The profile of `local`, `ssh://user@host:port` or `adb:SERIAL`, each engine of it tried; or
    of what `facts_script` printed on a device, in a file.

    `python` is the interpreter there that has the engines. A device without one, or on which
    nothing can be written, is read but not measured; the observer is told.

    Raises:
        TargetError: it cannot be reached, has no usable shell, or an architecture that profiles
            do not know.
    """
    observer = observer or Observer()
    if "://" not in target and Path(target).is_file():
        facts = read_facts(Path(target).read_text(errors="replace"))
        return _unmeasured(facts, target, profile_id, observer)
    here = target == "local"
    interpreter = python or (sys.executable if here else "python3")
    with connect(target) as transport:
        observer.phase(f"reading {target}")
        facts = facts_of(transport, interpreter)
        if target.startswith("adb:") and facts.python is None:
            return _with_runner(transport, facts, profile_id, observer)
        if facts.python is None:
            return _unmeasured(facts, target, profile_id, observer)
        tables = _tables(facts, target, profile_id, observer)
        if not tables["engines"]:
            observer.note(f"{target}: {interpreter} has no engine; --python names one that has")
        observer.phase("running one operator through each engine")
        with _Bench(transport, interpreter, here=here) as bench:
            tables["engines"] = _working(tables["engines"], bench, observer)
            if measured and tables["engines"]:
                observer.phase("measuring its roofline")
                _measure(tables, bench, observer)
        tables["sources"] = [one for one in tables["sources"] if _is_of(one, tables)]
        return DeviceProfile.model_validate(tables)


def _tables(
    facts: Facts, target: str, profile_id: str | None, observer: Observer
) -> dict[str, Any]:
    for fault in facts.faults:
        observer.note(f"{target}: {fault}")
    name = facts.model or facts.soc or facts.cpu or facts.arch
    return profile_of(facts, profile_id=profile_id or slug(name), name=name, kind=_kind(facts))


def _unmeasured(
    facts: Facts, target: str, profile_id: str | None, observer: Observer
) -> DeviceProfile:
    """Engines as installed: none was tried, nothing was measured, and the user is told."""
    tables = _tables(facts, target, profile_id, observer)
    observer.note(f"{target}: no engine was tried and nothing measured")
    if not tables["engines"]:
        observer.note(
            "state the engines that run there yourself, in the profile: [engines.litert], say"
            if facts.android
            else f"{target}: no engine was found; --python names an interpreter that has one"
        )
    return DeviceProfile.model_validate(tables)


def _with_runner(
    transport: Transport, facts: Facts, profile_id: str | None, observer: Observer
) -> DeviceProfile:
    """The native runner is brought, and each of its engines runs one operator; a roofline is not
    measured: the runner times whole models only."""
    tables = _tables(replace(facts, faults=()), transport.target, profile_id, observer)
    observer.phase("running one operator through the native runner")
    files = {"onnxruntime": ("probe.onnx", ONNX_MODEL), "litert": ("probe.tflite", tflite_model())}
    work: list[str] = []
    for engine in RUNNER_ENGINES:
        try:
            with PhoneWorkbench(transport, engines=[engine], observer=observer) as bench:
                _run_one(transport, bench.program, *files[engine])
            work.append(engine)
        except (TargetError, MissingToolError) as error:
            observer.note(f"{transport.target}: {engine}: {one_line(error)}")
    return DeviceProfile.model_validate(with_runner(tables, work) if work else tables)


def _run_one(transport: Transport, program: Sequence[str], name: str, model: bytes) -> None:
    """Have the native runner run a model once.

    Raises:
        TargetError: it does not.
    """
    folder = transport.scratch()
    with TemporaryDirectory() as here:
        Path(here, name).write_bytes(model)
        transport.push(Path(here, name), f"{folder}/{name}")
    line = [*program, "bench", f"{folder}/{name}", "--runs", "1"]
    done = transport.run(line, timeout_s=_SLOW_S)
    transport.run(["rm", "-rf", folder], timeout_s=_SLOW_S)
    if done.code:
        raise TargetError(done.last_words)


class _Bench:
    """EdgeKit's runtime on the target: beside this process, or copied to a scratch folder."""

    def __init__(self, transport: Transport, python: str, *, here: bool) -> None:
        self.transport, self.python, self.here = transport, python, here
        self.fault: str | None = None
        self._stack = ExitStack()
        self._folder, self._archive = "", ""
        self._there: set[str] = set()

    def __enter__(self) -> _Bench:
        self.work = Path(self._stack.enter_context(TemporaryDirectory()))
        if self.here:
            self.command = [self.python, "-P", "-m", "edgekit_runtime"]
            return self
        try:
            self._folder = self.transport.scratch()
            archive = self.work / "runtime.pyz"
            archive.write_bytes(runtime_archive())
            self._archive = f"{self._folder}/runtime.pyz"
            self.transport.push(archive, self._archive)
        except TargetError as error:
            self.fault = str(error)
        self.command = [self.python, self._archive]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._folder:
            self.transport.run(["rm", "-rf", self._folder], timeout_s=60)

    def probe(self, engine: str) -> str | None:
        """None if the engine ran one operator there, else why not."""
        if self.fault:
            return self.fault
        if self.here:
            return probe_engine(engine)
        command = [self.python, "-c", _PROBE, self._archive, engine]
        done = self.transport.run(command, timeout_s=_SLOW_S)
        return None if done.code == 0 else done.last_words

    def answer(self, *arguments: str) -> str:
        """What the runtime prints for these arguments.

        Raises:
            ChildError: it failed.
        """
        done = self.transport.run([*self.command, *arguments], timeout_s=_SLOW_S)
        if done.code != 0:
            raise ChildError(done.last_words)
        return done.stdout.decode()

    def runs(self, engines: Sequence[str]) -> AbstractContextManager[Run]:
        """How a block of a probe model is measured there."""
        if self.here:
            return run_local(engines)
        command = [*self.command, "blocks"]
        return run_on(self.transport, command, place=self._place, timeout_s=_SLOW_S)

    def _place(self, model: ProbeModel) -> str:
        """Copy a model there, once; the files of two sizes have the same names."""
        path = f"{self._folder}/{model.size}-{model.path.name}"
        if path not in self._there:
            for file in model.files:
                self.transport.push(file, f"{self._folder}/{model.size}-{file.name}")
            self._there.add(path)
        return path


def _working(engines: dict[str, Any], bench: _Bench, observer: Observer) -> dict[str, Any]:
    found = {}
    for name, facts in engines.items():
        fault = bench.probe(name)
        if fault is None:
            found[name] = facts
        else:
            observer.note(f"{name} {facts.get('version', '')} is left out: {fault}")
    return found


def _measure(tables: dict[str, Any], bench: _Bench, observer: Observer) -> None:
    threads = sorted({1, tables["defaults"]["threads"]})
    rate = None
    try:
        said = json.loads(bench.answer("bandwidth", "--threads", str(max(threads))))
        rate = float(said["bytes_per_s"])
    except (EdgeKitError, ValueError, KeyError) as error:
        observer.note(f"memory bandwidth was not measured: {one_line(error)}")

    def models(size: int) -> list[ProbeModel]:
        # A folder for each size: files of two sizes have the same names.
        return probe_models(bench.work / str(size), list(tables["engines"]), size=size)

    with bench.runs(list(tables["engines"])) as run:
        found = measure_roofline(
            models, run, threads=threads, memory_bytes_per_s=rate, effort=FULL,
            progress=lambda done, total: observer.progress("roofline", done, total),
        )  # fmt: skip
    for fault in _worth_telling(found.failures):
        observer.note(f"{fault.engine} {fault.kind} {fault.dtype}: {fault.reason}")
    if found.unconfirmed:
        observer.note(
            f"{len(found.unconfirmed)} of {len(found.roofline.compute)} figures were reached by "
            "one block only: the device is busy or shared, so its roof may be higher"
        )
    tables["roofline"] = found.roofline.model_dump(exclude_none=True)
    today, label = datetime.now(UTC).date().isoformat(), label_of(bench.transport.target)
    tables["sources"].append(
        {"fields": ["roofline"], "kind": "probe",
         "title": f"{label} on the device by EdgeKit {__version__} on {today}"}
    )  # fmt: skip


def _worth_telling(failures: Sequence[ProbeFailure]) -> Iterator[ProbeFailure]:
    """One per engine, kind and type: its operators usually fail for one reason."""
    seen = set()
    for one in failures:
        key = (one.engine, one.kind, one.dtype)
        if key not in seen:
            seen.add(key)
            yield one


def _is_of(source: dict[str, Any], tables: dict[str, Any]) -> bool:
    return source["fields"] != ["engines"] or bool(tables["engines"])


def _kind(facts: Facts) -> str:
    if facts.android:
        return "phone"
    if facts.arch == "x86_64":
        return "pc"
    return "board" if facts.model else "generic"


def slug(name: str) -> str:
    """A profile id made of a name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"
