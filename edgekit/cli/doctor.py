"""`edgekit doctor`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Annotated, Any

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from edgekit import __version__, sandbox
from edgekit.accelerate import DISTRIBUTIONS
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
from edgekit.facts import probe_accelerator, probe_engine, this_machine
from edgekit.firmware.probe import TOOLS, probe_tool
from edgekit_runtime.engines import ENGINES, engine_version
from edgekit_runtime.engines.accelerators import VERIFIED, all_names

__all__ = ["doctor"]


def doctor(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Check which engines, accelerators, converters and compilers really work here: each takes one
    operator.

    Parameters
    ----------
    json
        One JSON object on stdout (schema edgekit.doctor/1).
    """
    with TerminalObserver() as observer, ThreadPoolExecutor(max_workers=2) as pool:
        observer.phase("running one operator through each engine and converter")
        engines = list(pool.map(_engine, ENGINES))
        accelerators = list(pool.map(_accelerator, all_names()))
        converters = list(pool.map(_converter, (CLEAN_UP, *EDGES)))
        microcontrollers = list(pool.map(_microcontroller_tool, TOOLS))
    document = {
        "schema": "edgekit.doctor/1",
        "edgekit": __version__,
        "machine": this_machine().model_dump(by_alias=True),
        "engines": engines,
        "accelerators": accelerators,
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


def _accelerator(name: str) -> dict[str, Any]:
    """`verified`: tests of EdgeKit run it; `simulated`: what stands in for it here."""
    simulated, fault = "", ""
    brought_by = DISTRIBUTIONS.get(name, ())[-1:]
    version = tool_versions(brought_by)[brought_by[0]] if brought_by else engine_version(name)
    try:
        simulated = probe_accelerator(name)
    except EdgeKitError as error:
        fault = str(error)
    return {
        "name": name, "version": version, "ok": not fault, "detail": fault,
        "verified": name in VERIFIED, "simulated": simulated or None,
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
    for kind in ("engines", "accelerators", "converters", "quantizers", "microcontrollers"):
        table.add_row(f"[bold]{kind}[/bold]")
        for row in document[kind]:
            table.add_row(
                f"  {row['name']}", row["version"] or "-", _works(kind, row),
                escape(_detail(kind, row)[:200]), style="" if row["ok"] else "dim",
            )  # fmt: skip
    stdout.print(table)
    stdout.print("\n* not verified here: no test of EdgeKit runs it, on any machine so far")
    machine = document["machine"]
    stdout.print(f"\n{machine['name']}: {machine['arch']}, {machine['cpu']['cores']} cores")
    for text in document["warnings"]:
        stdout.print(f"[yellow]warning:[/yellow] {text}")


def _works(kind: str, row: dict[str, Any]) -> str:
    if not row["ok"]:
        return "no"
    if row.get("simulated"):
        return "simulated"
    return "installed" if kind == "quantizers" else "yes"


def _detail(kind: str, row: dict[str, Any]) -> str:
    if kind != "accelerators":
        return str(row["detail"])
    if row["simulated"]:
        return f"by {row['simulated']}: its outputs count, its times do not"
    return str(row["detail"]) if row["verified"] else f"* {row['detail']}"
