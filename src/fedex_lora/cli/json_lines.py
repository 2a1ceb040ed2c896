"""Logs as JSON on request: one object a line, with time (UTC), level, event and its fields."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedex_lora.cli.spoken import Spoken, spoken

if TYPE_CHECKING:
    from fedex_lora.federation.record import Record
    from fedex_lora.runs.watch import Start

_SELDOM = 10.0  # seconds between two lines of one client's turn
_on = False


def log_json(on: bool) -> bool:
    """Whether all that is told from now on is JSON."""
    global _on
    _on = on
    return on


def logs_json() -> bool:
    """Whether it is."""
    return _on


LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        is_eager=True,
        callback=log_json,
        help="Print one JSON object a line: time, level, event, fields.",
    ),
]


def emit(event: str, level: str = "info", /, **fields: Any) -> bool:
    """Prints an event, where JSON was asked for; whether it was.

    Args:
        fields: Values of JSON, in mappings and lists; of floats that JSON has not null is made.
    """
    if _on:
        from fedex_lora.runs.rundir import plain

        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "event": event, "fields": plain(fields)}
        sys.stdout.write(json.dumps(line, default=str) + "\n")
        sys.stdout.flush()
    return _on


class Events:
    """A watcher whose every word is an event; `label` says which of several runs it is of."""

    def __init__(self, label: str = "") -> None:
        self._of = {"label": label} if label else {}
        self._turn, self._when = (0, ""), 0.0

    def started(self, start: Start) -> None:
        emit("started", **self._of, **asdict(start))

    def phase(self, text: str) -> None:
        emit("phase", **self._of, text=text)

    def turn(
        self, round: int, client: str, done: int, total: int, loss: float | None = None
    ) -> None:
        """The first and the last step of a client's turn, and some between."""
        turn, now = (round, client), time.monotonic()
        if turn != self._turn or done == total or now - self._when > _SELDOM:
            self._turn, self._when = turn, now
            about = {"round": round, "client": client, "step": done, "steps": total, "loss": loss}
            emit("turn", **self._of, **about)

    def round_done(self, record: Record) -> None:
        level = "warning" if record["refused"] or record["lost"] else "info"
        emit("round", level, **self._of, **record)

    def scored(self, record: Record) -> None:
        emit("scored", **self._of, round=record["round"], score=record["score"])

    def note(self, text: str) -> None:
        emit("note", **self._of, text=spoken(text))

    def close(self) -> None:
        """There is nothing to take away."""


class Lines(logging.StreamHandler):
    """Warnings of libraries and of this one, as people or programs read them."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(Spoken("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        text = spoken(record.getMessage())
        if not emit("log", record.levelname.lower(), logger=record.name, text=text):
            super().emit(record)
