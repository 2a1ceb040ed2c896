"""Figures of plain series, drawn so that colour alone never tells two lines apart."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# dark on white, each at least 4.5:1; a page may put lighter ones in their place on dark
PALETTE = (
    "#0b62a4",
    "#b84a00",
    "#00755a",
    "#8b3a94",
    "#5f5f5f",
    "#7a6400",
    "#c0215e",
    "#1a7d94",
)
GRID, INK = "#dddddd", "#222222"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKS = "os^DvPX*"
_WIDTH = 4.8  # inches: text keeps a readable size when a phone shows the figure
BANDS = 4  # lines that still can have bands without hiding each other
_ROW = 0.19  # inches of a row of the legend
_TITLE = 46  # letters of a line of the title
_LONGEST = 34  # letters of a label
_SIDE = 24  # letters of a label at the side, beyond which it is written small

_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Series:
    """One line: points in order, and optionally what lies around them.

    Attributes:
        style: Chooses colour, dashes and mark; the same number looks the same in every figure.
        low, high: The edges of a band.
        joined: Whether the points are joined by a line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    joined: bool = True


@dataclass(frozen=True)
class Bar:
    """One value with an interval, in a row of its own."""

    label: str
    value: float
    low: float | None
    high: float | None
    style: int = 0


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for drawing and saving these figures."""
    with mpl.rc_context(_STYLE):
        yield


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    whole: bool = False,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Lines over a common axis, the legend below.

    Args:
        whole: The x axis counts something: its ticks are whole numbers.
    """
    with style():
        labels = [readable(one.label) for one in series]
        rows = -(-len(labels) // _columns(labels))
        figure, axes = _empty(title, x_label, y_label, rows)
        for one in series:
            _draw(axes, one, len(series) <= BANDS)
        _scale(axes, whole, log_x, log_y)
        _below(figure, axes, series)
        return _settled(figure)


def _empty(title: str, x_label: str, y_label: str, rows: int) -> tuple[Figure, Axes]:
    """A figure whose axes are as high for a legend of many rows as for one of few."""
    figure = Figure(figsize=(_WIDTH, 3.0 + _ROW * rows), layout="constrained")
    _entitle(figure, title)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label, size="small" if len(y_label) > _SIDE else None)
    axes.grid(axis="y", linewidth=0.8)
    return figure, axes


def _settled(figure: Figure) -> Figure:
    """The layout found and then kept: each drawing would move it a little."""
    for _ in range(2):
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _entitle(figure: Figure, title: str) -> None:
    """A title over the whole width, in two lines if it must."""
    lines = textwrap.wrap(readable(title, 2 * _TITLE), _TITLE) or [""]
    figure.suptitle("\n".join(lines), x=0.012, ha="left", weight="bold", size=10.5)


def _draw(axes: Axes, one: Series, banded: bool) -> None:
    if banded and one.low is not None and one.high is not None and len(one.x) > 1:
        axes.fill_between(one.x, one.low, one.high, color=colour(one.style), alpha=0.14, lw=0)
    axes.plot(one.x, one.y, **_look(one))


def _look(one: Series) -> dict[str, Any]:
    return {
        "color": colour(one.style),
        "linestyle": next(islice(cycle(_DASHES), one.style, None)) if one.joined else "none",
        "marker": _MARKS[one.style % len(_MARKS)],
        # a mark on each of hundreds of rounds hides the line
        "markevery": max(1, len(one.x) // 12),
    }


def _below(figure: Figure, axes: Axes, series: Sequence[Series]) -> None:
    """The legend; by hand, as a label may be anything."""
    labels = [readable(one.label) for one in series]
    if len(labels) > 1 or any(labels):
        columns = _columns(labels)
        figure.legend(axes.get_lines(), labels, loc="outside lower left", ncols=columns)


def _columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return 3 if longest <= 12 and len(labels) > 2 else 2 if longest <= 24 else 1


def _scale(axes: Axes, whole: bool, log_x: bool, log_y: bool) -> None:
    if log_x:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8 if whole else 5, integer=whole, min_n_ticks=1))
    if log_y:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)


def _plain_ticks(axis: Axis) -> None:
    """Numbers as they are; matplotlib's own ticks of a log scale are formulas."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def panels(
    title: str,
    x_label: str,
    parts: Sequence[tuple[str, Sequence[Series]]],
    *,
    whole: bool = True,
    log: bool = False,
) -> Figure:
    """Several quantities over one x axis, one above the other; all have the same lines."""
    with style():
        figure = Figure(figsize=(_WIDTH, 0.9 + 1.6 * len(parts)), layout="constrained")
        every = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (y_label, series) in zip(every, parts):
            axes.set_ylabel(y_label)
            axes.grid(axis="y", linewidth=0.8)
            for one in series:
                _draw(axes, one, len(series) <= BANDS)
            _scale(axes, whole, log, log)
        _entitle(figure, title)
        every[-1].set_xlabel(x_label)
        _below(figure, every[0], parts[0][1])
        return _settled(figure)


def intervals(title: str, x_label: str, bars: Sequence[Bar]) -> Figure:
    """A row for each value, with its interval and a line at 0."""
    with style():
        figure = Figure(figsize=(_WIDTH, 1.2 + 0.36 * len(bars)), layout="constrained")
        _entitle(figure, title)
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.axvline(0, color=INK, linewidth=1)
        for row, bar in enumerate(bars):
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], color=colour(bar.style), linewidth=2.2)
            mark = _MARKS[bar.style % len(_MARKS)]
            axes.plot([bar.value], [row], color=colour(bar.style), marker=mark, markersize=7)
        axes.set_yticks(range(len(bars)), [readable(bar.label) for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.grid(axis="x", linewidth=0.8)
        return _settled(figure)


def colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def readable(label: str, longest: int = _LONGEST) -> str:
    """A label for a figure: one line, printable, not too long, not hidden by matplotlib.

    Example:
        >>> readable("_a" + chr(10) + "b"), readable("x" * 99, 5)
        (' _a?b', 'xxxx…')
    """
    text = "".join(c if c.isprintable() else "?" for c in label)
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return f" {text}" if text.startswith("_") else text
