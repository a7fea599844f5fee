"""`edgekit devices list | show | validate | probe`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.markup import escape
from rich.table import Table

from edgekit.cli.console import AnsweredError, TerminalObserver, print_json, size, stdout
from edgekit.device import DeviceProfile
from edgekit.errors import UsageError
from edgekit.profiles import load_profile, profile_faults, profile_ids, read_profile_text

__all__ = ["app", "list_", "memory_text", "probe", "show", "validate"]

app = App(name="devices", help="List, show, check and probe device profiles.")
Json = Annotated[bool, Parameter(negative="")]


@app.command(name="list")
def list_(*, json: Json = False) -> None:
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
    rows = [("id", "arch", "memory", "device + accelerators")]
    for one in profiles:
        others = " + ".join([one.name, *one.accelerators])
        rows.append((one.id, one.arch, memory_text(one), others))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:  # one line each, whatever the terminal's width
        start = "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=False))
        line = f"{start}  {row[-1]}"
        cut = len(line) > stdout.width
        stdout.print(f"{line[: stdout.width - 1]}…" if cut else line, markup=False, no_wrap=True)


@app.command
def show(profile: str, /, *, json: Json = False) -> None:
    """Show one device profile, every fact with its source.

    Parameters
    ----------
    profile
        Its id, or a .toml file.
    json
        One JSON object on stdout (schema edgekit.device/1); unknown facts are null.
    """
    found = load_profile(profile)
    if json:
        print_json(_facts(found))
        return
    name = escape(found.name)
    stdout.print(f"[bold]{found.id}[/bold]  {name} ({found.kind}, {found.arch})")
    numbers = {id(source): number for number, source in enumerate(found.sources, start=1)}
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for name, value in found.facts():
        source = found.source_of(name)
        table.add_row(
            name, escape(_value(name, value)), f"\\[{numbers[id(source)]}]" if source else ""
        )
    stdout.print(table)
    if found.notes:
        stdout.print(f"notes: {found.notes}", markup=False)
    for source in found.sources:
        said = f": {source.says}" if source.says else ""
        where = f" <{source.url}>" if source.url else ""
        stdout.print(
            f"[{numbers[id(source)]}] {source.kind}: {source.title}{said}{where}",
            markup=False, soft_wrap=True,
        )  # fmt: skip


@app.command
def validate(*files: Path, json: Json = False) -> None:
    """Check device profiles: one line per fault, the field named; exit code 2 if there is one.

    Parameters
    ----------
    files
        TOML files.
    json
        One JSON object on stdout (schema edgekit.validate/1).
    """
    if not files:
        raise UsageError("no file; wanted: edgekit devices validate FILE")
    faults = {str(file): _faults_of(file) for file in files}
    if json:
        print_json({"schema": "edgekit.validate/1", "faults": faults})
    else:
        for name, found in faults.items():
            for fault in found:
                stdout.print(f"{name}: {fault}", markup=False, soft_wrap=True)
            if not found:
                stdout.print(f"{name}: valid", markup=False, soft_wrap=True)
    bad = sum(map(bool, faults.values()))
    if bad:
        raise AnsweredError(f"{bad} of {len(files)} files are no valid profiles", 2)


@app.command
def probe(
    target: str = "local",
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    profile_id: Annotated[str | None, Parameter(name="--id")] = None,
    python: str | None = None,
    measure: bool = True,
    script: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Read what a device says of itself, measure its roofline, and make a profile of it.

    Nothing is installed there: EdgeKit's runtime (130 kB) and a few small models are copied to a
    temporary folder, which is removed again. A device without Python is read, not measured; over
    adb the native runner is brought, which stays for the next time.

    Parameters
    ----------
    target
        local, ssh://user@host:port, adb:SERIAL, or a file with what --script printed on the device.
    output
        Where the profile is written; without it, it is printed.
    profile_id
        The profile's id; by default made of the device's name.
    python
        The interpreter on the device that has the engines; python3 by default.
    measure
        Measure matrix multiplication, depthwise convolution and memory, some seconds per engine.
    script
        Print the shell script that reads the facts, for devices that only you can reach:
        edgekit devices probe --script | adb shell sh > phone.txt.
    json
        One JSON object on stdout (schema edgekit.device/1).
    """
    if script:
        if json:
            raise UsageError("--script prints a shell script: leave out --json")
        from edgekit.facts import facts_script

        stdout.print(facts_script(), markup=False, soft_wrap=True, end="")
        return
    from edgekit.measure.probe import probe_device, slug
    from edgekit.profiles import profile_toml

    if output is not None and output.suffix != ".toml":
        raise UsageError(f"{output}: a profile is a .toml file")
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"cannot write {output}: no folder {output.parent}")
    if profile_id is not None and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", profile_id):
        raise UsageError(f"--id {profile_id!r}; wanted small letters, digits and - between them")
    with TerminalObserver() as observer:
        found = probe_device(
            target, python=python, profile_id=profile_id or (slug(output.stem) if output else None),
            measured=measure, observer=observer,
        )  # fmt: skip
    text = profile_toml(found)
    if output is not None:
        from edgekit.cache import write_atomically

        write_atomically(output, text.encode())
    if json:
        print_json(_facts(found))
    elif output is None:
        stdout.print(text, markup=False, soft_wrap=True, end="")
    else:
        _show_probed(found)
        stdout.print(f"profile  {output}", soft_wrap=True)


