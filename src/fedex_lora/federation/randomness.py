"""Random numbers that nobody can know or repeat: from the operating system's generator.

What a seed gives, everybody who has the recipe can compute, and subtract. Noise that is to hide
something, and the draw of the rows or clients that it is spent on, come from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

Bits = Callable[[int], Tensor]
"""(how many) → so many int64, each of 64 random bits."""


def secret(count: int) -> Tensor:
    """Bits of the operating system, of which no two calls give the same."""
    return torch.frombuffer(bytearray(os.urandom(8 * count) or bytes(8)), dtype=torch.int64)[:count]


def rehearsed(seed: int) -> Bits:
    """Bits that are a function of the seed: for tests. What they hide is not hidden."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)

    return drawn


def uniform(bits: Bits, count: int) -> Tensor:
    """Float64 numbers within (0, 1): the middles of 2⁵³ equal parts.

    Example:
        >>> u = uniform(rehearsed(0), 10_000)
        >>> bool(0 < u.min() and u.max() < 1), round(u.mean().item(), 2)
        (True, 0.5)
    """
    return (((bits(count) >> 11) & (2**53 - 1)).double() + 0.5) / 2**53


def normal(bits: Bits, like: Tensor) -> Tensor:
    """N(0, 1), independent in every entry, of the shape, dtype and device of `like`.

    They are the quantiles of uniform numbers, in float64.

    Example:
        >>> x = normal(rehearsed(0), torch.empty(100, 100))
        >>> bool(x.mean().abs() < 0.03), round(x.std().item(), 1)
        (True, 1.0)
    """
    drawn = torch.special.ndtri(uniform(bits, like.numel()))
    return drawn.reshape(like.shape).to(like)


def poisson_sample(bits: Bits, count: int, rate: float) -> list[int]:
    """Of `count` things each with probability `rate`, independently."""
    return torch.nonzero(uniform(bits, count) < rate).flatten().tolist()
