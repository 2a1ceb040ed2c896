"""Which optimizer the server applies to the increments of G."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fedex_lora.aggregation.methods import Method

Name = Literal["fedavgm", "fedadam", "fedyogi"]


@dataclass(frozen=True)
class ServerOptimizer:
    """With Δ = Σ wᵢsᵢ(BᵢAᵢ − Bᵢ⁰Aᵢ⁰), what a round would add to G by itself:

        fedavgm:  m ← β₁·m + Δ,                                          G ← G + η·m
        fedadam:  m ← β₁·m + (1 − β₁)·Δ,  v ← β₂·v + (1 − β₂)·Δ²,        G ← G + η·m/(√v + τ)
        fedyogi:  m likewise,  v ← v − (1 − β₂)·Δ²·sign(v − Δ²),         G likewise

    v begins at τ², m at zero; nothing is corrected for that, as in the paper.

    Attributes:
        name: Which.
        learning_rate: η.
        momentum: β₁.
        beta2: β₂.
        tau: τ.

    Source:
        Hsu, Qi, Brown, arXiv 1909.06335 (FedAvgM); Reddi et al., "Adaptive Federated Optimization",
        arXiv 2003.00295.
    """

    name: Name
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    @property
    def adaptive(self) -> bool:
        """Whether every coordinate has a step size of its own."""
        return self.name != "fedavgm"

    def problems(self, method: Method, server_learning_rate: float) -> Iterator[tuple[str, str]]:
        """What it does not go with, and why."""
        if server_learning_rate != 1:
            yield "server_learning_rate", "the server's optimizer has one of its own; leave it out"
        if method.pooled or not method.exchanges:
            yield "server_optimizer", "nothing is exchanged"
        elif not (method.in_ledger or method.means_alone):
            told = "has no increments: its factors are made anew each round, and nothing of G is in"
            yield "server_optimizer", f"{told} the base"
