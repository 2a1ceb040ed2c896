"""What a run in another process tells of itself: a file of JSON lines, written and followed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedex_lora.errors import ProtocolError, QuorumLost, UserError
from fedex_lora.federation.record import Record
from fedex_lora.runs.rundir import plain
from fedex_lora.runs.watch import Start, Watcher

_OFTEN = 0.5  # seconds


class Recorder:
    """A watcher that writes down what it is told."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def started(self, start: Start) -> None:
        self._write("started", asdict(start))

    def turn(
        self, round: int, client: str, done: int, total: int, loss: float | None = None
    ) -> None:
        self._write("turn", [round, client, done, total, loss])

    def round_done(self, record: Record) -> None:
        self._write("round_done", record)

    def scored(self, record: Record) -> None:
        self._write("scored", record)

    def note(self, text: str) -> None:
        self._write("note", text)

    def ended(self, how: str, text: str, results: dict[str, Any] | None = None) -> None:
        """The last line: done, or quorum, user, fault and why."""
        self._write("ended", {"how": how, "text": text, "results": results})

    def _write(self, event: str, value: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, "value": plain(value)}) + "\n")


def follow(path: Path, watcher: Watcher, still_runs: Callable[[], bool]) -> dict[str, Any]:
    """Tells `watcher` what the file says until the run has ended.

    Args:
        still_runs: Asked now and then; a run that is over without having said so has died.

    Returns:
        What results.json says.

    Raises:
        QuorumLost, UserError: What the run ended with.
    """
    for event, value in _events(path, still_runs):
        if event == "ended":
            return _outcome(value)
        if event == "started":
            watcher.started(Start(**value))
        elif event == "turn":
            watcher.turn(*value)
        else:
            getattr(watcher, {"round_done": "round_done", "scored": "scored"}.get(event, "note"))(
                value
            )
    raise ProtocolError(
        "the coordinator's process ended without a word; its log says why (deploy server prints "
        "it). What was finished is intact: go on with `resume=True`"
    )


def _events(path: Path, still_runs: Callable[[], bool]) -> Iterator[tuple[str, Any]]:
    """Complete lines as they come; ends when the run is over and nothing is left to read."""
    position = 0
    while True:
        over = not still_runs()
        with path.open() as file:
            file.seek(position)
            for line in file:
                if line.endswith("\n"):
                    position += len(line.encode())
                    found = json.loads(line)
                    yield found["event"], found["value"]
        if over:
            return
        time.sleep(_OFTEN)


def _outcome(value: dict[str, Any]) -> dict[str, Any]:
    if value["how"] == "done":
        return value["results"]
    if value["how"] == "quorum":
        raise QuorumLost(value["text"])
    if value["how"] == "user":
        raise UserError(value["text"])
    raise ProtocolError(
        f"the coordinator's program failed: {value['text']}; its log has the rest. What was "
        "finished is intact: go on with `resume=True`"
    )
