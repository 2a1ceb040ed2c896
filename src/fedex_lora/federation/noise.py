"""Client-level differential privacy: noise on the mean of clipped updates, which the server adds,
or where it sees sums alone the clients, a share each.

McMahan et al. 2018 (arXiv 1710.06963), and for the bound that follows the updates' norms Andrew et
al. 2021 (arXiv 1905.03871). A client's clipped drift, or zero in its place, is what is hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedex_lora.aggregation.seeding import derive
from fedex_lora.federation.messages import Tensors
from fedex_lora.federation.randomness import Bits, normal, rehearsed, secret

SLACK = 1e-5  # of a bound: a norm that was clipped to it in float32


@dataclass(frozen=True)
class MeanNoise:
    """(Σ of the clipped drifts of those who came + N(0, deviation²)) / asked.

    Attributes:
        deviation: Of the noise on the sum: noise multiplier times bound.
        asked: m, how many clients the round is for: a number that no client changes.
        bits: Where the noise is drawn from.
    """

    deviation: float
    asked: int
    bits: Bits = secret

    def share(self, tensors: Tensors, start: Tensors, taken: int, first: bool) -> Tensors:
        """An update in whose place the server takes this, so that the mean over `taken` of them is
        the noised one over `asked`.

        Args:
            first: Whether it is the one that carries the noise.
        """
        found = {}
        for name in sorted(tensors):
            drift = tensors[name] - start[name]
            if first:
                drift = drift + self.deviation * normal(self.bits, drift)
            found[name] = start[name] + (taken / self.asked) * drift
        return found


_TAIL = 12.0  # standard deviations that no entry of the noise exceeds, but for 1e-32


@dataclass(frozen=True)
class SumNoise:
    """Σ over the clients that stay of (a clipped drift + N(0, deviation²/least)): never less noise
    than deviation², as at least so many stay.

    Attributes:
        bound: C, of a drift over all its tensors together.
        deviation: Of the noise on the sum: noise multiplier times C.
        least: t, how many clients must stay.
        seed: Of a rehearsal, whose noise hides nothing.
    """

    bound: float
    deviation: float
    least: int
    seed: int | None = None

    @property
    def largest(self) -> float:
        """Of a drift's entries, noise included; a number that follows from no client's."""
        return self.bound + _TAIL * self.deviation / math.sqrt(self.least)

    def share(self, drift: Tensors, client: str, round: int) -> dict[str, Tensor]:
        """What a client adds to the sum, in float64."""
        bits = secret
        if self.seed is not None:
            bits = rehearsed(derive(self.seed, "share of noise", round, client))
        exact = {name: drift[name].double() for name in sorted(drift)}
        norm = math.hypot(*(torch.linalg.vector_norm(t).item() for t in exact.values()))
        factor = min(1.0, self.bound / norm) if norm else 1.0  # float32 may have rounded upwards
        one = self.deviation / math.sqrt(self.least)
        return {name: factor * t + one * normal(bits, t) for name, t in exact.items()}


def split(noise: float, asked: int) -> tuple[float, float]:
    """The noise multipliers of the sum and of the count of updates within the bound, which together
    cost what `noise` costs alone: σ⁻² = σ_Δ⁻² + (2σ_b)⁻² (theorem 1 of Andrew et al.).

    Example:
        >>> of_sum, of_count = split(0.8, 100)
        >>> round((of_sum**-2 + (2 * of_count) ** -2) ** -0.5, 9), of_count
        (0.8, 5.0)
    """
    of_count = max(asked / 20, 1.5 * noise)
    return (noise**-2 - (2 * of_count) ** -2) ** -0.5, of_count


def next_bound(
    bound: float,
    norms: Iterable[float],
    asked: int,
    noise: float,
    quantile: float,
    rate: float,
    bits: Bits = secret,
) -> float:
    """C·exp(−η(b̃ − γ)), where b̃ is the noised share of updates within the bound C.

    Args:
        norms: Of the updates as they came, clipped.
        noise: σ_b, of the count.
        quantile: γ.
        rate: η.
    """
    within = sum((0.5 if norm < bound * (1 - SLACK) else -0.5) for norm in norms)
    drawn = normal(bits, torch.empty(1, dtype=torch.float64)).item()
    share = (within + noise * drawn) / asked + 0.5
    return bound * math.exp(-rate * (share - quantile))
