"""A TARGET of the command line as a place to measure in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgekit.deploy import connect, lab
from edgekit.deploy.provision import bring_packages, missing_packages
from edgekit.deploy.runner import Runner
from edgekit.deploy.transport import Transport
from edgekit.deploy.workbench import Workbench
from edgekit.device import DeviceProfile
from edgekit.errors import TargetError
from edgekit.facts import Facts, facts_script, profile_of, read_facts
from edgekit.measure.site import HERE, Site, There
from edgekit.observer import Observer

__all__ = [
    "EMULATED", "INSTRUCTIONS", "Target", "TargetSite", "facts_of", "label_of", "open_site",
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
    if facts.python is None:
        why = "; ".join(facts.faults) or "no Python"
        raise TargetError(
            f"{target.name}: {python}: {why}; install Python 3.9 or newer, or name one with "
            "--python"
        )
    name = facts.model or facts.soc or facts.cpu or facts.arch
    profile = DeviceProfile.model_validate(
        profile_of(facts, profile_id="target", name=name, kind="board")
    )
    return TargetSite(target, facts, profile)
