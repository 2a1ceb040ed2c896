"""RAVAN: several heads of low rank, between whose fixed factors small matrices are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Assignment

if TYPE_CHECKING:
    from torch import Tensor

    from fedex_lora.aggregation.adapter import Factors, LayerShape
    from fedex_lora.aggregation.statistics import Statistics


@dataclass(frozen=True)
class Heads(Assignment):
    """ΔW = s·Σₕ sₕBₕHₕAₕ, Bₕ and Aₕ fixed, Hₕ (p × p, p = ⌈r/heads⌉) and the numbers sₕ trained:

        before round 1:  [B₁ … B_heads] (out × r) has orthonormal columns, the stacked Aₕ (r × in)
                         orthonormal rows, Hₕ = 0 and sₕ = 1, so G is as loaded
        every round:     Hₕ' = Σ wᵢ·sₕᵢHₕᵢ and sₕ' = 1

    Clients send the products sₕHₕ, so Σ wᵢ·s·Σₕ sₕᵢBₕHₕᵢAₕ = s·Σₕ BₕHₕ'Aₕ: exact, and r²/heads
    numbers a layer whatever k.

    The paper tries several fixed factors; these are its Gram-Schmidt ones, made by QR in float64 of
    random matrices, a function of the seed that is never sent. All clients train all heads; the
    paper's choice of heads for clients with little room is not here.

    Attributes:
        heads: How many the rank r is divided into; r of them where r is less than the default.
            Where they do not divide it, the last one is narrower, and the rest of its H counts for
            nothing.

    Source:
        Raje, Askin, Jhunjhunwala, Joshi, "Ravan: Multi-Head Low-Rank Adaptation for Federated
        Fine-Tuning", arXiv 2506.05568.
    """

    name = "B and A fixed, heads averaged"

    heads: int = 4

    def misfits(self, rank: int) -> Iterator[str]:
        if self.heads > rank:
            yield f"heads: {self.heads} heads share the rank of {rank}; expected no more than that"

    def first(self, layer: LayerShape, factors: Factors, seed: int) -> Assigned:
        import torch  # noqa: PLC0415 (the table is read without it)

        from fedex_lora.aggregation.adapter import Factors  # noqa: PLC0415

        drawn = torch.randn(
            layer.out, layer.rank, generator=torch.Generator().manual_seed(seed)
        ).to(factors.B.device)
        a, b = _orthonormal(factors.A.mT).mT.contiguous(), _orthonormal(drawn)
        p = -(-layer.rank // self.heads)
        blocks = torch.zeros(-(-layer.rank // p), p, p)
        return Assigned(Factors(a, b, factors.scale), inner=blocks)

    def assign(self, s: Statistics) -> Assigned:
        return Assigned(s.start)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.heads < 1:
            yield f"heads: expected a number of at least 1, got {self.heads}"


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same span; those beyond the rows that there are are zero."""
    import torch  # noqa: PLC0415

    q = torch.linalg.qr(columns.double()).Q
    missing = columns.shape[1] - q.shape[1]
    return torch.nn.functional.pad(q, (0, missing)).to(columns.dtype)
