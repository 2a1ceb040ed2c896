"""What crosses between server and client in a round of secure aggregation, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from fedex_lora.federation.header import Limit
from fedex_lora.federation.loop import Exchange, Transport
from fedex_lora.federation.messages import Lost
from fedex_lora.federation.secure.primitives import Vector, canonical

Step = Literal["keys", "shares", "train", "open", "send"]
Sum = Literal["sizes", "numbers"]
SUMS: tuple[Sum, Sum] = ("sizes", "numbers")
MESSAGES = len(get_args(Step)) + 1  # that a client is sent in a round: it opens two sums
_WORDS = 1 << 20  # bytes of a header: of letters and shares, at most


@dataclass(frozen=True)
class Ask:
    """Server to client.

    Attributes:
        step: What is asked for. Where it is to train, the round's broadcast goes with it.
        about: JSON.
        numbers: How many numbers the answer holds under masks.
    """

    step: Step
    about: Mapping[str, Any]
    numbers: int = 0

    @property
    def trains(self) -> bool:
        """Whether the round's broadcast goes with it."""
        return self.step == "train"

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


def limit(numbers: int = 0) -> Limit:
    """Of a message with so many numbers under masks; letters and shares stand in its header."""
    return Limit(header=_WORDS, whole=8 + _WORDS + 8 * numbers, masked=True)


class SecureTransport(Transport, Protocol):
    """A transport that carries the messages of secure aggregation too."""

    def ask(self, exchange: Exchange, asks: Mapping[str, Ask]) -> Iterator[Answer | Lost]:
        """Delivers to each client what it is asked, all the same step; one reply a client."""
        ...
