"""Weighted means of one layer's factors and their covariance, client after client.

The residual of averaging, Σ wᵢBᵢAᵢ − B̄Ā, equals the covariance Σ wᵢ(Bᵢ − B̄)(Aᵢ − Ā). It is
computed as one computes a covariance: by Welford's update, on the drifts D = B − B₁ and E = A − A₁
from where the first client ended, so that nothing cancels and no out × in matrix is formed. (A
covariance is the same from any reference; the factors the round began with would do as well, but
had to be read besides.) With Nⱼ = n₁ + … + nⱼ,

    term_j = (n_j·N_{j−1}/N_j)·(D_j − D̄_{j−1})(E_j − Ē_{j−1}),   residual = Σ_{j≥2} term_j / N_k.

The terms are a factorisation of rank at most (k−1)·r. They come in the order in which clients are
added; in one order they are the same bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.running_sum import RunningSum

Pair = tuple[Tensor, Tensor]


class Covariance:
    """Running means of B (out × r) and A (r × in), and Σ nᵢ(Bᵢ − B̄)(Aᵢ − Ā).

    Args:
        clients: How many are expected; for them memory is taken once.
        terms: Whether the covariance is wanted; without it only the means are kept.

    Attributes:
        weight: N, the sum of the weights so far.

    Example:
        >>> one = Covariance()
        >>> for n, x in ((1.0, 1.0), (1.0, 3.0), (2.0, 6.0)):
        ...     one.add(n, torch.full((1, 1), x), torch.full((1, 1), x))
        >>> one.means()[0].item(), one.spread().dense().item()    # mean 4, variance 4.5
        (4.0, 4.5)
    """

    def __init__(self, clients: int = 2, terms: bool = True) -> None:
        self.weight = 0.0
        self._terms = RunningSum(clients - 1) if terms else None
        self._first = self._drift = (torch.empty(0), torch.empty(0))

    def add(self, n: float, b: Tensor, a: Tensor) -> None:
        """Takes in one client. The tensors of the first one must stay as they are."""
        self._take(n, (b, a), (None, None))

    def _take(self, n: float, ends: Pair, beyond: Pair | tuple[None, None]) -> None:
        """Takes in `ends` + `beyond`, which are not added up: that would round the difference."""
        if not self.weight:
            b, a = self._first = ends
            self._drift = (torch.zeros_like(b), torch.zeros_like(a))
            self.weight = n
            return
        before, self.weight = self.weight, self.weight + n
        places = self._terms.place(*ends) if self._terms else (None, None)
        for x, more, first, mean, drift in zip(ends, beyond, self._first, self._drift, places):
            drift = torch.sub(x, first, out=drift)
            drift = (drift if more is None else drift.add_(more)).sub_(mean)  # D_j − D̄_{j−1}
            mean.add_(drift, alpha=n / self.weight)
        if places[0] is not None:
            places[0].mul_(n * before / self.weight)

    def combine(self, other: Covariance) -> None:
        """Takes in all clients of another one; that is not to be used any more.

        Source:
            Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
            variances", 1979: the means differ by a drift of weight n·N/(n + N).
        """
        if not self.weight:
            self.__dict__ |= other.__dict__
            return
        n = other.weight
        if n:
            self._take(n, other._first, other._drift)
            if self._terms and other._terms:
                self._terms.combine(other._terms)

    def means(self) -> tuple[Tensor, Tensor]:
        """B̄ and Ā, in the memory of the running means: to be called once."""
        (b, a), (d, e) = self._first, self._drift
        return d.add_(b), e.add_(a)

    def spread(self, scale: float = 1.0) -> Delta | None:
        """scale·Σ wᵢ(Bᵢ − B̄)(Aᵢ − Ā) with wᵢ = nᵢ / N, to be called once; None for one client."""
        return self._terms.total(scale / self.weight) if self._terms else None
