"""Numbers as integers modulo 2⁶⁴, with a unit for each tensor that follows its size.

A tensor whose largest entry over all clients is below 2ᵉ is counted in units of 2^(e − bits).
Nobody may know whose entry that is. So each client votes for all exponents up to its own with
random numbers, and for those above with zeros: of the sum, which is all that is seen, an entry is
zero (but for one chance in 2⁶⁴) exactly if nobody voted for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedex_lora.errors import UpdateRefused
from fedex_lora.federation.secure.primitives import Vector

LEAST, MOST = -88, 40  # exponents; what is smaller is zero, what is larger nobody can train from
LEVELS = MOST - LEAST


def exponent(tensor: Tensor) -> int:
    """The least e with all |entries| < 2ᵉ, at least `LEAST`.

    Raises:
        UpdateRefused: There is none up to `MOST`, or an entry is NaN.

    Example:
        >>> exponent(torch.tensor([0.3, -1.0])), exponent(torch.zeros(2))
        (1, -88)
    """
    ends = torch.aminmax(tensor.detach()) if tensor.numel() else ()
    largest = max((abs(end.item()) for end in ends), default=0.0)
    found = math.frexp(largest)[1] if largest else LEAST
    if not math.isfinite(largest) or found > MOST:
        raise UpdateRefused(f"an entry of {largest:.3g}; at most {2.0**MOST:.3g} can be summed")
    return max(found, LEAST)


def votes(tensors: Mapping[str, Tensor]) -> Vector:
    """A client's votes for each tensor's size: for every exponent above `LEAST` a number."""
    found = np.zeros((len(tensors), LEVELS), np.uint64)
    for row, (name, tensor) in zip(found, tensors.items(), strict=True):
        try:
            count = exponent(tensor) - LEAST
        except UpdateRefused as error:
            raise UpdateRefused(f"{name}: {error}") from None
        row[:count] = np.maximum(np.frombuffer(os.urandom(8 * count), np.uint64), 1)
    return found.reshape(-1)


def sizes(total: Vector) -> list[int]:
    """The exponent of each tensor's largest entry over all clients, from the sum of their votes.

    Example:
        >>> one, two = ({"a": torch.tensor([x]), "b": torch.zeros(1)} for x in (3.0, 0.1))
        >>> sizes(votes(one) + votes(two))
        [2, -88]
    """
    voted = total.reshape(-1, LEVELS) != 0
    return [LEAST + int(row.nonzero()[0].max(initial=-1)) + 1 for row in voted]


def encode(
    tensors: Mapping[str, Tensor], exponents: Sequence[int], weight: float, bits: int, clients: int
) -> Vector:
    """weight·x in units of 2^(e − bits), rounded; one vector of all tensors.

    Args:
        weight: n of the weights, as far as it goes into the sum.
        clients: How many there are at most; their sum cannot overflow then.

    Raises:
        UpdateRefused: An entry is larger than was agreed, or the sum could overflow.
    """
    if not 0 < weight * clients <= 2.0 ** (63 - bits):
        raise UpdateRefused(
            f"a weight of {weight:g} among {clients} clients could overflow the sum at "
            f"{bits} bits; lower privacy.secure_aggregation.bits"
        )
    vector = torch.empty(sum(t.numel() for t in tensors.values()), dtype=torch.int64)
    parts = vector.split([t.numel() for t in tensors.values()])
    for (name, tensor), e, part in zip(tensors.items(), exponents, parts, strict=True):
        if exponent(tensor) > e:
            raise UpdateRefused(f"{name}: the size that was agreed on is too small for it")
        units = tensor.detach().to(torch.float64).reshape(-1) * (weight * 2.0 ** (bits - e))
        part.copy_(units.round_())
    return vector.numpy().view(np.uint64)


def decode(
    total: Vector, shapes: Mapping[str, tuple[int, ...]], exponents: Sequence[int], bits: int
) -> dict[str, Tensor]:
    """Σ weight·x of each tensor as float64, from the sum of the vectors.

    Example:
        >>> x = {"a": torch.tensor([[0.5, -3.0]])}
        >>> both = encode(x, [2], 3.0, 40, 2) + encode(x, [2], 1.0, 40, 2)
        >>> decode(both, {"a": (1, 2)}, [2], 40)["a"].tolist()
        [[2.0, -12.0]]
    """
    found, first = {}, 0
    signed = torch.from_numpy(total.view(np.int64))
    for (name, shape), e in zip(shapes.items(), exponents, strict=True):
        count = math.prod(shape)
        part = signed[first : first + count].to(torch.float64)
        found[name] = part.mul_(2.0 ** (e - bits)).reshape(shape)
        first += count
    return found
