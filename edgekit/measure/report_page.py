"""HTML pages that load nothing else and that no text can break out of.

Everything is built with `element`, which escapes text by default: paths, reasons and notes come
from files and tools that are not ours. A content security policy in the page forbids whatever
escaping might miss.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

__all__ = ["Markup", "element", "fact_list", "page", "section"]


class Markup(str):
    """HTML; any other string is text and gets escaped."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: str) -> Markup:
    """`<tag attributes>children</tag>`; `class_` is `class`, `data_label` is `data-label`."""
    named = (
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
    )
    inside = "".join(c if isinstance(c, Markup) else escape(str(c)) for c in children)
    return Markup(f"<{tag}{''.join(named)}>{inside}</{tag}>")


def section(title: str, *children: Markup) -> Markup:
    """A section under a heading."""
    return element("section", element("h2", title), *children)


def fact_list(facts: Iterable[tuple[str, object]], *, style: str = "facts") -> Markup:
    """Names and values, a `dl` of this class."""
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in facts)
    return element("dl", *pairs, class_=style)


def page(title: str, body: Sequence[Markup], figure: dict[str, Any] | None) -> str:
    """A whole page; with a plotly figure, its script comes along."""
    scripts: list[str] = []
    data = Markup()
    if figure is not None:
        from plotly.offline import get_plotlyjs

        scripts = [get_plotlyjs(), _resource("report.js")]
        # In a script element nothing is escaped: no `<` may be left that could end it.
        text = json.dumps(figure, allow_nan=False).replace("<", "\\u003c")
        data = Markup(f'<script type="application/json" id="figure">{text}</script>')
    allowed = " ".join(f"'sha256-{_sha256_base64(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            element("title", title),
            f"<style>\n{_resource('report.css')}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>",
            data,
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        )
    )


def _sha256_base64(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _resource(name: str) -> str:
    return resources.files("edgekit.measure").joinpath(name).read_text(encoding="utf-8")
