"""What a run needs of whatever carries its messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedex_lora.engines.stage import Stage
from fedex_lora.federation.loop import Transport
from fedex_lora.federation.settings import Settings


class Engine(Transport, Protocol):
    """A transport whose clients come and go.

    Attributes:
        settings: The federation's; the run replaces them when clients join.
        stage: The coordinator's own model.
        examples: How many rows each client trains on, as it declared.
        validation: How many rows of its own each client scores models on, by client.
        scores_later: Whether what clients think of a round's model comes with the next round's
            updates, and not before.
    """

    settings: Settings
    stage: Stage

    @property
    def scores_later(self) -> bool: ...

    @property
    def examples(self) -> Mapping[str, int]: ...

    @property
    def validation(self) -> Mapping[str, int]: ...

    def newcomers(self) -> list[str]:
        """Clients that have joined since the last call and are not in the settings yet."""
        ...
