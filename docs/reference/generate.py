"""Writes the reference from the code: `python docs/reference/generate.py`."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import edgekit_runtime
from edgekit.cli import app
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
                if name != "worker":
                    one.formatter_class = _Wide
                    parts += [f"### `{name}`", f"```\n{one.format_help().strip()}\n```"]
    return parts


class _Wide(argparse.HelpFormatter):
    """The same lines whatever the terminal's width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


PAGES = {FOLDER / "cli.md": command_line, FOLDER / "runtime.md": runtime}


if __name__ == "__main__":
    for path, make in PAGES.items():
        path.write_text(make())
