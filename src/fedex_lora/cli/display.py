"""What the command line shows while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.status import Status
from rich.table import Table

from fedex_lora.cli.spoken import spoken
from fedex_lora.errors import number, size, some, tally
from fedex_lora.runs.spent import line

if TYPE_CHECKING:
    from fedex_lora.federation.loop import Record
    from fedex_lora.runs.watch import Start

_WIDEST = 10_000  # characters in a line


class Display:
    """A line for each round and, on a terminal, a bar for the client whose turn it is."""

    def __init__(self, console: Console, label: str = "") -> None:
        self.console, self.label = console, label
        self._bar = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._turn: tuple[int, str] | None = None
        self._task: TaskID | None = None
        self._status: Status | None = None

    def started(self, start: Start) -> None:
        self._clear()
        examples = tally(start.examples)
        self.console.print(
            f"{self.label or start.name}: {start.method}, seed {start.seed}, "
            f"{start.rounds} rounds, training examples {examples}  →  {start.out}",
            style="bold",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def phase(self, text: str) -> None:
        """What the run is at before its first round."""
        if not self.console.is_terminal:
            self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
            return
        self._clear()
        self._status = self.console.status(escape(text))
        self._status.start()

    def turn(self, round: int, client: str, done: int, total: int) -> None:
        if self._turn != (round, client):
            self._clear()
            self._bar.start()
            self._turn = (round, client)
            self._task = self._bar.add_task(f"round {round}  {client}", total=total)
        assert self._task is not None
        self._bar.update(self._task, completed=done)

    def round_done(self, record: Record) -> None:
        self._clear()
        self.console.print("  " + round_line(record), highlight=False, markup=False, soft_wrap=True)
        by_reason: dict[str, list[str]] = {}
        for name, why in {**record["refused"], **record["lost"]}.items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            self.console.print(
                f"    without {some(names)}: {spoken(why)}",
                style="yellow",
                highlight=False,
                markup=False,
            )

    def scored(self, record: Record) -> None:
        self._clear()
        text = f"  round {record['round']}; clients' own rows: {number(record['score'], 3)}"
        self.console.print(text, highlight=False, markup=False)

    def note(self, text: str) -> None:
        self._clear()
        self.console.print(
            f"note: {spoken(text)}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )

    def close(self) -> None:
        """Takes the bar away, whatever happened."""
        self._clear()

    def _clear(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task, self._turn = None, None
        self._bar.stop()


def round_line(record: Record) -> str:
    """A round in one line: scores, loss, deviation, bytes, seconds."""
    parts = [f"round {record['round']}"]
    for split, scores in record.get("scores", {}).items():
        shown = ", ".join(f"{k} {number(v, 3)}" for k, v in scores.items() if k != "loss")
        parts.append(f"{split}: {shown}")
    if not record.get("scores") and record.get("score") is not None:
        parts.append(f"clients' own rows: {record['score']:.3f}")
    losses = [c["loss"] for c in record["clients"].values() if c.get("loss") is not None]
    if losses:
        parts.append(f"training loss {sum(losses) / len(losses):.3f}")
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
