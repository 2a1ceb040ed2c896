"""A running sum of factored matrices in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fedex_lora.lowrank import LowRank


class RunningSum:
    """Σ cⱼ·Lⱼ·Rⱼ, one term after the other.

    The factors stand side by side in one buffer, written once. As soon as they would hold more
    numbers than the dense matrix, the sum turns dense; memory stays under 2 × the dense matrix
    however many terms come.

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
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._rank = 0
        self._dense: Tensor | None = None

    def add(self, term: LowRank, c: float) -> None:
        """Adds c·term; `term` is only read."""
        if self._dense is not None:
            self._dense += term.dense().mul_(c)
            return
        m, n = term.shape[-2:]
        if (self._rank + term.rank) * (m + n) >= m * n:
            before = self.total(1.0)
            self._dense = term.dense().mul_(c)
            self._dense += 0 if before is None else _dense(before)
            self._left = self._right = None
            return
        left, right = self._room(term)
        end = self._rank + term.rank
        torch.mul(term.left, c, out=left[..., self._rank : end])
        right[..., self._rank : end, :].copy_(term.right)
        self._rank = end

    def total(self, c: float) -> LowRank | Tensor | None:
        """c times the sum, in its own memory: to be called once. None if nothing was added."""
        if self._dense is not None:
            return self._dense.mul_(c)
        if self._left is None or self._right is None:
            return None
        return LowRank(self._left[..., : self._rank].mul_(c), self._right[..., : self._rank, :])

    def _room(self, term: LowRank) -> tuple[Tensor, Tensor]:
        """The buffers, with room for one more term."""
        if self._left is None or self._right is None:
            self._grow(term, self._expected * term.rank)
        elif self._rank + term.rank > self._left.shape[-1]:
            self._grow(term, 2 * self._rank + term.rank)
        assert self._left is not None and self._right is not None
        return self._left, self._right

    def _grow(self, term: LowRank, rank: int) -> None:
        *batch, m, n = term.shape
        rank = max(term.rank, self._rank + term.rank, min(rank, m * n // (m + n)))
        left, right = term.left.new_empty(*batch, m, rank), term.right.new_empty(*batch, rank, n)
        if self._left is not None and self._right is not None:
            left[..., : self._rank] = self._left[..., : self._rank]
            right[..., : self._rank, :] = self._right[..., : self._rank, :]
        self._left, self._right = left, right


def _dense(w: LowRank | Tensor) -> Tensor:
    return w.dense() if isinstance(w, LowRank) else w
