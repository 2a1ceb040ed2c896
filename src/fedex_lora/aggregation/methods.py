"""The federated LoRA methods, each a few choices in one table.

A client starts a round from the global model G and moves away from it in its adapter's
coordinates. The ideal next global model is the weighted mean of where the clients ended,

    G' = G + η · Σᵢ wᵢ·sᵢ·(BᵢAᵢ − Bᵢ⁰Aᵢ⁰).

Methods differ in what is trained, in which factors the clients get next (the assignment), and
in what becomes of the residual, the part of G' that those factors cannot express.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from fedex_lora.errors import UserError

Trains = Literal["both", "B", "alternate", "all"]
Assignment = Literal["average", "reinit", "keep", "svd"]
Residual = Literal["exact", "truncated", "dropped", "zero"]


@dataclass(frozen=True)
class Method:
    """One method: three choices, and for the baselines whose data it trains on.

    Attributes:
        trains: "both" factors; "B" only; "alternate": B in odd rounds, A in even ones; "all"
            parameters of the model, without LoRA.
        assignment: "average" of the factors; "reinit": A fresh from the seed, B = 0; "keep": each
            client's own; "svd" of the mean product, cut to each client's rank.
        residual: "exact": all of it goes into the base; "truncated" to a rank; "dropped"; "zero":
            there is none by construction.
        source: Paper, and equations where it gives them.
        pooled: One client holds all the data.
        exchanges: Whether anything is sent at all.
    """

    trains: Trains
    assignment: Assignment
    residual: Residual
    source: str
    pooled: bool = False
    exchanges: bool = True

    @property
    def shared_base(self) -> bool:
        """Whether all clients have one base; not so if G is exact and factors differ per client."""
        return not (self.assignment in ("keep", "svd") and self.residual == "exact")

    @property
    def own_factors(self) -> bool:
        """Whether a client's factors are its own state, to be held for it while it is away."""
        return self.assignment == "keep" or not self.shared_base

    @property
    def ranks_may_differ(self) -> bool:
        """Whether clients may have different LoRA ranks."""
        return self.trains == "both" and self.assignment != "average" and self.exchanges

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
    "fedit": Method("both", "average", "dropped", "Zhang et al., arXiv 2305.05644"),
    "ffa": Method("B", "average", "zero", "Sun et al., arXiv 2403.12313"),
    "fedex": Method("both", "average", "exact", "Singhal et al., arXiv 2410.09432, eq. 5-16"),
    "fedex-svd": Method("both", "average", "truncated", "arXiv 2410.09432, eq. 17-18"),
    "fedex-reinit": Method(
        "both", "reinit", "exact", "arXiv 2410.09432, sec. 5; FLoRA, arXiv 2409.05976"
    ),
    "fedex-keep": Method("both", "keep", "exact", "arXiv 2410.09432, sec. 5"),
    "fedex-hetero": Method("both", "svd", "exact", "open problem in arXiv 2410.09432, sec. 5"),
    "flexlora": Method("both", "svd", "dropped", "Bai et al., arXiv 2402.11505"),
    "fedsvd": Method("B", "svd", "zero", "arXiv 2505.12805"),
    "rolora": Method("alternate", "average", "zero", "arXiv 2409.02346"),
    "full": Method("all", "average", "zero", "McMahan et al., federated full fine-tuning"),
    "centralized": Method("both", "average", "exact", "one client with all the data", pooled=True),
    "centralized-full": Method(
        "all", "average", "zero", "full fine-tuning on all the data", pooled=True
    ),
    "local": Method("both", "keep", "dropped", "every client alone", exchanges=False),
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: If there is none; the nearest name is suggested.

    Example:
        >>> get_method("fedex").assignment
        'average'
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)
    raise UserError(
        f"method.name: there is no method {name!r}; did you mean {near[0]!r}? "
        f"Known: {', '.join(METHODS)}"
    )
