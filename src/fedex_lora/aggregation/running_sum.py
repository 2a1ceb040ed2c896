"""A running sum of factored matrices in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fedex_lora.aggregation.lowrank import LowRank


class RunningSum:
    """Σ cⱼ·Lⱼ·Rⱼ, one term after the other.

    The factors stand side by side in one buffer, written once. When they would hold more numbers
    than the dense matrix, they are multiplied out and the buffer is used anew: one large product
    for many terms, and memory under 2 × the dense matrix however many terms come (as long as those
    that come at once are not larger).

    Args:
        terms: How many terms are expected; with more the buffer grows.

    Example:
        >>> s = RunningSum(terms=2)
        >>> s.add(LowRank(torch.ones(5, 1), torch.ones(1, 4)), 2.0)
        >>> s.add(LowRank(torch.ones(5, 1), torch.ones(1, 4)), 1.0)
        >>> s.total(0.5).dense()[0, 0].item()
        1.5
    """

    def __init__(self, terms: int = 2) -> None:
        self._expected = max(1, terms)
        self._left = self._right = torch.empty(0)
        self._rank = 0
        self._dense: Tensor | None = None

    def add(self, term: LowRank, c: float) -> None:
        """Adds c·term; `term` is only read."""
        (place,) = self.places(term, 1)
        torch.mul(term.left, c, out=place.left)
        place.right.copy_(term.right)

    def places(self, like: LowRank, count: int) -> list[LowRank]:
        """Room for `count` terms of the shape and rank of `like`.

        Returns:
            Views of the buffer, which the caller must fill before anything else.
        """
        (*_, m, n), rank = like.shape, like.rank
        most = (m * n - 1) // (m + n)  # with more columns the dense matrix is not larger
        if self._rank + count * rank > most:
            self._multiply_out()
        self._make_room(like, count * rank, most)
        begin, self._rank = self._rank, self._rank + count * rank
        cuts = [slice(i, i + rank) for i in range(begin, self._rank, rank)]
        return [LowRank(self._left[..., cut], self._right[..., cut, :]) for cut in cuts]

    def total(self, c: float) -> LowRank | Tensor | None:
        """c times the sum, in its own memory: to be called once. None if nothing was added."""
        factors = self._factors()
        if factors is None or self._dense is not None or _large(factors):
            self._multiply_out()
            self._left = self._right = torch.empty(0)
            return self._dense if self._dense is None or c == 1 else self._dense.mul_(c)
        return factors if c == 1 else LowRank(factors.left.mul_(c), factors.right)

    def _factors(self) -> LowRank | None:
        if not self._rank:
            return None
        left, right = self._left[..., : self._rank], self._right[..., : self._rank, :]
        # Where fewer came than were expected, the room left over must not decide the last bits:
        # on some processors a product's depend on the strides.
        return LowRank(left.contiguous(), right.contiguous())

    def _multiply_out(self) -> None:
        factors, self._rank = self._factors(), 0
        if factors is None:
            return
        if self._dense is None:
            self._dense = factors.dense()
            return
        flat = self._dense.view(-1, *self._dense.shape[-2:])  # added to in place: no second one
        left, right = (t.reshape(-1, *t.shape[-2:]) for t in (factors.left, factors.right))
        torch.baddbmm(flat, left, right, out=flat)

    def _make_room(self, like: LowRank, more: int, most: int) -> None:
        """Room in the buffers for `more` columns."""
        used = self._rank
        room = self._left.shape[-1] if self._left.dim() > 1 else 0
        if used + more <= room:
            return
        *batch, m, n = like.shape
        wanted = 2 * used if room else self._expected * like.rank
        rank = max(used + more, min(wanted, most))
        left, right = like.left.new_empty(*batch, m, rank), like.right.new_empty(*batch, rank, n)
        if used:
            left[..., :used] = self._left[..., :used]
            right[..., :used, :] = self._right[..., :used, :]
        self._left, self._right = left, right


def _large(factors: LowRank) -> bool:
    m, n = factors.shape[-2:]
    return factors.rank * (m + n) >= m * n
