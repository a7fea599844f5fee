"""`edgekit deploy`, `status`, `rollback` and `gc`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from edgekit.cli.console import TerminalObserver, print_json, seconds, size, stdout
from edgekit.deploy import connect
from edgekit.deploy.install import Device, checked
from edgekit.deploy.install import deploy as install
from edgekit.deploy.phone import device_on
from edgekit.errors import UsageError
from edgekit.measure.target import Target, open_site

__all__ = ["deploy", "gc", "rollback", "status"]

Flag = Annotated[bool, Parameter(negative="")]


def deploy(
    bundle: Path,
    /,
    *,
    to: str,
    as_: Annotated[str | None, Parameter(name="--as")] = None,
    python: str | None = None,
    root: str | None = None,
    max_latency: str | None = None,
    allow_older: Flag = False,
    any_profile: Flag = False,
    provision: Flag = False,
    accept_new_host_key: Flag = False,
    json: Flag = False,
) -> None:
    """Install a bundle on a device, prove there that it works, and activate it in one step.

    Only what the device lacks is sent. The bundle is tried there in a process of its own: golden
    outputs, placement, latency and memory; if it fails, what was active stays so. A program there
    opens it with edgekit_runtime.open_installed(NAME).

    Parameters
    ----------
    bundle
        A bundle (.edgekit).
    to
        local, ssh://user@host:port or adb:SERIAL.
    as_
        The name to install it under; the bundle's own otherwise.
    python
        The interpreter on the device that has numpy and an engine; python3 otherwise.
    root
        The folder of installed bundles on the device; EDGEKIT_ROOT there, or
        ~/.local/share/edgekit otherwise.
    max_latency
        The most its median latency may be there: 20ms.
    allow_older
        Also a bundle of a lower sequence than the active one.
    any_profile
        Also a bundle that was made for another device.
    provision
        Bring numpy and the bundle's engines to a device that has none: wheels are resolved here.
    accept_new_host_key
        Add the key of a host that is not known yet to known_hosts.
    json
        One JSON object on stdout (schema edgekit.deploy/1).
    """
    if not bundle.is_file():
        raise UsageError(f"no file {bundle}; wanted a bundle (.edgekit)")
    name = as_ or _name_in(bundle)
    limit = _nanoseconds(max_latency)
    with (
        TerminalObserver() as observer,
        ThreadPoolExecutor(1) as beside,  # hashes while the device is connected
    ):
        ready = beside.submit(checked, bundle)
        packages = ""
        if provision:
            target = Target(to, python, root, provision, accept_new_host_key)
            packages = _provisioned(bundle, target, observer)
        with _device(to, name, python, root, accept=accept_new_host_key) as device:
            device.packages = packages
            done = install(
                ready.result(), device, allow_older=allow_older, any_profile=any_profile,
                max_latency_ns=limit, observer=observer,
            )  # fmt: skip
    if json:
        print_json({"schema": "edgekit.deploy/1", "target": to, **vars(done)})
        return
    if done.state == "active":
        stdout.print(f"{name}: {done.file} is active on {to} already", soft_wrap=True)
        return
    stdout.print(f"{name}: {done.file} is active on {to}", markup=False, soft_wrap=True)
    stdout.print(f"sent {size(done.sent_bytes)} of {size(done.size_bytes)}")
    stdout.print(
        f"tried there: golden outputs right, p50 {seconds(done.trial['latency_ns']['p50'])}, "
        f"{done.trial['placement']}", markup=False, soft_wrap=True,
    )  # fmt: skip
    if passed := done.trial.get("passed_over"):
        ran = f"it runs variant {done.trial['variant']}; not {passed}"
        stdout.print(f"note: {ran}", markup=False, soft_wrap=True)
    if done.previous:
        stdout.print(f"edgekit rollback --to {to} --as {name}: back to {done.previous}")


def status(
    *,
    to: str,
    as_: Annotated[str, Parameter(name="--as")],
    python: str | None = None,
    root: str | None = None,
    json: Flag = False,
) -> None:
    """Show what is installed on a device under a name.

    Parameters
    ----------
    to
        local, ssh://user@host:port or adb:SERIAL.
    as_
        The name it was installed under.
    python
        The interpreter on the device.
    root
        The folder of installed bundles on the device.
    json
        One JSON object on stdout (schema edgekit.status/1).
    """
    with _device(to, as_, python, root) as device:
        found = device.ask("status")
    if json:
        print_json({"schema": "edgekit.status/1", "target": to, **found})
        return
    for file in found["versions"]:
        mark = {found["active"]: "active", found["previous"]: "previous"}.get(file, "")
        stdout.print(f"{file}  {mark}".rstrip(), markup=False, soft_wrap=True)
    if not found["versions"]:
        stdout.print(f"nothing is installed under {as_!r} on {to}", markup=False, soft_wrap=True)
    if found["unfinished"]:
        stdout.print(
            f"unfinished: {found['unfinished'].get('step')} of {found['unfinished'].get('file')}; "
            "deploying again goes on", markup=False, soft_wrap=True,
        )  # fmt: skip
    for one in found["failed_trials"].values():
        stdout.print(f"failed {one['count']} trials: {one['why']}", markup=False, soft_wrap=True)


def rollback(
    *,
    to: str,
    as_: Annotated[str, Parameter(name="--as")],
    python: str | None = None,
    root: str | None = None,
    json: Flag = False,
) -> None:
    """Go back to the version that was active before.

    Parameters
    ----------
    to
        local, ssh://user@host:port or adb:SERIAL.
    as_
        The name it was installed under.
    python
        The interpreter on the device.
    root
        The folder of installed bundles on the device.
    json
        One JSON object on stdout (schema edgekit.rollback/1).
    """
    with _device(to, as_, python, root) as device:
        found = device.ask("rollback")
    if json:
        print_json({"schema": "edgekit.rollback/1", "target": to, **found})
    else:
        stdout.print(f"{as_}: {found['active']} is active on {to}", markup=False, soft_wrap=True)


def gc(
    *,
    to: str,
    as_: Annotated[str, Parameter(name="--as")],
    python: str | None = None,
    root: str | None = None,
    json: Flag = False,
) -> None:
    """Remove versions that are neither active nor the one before, and forget failed trials.

    Parameters
    ----------
    to
        local, ssh://user@host:port or adb:SERIAL.
    as_
        The name they were installed under.
    python
        The interpreter on the device.
    root
        The folder of installed bundles on the device.
    json
        One JSON object on stdout (schema edgekit.gc/1).
    """
    with _device(to, as_, python, root) as device:
        found = device.ask("gc", runtime=device.runtime)
    if json:
        print_json({"schema": "edgekit.gc/1", "target": to, **found})
    else:
        stdout.print(f"freed {size(found['freed_bytes'])}; {len(found['versions'])} versions left")


@contextmanager
def _device(
    to: str, name: str, python: str | None, root: str | None, *, accept: bool = False
) -> Iterator[Device]:
    with (
        TerminalObserver() as observer,
        connect(to, accept_new_host_key=accept) as transport,
        device_on(transport, name, root=root, python=python, observer=observer) as device,
    ):
        yield device


def _provisioned(bundle: Path, target: Target, observer: TerminalObserver) -> str:
    """Have numpy and the bundle's engines there; the folder of what was brought, if anything."""
    from edgekit_runtime.bundle import Bundle

    with Bundle(bundle) as opened:
        engines = [one.engine for one in opened.manifest.variants]
    site = open_site(target, observer)
    site.need(engines, observer)
    return site.packages_folder


def _name_in(bundle: Path) -> str:
    from edgekit_runtime.bundle import Bundle

    with Bundle(bundle) as opened:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", opened.manifest.name).strip("-.")[:64] or "model"


def _nanoseconds(text: str | None) -> int | None:
    if text is None:
        return None
    units: dict[str, Any] = {"us": 1e3, "ms": 1e6, "s": 1e9}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text.strip())
    if not found or not float(found[1]):
        raise UsageError(f"--max-latency is {text!r}; wanted a time such as 20ms or 1.5s")
    return int(float(found[1]) * units[found[2]])
