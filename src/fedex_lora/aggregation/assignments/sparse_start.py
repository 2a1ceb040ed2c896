"""SLoRA: sparse rounds on the whole weights first, of which the factors of LoRA are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Average

if TYPE_CHECKING:
    from torch import Tensor

    from fedex_lora.aggregation.adapter import Factors, LayerShape


@dataclass(frozen=True)
class SparseStart(Average):
    """In the first rounds clients train W0 + D, D sparse; then LoRA begins where that ended:

        first rounds:    D' = Σ wᵢDᵢ, exact; of out·in numbers a share `density` is not zero
        after the last:  D ≈ U_rΣ_rV_rᵀ,  B = U_rΣ_r/s, A = V_rᵀ, and D is taken away
        later on:        B' = B⁰ + η(B̄ − B⁰), A' likewise, as under plain averaging

    What of D lies beyond the rank is lost, and so is what averages miss later. The places of D are
    random, the same for all clients, and never sent. How Σ is shared between B and A is this
    package's choice, as for `flexlora`.

    Attributes:
        density: The share of a weight's entries that the first rounds train.
        rounds: How many rounds are sparse.

    Source:
        Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models",
        arXiv 2308.06522.
    """

    name = "average, after sparse rounds"

    density: float = 0.01
    rounds: int = 1

    def first(self, layer: LayerShape, factors: Factors, seed: int) -> Assigned:
        import torch  # noqa: PLC0415 (the table is read without it)

        count = max(1, round(self.density * layer.out * layer.inp))
        return Assigned(factors, sparse=torch.zeros(count))

    def sparse(self, round: int) -> bool:
        return round <= self.rounds

    def condensed(self, layer: LayerShape, change: Tensor) -> Factors:
        import torch  # noqa: PLC0415

        from fedex_lora.aggregation.adapter import Factors  # noqa: PLC0415

        pad, rank = torch.nn.functional.pad, layer.rank
        u, s, vh = (x.to(change.dtype) for x in torch.linalg.svd(change.double(), False))
        missing = max(0, rank - len(s))
        b = pad(u[:, :rank] * s[:rank] / layer.scale, (0, missing)).contiguous()
        return Factors(pad(vh[:rank], (0, 0, 0, missing)).contiguous(), b, layer.scale)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 < self.density <= 1:
            yield f"density: expected a number above 0 and at most 1, got {self.density}"
        if self.rounds < 1:
            yield f"rounds: expected a number of at least 1, got {self.rounds}"
