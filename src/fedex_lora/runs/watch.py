"""Who wants to know how a run goes on, and what they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedex_lora.federation.loop import Record


@dataclass(frozen=True)
class Start:
    """What a run is, for people; `examples` are training examples by client."""

    name: str
    method: str
    seed: int
    rounds: int
    examples: Mapping[str, int]
    out: str


class Watcher(Protocol):
    """What wants to know how a run goes on, e.g. the command line's display.

    `scored` is told when a record that `round_done` has shown gets its clients' scores later.
    """

    def started(self, start: Start) -> None: ...
    def turn(self, round: int, client: str, done: int, total: int) -> None: ...
    def round_done(self, record: Record) -> None: ...
    def scored(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def started(self, start: Start) -> None: ...
    def turn(self, round: int, client: str, done: int, total: int) -> None: ...
    def round_done(self, record: Record) -> None: ...
    def scored(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
