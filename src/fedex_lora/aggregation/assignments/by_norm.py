"""HetLoRA: clients count by the size of what they changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from fedex_lora.aggregation.assignment import Assigned, Assignment
from fedex_lora.aggregation.pruning import Pruning

if TYPE_CHECKING:
    from fedex_lora.aggregation.statistics import Statistics

_LEAST = 1e-30  # so that clients none of which changed anything count alike


@dataclass(frozen=True)
class ByNorm(Assignment):
    """Factors zero-padded to the largest rank, averaged, and cut to each client's rank:

        pᵢ = ‖sᵢBᵢAᵢ‖_F / Σⱼ ‖sⱼBⱼAⱼ‖_F,    B' = Σ pᵢ(Bᵢ⁰ + η(Bᵢ − Bᵢ⁰)),    A' likewise.

    The weights are of each layer, and the numbers of examples do not count, as in the paper; the
    head is averaged by wᵢ. With γ below 1 clients also prune their ranks (`Pruning`).

    Attributes:
        decay: γ of the self-pruning; 1 for none.
        penalty: λ of it.

    Source:
        Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
        arXiv 2401.06432: padding, sparsity-weighted aggregation, truncation.
    """

    decay: float = 1.0
    penalty: float = 0.01

    name = "average by norm"
    needs = frozenset({"ends"})
    ranks_may_differ = True

    @property
    def pruning(self) -> Pruning | None:
        return Pruning(self.decay, self.penalty) if self.decay < 1 else None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 < self.decay <= 1:
            yield f"decay: expected a number above 0 and at most 1, got {self.decay}"
        if not 0 <= self.penalty < inf:
            yield f"penalty: expected a finite number, 0 or more, got {self.penalty}"

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
