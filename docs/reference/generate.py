"""Writes the reference from the code: `python docs/reference/generate.py`."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import edgekit_runtime
from edgekit import device, operators
from edgekit.cli import app
from edgekit.cli.devices import memory_text
from edgekit.profiles import catalogue_ids, load_profile
from edgekit_runtime import __main__ as runtime_cli
from edgekit_runtime import errors
from edgekit_runtime.hooks import Hooks, Measuring

_HEAD = "<!-- made by docs/reference/generate.py; do not edit -->\n\n"
FOLDER = Path(__file__).parent


def command_line() -> str:
    """`edgekit` as Markdown."""
    sys.argv = ["edgekit"]  # else the usage lines begin with whatever runs this
    text = app.generate_docs(output_format="markdown", heading_level=1)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return _HEAD + "\n".join(lines) + "\n"


def runtime() -> str:
    """edgekit_runtime: its functions, classes and errors, then its command line."""
    parts = ["# edgekit_runtime", _doc(edgekit_runtime), "## Functions"]
    installed = _module("installed")
    for function in (edgekit_runtime.load, edgekit_runtime.open_installed, installed.install,
                     installed.activate, installed.root_folder):  # fmt: skip
        parts += [f"### `{function.__name__}`", _signature(function), _doc(function)]
    parts.append("## Classes")
    for kind in (edgekit_runtime.Session, edgekit_runtime.Bound, edgekit_runtime.Stream, Hooks,
                 Measuring, edgekit_runtime.TensorSpec):  # fmt: skip
        parts += [f"### `{kind.__name__}`", _doc(kind)]
        for name, member in vars(kind).items():
            shown = not name.startswith("_") or name == "__call__"
            if shown and inspect.isfunction(member):
                parts += [f"#### `{kind.__name__}.{name}`", _signature(member), _doc(member)]
            elif shown and isinstance(member, property):
                parts += [f"#### `{kind.__name__}.{name}` (property)", _doc(member)]
    parts += ["## Errors", _doc(errors), "## serve-stdin", _doc(_module("serve"))]
    parts += ["## Command line", *_parsers()]
    return _HEAD + "\n\n".join(part for part in parts if part) + "\n"


def device_profile() -> str:
    """The schema of device profiles, table by table."""
    parts = [
        "# Device profiles: the schema",
        f"`{device.SCHEMA}`, a TOML file. Every table and key but those marked *required* may be "
        "left out: what is not known is not stated. How to write one: "
        "[how-to](../how-to/device-profiles.md).",
    ]
    for where, kind in _PROFILE_TABLES.items():
        parts += [f"## {where}", _doc(kind), "| key | value | |\n|---|---|---|\n" + _keys(kind)]
    parts += ["# Operator tables", _doc(sys.modules["edgekit.operators"])]
    parts += [_doc(operators.OperatorTable), "| table | about | operators | source |"]
    rows = ["|---|---|---|---|"]
    for name in operators.operator_table_ids():
        table = operators.operator_table(name)
        opset = f", opset up to {table.opset}" if table.opset else ""
        count = f"{len(table.operators)} of {table.format}"
        source = f"{table.source.kind}: {table.source.title}"
        rows.append(f"| `{name}` | {table.called}{opset} | {count} | {source} |")
    parts[-1] += "\n" + "\n".join(rows)
    return _HEAD + "\n\n".join(parts) + "\n"


_PROFILE_TABLES: dict[str, Any] = {
    "The profile": device.DeviceProfile,
    "`[cpu]`": device.Cpu,
    "`[cpu.clusters.NAME]`": device.Cluster,
    "`[memory]`": device.Memory,
    "`[system]`": device.System,
    "`[engines.NAME]`": device.EngineFacts,
    "`[accelerators.NAME]`": device.Accelerator,
    "`[quantization]`": device.Quantization,
    "`[defaults]`": device.Defaults,
    "`[thermal]`": device.Thermal,
    "`[power]`": device.Power,
    "`[roofline]`": device.Roofline,
    "`[[roofline.compute]]`": device.ComputeRoof,
    "`[[sources]]`": device.Source,
}


def _keys(kind: Any) -> str:
    rows = []
    for name, field in kind.model_fields.items():
        needed = "required" if field.is_required() else ""
        rows.append(f"| `{field.alias or name}` | {_type(field.annotation)} | {needed} |")
    return "\n".join(rows)


def _type(annotation: Any) -> str:
    """A field's type in words."""
    import types
    import typing

    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in inner if one is not type(None))
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"table of {_type(inner[1])}"
    words = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return words.get(annotation, "table")


def devices() -> str:
    """The catalogue."""
    parts = [
        "# The devices EdgeKit knows",
        "Every figure with its source: `edgekit devices show ID`. What is not stated here is not "
        "known from a source.",
    ]
    rows = [
        "| id | device | cores | memory | runs with | accelerators |",
        "|---|---|---|---|---|---|",
    ]
    for name in catalogue_ids():
        one = load_profile(name)
        npus = ", ".join(
            f"{key} ({value.kind}, {value.operator_table or 'operators not published'})"
            for key, value in one.accelerators.items()
        )
        rows.append(
            f"| `{one.id}` | {one.name} | {_cores(one)} | {memory_text(one)} "
            f"| {', '.join(one.engines)} | {npus} |"
        )
    return _HEAD + "\n\n".join([*parts, "\n".join(rows)]) + "\n"


def _cores(profile: Any) -> str:
    clusters = profile.cpu.clusters
    if not clusters:
        return str(profile.cpu.cores or "")
    return ", ".join(
        f"{one.count}x {one.core}" + (f" {one.max_hz / 1e9:.3g} GHz" if one.max_hz else "")
        for one in clusters.values()
    )


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(f"edgekit_runtime.{name}")


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.name != "self"]
    text = f"{function.__name__}{signature.replace(parameters=own)}"
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are strings there
    if len(text) > 100:
        start, _, end = text.rpartition(")")
        name, _, inside = start.partition("(")
        rows = re.split(r", (?=\*|\w+:)", inside)
        text = f"{name}(\n    " + ",\n    ".join(rows) + f",\n){end}"
    return f"```python\n{text}\n```"


def _doc(thing: Any) -> str:
    """The docstring; what is indented in it is code, so it stays as it is."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    for number, line in enumerate(lines):
        if line == "Raises:":
            for later in range(number + 1, len(lines)):
                if lines[later].startswith("    ") and not lines[later].startswith("     "):
                    lines[later] = "- " + lines[later].strip()
                elif lines[later].startswith("     "):
                    lines[later] = "  " + lines[later].strip()
            lines[number] = "Raises:\n"
    return "\n".join(lines).strip()


def _parsers() -> list[str]:
    parser = runtime_cli._parser()
    parser.formatter_class = _Wide
    parts = [f"```\n{parser.format_help().strip()}\n```"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                if name not in ("worker", "blocks", "bandwidth"):
                    one.formatter_class = _Wide
                    parts += [f"### `{name}`", f"```\n{one.format_help().strip()}\n```"]
    return parts


class _Wide(argparse.HelpFormatter):
    """The same lines whatever the terminal's width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


PAGES = {
    FOLDER / "cli.md": command_line,
    FOLDER / "runtime.md": runtime,
    FOLDER / "device-profile.md": device_profile,
    FOLDER / "devices.md": devices,
}


if __name__ == "__main__":
    for path, make in PAGES.items():
        path.write_text(make())