def _show_probed(profile: DeviceProfile) -> None:
    cpu = profile.cpu
    cores = f"{cpu.cores} core{'s' if cpu.cores != 1 else ''}" if cpu.cores else "cores unknown"
    stdout.print(
        f"[bold]{escape(profile.name)}[/bold]: {profile.arch}, {cores}, "
        f"{memory_text(profile)} of memory"
    )
    if profile.roofline is None:
        return
    roofline = profile.roofline
    if roofline.memory_bytes_per_s:
        stdout.print(f"memory {roofline.memory_bytes_per_s / 1e9:.1f} GB/s, measured")
    table = Table(box=None)
    for column in ("engine", "kind", "type", "threads", "GOP/s, measured"):
        table.add_column(column, justify="right" if column.startswith(("GOP", "th")) else "left")
    for one in roofline.compute:
        table.add_row(
            one.engine, one.kind, one.dtype, str(one.threads), f"{one.ops_per_s / 1e9:.3g}"
        )
    stdout.print(table)


def _faults_of(file: Path) -> list[str]:
    try:
        return profile_faults(read_profile_text(file))
    except UsageError as error:
        return [str(error)]


def memory_text(profile: DeviceProfile) -> str:
    """`8 GiB`, `1 GiB to 8 GiB`, `512 KiB SRAM`; a dash where it is not stated."""
    memory = profile.memory
    if profile.kind == "microcontroller" and memory.sram_bytes:
        return f"{_binary(memory.sram_bytes)} SRAM"
    if memory.ram_bytes:
        return _binary(memory.ram_bytes)
    if memory.ram_sold_bytes:
        low, high = min(memory.ram_sold_bytes), max(memory.ram_sold_bytes)
        return _binary(low) if low == high else f"{_binary(low)} to {_binary(high)}"
    return "-"


def _binary(size_bytes: int) -> str:
    """Memory is counted in powers of two."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >= 1 << exponent:
            return f"{size_bytes / (1 << exponent):.3g} {unit}"
    return f"{size_bytes} B"


def _value(name: str, value: Any) -> str:
    if value == {}:
        return "yes"
    if isinstance(value, dict):
        return " ".join(_value(f"{name}.{key}", inner) for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_value(name, one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    for ending, show_one in _UNITS.items():
        if name.endswith(ending):
            return show_one(value)
    return str(value)


_UNITS: dict[str, Callable[[Any], str]] = {
    "storage_bytes": size,
    "bytes_per_s": lambda value: f"{value / 1e9:.3g} GB/s",
    "_bytes": _binary,
    "_hz": lambda value: f"{value / 1e9:.3g} GHz" if value >= 1e9 else f"{value / 1e6:.3g} MHz",
    "ops_per_s": lambda value: (
        f"{value / 1e12:.3g} TOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GOP/s"
    ),
}


def _facts(profile: DeviceProfile) -> dict[str, Any]:
    return profile.model_dump(by_alias=True)
