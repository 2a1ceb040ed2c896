"""FLoRIST: the stacked adapters, cut to the rank that holds most of their energy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Reinit

if TYPE_CHECKING:
    from fedex_lora.aggregation.statistics import Statistics


@dataclass(frozen=True)
class Thresholded(Reinit):
    """P = Σ wᵢsᵢBᵢAᵢ = UΣVᵀ, of which the first p singular values go to all clients:

        p = min{p : Σ_{j≤p} σⱼ² ≥ τ·Σⱼ σⱼ²},    into the base: U_pΣ_pV_pᵀ,

    and clients begin anew, A fresh and B = 0, as under FLoRA. The decomposition is of the stacked
    factors, by QR of both and an SVD of the small core; no out × in matrix is formed. What lies
    beyond p is lost. τ = 1 is `fedex-reinit`.

    Attributes:
        energy: τ, above 0 and at most 1.

    Source:
        Ramesh, Dass, "FLoRIST", arXiv 2506.09199.
    """

    name = "reinit, cut by energy"

    energy: float = 0.99

    def assign(self, s: Statistics) -> Assigned:
        assert s.product is not None
        return Assigned(None, s.product.keeping(self.energy))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 < self.energy <= 1:
            yield f"energy: expected a number above 0 and at most 1, got {self.energy}"
