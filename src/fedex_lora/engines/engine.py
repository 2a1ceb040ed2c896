"""What the round loop needs of whatever carries its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedex_lora.engines.local import LocalEngine
from fedex_lora.federation.loop import Transport
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState

Scores = Mapping[str, float]


class Engine(Transport, Protocol):
    """A transport with clients that can score the models they are given.

    Attributes:
        settings: The federation's; the loop replaces them when clients join.
        examples: How many rows each client trains on, as it declared.
        validation: How many rows of its own each client scores models on, by client.
        server: The coordinator's own model.
    """

    settings: Settings

    @property
    def examples(self) -> Mapping[str, int]: ...

    @property
    def validation(self) -> Mapping[str, int]: ...

    @property
    def server(self) -> LocalEngine: ...

    def newcomers(self) -> list[str]:
        """Clients that have joined since the last call and are not in the settings yet."""
        ...

    def client_scores(
        self, state: ServerState, clients: Sequence[str]
    ) -> Mapping[str, Scores] | None:
        """The clients' scores of the models they start the next round from.

        Returns:
            By client; None if they come with the next round's updates.
        """
        ...

    def deliver(self, state: ServerState) -> Mapping[str, Scores]:
        """Brings the last model to all clients; their scores of it where `client_scores` gave
        None."""
        ...
