"""Clients' ranks that shrink: which of a client's last rank rows it can do without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fedex_lora.aggregation.adapter import Factors

    Layers = Mapping[str, Factors]

_LEAST = 1e-30  # of a norm that is divided by


@dataclass(frozen=True)
class Pruning:
    """HetLoRA's self-pruning. A client of rank r may come down to r' = ⌊γr⌋, at least 1. It trains

        F(B, A) + λ·S(B, A),    S(B, A) = Σ ‖B[:, r':]‖_F · ‖A[r':, :]‖_F    over its layers,

    and if S is smaller than it began, the last r − r' columns of B and rows of A are dropped, and
    its rank is r' from then on.

    The paper speaks of one pair of factors; over several layers S is summed, so that a client has
    one rank. It rounds γr in no way; here it is rounded down.

    Attributes:
        decay: γ, below 1.
        penalty: λ.

    Source:
        Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
        arXiv 2401.06432.

    Example:
        >>> Pruning(decay=0.75, penalty=0.0).kept(8), Pruning(0.5, 0.0).kept(1)
        (6, 1)
    """

    decay: float
    penalty: float

    def kept(self, rank: int) -> int:
        """r' of a client of that rank."""
        return max(1, floor(self.decay * rank))

    def last(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of A and the columns of B that a client may do without."""
        kept = self.kept(a.shape[0])
        return a[kept:], b[:, kept:]

    def gradients(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """∂S/∂A = ‖B₂‖·A₂/‖A₂‖ and ∂S/∂B = ‖A₂‖·B₂/‖B₂‖ of one layer's last rows A₂ and columns B₂,
        zero elsewhere and where a norm is zero."""
        last_a, last_b = self.last(a, b)
        norm_a, norm_b = last_a.norm(), last_b.norm()
        along_a, along_b = 0 * a, 0 * b
        kept = self.kept(a.shape[0])
        along_a[kept:] = last_a * (norm_b / norm_a.clamp_min(_LEAST))
        along_b[:, kept:] = last_b * (norm_a / norm_b.clamp_min(_LEAST))
        return along_a, along_b

    def size(self, layers: Layers) -> float:
        """S, in float64."""
        pairs = (self.last(f.A.double(), f.B.double()) for f in layers.values())
        return sum((a.norm() * b.norm()).item() for a, b in pairs)

    def prunes(self, start: Layers, end: Layers) -> bool:
        """Whether a client that began and ended there comes down to a lower rank."""
        return self.size(end) < self.size(start)

    def without_last(self, layers: Layers) -> dict[str, Factors]:
        """The same at the same rank, zero in what is dropped."""
        found = {}
        for name, f in layers.items():
            kept, a, b = self.kept(f.rank), f.A.clone(), f.B.clone()
            a[kept:], b[:, kept:] = 0, 0
            found[name] = replace(f, A=a, B=b)
        return found
