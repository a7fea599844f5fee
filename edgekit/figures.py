"""Is a figure stated in a text? What makes the sources of device profiles checkable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["figure_is_in", "figures", "unit_of"]


def figures(name: str, value: Any) -> Iterator[int | float | str]:
    """The figures of a field: numbers (flags are none), and versions, which are text."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from figures(name, one)
    elif name.rpartition(".")[2] in ("minimum", "version", "python"):
        yield str(value)


_WORDS = {
    1: "one|single", 2: "two|dual", 3: "three|triple", 4: "four|quad", 5: "five", 6: "six|hexa",
    7: "seven", 8: "eight|octa", 10: "ten|deca",
}  # fmt: skip
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
#: what stands behind the prefix, by the unit that a field's name ends in
_UNITS = {
    "bytes": r"(?:i?B\b|i?[bB]ytes?\b)",
    "hz": r"[hH]z\b",
    "w": r"(?:W\b|watts?\b)",
    "ops_per_s": r"(?:FL)?OP(?:S|s|/s)?\b",
    "bytes_per_s": r"B(?:yte)?s?/s",
}
_NUMBER = r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)"


def unit_of(name: str) -> str:
    """The unit in a field's name, as `figure_is_in` takes it; empty for a plain number."""
    found = [unit for unit in _UNITS if name.endswith(f"_{unit}")]
    return max(found, key=len, default="")


def figure_is_in(figure: int | float | str, text: str, *, unit: str = "") -> bool:
    """Whether a figure is stated in a text, in any usual spelling.

    With a unit (bytes, hz, w, ops_per_s, bytes_per_s) the number must be followed by it, after any
    prefix: `2400000000` hz are found in "2.4 GHz", `536870912` bytes in "512 MB" and "512 MiB"
    (memory is counted in powers of two under either name). A list may have its unit at the end:
    "2, 4 and 8 GB". Without a unit the plain number counts, or its word: `4` is in "quad-core".
    """
    if isinstance(figure, str):
        return re.search(rf"(?<![\w.-]){re.escape(figure)}(?![\w]|\.\d)", text) is not None
    if not unit:
        words = _WORDS.get(int(figure), "") if figure == int(figure) else ""
        if words and re.search(rf"\b(?:{words})\b", text, re.IGNORECASE):
            return True
        numbers = (float(match[1].replace(",", "")) for match in re.finditer(_NUMBER, text))
        return any(_same(number, figure) for number in numbers)
    for match in re.finditer(_LISTED.format(unit=_UNITS[unit]), text):
        if unit == "w" and match["prefix"] == "m":
            continue  # milli
        power = _PREFIXES[(match["prefix"] or "").lower()]
        for number in re.findall(_NUMBER, match["numbers"]):
            value = float(number.replace(",", ""))
            if any(_same(value * base**power, figure) for base in (1000, 1024)):
                return True
    return False


#: numbers that share a unit: "1, 2, 4 or 8 GB", "4x 2.4 GHz"
_LISTED = (
    r"(?P<numbers>" + _NUMBER + r"(?:(?:\s*(?:,|/|and|or|to|-)\s*)+" + _NUMBER + r")*)"
    r"[\s-]*(?P<prefix>[kKMGTmg]?){unit}"
)


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9 * abs(other)
