"""What the rejected alternative would cost: clients go on training the stacked factors.

Section 2 of arXiv 2410.09432: Σ wᵢBᵢAᵢ has factors of rank k·r; kept trainable, their rank grows by
the factor k every round. Computed from the layers' shapes; nothing of it is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedex_lora.experiments.analysis.runs import Run, Shape, head_numbers, site_shapes

_BYTES = 4  # float32, as everything is sent


@dataclass(frozen=True)
class Stacked:
    """One round of stacking.

    Attributes:
        rank: What every client trains in this round.
        full: Whether that is the rank of a whole matrix or more, for the smallest layer.
        bytes: Down and up of all clients: factors and head.
    """

    round: int
    rank: int
    full: bool
    bytes: int


def stacked(
    shapes: Iterable[Shape], rank: int, clients: int, rounds: int, head: int = 0
) -> list[Stacked]:
    """Rank r·k^(t−1) in round t, and k clients' bytes for it.

    Args:
        shapes: (out, in) of every adapted layer.
        rank: r of round 1, whose factors are a function of the seed and not sent down.
        clients: k, that take part in a round.
        head: Numbers of the trained head.

    Example:
        >>> [s.rank for s in stacked([(64, 32)], rank=2, clients=3, rounds=4)]
        [2, 6, 18, 54]
    """
    shapes = list(shapes)
    sides, smallest = sum(m + n for m, n in shapes), min(min(s) for s in shapes)
    found = []
    for round in range(1, rounds + 1):
        trained = rank * clients ** (round - 1)
        messages = 1 if round == 1 else 2
        numbers = messages * clients * (trained * sides + head)
        found.append(Stacked(round, trained, trained >= smallest, numbers * _BYTES))
    return found


def stacked_like(run: Run) -> list[Stacked]:
    """Stacking with a run's layers, head, clients, rank and rounds; empty without their shapes."""
    shapes = site_shapes(run.path)
    if not shapes:
        return []
    fed = run.recipe.federation
    rank = run.recipe.lora.r
    return stacked(shapes.values(), rank, fed.sampled, fed.rounds, head_numbers(run.path))
