"""LoRA-FAIR: B̄ corrected towards the ideal product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Average

if TYPE_CHECKING:
    from fedex_lora.aggregation.statistics import Statistics


@dataclass(frozen=True)
class CorrectedB(Average):
    """A' = Ā and B' = B̄ + ΔB, where ΔB minimises

        ‖Σ wᵢBᵢAᵢ − (B̄ + ΔB)Ā‖²_F + λ‖ΔB‖²_F,

    that is ΔB = R·Āᵀ(ĀĀᵀ + λ1)⁻¹ with R = Σ wᵢBᵢAᵢ − B̄Ā. λ = 0 gives the best B for Ā, a large λ
    plain averaging. What is still missed is dropped.

    The paper leaves the measure of similarity open and uses the cosine, by gradient descent; the
    squared distance has this closed form. λ = 0.01 is the paper's.

    Attributes:
        penalty: λ, at least 0.

    Source:
        Bian et al., "LoRA-FAIR", arXiv 2411.14961.
    """

    name = "average, B corrected"

    penalty: float = 0.01

    def assign(self, s: Statistics) -> Assigned:
        import torch  # noqa: PLC0415 (the table is read without it)

        missed, moved = s.averages_miss, s.moved
        if missed is None:
            return Assigned(moved)
        left, right = missed.factors()
        a = moved.A.double()
        one = torch.eye(len(a), dtype=a.dtype, device=a.device)
        towards = (right.double() @ a.mT) @ torch.linalg.pinv(a @ a.mT + self.penalty * one)
        correction = left @ (towards / s.layer.scale).to(left.dtype)
        return Assigned(replace(moved, B=moved.B + correction))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.penalty < float("inf"):
            yield f"penalty: expected a number of at least 0, got {self.penalty}"
