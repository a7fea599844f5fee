"""What candidates need on a device that runs firmware, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from edgekit.cli.console import seconds, size, stdout

__all__ = ["show_firmware"]

_MOST = 5


def show_firmware(rows: Sequence[dict[str, Any]]) -> None:
    """Memory, estimates and what is left to the CPU, of `edgekit.optimize/1` rows."""
    known = [row for row in rows if row["firmware"]]
    table = Table(
        title="On the device", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1),
        pad_edge=False,
    )  # fmt: skip
    table.add_column("candidate", overflow="fold")
    for name in ("arena", "flash", "estimate", "MACs on NPU"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in known:
        found = row["firmware"]
        share = "-" if not found["estimate"] else f"{100 * found['macs_on_accelerator']:.4g} %"
        table.add_row(
            row["id"], size(found["arena_bytes"]), size(found["flash_bytes"]),
            seconds(found["estimate"]["latency_ns"]) if found["estimate"] else "-", share,
        )  # fmt: skip
    stdout.print(table)
    for line in dict.fromkeys(_source(row) for row in known):
        stdout.print(line, markup=False, soft_wrap=True)
    for row in known:
        left = row["firmware"]["left_to_cpu"]
        for one in left[:_MOST]:
            stdout.print(
                f"{row['id']}: on the CPU: {one['type']} {one['name']}: {one['reason']}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
        if len(left) > _MOST:
            stdout.print(f"and {len(left) - _MOST} more")


def _source(row: dict[str, Any]) -> str:
    found, tool = row["firmware"], row["firmware"]["estimate"]
    if tool is None:
        return f"memory of {row['engine']}: {found['memory_from']}; nothing estimates its latency"
    return (
        f"{row['engine']}: estimated by {tool['tool']} ({tool['system']}, {tool['memory_mode']}, "
        f"{tool['clock_hz'] / 1e6:g} MHz, {tool['cycles']:,} cycles), not measured"
    )
