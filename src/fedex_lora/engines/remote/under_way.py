"""Messages under way to clients on other machines, and how long somebody is waited for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.messages import Broadcast
from fedex_lora.federation.secure.messages import Ask


@dataclass
class Sent:
    """A message under way."""

    client: str
    node: str
    expires: float
    nbytes: int
    again: bool = False
    round: int = 0  # of the update that was asked for, if one was


@dataclass
class Run:
    """One exchange under way, and what came of it.

    Attributes:
        kind: Of its messages: round, evaluate, final or secure.
        messages: What the server counts on sending, by client.
        counted: Bytes of those that were sent as they are.
        spent: Bytes of all that was sent.
        asks: Under secure aggregation, what each client is asked.
    """

    exchange: Exchange
    kind: str
    messages: Mapping[str, Broadcast]
    under_way: dict[str, Sent] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)  # by client, why nothing was sent
    counted: dict[str, int] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=dict)
    good: int = 0
    losses: list[float] = field(default_factory=list)
    told: int = -1
    asks: Mapping[str, Ask] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return self.kind in ("round", "secure")

    def brings(self, client: str) -> bool:
        """Whether a broadcast goes with what this client is sent."""
        return client not in self.asks or self.asks[client].trains

    @property
    def number(self) -> int:
        """The round it belongs to: that which is trained, or whose model is scored."""
        return self.exchange.round - (not self.trains)


class Patience:
    """Waits for so many seconds from the first moment that something is lacking."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.since: float | None = None

    def holds(self, lacking: bool) -> bool:
        now = time.monotonic()
        if lacking and self.since is None:
            self.since = now
        return lacking and now - (self.since or now) <= self.seconds
