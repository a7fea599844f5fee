"""Writes docs/reference/cli.md from the code: `python docs/reference/generate.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from edgekit.cli import app

TARGET = Path(__file__).parent / "cli.md"


def reference() -> str:
    """The command line as Markdown."""
    sys.argv = ["edgekit"]  # else the usage lines begin with whatever runs this
    text = app.generate_docs(output_format="markdown", heading_level=1)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    head = "<!-- made by docs/reference/generate.py; do not edit -->\n\n"
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference())
