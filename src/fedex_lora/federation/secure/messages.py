"""What crosses between server and client in a round of secure aggregation, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fedex_lora.federation.loop import Exchange, Transport
from fedex_lora.federation.messages import Lost
from fedex_lora.federation.secure.primitives import Vector, canonical

Step = Literal["keys", "shares", "train", "open", "send"]
Sum = Literal["sizes", "numbers"]
SUMS: tuple[Sum, Sum] = ("sizes", "numbers")


@dataclass(frozen=True)
class Ask:
    """Server to client.

    Attributes:
        step: What is asked for. Where it is to train, the round's broadcast goes with it.
        about: JSON.
    """

    step: Step
    about: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of what is asked, besides a broadcast."""
        return len(canonical(self.about))


@dataclass(frozen=True)
class Answer:
    """Client to server.

    Attributes:
        client: Who sent it, as the transport knows.
        about: JSON.
        vector: Numbers under masks.
        nbytes: Of the message it came in; None if it crossed no wire.
        resent: Bytes that were sent to the client on top of what was counted, to catch it up.
    """

    client: str
    about: Mapping[str, Any] = field(default_factory=dict)
    vector: Vector | None = None
    nbytes: int | None = None
    resent: int = 0


class SecureTransport(Transport, Protocol):
    """A transport that carries the messages of secure aggregation too."""

    def ask(self, exchange: Exchange, asks: Mapping[str, Ask]) -> Iterator[Answer | Lost]:
        """Delivers to each client what it is asked, all the same step; one reply a client."""
        ...
