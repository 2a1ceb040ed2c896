"""FedDPA: a pair of factors that is shared, and one beside it that stays with its client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import OWN_PAIR, Average

if TYPE_CHECKING:
    from fedex_lora.aggregation.adapter import Factors, LayerShape


@dataclass(frozen=True)
class OwnPair(Average):
    """The shared pair is averaged; beside it client i has its own Bᵢ*, Aᵢ*, which never leave it:

        B' = B⁰ + η(B̄ − B⁰), A' likewise;    its model is  W0 + s·((1 − λ)·B'A' + λ·Bᵢ*Aᵢ*)

    In a round a client first trains its own pair in that model, the shared one and the head as they
    were sent, and then the shared pair and the head in W0 + s·BA, as under plain averaging. So it
    trains twice. What averages miss is dropped.

    The paper mixes by a weight that follows each example's likeness to the client's training rows;
    here λ is one number, as in training in the published code, so that a client's model can be
    exported: as one pair of rank 2r. There the own pair begins with round 2, here with round 1, at
    A drawn from the seed and B = 0.

    Attributes:
        mix: λ, above 0 and at most 1.

    Source:
        Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", arXiv 2403.19211
        (FedDPA-T); the head is averaged with the shared pair, of which the paper has none.
    """

    name = "average, a pair of one's own beside"
    own = OWN_PAIR
    private = True

    mix: float = 0.5

    def pair(self, layers: Mapping[str, LayerShape], seed: int) -> dict[str, Factors]:
        from fedex_lora.aggregation.adapter import fresh  # noqa: PLC0415 (no torch for the table)
        from fedex_lora.aggregation.seeding import derive  # noqa: PLC0415

        drawn = fresh(layers, derive(seed, "own pair"))
        return {name: replace(f, scale=self.mix * f.scale) for name, f in drawn.items()}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 < self.mix <= 1:
            yield f"mix: expected a number above 0 and at most 1, got {self.mix}"
