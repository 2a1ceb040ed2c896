"""What carries bytes between the coordinator and the institutions' nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Failed:
    """No reply will come; `gone` if it may mend itself, as a connection does or a process."""

    reason: str
    gone: bool = False


class Courier(Protocol):
    """Carries blobs to nodes and back."""

    def nodes(self) -> list[str]:
        """Those connected now."""
        ...

    def owner(self, node: str) -> str | None:
        """The client whose node it is, by the key with which it is connected; None if nodes have no
        keys. What a message says of its sender is compared with this."""
        ...

    def bound(self, most: int) -> None:
        """From now on no larger reply is taken in, in bytes."""
        ...

    def send(self, node: str, blob: bytes, round: int, seconds: float) -> str | Failed:
        """Sends one message; a ticket for its reply, which is void after so many seconds."""
        ...

    def collect(self, tickets: Sequence[str]) -> list[tuple[str, bytes | Failed]]:
        """Replies that have come, each once."""
        ...


@dataclass(frozen=True)
class Waits:
    """How long is waited, in seconds.

    Attributes:
        round: For a reply.
        clients: While there are fewer clients than are needed.
    """

    round: float
    clients: float
