"""HTML as values: every text is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Markup. Plain `str` is text."""


Child = str | Html


def el(tag: str, *children: Child | None, **attributes: str | int | None) -> Html:
    """An element; a trailing underscore of an attribute's name is dropped, others become dashes.

    Example:
        >>> el("p", "a < b ", el("b", "c"), class_="note")
        '<p class="note">a &lt; b <b>c</b></p>'
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_printable(str(value)))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(map(text, (c for c in children if c is not None)))
    return Html(f"<{tag}{given}>{inner}</{tag}>")


def text(value: Child) -> Html:
    """Markup as it is, text escaped."""
    return value if isinstance(value, Html) else Html(escape(_printable(value)))


def _printable(value: str) -> str:
    """Control characters, which HTML forbids, made visible."""
    return "".join(c if c.isprintable() or c in "\n\t " else "\ufffd" for c in value)


def join(parts: Iterable[Child | None]) -> Html:
    return Html("".join(text(p) for p in parts if p is not None))


def table(
    header: Sequence[Child], rows: Iterable[Sequence[Child]], caption: Child | None = None
) -> Html:
    """A table that scrolls within its own box; the first column names the row."""
    head = el("tr", *(el("th", cell, scope="col") for cell in header))
    body = [
        el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:]))
        for row in rows
    ]
    box = el(
        "div",
        el("table", el("thead", head), el("tbody", *body)),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label="table",
    )
    return join([box, el("p", caption, class_="soft") if caption else None])


def details(summary: Child, *children: Child | None, open: bool = False) -> Html:
    """Content that is folded away until it is asked for."""
    inner = el("details", el("summary", summary), *children)
    return Html(inner.replace("<details>", "<details open>", 1)) if open else inner


def bullets(items: Iterable[Child]) -> Html:
    return el("ul", *(el("li", item) for item in items))
