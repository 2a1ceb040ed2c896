"""Client-level differential privacy: noise on the mean of clipped updates, which the server adds,
or where it sees sums alone the clients, a share each.

McMahan et al. 2018 (arXiv 1710.06963), and for the bound that follows the updates' norms Andrew et
al. 2021 (arXiv 1905.03871). A client's clipped drift, or zero in its place, is what is hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedex_lora.aggregation.seeding import derive
from fedex_lora.errors import ProtocolError
from fedex_lora.federation.messages import Tensors, norm_of
from fedex_lora.federation.randomness import Bits, normal, rehearsed, secret

SLACK = 1e-5  # of a bound: a norm that was clipped to it in float32
LEAST, MOST = 1e-9, 1e9  # of a bound: beyond them float32 and sums in fixed point hold no noise


@dataclass(frozen=True)
class MeanNoise:
    """(Σ of the clipped drifts of those who came + N(0, deviation²)) / asked.

    Attributes:
        bound: C, of a drift over all its tensors together; what rounding put on top is clipped.
        deviation: Of the noise on the sum: noise multiplier times bound.
        asked: m, how many clients the round is for: a number that no client changes.
        bits: Where the noise is drawn from.
    """

    bound: float
    deviation: float
    asked: int
    bits: Bits = secret

    def share(self, tensors: Tensors, start: Tensors, taken: int, first: bool) -> Tensors:
        """An update in whose place the server takes this, so that the mean over `taken` of them is
        the noised one over `asked`.

        Args:
            first: Whether it is the one that carries the noise.
        """
        drift = {name: tensors[name] - start[name] for name in sorted(tensors)}
        factor, found = _factor(drift, self.bound), {}
        for name, moved in drift.items():
            moved = factor * moved
            if first:
                moved = moved + self.deviation * normal(self.bits, moved)
            found[name] = start[name] + (taken / self.asked) * moved
        return found


def _factor(drift: Tensors, bound: float) -> float:
    """What clips a drift that float32 may have rounded upwards."""
    norm = norm_of(drift.values())
    return bound / norm if norm > bound else 1.0


WITHIN = "within"


def told_bound(bound: object, adaptive: bool) -> float:
    """A bound that a client was told. Whichever it is costs the same, as the noise follows it.

    Raises:
        ProtocolError: It is no bound, or by the client's own recipe the bound is fixed.
    """
    if not adaptive:
        raise ProtocolError("told a bound; that of its own recipe is fixed (client_level.adaptive)")
    if type(bound) is not float or not LEAST <= bound <= MOST:
        raise ProtocolError(
            f"told a bound of {str(bound)[:40]}; expected a number from {LEAST:g} to {MOST:g}"
        )
    return bound


_TAIL = 12.0  # standard deviations that no entry of the noise exceeds, but for 1e-32


@dataclass(frozen=True)
class SumNoise:
    """Σ over the clients that stay of (a clipped drift + N(0, deviation²/least)): never less noise
    than deviation², as at least so many stay.

    Where the bound follows the drifts' norms, it is a round's own, and the sum has a part of its
    own, `WITHIN`: over the same clients ±½ + N(0, of_count²/least), +½ of who is within the bound.

    Attributes:
        bound: C, of a drift over all its tensors together.
        deviation: Of the noise on the sum: noise multiplier times C.
        least: t, how many clients must stay.
        seed: Of a rehearsal, whose noise hides nothing.
        of_count: Deviation of the noise on the count; None where the bound is fixed.
    """

    bound: float
    deviation: float
    least: int
    seed: int | None = None
    of_count: float | None = None

    def at(self, bound: object) -> SumNoise:
        """The same with a round's bound, by which the noise is as much larger or smaller; None for
        the bound as it stands.

        Raises:
            ProtocolError: It is no bound, or the bound is fixed.
        """
        if bound is None:
            return self
        new = told_bound(bound, self.of_count is not None)
        return replace(self, bound=new, deviation=self.deviation * (new / self.bound))

    @property
    def largest(self) -> float:
        """Of a drift's entries, noise included; a number that follows from no client's."""
        return self.bound + _TAIL * self.deviation / math.sqrt(self.least)

    @property
    def largest_count(self) -> float:
        """The same of a client's part of the count."""
        assert self.of_count is not None
        return 0.5 + _TAIL * self.of_count / math.sqrt(self.least)

    def share(self, drift: Tensors, client: str, round: int) -> dict[str, Tensor]:
        """What a client adds to the sum, in float64."""
        bits = secret
        if self.seed is not None:
            bits = rehearsed(derive(self.seed, "share of noise", round, client))
        exact = {name: drift[name].double() for name in sorted(drift)}
        factor = _factor(exact, self.bound)
        one = self.deviation / math.sqrt(self.least)
        found = {name: factor * t + one * normal(bits, t) for name, t in exact.items()}
        if self.of_count is not None:
            within = torch.tensor([_half(norm_of(exact.values()), self.bound)], dtype=torch.float64)
            found[WITHIN] = within + self.of_count / math.sqrt(self.least) * normal(bits, within)
        return found


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


def count_within(norms: Iterable[float], bound: float, noise: float, bits: Bits = secret) -> float:
    """Σ ±½ + N(0, noise²), +½ of each update that is within the bound.

    Args:
        norms: Of the updates as they came, clipped.
        noise: σ_b.
    """
    drawn = normal(bits, torch.empty(1, dtype=torch.float64)).item()
    return sum(_half(norm, bound) for norm in norms) + noise * drawn


def _half(norm: float, bound: float) -> float:
    return 0.5 if norm < bound * (1 - SLACK) else -0.5


def next_bound(bound: float, within: float, asked: int, quantile: float, rate: float) -> float:
    """C·exp(−η(b̃ − γ)), where b̃ is the noised share of updates within the bound C; from `LEAST` to
    `MOST`, as much noise may take it anywhere.

    Args:
        within: What `count_within` gives.
        asked: m; who did not come counts as half within.
        quantile: γ.
        rate: η.

    Example:
        >>> next_bound(1.0, -2.0, 4, 0.5, 0.2) > 1.0  # all four were beyond it
        True
    """
    exponent = -rate * (within / asked + 0.5 - quantile)
    return min(MOST, max(LEAST, bound * math.exp(min(max(exponent, -100.0), 100.0))))
