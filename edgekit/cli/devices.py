"""`edgekit devices list | show`."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.table import Table

from edgekit.cli.console import print_json, size, stdout
from edgekit.device import DeviceProfile, load_profile, profile_ids

__all__ = ["app", "list_", "show"]

app = App(name="devices", help="List and show device profiles.")


@app.command(name="list")
def list_(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """List the device profiles.

    Parameters
    ----------
    json
        One JSON object on stdout (schema edgekit.devices/1).
    """
    profiles = [load_profile(one) for one in profile_ids()]
    if json:
        print_json({"schema": "edgekit.devices/1", "devices": [_facts(one) for one in profiles]})
        return
    table = Table(box=None)
    for column in ("id", "device", "arch", "cores", "engines"):
        table.add_column(column, overflow="fold")
    for one in profiles:
        cores = "-" if one.cpu.cores is None else str(one.cpu.cores)
        table.add_row(one.id, one.name, one.arch, cores, ", ".join(one.engines))
    stdout.print(table)


@app.command
def show(profile: str, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Show one device profile with the source of each figure.

    Parameters
    ----------
    profile
        Its id, or a .toml file.
    json
        One JSON object on stdout (schema edgekit.device/1).
    """
    found = load_profile(profile)
    if json:
        print_json(_facts(found))
        return
    facts = _facts(found)
    stdout.print(f"[bold]{found.id}[/bold]  {found.name}")
    rows: dict[str, Any] = {
        "arch": found.arch,
        "cpu.model": found.cpu.model,
        "cpu.cores": found.cpu.cores,
        "cpu.features": ", ".join(found.cpu.features or []) or None,
        "memory_bytes": size(found.memory_bytes) if found.memory_bytes else None,
        "engines": ", ".join(found.engines),
        "threads": found.threads,
        "quantization.reduce_range": found.quantization.reduce_range,
        "quantization.per_channel": found.quantization.per_channel,
    }
    for name, value in rows.items():
        source = facts["sources"].get(name)
        shown = "unknown" if value is None else value
        stdout.print(
            f"{name:<26} {shown}" + (f"   ({source})" if source else ""),
            markup=False, soft_wrap=True,
        )  # fmt: skip


def _facts(profile: DeviceProfile) -> dict[str, Any]:
    return profile.model_dump(by_alias=True)
