"""FedSA-LoRA: A is shared, B stays with its client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Assignment

if TYPE_CHECKING:
    from fedex_lora.aggregation.statistics import Statistics


@dataclass(frozen=True)
class SharedA(Assignment):
    """A' = A⁰ + η(Ā − A⁰); B is each client's own, and never leaves it.

    A holds what clients have in common, B what is a client's own. The server cannot know what B
    does, so nobody has a global model: clients score, and export their own.

    Source:
        Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv
        2410.01463. The head is averaged with A; the paper does not say what becomes of it.
    """

    name = "A averaged, B own"
    shared = frozenset("A")
    own = frozenset("B")
    private = True

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(s.moved)
