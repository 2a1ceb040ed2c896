"""HetLoRA: clients count by the size of what they changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Assignment

if TYPE_CHECKING:
    from fedex_lora.aggregation.statistics import Statistics

_LEAST = 1e-30  # so that clients none of which changed anything count alike


@dataclass(frozen=True)
class ByNorm(Assignment):
    """Factors zero-padded to the largest rank, averaged, and cut to each client's rank:

        pᵢ = ‖sᵢBᵢAᵢ‖_F / Σⱼ ‖sⱼBⱼAⱼ‖_F,    B' = Σ pᵢ(Bᵢ⁰ + η(Bᵢ − Bᵢ⁰)),    A' likewise.

    The weights are of each layer, and the numbers of examples do not count, as in the paper; the
    head is averaged by wᵢ. Ranks stay as the recipe gives them.

    Source:
        Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
        arXiv 2401.06432: padding, sparsity-weighted aggregation, truncation.
    """

    name = "average by norm"
    needs = frozenset({"ends"})
    ranks_may_differ = True

    def assign(self, s: Statistics) -> Assigned:
        if s.hollow:
            return Assigned(s.mean)
        norms = [x.end.delta().norm() + _LEAST for x in s.ends]
        total = sum(norms[1:], norms[0])
        a, b = 0 * s.mean.A, 0 * s.mean.B
        for norm, x in zip(norms, s.ends):
            a = a + norm / total * (x.start.A + s.eta * (x.end.A - x.start.A))
            b = b + norm / total * (x.start.B + s.eta * (x.end.B - x.start.B))
        return Assigned(replace(s.mean, A=a, B=b))
