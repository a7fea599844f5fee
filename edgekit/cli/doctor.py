"""`edgekit doctor`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Annotated, Any

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from edgekit import __version__, sandbox
from edgekit.cli.console import TerminalObserver, print_json, stdout
from edgekit.compress.quantizers import QUANTIZERS, Quantizer
from edgekit.convert import (
    CLEAN_UP,
    EDGES,
    SUFFIX,
    Edge,
    install_line,
    missing_extra,
    tool_versions,
)
from edgekit.errors import EdgeKitError
from edgekit.facts import probe_engine, this_machine
from edgekit.firmware.probe import TOOLS, probe_tool
from edgekit_runtime.engines import ENGINES, engine_version

__all__ = ["doctor"]


def doctor(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Check which engines, converters and compilers really work here: each takes one operator.

    Parameters
    ----------
    json
        One JSON object on stdout (schema edgekit.doctor/1).
    """
    with TerminalObserver() as observer, ThreadPoolExecutor(max_workers=2) as pool:
        observer.phase("running one operator through each engine and converter")
        engines = list(pool.map(_engine, ENGINES))
        converters = list(pool.map(_converter, (CLEAN_UP, *EDGES)))
        microcontrollers = list(pool.map(_microcontroller_tool, TOOLS))
    document = {
        "schema": "edgekit.doctor/1",
        "edgekit": __version__,
        "machine": this_machine().model_dump(by_alias=True),
        "engines": engines,
        "converters": converters,
        "quantizers": [_quantizer(one) for one in QUANTIZERS],
        "microcontrollers": microcontrollers,
        "warnings": _warnings(),
    }
    if json:
        print_json(document)
    else:
        _show(document)


def _engine(name: str) -> dict[str, Any]:
    fault = probe_engine(name)
    return {
        "name": name, "version": engine_version(name), "ok": fault is None, "detail": fault or ""
    }  # fmt: skip


def _converter(edge: Edge) -> dict[str, Any]:
    name = f"{edge.source} -> {edge.target} ({edge.tool})"
    missing = missing_extra(edge)
    version = tool_versions(edge.distributions)[edge.tool]
    fault = f"{missing} is not installed; {install_line(edge)}" if missing else ""
    if not fault:
        fault = _convert_one_operator(edge)
    return {"name": name, "version": version, "ok": not fault, "detail": fault}


def _convert_one_operator(edge: Edge) -> str:
    try:
        sandbox.call(
            "edgekit_converters.probes:convert_one_operator",
            {
                "source_format": edge.source,
                "function": edge.function,
                "name": f"out{SUFFIX[edge.target]}",
            },
            limits=sandbox.Limits(timeout_s=120),
            what="converting one operator",
        )
    except EdgeKitError as error:
        return str(error)
    return ""


def _microcontroller_tool(name: str) -> dict[str, Any]:
    distribution, _ = TOOLS[name]
    fault = probe_tool(name)
    version = tool_versions((distribution,))[distribution]
    return {"name": name, "version": version, "ok": fault is None, "detail": fault or ""}


def _quantizer(one: Quantizer) -> dict[str, Any]:
    return {
        "name": f"{one.target} ({one.tool})",
        "version": tool_versions(one.distributions)[one.distributions[0]],
        "ok": one.missing() is None,
        "detail": one.missing() or "",
    }


def _warnings() -> list[str]:
    def installed(name: str) -> bool:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            return False
        return True

    if installed("edgekit-sdk") and installed("edgekit-runtime"):
        return [
            "edgekit-sdk and edgekit-runtime are both installed and own the same files: "
            "pip uninstall edgekit-runtime, then reinstall edgekit-sdk"
        ]
    return []


def _show(document: dict[str, Any]) -> None:
    table = Table(box=None)
    for column in ("", "version", "works", ""):
        table.add_column(column, overflow="fold", no_wrap=not column and not table.columns)
    for kind in ("engines", "converters", "quantizers", "microcontrollers"):
        table.add_row(f"[bold]{kind}[/bold]")
        for row in document[kind]:
            works = "yes" if row["ok"] else "no"
            if kind == "quantizers" and row["ok"]:
                works = "installed"
            table.add_row(
                f"  {row['name']}", row["version"] or "-", works, escape(row["detail"][:200]),
                style="" if row["ok"] else "dim",
            )  # fmt: skip
    stdout.print(table)
    machine = document["machine"]
    stdout.print(f"\n{machine['name']}: {machine['arch']}, {machine['cpu']['cores']} cores")
    for text in document["warnings"]:
        stdout.print(f"[yellow]warning:[/yellow] {text}")
