"""The federated LoRA methods, each a few choices in one table.

A client starts a round from the global model G and moves away from it in its adapter's
coordinates. The ideal next global model is the weighted mean of where the clients ended,

    G' = G + η · Σᵢ wᵢ·sᵢ·(BᵢAᵢ − Bᵢ⁰Aᵢ⁰).

Methods differ in what is trained, in which factors the clients get next (the assignment), and
in what becomes of the residual, the part of G' that those factors cannot express.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedex_lora.aggregation.assignment import (
    Alone,
    Assignment,
    Average,
    Keep,
    OwnSvd,
    Reinit,
    Svd,
)
from fedex_lora.errors import RecipeError, did_you_mean

Trains = Literal["both", "B", "alternate", "all"]
Residual = Literal["exact", "truncated", "dropped", "zero"]


@dataclass(frozen=True)
class Method:
    """One method: three choices, and for the baselines whose data it trains on.

    Attributes:
        trains: "both" factors; "B" only; "alternate": B in odd rounds, A in even ones; "all"
            parameters of the model, without LoRA.
        assignment: Which factors the clients get next.
        residual: "exact": all of it goes into the base; "truncated" to a rank; "dropped"; "zero":
            there is none by construction.
        source: Paper, and equations where it gives them.
        pooled: One client holds all the data.
    """

    trains: Trains
    assignment: Assignment
    residual: Residual
    source: str
    pooled: bool = False

    @property
    def in_ledger(self) -> bool:
        """Whether residuals go into the base."""
        return self.residual in ("exact", "truncated")

    @property
    def shared_base(self) -> bool:
        """Whether all clients have one base; not so if G is exact and factors differ per client."""
        return not (self.assignment.own and self.in_ledger)

    @property
    def exchanges(self) -> bool:
        """Whether anything is sent at all."""
        return not self.assignment.head_private

    @property
    def averages(self) -> bool:
        """Whether clients get the mean of their factors."""
        return isinstance(self.assignment, Average)

    @property
    def ranks_may_differ(self) -> bool:
        """Whether clients may have different LoRA ranks."""
        return self.trains == "both" and self.assignment.ranks_may_differ

    def trained(self, round: int) -> frozenset[str]:
        """Which of the factors "A" and "B" clients train in a round (rounds count from 1).

        Example:
            >>> sorted(METHODS["rolora"].trained(1)), sorted(METHODS["rolora"].trained(2))
            (['B'], ['A'])
        """
        alternate = "B" if round % 2 else "A"
        choice = {"both": "AB", "B": "B", "alternate": alternate, "all": ""}[self.trains]
        return frozenset(choice)


METHODS: dict[str, Method] = {
    "fedit": Method("both", Average(), "dropped", "Zhang et al., arXiv 2305.05644"),
    "ffa": Method("B", Average(), "zero", "Sun et al., arXiv 2403.12313"),
    "fedex": Method("both", Average(), "exact", "Singhal et al., arXiv 2410.09432, eq. 5-16"),
    "fedex-svd": Method("both", Average(), "truncated", "arXiv 2410.09432, eq. 17-18"),
    "fedex-reinit": Method(
        "both", Reinit(), "exact", "arXiv 2410.09432, sec. 5; FLoRA, arXiv 2409.05976"
    ),
    "fedex-keep": Method("both", Keep(), "exact", "arXiv 2410.09432, sec. 5"),
    "fedex-hetero": Method("both", OwnSvd(), "exact", "open problem in arXiv 2410.09432, sec. 5"),
    "flexlora": Method("both", Svd(), "dropped", "Bai et al., arXiv 2402.11505"),
    "fedsvd": Method("B", Svd(), "zero", "arXiv 2505.12805"),
    "rolora": Method("alternate", Average(), "zero", "arXiv 2409.02346"),
    "full": Method("all", Average(), "zero", "McMahan et al., federated full fine-tuning"),
    "centralized": Method("both", Average(), "exact", "one client with all the data", pooled=True),
    "centralized-full": Method(
        "all", Average(), "zero", "full fine-tuning on all the data", pooled=True
    ),
    "local": Method("both", Alone(), "dropped", "every client alone"),
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: If there is none; the nearest name is suggested.

    Example:
        >>> get_method("fedex").assignment.name
        'average'
    """
    if name in METHODS:
        return METHODS[name]
    raise RecipeError(
        f"method.name: there is no method {name!r}{did_you_mean(name, METHODS, 0.0)} "
        f"Known: {', '.join(METHODS)}"
    )
