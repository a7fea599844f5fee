"""Memory, estimates and placement on devices of which nothing is measured, as parts of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgekit.measure.report_page import Markup, element, section
from edgekit.measure.report_text import bytes_text, ms_text

__all__ = ["firmware_section"]

_Document = dict[str, Any]


def firmware_section(ranked: Sequence[_Document]) -> Markup:
    """What each candidate needs on the device, by `edgekit.optimize/1` rows; empty without any."""
    known = [one for one in ranked if one.get("firmware")]
    if not known:
        return Markup("")
    columns = (
        "candidate",
        "tensor arena",
        "flash",
        "latency, estimated",
        "MACs on the accelerator",
    )
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    table = element("table", element("thead", head), element("tbody", *map(_row, known)))
    notes = [element("li", note) for note in dict.fromkeys(_note(one) for one in known)]
    left = [
        element("li", f"{one['id']}: {op['type']} {op['name']}: {op['reason']}")
        for one in known for op in one["firmware"]["left_to_cpu"]
    ]  # fmt: skip
    parts = [element("ul", *notes, class_="small"), element("div", table, class_="scroll")]
    if left:
        parts += [element("p", "What the accelerator leaves to the CPU:"), element("ul", *left)]
    return section("On the device", *parts)


def _row(one: _Document) -> Markup:
    found, estimate = one["firmware"], one["firmware"]["estimate"]
    cells = (
        bytes_text(found["arena_bytes"]), bytes_text(found["flash_bytes"]),
        f"{ms_text(estimate['latency_ns'])} ms" if estimate else "\u2013",
        f"{100 * found['macs_on_accelerator']:.4g} %" if estimate else "\u2013",
    )  # fmt: skip
    return element(
        "tr", element("th", one["id"], scope="row"), *(element("td", cell) for cell in cells)
    )


def _note(one: _Document) -> str:
    found, estimate = one["firmware"], one["firmware"]["estimate"]
    if estimate is None:
        return (
            f"{one['engine']}: memory from {found['memory_from']}; nothing estimates its latency."
        )
    return (
        f"{one['engine']}: estimated by {estimate['tool']} for {estimate['system']}, "
        f"{estimate['memory_mode']}, {estimate['clock_hz'] / 1e6:g} MHz "
        f"({estimate['cycles']:,} cycles). Not measured."
    )
