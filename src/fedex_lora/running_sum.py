"""A running sum of factored matrices in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fedex_lora.lowrank import LowRank


class RunningSum:
    """Σ cⱼ·Lⱼ·Rⱼ, one term after the other.

    The factors stand side by side in one buffer, written once. When they would hold more numbers
    than the dense matrix, they are multiplied out and the buffer is used anew: one large product
    for many terms, and memory under 2 × the dense matrix however many terms come.

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
        m, n = term.shape[-2:]
        if (self._rank + term.rank) * (m + n) >= m * n:
            self._multiply_out()
        if term.rank * (m + n) >= m * n:
            self._plus(term.dense().mul_(c))
            return
        self._make_room(term)
        end = self._rank + term.rank
        torch.mul(term.left, c, out=self._left[..., self._rank : end])
        self._right[..., self._rank : end, :].copy_(term.right)
        self._rank = end

    def total(self, c: float) -> LowRank | Tensor | None:
        """c times the sum, in its own memory: to be called once. None if nothing was added."""
        if self._dense is not None:
            self._multiply_out()
            self._left = self._right = torch.empty(0)
            return self._dense.mul_(c)
        factors = self._factors()
        return LowRank(factors.left.mul_(c), factors.right) if factors else None

    def _factors(self) -> LowRank | None:
        if not self._rank:
            return None
        return LowRank(self._left[..., : self._rank], self._right[..., : self._rank, :])

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

    def _plus(self, w: Tensor) -> None:
        self._dense = w if self._dense is None else self._dense.add_(w)

    def _make_room(self, term: LowRank) -> None:
        """Room in the buffers for one more term."""
        room = self._left.shape[-1] if self._left.dim() > 1 else 0
        if self._rank + term.rank <= room:
            return
        *batch, m, n = term.shape
        wanted = 2 * self._rank + term.rank if room else self._expected * term.rank
        rank = max(self._rank + term.rank, min(wanted, m * n // (m + n)))
        left, right = term.left.new_empty(*batch, m, rank), term.right.new_empty(*batch, rank, n)
        if (factors := self._factors()) is not None:
            left[..., : self._rank] = factors.left
            right[..., : self._rank, :] = factors.right
        self._left, self._right = left, right
