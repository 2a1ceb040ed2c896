"""What the command line shows while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedex_lora.cli.spoken import spoken
from fedex_lora.errors import number, size, some, tally
from fedex_lora.runs.pace import Pace
from fedex_lora.runs.spent import line

if TYPE_CHECKING:
    from fedex_lora.federation.record import Record
    from fedex_lora.runs.watch import Start

_WIDEST = 10_000  # characters in a line
_SELDOM = 30.0  # seconds between two lines on how far it is, where there is no terminal


class Display:
    """A line for each round, and how far the run is: on a terminal a line that changes; elsewhere,
    as in a file, a line now and then.

    Args:
        clock: Seconds.
    """

    def __init__(
        self, console: Console, label: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.label, self._clock = console, label, clock
        self._pace: Pace | None = None
        self._phase: Spinner | None = None
        self._live: Live | None = None
        self._told = clock()

    def started(self, start: Start) -> None:
        now, per_round = self._clock(), start.per_round or len(start.examples)
        self._pace, self._phase = Pace(start.rounds, per_round, start.done, now), None
        examples = f", training examples {tally(start.examples)}" if start.examples else ""
        self._print(
            f"{self.label or start.name}: {start.method}, seed {start.seed}, "
            f"{start.rounds} rounds{examples}  →  {start.out}",
            style="bold",
        )
        self._show()

    def phase(self, text: str) -> None:
        """What the run is at before its first round."""
        self._phase = Spinner("dots", escape(text))
        if self.console.is_terminal:
            self._show()
        else:
            self._print(f"  {text}")

    def turn(
        self, round: int, client: str, done: int, total: int, loss: float | None = None
    ) -> None:
        if self._pace is None:  # a turn of a run whose rounds are played elsewhere
            self._pace = Pace(0, 1, round - 1, self._clock())
        self._phase = None
        self._pace.turn(client, done, total, loss)
        self._show()

    def round_done(self, record: Record) -> None:
        if self._pace is not None:
            self._pace.round_done(record["round"])
        self._print("  " + round_line(record))
        by_reason: dict[str, list[str]] = {}
        delayed = record.get("delayed", {}).items()
        later = {name: f"it comes in round {due} (a rehearsal)" for name, due in delayed}
        for name, why in {**record["refused"], **record["lost"], **later}.items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            self._print(f"    without {some(names)}: {spoken(why)}", style="yellow", wrap=False)
        if late := [f"{x['client']} (round {x['round']})" for x in record.get("late", {}).values()]:
            self._print(f"    with late updates of {some(late)}", wrap=False)

    def scored(self, record: Record) -> None:
        whose = some(list(record.get("client_scores", {}))) or "nobody"
        score = "" if record["scores"] else f": {number(record['score'], 3)}"
        self._print(f"  round {record['round']} was scored by {whose} on rows of their own{score}")

    def note(self, text: str) -> None:
        self._print(f"note: {spoken(text)}", style="yellow")

    def close(self) -> None:
        """Takes the line that changes away, whatever happened."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str, style: str | None = None, wrap: bool = True) -> None:
        self._told = self._clock()
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=wrap)

    def _show(self) -> None:
        """How far it is."""
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(
                    console=self.console, transient=True, get_renderable=self._renderable
                )
                self._live.start()
        elif self._pace is not None and self._clock() - self._told >= _SELDOM:
            self._print("  " + self._pace.line(self._clock(), _WIDEST, bar=False))

    def _renderable(self) -> RenderableType:
        if self._phase is not None:
            return self._phase
        width = self.console.width - 2
        text = "" if self._pace is None else self._pace.line(self._clock(), width)
        return Text(f"  {text}", no_wrap=True, overflow="crop")


def round_line(record: Record) -> str:
    """A round in one line: scores, loss, deviation, bytes, seconds."""
    parts = [f"round {record['round']}"]
    for split, scores in record.get("scores", {}).items():
        shown = ", ".join(f"{k} {number(v, 3)}" for k, v in scores.items() if k != "loss")
        parts.append(f"{split}: {shown}")
    if not record.get("scores") and record.get("score") is not None:
        parts.append(f"clients' own rows: {record['score']:.3f}")
    losses = [c["loss"] for c in record["clients"].values() if c.get("loss") is not None]
    loss = sum(losses) / len(losses) if losses else record.get("loss")  # of a sum alone
    if loss is not None:
        parts.append(f"training loss {loss:.3f}")
    if "privacy" in record:
        parts.append(line(record["privacy"]))
    if "deviation" in record:
        parts.append(f"deviation {record['deviation']:.3g}")
    up, down = (sum(record[k].values()) for k in ("bytes_up", "bytes_down"))
    parts.append(f"{size(up)} up, {size(down)} down")
    parts.append(f"{record['seconds']['round']:.1f} s")
    return "; ".join(parts)


def show_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with numbers to the right. Cells wrap on a terminal, but not within words: a table
    that needs more is wider than the terminal. In a file lines are as long as it takes."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(zip(header, *rows)):
        longest = max((len(word) for cell in column for word in cell.split()), default=0)
        side: Literal["left", "right"] = "right" if i else "left"
        table.add_column(column[0], justify=side, no_wrap=not i, min_width=longest)
    for row in rows:
        table.add_row(*map(escape, row))
    least, most = Measurement.get(console, console.options.update(max_width=_WIDEST), table)
    table.width = max(least, min(most, console.width)) if console.is_terminal else most
    console.print(table, crop=False)
