"""Rounds that do not wait for everybody: what a late update counts, and what takes one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedex_lora.aggregation.combining import Combining
    from fedex_lora.aggregation.methods import Method


@dataclass(frozen=True)
class Asynchronous:
    """An update that is τ rounds late is added to G from the version that it started from:

        G' = G + η·Σ uᵢ·sᵢ(BᵢAᵢ − Bᵢ⁰Aᵢ⁰) / Σ uᵢ,    uᵢ = nᵢ·(1 + τᵢ)^−a

    over all updates that a round takes, punctual ones (τ = 0) and late ones, each with its own
    start Bᵢ⁰, Aᵢ⁰; the head likewise. The factors that clients get next are the method's, of the
    punctual updates alone, with their share of η; what late ones add goes into the ledger.

    Attributes:
        staleness: How many rounds late an update may be, at most.
        exponent: a.
        delay: Rehearsal in one process: the probability that an update comes late, by 1 to
            `staleness` rounds; drawn from the seed.

    Source:
        The weight: Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", arXiv 1903.03934
        (polynomial). Rounds that take what has come: Nguyen et al., "Federated Learning with
        Buffered Asynchronous Aggregation", arXiv 2106.06639. Neither is about LoRA.

    Example:
        >>> Asynchronous(staleness=2, exponent=0.5).weight(12, late=3)
        6.0
    """

    staleness: int = 1
    exponent: float = 0.5
    delay: float = 0.0

    def weight(self, n: float, late: int) -> float:
        """u of an update of n rows (1 where clients count alike) that is so many rounds late."""
        return n * (1 + late) ** -self.exponent

    def problems(
        self, method: Method, combining: Combining, scaffold: bool
    ) -> Iterator[tuple[str, str]]:
        """What it does not go with, and why."""
        if method.pooled or not method.exchanges:
            yield "asynchronous", "nothing is exchanged"
        elif not (method.shared_base and method.residual in ("exact", "truncated")):
            told = "a late update is added through the ledger of a base that all clients share"
            yield "asynchronous", f"{told}, which this method has not"
        if combining.robust:
            yield "asynchronous", f"{combining.mean} compares updates that started alike"
        if scaffold:
            yield "asynchronous", "control variates of a start that is gone are of no use"
