"""Who wants to know how a run goes on, and what they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedex_lora.federation.record import Record


@dataclass(frozen=True)
class Start:
    """What a run is, for people.

    Attributes:
        examples: Training examples by client.
        per_round: How many clients a round has.
        done: Rounds that were done before, of a run that is resumed.
    """

    name: str
    method: str
    seed: int
    rounds: int
    examples: Mapping[str, int]
    out: str
    per_round: int = 0
    done: int = 0


class Watcher(Protocol):
    """What wants to know how a run goes on, e.g. the command line's display.

    `turn` is told steps of a client's turn and the last step's loss, where it is known; across
    machines, where steps are not, how many clients have answered, with no client's name.
    `scored` is told when a record that `round_done` has shown gets its clients' scores later.
    """

    def started(self, start: Start) -> None: ...
    def turn(
        self, round: int, client: str, done: int, total: int, loss: float | None = None
    ) -> None: ...
    def round_done(self, record: Record) -> None: ...
    def scored(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def started(self, start: Start) -> None: ...
    def turn(
        self, round: int, client: str, done: int, total: int, loss: float | None = None
    ) -> None: ...
    def round_done(self, record: Record) -> None: ...
    def scored(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
