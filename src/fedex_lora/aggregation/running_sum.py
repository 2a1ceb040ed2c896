"""A running sum of factored matrices in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fedex_lora.aggregation.delta import Delta


class RunningSum:
    """Σ cⱼ·Lⱼ·Rⱼ, one term after the other.

    The factors stand side by side in one buffer, written once. When they would hold more numbers
    than the dense matrix, they are multiplied out and the buffer is used anew: one large product
    for many terms, and memory under 2 × the dense matrix however many terms come.

    Args:
        terms: How many terms are expected; with more the buffer grows.

    Example:
        >>> s = RunningSum(terms=2)
        >>> s.add(torch.ones(5, 1), torch.ones(1, 4), 2.0)
        >>> s.add(torch.ones(5, 1), torch.ones(1, 4))
        >>> s.total(0.5).dense()[0, 0].item()
        1.5
    """

    def __init__(self, terms: int = 2) -> None:
        self._expected = max(1, terms)
        self._left = self._right = torch.empty(0, 0)
        self._rank = 0
        self._dense: Tensor | None = None

    def add(self, left: Tensor, right: Tensor, c: float = 1.0) -> None:
        """Adds c · left · right; both are only read."""
        to_left, to_right = self.place(left, right)
        torch.mul(left, c, out=to_left)
        to_right.copy_(right)

    def place(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Room for a term of the shapes of `left` and `right`.

        Returns:
            Views of the buffer, which the caller must fill before anything else.
        """
        (out, rank), inp = left.shape, right.shape[1]
        most = (out * inp - 1) // (out + inp)  # with more columns the dense matrix is not larger
        if self._rank + rank > most:
            self._multiply_out()
        self._make_room(left, right, most)
        cut = slice(self._rank, self._rank + rank)
        self._rank += rank
        return self._left[:, cut], self._right[cut]

    def combine(self, other: RunningSum) -> None:
        """Adds what another sum holds."""
        if (found := other.total()) is not None:
            if found.right is not None:
                self.add(found.left, found.right)
            elif self._dense is None:
                self._dense = found.left
            else:
                self._dense += found.left

    def total(self, c: float = 1.0) -> Delta | None:
        """c times the sum, in its own memory: to be called once. None if nothing was added."""
        if self._dense is not None or (self._rank and self._is_large()):
            self._multiply_out()
            assert self._dense is not None
            return Delta(self._dense if c == 1 else self._dense.mul_(c))
        if not self._rank:
            return None
        left, right = self._filled()
        return Delta(left if c == 1 else left.mul_(c), right)

    def _filled(self) -> tuple[Tensor, Tensor]:
        # Where fewer came than were expected, the room left over must not decide the last bits:
        # on some processors a product's depend on the strides.
        return self._left[:, : self._rank].contiguous(), self._right[: self._rank]

    def _is_large(self) -> bool:
        out, inp = self._left.shape[0], self._right.shape[1]
        return self._rank * (out + inp) >= out * inp

    def _multiply_out(self) -> None:
        if not self._rank:
            return
        left, right = self._filled()
        self._rank = 0
        self._dense = left @ right if self._dense is None else self._dense.addmm_(left, right)

    def _make_room(self, left: Tensor, right: Tensor, most: int) -> None:
        """Room in the buffers for the columns of one more term."""
        needed, room = self._rank + left.shape[1], self._left.shape[1]
        if needed <= room:
            return
        rank = max(needed, min(2 * self._rank or self._expected * left.shape[1], most))
        new_left = left.new_empty(left.shape[0], rank)
        new_right = right.new_empty(rank, right.shape[1])
        if self._rank:
            new_left[:, : self._rank] = self._left[:, : self._rank]
            new_right[: self._rank] = self._right[: self._rank]
        self._left, self._right = new_left, new_right
