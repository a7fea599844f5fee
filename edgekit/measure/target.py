"""A TARGET of the command line as a place to measure in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from edgekit.deploy import connect, lab
from edgekit.deploy.phone import RUNNER_ENGINES, PhoneWorkbench
from edgekit.deploy.provision import bring_packages, missing_packages
from edgekit.deploy.runner import Runner
from edgekit.deploy.transport import Transport
from edgekit.deploy.workbench import Workbench
from edgekit.device import DeviceProfile
from edgekit.errors import TargetError, UsageError
from edgekit.facts import Facts, facts_script, profile_of, read_facts
from edgekit.measure.android import android_state, with_runner
from edgekit.measure.conditions import Moment
from edgekit.measure.site import HERE, Site, There
from edgekit.observer import Observer
from edgekit_runtime.engines import ENGINES

__all__ = [
    "EMULATED", "INSTRUCTIONS", "PhoneSite", "Target", "TargetSite", "board_profile", "facts_of",
    "label_of", "open_site",
]  # fmt: skip

_SLOW_S = 300.0  # an emulated board takes minutes for what a device does in a second
#: labels of latencies that are not those of hardware
INSTRUCTIONS, EMULATED = "simulated (instructions)", "simulated (emulator)"


@dataclass(frozen=True)
class Target:
    """What to reach, and how: `python` is the interpreter there, `root` the folder of what EdgeKit
    keeps there, `provision` whether numpy and engines may be brought."""

    name: str = "local"
    python: str | None = None
    root: str | None = None
    provision: bool = False
    accept_new_host_key: bool = False


def facts_of(transport: Transport, python: str) -> Facts:
    """What the target says of itself, and what the interpreter there has.

    Raises:
        TargetError: it has no usable shell.
    """
    quoted = "'" + python.replace("'", "'\\''") + "'"
    script = f"PYTHON={quoted}\n{facts_script()}"
    done = transport.run(["sh", "-s"], stdin=script.encode(), timeout_s=_SLOW_S)
    if done.code == 127 and not done.stdout:
        raise TargetError(f"{transport.target}: no POSIX shell there: {done.last_words}")
    return read_facts(done.stdout.decode(errors="replace"))


def label_of(target: str) -> str:
    """`measured`, unless it is a board of the lab."""
    if any(one.target == target for one in lab.running()):
        one = next(one for one in lab.running() if one.target == target)
        return INSTRUCTIONS if one.virtual_time else EMULATED
    with suppress(ValueError):
        place = urlsplit(target)
        for one in lab.running():
            if place.hostname == "127.0.0.1" and place.port == one.port:
                return INSTRUCTIONS if one.virtual_time else EMULATED
    return "measured"


class TargetSite(There):
    """A target with Python. `need` before anything is measured there."""

    def __init__(self, target: Target, facts: Facts, profile: DeviceProfile) -> None:
        scheme = target.name.partition("://")[0]
        super().__init__(self._open, profile, target=scheme, label=label_of(target.name))
        self._where, self._facts = target, facts
        self._observer = Observer()

    @property
    def packages(self) -> dict[str, str]:
        """Numpy and the engines there: distribution -> version."""
        return self._facts.packages

    def fault_of(self, engine: str) -> str | None:
        lacking = [] if self._where.provision else missing_packages([engine], self.packages)
        return f"the device has no {' and no '.join(lacking)}" if lacking else None

    def need(self, engines: Sequence[str], observer: Observer) -> None:
        """Have numpy and these engines there.

        Raises:
            TargetError: they are not, and must not be brought, or cannot be.
        """
        self._observer = observer
        missing = missing_packages(engines, self.packages)
        if not missing:
            return
        if not self._where.provision:
            python = self._where.python or "python3"
            raise TargetError(
                f"{self._where.name}: {python} has no {' and no '.join(missing)}; name an "
                "interpreter that has with --python, or bring them with --provision"
            )
        with self.session():
            bench = self.runner
            assert isinstance(bench, Workbench)  # noqa: S101  (this class opens no other)
            self.packages_folder = bring_packages(bench, engines, self._facts, observer)
            bench.packages = self.packages_folder

    @contextmanager
    def _open(self) -> Iterator[Runner]:
        where = self._where
        with (
            connect(where.name, accept_new_host_key=where.accept_new_host_key) as transport,
            Workbench(
                transport, root=where.root, python=where.python, observer=self._observer
            ) as bench,
        ):
            bench.packages = self.packages_folder
            yield bench


class PhoneSite(There):
    """A device without Python: the native runner and its engines are brought."""

    def __init__(self, target: Target, profile: DeviceProfile) -> None:
        super().__init__(self._open, profile, target="adb", label=label_of(target.name))
        self._where, self._observer = target, Observer()
        self._engines: set[str] = set()

    @property
    def packages(self) -> dict[str, str]:
        """The engines of the runner: distribution -> version."""
        return {name: str(facts.version) for name, facts in self.profile.engines.items()}

    def fault_of(self, engine: str) -> str | None:
        return None if engine in RUNNER_ENGINES else f"the native runner has no {engine}"

    def need(self, engines: Sequence[str], observer: Observer) -> None:
        """Have the runner there, with these engines.

        Raises:
            TargetError: it has others.
        """
        self._observer = observer
        for engine in engines:
            if fault := self.fault_of(engine):
                raise TargetError(
                    f"{self._where.name}: {fault}, only {' and '.join(RUNNER_ENGINES)}: give it a "
                    f"model or variant for one of them (--engine {RUNNER_ENGINES[0]})"
                )
        self._engines |= set(engines)

    def conditions(self) -> dict[str, Any]:
        return super().conditions() | android_state(self._say)

    def moment(self, *, watch_s: float = 0.0) -> Moment:
        found = super().moment(watch_s=watch_s)
        said = android_state(self._say)
        slowed = [] if not said["thermal_status"] else [f"thermal status {said['thermal_status']}"]
        return replace(
            found, battery=found.battery or said["battery"], throttled=[*found.throttled, *slowed]
        )

    def _say(self, service: str) -> str:
        bench = self.runner
        assert isinstance(bench, PhoneWorkbench)  # noqa: S101  (this class opens no other)
        return bench.call(["dumpsys", service], timeout_s=60.0).out

    @contextmanager
    def _open(self) -> Iterator[Runner]:
        with (
            connect(self._where.name) as transport,
            PhoneWorkbench(
                transport,
                root=self._where.root,
                engines=sorted(self._engines),
                observer=self._observer,
            ) as bench,
        ):
            yield bench


def open_site(target: Target, observer: Observer) -> Site:
    """This machine for `local`; else a target, of which the facts were read.

    Raises:
        TargetError: it cannot be reached, or has no Python.
    """
    if target.name == "local":
        return HERE
    observer.phase(f"reading {target.name}")
    python = target.python or "python3"
    with connect(target.name, accept_new_host_key=target.accept_new_host_key) as transport:
        facts = facts_of(transport, python)
    if target.name.startswith("adb:"):
        return _phone_site(target, facts)
    if facts.python is None:
        why = "; ".join(facts.faults) or "no Python"
        raise TargetError(
            f"{target.name}: {python}: {why}; install Python 3.9 or newer, or name one with "
            "--python"
        )
    return TargetSite(target, facts, board_profile(facts, provision=target.provision))


def board_profile(facts: Facts, *, provision: bool = False) -> DeviceProfile:
    """What a board says of itself. `provision`: engines that it lacks can be brought."""
    name = facts.model or facts.soc or facts.cpu or facts.arch
    tables = profile_of(facts, profile_id="target", name=name, kind="board")
    lacking = [engine for engine in ENGINES if engine not in tables["engines"]]
    if provision and lacking:
        tables["engines"] |= {engine: {} for engine in lacking}
        source = {"kind": "choice", "title": "EdgeKit", "says": "--provision brings it"}
        tables["sources"].append({"fields": [f"engines.{name}" for name in lacking], **source})
    return DeviceProfile.model_validate(tables)


def _phone_site(target: Target, facts: Facts) -> PhoneSite:
    if target.python is not None or target.provision:
        raise UsageError(
            "--python and --provision are for targets with Python; adb targets get the native "
            "runner"
        )
    name = facts.model or facts.soc or facts.cpu or facts.arch
    tables = profile_of(facts, profile_id="target", name=name, kind="phone")
    return PhoneSite(target, DeviceProfile.model_validate(with_runner(tables)))
