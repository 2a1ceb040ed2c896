"""What has been spent of a privacy budget, by dp-accounting.

Two data sets are neighbours when one has one row more (example level), or one client more (client
level). A step takes each with probability `rate`, independently, and adds Gaussian noise to the sum
of what was taken, clipped: the Poisson-subsampled Gaussian mechanism. Steps compose by their
privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), rounded upwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import dp_accounting
from dp_accounting.pld import PLDAccountant

from fedex_lora.errors import UserError

_INTERVAL = 1e-3  # of the privacy loss; ε comes out at most 0.1 % above that of a finer one
_MOST_NOISE, _LEAST_NOISE = 1e3, 0.2
_NONE = 0.01  # less noise than this, with which one step has an ε of 5,000, is counted as none
_CLOSE = 1e-3  # of a noise multiplier


@dataclass(frozen=True)
class Steps:
    """So many equal steps.

    Attributes:
        noise: The noise multiplier σ: standard deviation over the clipping bound.
        rate: With which probability a row, or a client, takes part in a step.
        count: How many steps.
    """

    noise: float
    rate: float
    count: int


class Spending(Protocol):
    """Where a client takes down what it spends."""

    def spend(self, client: str, new: Steps) -> float:
        """Takes it down before it is done, and returns ε of the run with it."""
        ...


@lru_cache(maxsize=4096)
def _epsilon(spent: tuple[Steps, ...], delta: float) -> float:
    # with little noise losses are of the order 1/(2σ²): a grid as fine would not fit into memory
    least = min((part.noise for part in spent if part.count and part.rate), default=1.0)
    interval = _INTERVAL * max(1.0, (0.1 / least) ** 2)
    accountant = PLDAccountant(value_discretization_interval=interval)
    for part in spent:
        if part.count and part.rate:
            step = dp_accounting.GaussianDpEvent(part.noise)
            sampled = dp_accounting.PoissonSampledDpEvent(part.rate, step)
            accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, part.count))
    return float(accountant.get_epsilon(delta))


def epsilon(spent: Iterable[Steps], delta: float) -> float:
    """ε of the whole at this δ; infinite without noise.

    Example:
        >>> round(epsilon([Steps(1.0, 0.01, 1000)], 1e-5), 1)
        1.8
        >>> epsilon([], 1e-5)
        0.0
    """
    spent = tuple(part for part in spent if part.count)
    if not spent:
        return 0.0
    return float("inf") if any(part.noise < _NONE for part in spent) else _epsilon(spent, delta)


def noise_for(budget: float, delta: float, rate: float, count: int) -> float:
    """The smallest noise multiplier (to 0.1 %, from above) with which `count` steps stay within ε.

    Raises:
        UserError: No noise up to 1,000 times the clipping bound is enough.

    Example:
        >>> noise = noise_for(2.0, 1e-5, 0.01, 1000)
        >>> epsilon([Steps(noise, 0.01, 1000)], 1e-5) <= 2.0
        True
        >>> epsilon([Steps(0.99 * noise, 0.01, 1000)], 1e-5) <= 2.0
        False
    """

    def fits(noise: float) -> bool:
        return epsilon([Steps(noise, rate, count)], delta) <= budget

    # a guess near the answer: with far too little noise ε is large, and takes long to compute
    guess = rate * math.sqrt(2 * count * math.log(1 / delta)) / budget
    low, high = 0.0, min(max(guess, _LEAST_NOISE), _MOST_NOISE)
    while not fits(high):
        low, high = high, 2 * high
        if high > 2 * _MOST_NOISE:
            raise UserError(
                f"a budget of ε = {budget:g} at δ = {delta:g} allows no training of {count} steps "
                f"at sampling rate {rate:.3g}: it would take noise of more than {_MOST_NOISE:g} "
                "times the clipping bound"
            )
    while low == 0 and high > _LEAST_NOISE:
        if fits(high / 2):
            high /= 2
        else:
            low = high / 2
    while low and high - low > _CLOSE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def added(spent: Sequence[Steps], new: Steps) -> tuple[Steps, ...]:
    """The steps so far and more of them; equal ones are counted together.

    Example:
        >>> added([Steps(1.0, 0.1, 5)], Steps(1.0, 0.1, 3))
        (Steps(noise=1.0, rate=0.1, count=8),)
    """
    counts = {(part.noise, part.rate): part.count for part in spent}
    key = new.noise, new.rate
    counts[key] = counts.get(key, 0) + new.count
    return tuple(Steps(noise, rate, count) for (noise, rate), count in counts.items())


def as_json(spent: Iterable[Steps]) -> list[list[float]]:
    """[σ, rate, count] of each kind of step, for records and files."""
    return [[part.noise, part.rate, part.count] for part in spent]


def from_json(value: Any) -> tuple[Steps, ...]:
    """What `as_json` wrote.

    Raises:
        ValueError: It is something else.
    """
    found = tuple(Steps(float(noise), float(rate), int(count)) for noise, rate, count in value)
    if not all(s.noise >= 0 and 0 <= s.rate <= 1 and s.count >= 0 for s in found):
        raise ValueError("steps that cannot be")
    return found


@dataclass
class Accounts:
    """What clients have spent.

    Attributes:
        delta: δ of the budget.
        budget: ε that none of them may exceed; None for any.
        spent: By client.
    """

    delta: float
    budget: float | None = None
    spent: dict[str, tuple[Steps, ...]] = field(default_factory=dict)

    def spend(self, client: str, new: Steps) -> float:
        """Takes down what a client is about to do.

        Returns:
            Its ε with that.

        Raises:
            UserError: That would be above its budget; nothing is taken down.
        """
        after = added(self.spent.get(client, ()), new)
        total = epsilon(after, self.delta)
        if self.budget is not None and total > self.budget:
            raise UserError(
                f"{client}: {new.count} more steps would bring it to ε = {total:.4g}; the budget "
                f"is {self.budget:g} at δ = {self.delta:g}"
            )
        self.spent[client] = after
        return total

    def told(self, client: str) -> float:
        """ε so far."""
        return epsilon(self.spent.get(client, ()), self.delta)
