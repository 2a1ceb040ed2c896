"""Figures as files, and as SVG that may stand within a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

from fedex_lora.experiments.analysis.plots import GRID, INK, PALETTE, style
from fedex_lora.experiments.report.html import Html

MARKER = "fedex-lora report"  # in every file that a report consists of
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
_COLOURS = {INK: "currentColor", GRID: "var(--grid)"}
_COLOURS |= {c: f"var(--c{i})" for i, c in enumerate(PALETTE)}
_FONT = re.compile(r"font-family: [^;]*;?\s*")
_REFERENCE = re.compile(r"url\(#")

ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


@contextmanager
def _saving(name: str) -> Iterator[None]:
    """The same bytes for the same figure; letters that matplotlib's font lacks become boxes."""
    with style(), mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def svg_file(figure: Figure, name: str) -> bytes:
    """A file on a white ground."""
    buffer = io.BytesIO()
    with _saving(name):
        meta = {"Date": None, "Creator": MARKER}
        figure.savefig(buffer, format="svg", facecolor="white", metadata=meta)
    return buffer.getvalue()


def png_file(figure: Figure, name: str) -> bytes:
    """A file on a white ground, 150 points an inch."""
    buffer = io.BytesIO()
    with _saving(name):
        meta = {"Software": MARKER}
        figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata=meta)
    return buffer.getvalue()


def inline(svg: bytes, name: str, title: str) -> Html:
    """A file of `svg_file` for use within a page.

    It has no ground of its own, its colours are CSS variables (`--c0` …, `--grid`) and the text's
    colour, it fills the width it is given, and its ids begin with `name`, so that they differ from
    those of other figures.
    """
    root = ElementTree.fromstring(svg)
    _without(root, "metadata", "style")
    for parent in list(root.iter()):
        for child in list(parent):
            if child.get("id") == "patch_1" and parent.get("id") == "figure_1":
                parent.remove(child)  # the white ground
    for element in root.iter():
        _adapt(element, name)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return Html(_compact(ElementTree.tostring(root, encoding="unicode")))


def _without(root: ElementTree.Element, *tags: str) -> None:
    gone = {f"{{{_SVG}}}{tag}" for tag in tags}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in gone:
                parent.remove(child)


def _adapt(element: ElementTree.Element, name: str) -> None:
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.get('id')}")
    if _HREF in element.attrib:
        element.set(_HREF, f"#{name}-{element.attrib[_HREF].removeprefix('#')}")
    if "clip-path" in element.attrib:
        element.set("clip-path", _REFERENCE.sub(f"url(#{name}-", element.attrib["clip-path"]))
    if "style" in element.attrib:
        looks = _FONT.sub("", element.attrib["style"])
        for colour, variable in _COLOURS.items():
            looks = looks.replace(colour, variable)
        element.set("style", looks)


def _compact(svg: str) -> str:
    return re.sub(r">\s+<", "><", svg).replace("\n", " ")
