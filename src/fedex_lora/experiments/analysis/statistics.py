"""Means over seeds and tasks with intervals, and what may be said of a difference.

Runs of equal seed share data, partition and initial adapter, so methods are compared by the
differences of such pairs. What is random then is the seed; with several tasks it is averaged
within each task first, so that a task with many seeds counts no more than one with few.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from fedex_lora.errors import number

Interval = tuple[float, float]
Strata = Mapping[str, Sequence[float]]  # by task, a value a seed
Outcome = Literal["better", "worse", "none", "unknown"]

LEVEL = 0.95
RESAMPLES = 10_000
_TINY = 1e-12  # a spread this small is rounding


@dataclass(frozen=True)
class Estimate:
    """A mean, and two intervals for it at the same level.

    Attributes:
        interval: Student's t; None where there is no spread to judge by.
        resampled: Percentile bootstrap over the same values. With few seeds it is too narrow (see
            `what_seeds_show`), so alone it decides nothing.
        basis: What was counted, for people: "3 seeds".
        seeds: Of the task that has the fewest.
    """

    mean: float
    interval: Interval | None
    resampled: Interval | None
    basis: str
    level: float = LEVEL
    seeds: int = 1

    @property
    def sign(self) -> int:
        """1 or −1 if both intervals lie on one side of 0, else 0: nothing can be claimed."""
        if self.interval is None:
            return 0
        intervals = [i for i in (self.interval, self.resampled) if i is not None]
        if all(low > 0 for low, _ in intervals):
            return 1
        return -1 if all(high < 0 for _, high in intervals) else 0


def estimate(strata: Strata, level: float = LEVEL) -> Estimate:
    """The mean over tasks of the means over seeds, with its intervals.

    With one task, Student's interval of the mean. With several and two or more seeds in each,
    Var = Σ_t s_t²/n_t / T² with Satterthwaite's degrees of freedom: it speaks of these tasks. Where
    a task has one seed only, the T means of the tasks are the sample.

    Args:
        strata: By task, a value a seed; one value at least in all.

    Example:
        >>> e = estimate({"sst2": [0.1, 0.2, 0.3]})
        >>> round(e.mean, 3), [round(x, 3) for x in e.interval], e.basis
        (0.2, [-0.048, 0.448], '3 seeds')
        >>> estimate({"sst2": [0.1]}).interval is None
        True
    """
    groups = [list(map(float, values)) for values in strata.values() if len(values)]
    few, many = (f(map(len, groups)) for f in (min, max))
    basis = f"{few if few == many else f'{few} to {many}'} seed{'s' * (many > 1)}"
    if len(groups) > 1:
        basis = f"{len(groups)} tasks, {basis} each" + ": tasks are the sample" * (few == 1)
        if few == 1:
            groups = [[statistics.fmean(g) for g in groups]]
    mean = statistics.fmean(statistics.fmean(g) for g in groups)
    if min(map(len, groups)) < 2:
        return Estimate(mean, None, None, basis, level, few)
    resampled = stats.bootstrap(
        groups,
        lambda *drawn, axis: np.mean([d.mean(axis=axis) for d in drawn], axis=0),
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(resampled.low), float(resampled.high)
    return Estimate(mean, _student(groups, mean, level), (low, high), basis, level, few)


def _student(groups: Sequence[Sequence[float]], mean: float, level: float) -> Interval | None:
    parts = [statistics.variance(g) / len(g) / len(groups) ** 2 for g in groups]
    variance = sum(parts)
    if variance <= _TINY**2:  # equal every time: no spread to judge by, unless they are all 0
        return (0.0, 0.0) if abs(mean) <= _TINY else None
    freedom = variance**2 / sum(p**2 / (len(g) - 1) for p, g in zip(parts, groups))
    low, high = stats.t.interval(level, freedom, mean, math.sqrt(variance))
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """How `ours` compares with `reference` over pairs of equal seed (and task).

    Attributes:
        difference: Of ours − reference.
        higher: Whether a higher score is better.
    """

    ours: str
    reference: str
    difference: Estimate
    higher: bool = True

    @property
    def outcome(self) -> Outcome:
        """ "better" or "worse" only if the intervals exclude 0."""
        if self.difference.interval is None:
            return "unknown"
        sign = self.difference.sign * (1 if self.higher else -1)
        return {1: "better", -1: "worse", 0: "none"}[sign]  # type: ignore[return-value]

    def verdict(self) -> str:
        """One sentence.

        Example:
            >>> Paired("a", "b", estimate({"t": [0.1, 0.11, 0.12]})).verdict()
            'a beats b by 0.110 (95 % interval 0.085 to 0.135; 3 seeds).'
            >>> print(Paired("a", "b", estimate({"t": [0.1, -0.2, 0.3]})).verdict())
            No difference seen between a and b: +0.067 (95 % interval −0.558 to 0.692; 3 seeds).
        """
        d, told = self.difference, number(self.difference.mean, 3, sign=True)
        if self.outcome == "unknown":
            return (
                f"{self.ours} and {self.reference}: {told} apart ({d.basis}), "
                "with no spread to tell it from chance."
            )
        if self.outcome == "none":
            names = f"{self.ours} and {self.reference}"
            return f"No difference seen between {names}: {told} ({interval_text(d)})."
        names = [self.ours, self.reference][:: 1 if self.outcome == "better" else -1]
        gain = d if d.mean > 0 else mirrored(d)
        return f"{' beats '.join(names)} by {number(gain.mean, 3)} ({interval_text(gain)})."


def mirrored(e: Estimate) -> Estimate:
    """The estimate of the negative."""
    flipped = [None if i is None else (-i[1], -i[0]) for i in (e.interval, e.resampled)]
    return replace(e, mean=-e.mean, interval=flipped[0], resampled=flipped[1])


def percent(share: float) -> str:
    """A share of 1.

    Example:
        >>> percent(0.25), percent(0.0123)
        ('25 %', '1.2 %')
    """
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def spread(values: Sequence[float | None]) -> str:
    """mean ± standard deviation over seeds; the value alone if there is one; "-" if one is missing,
    or there is none.

    Example:
        >>> spread([0.5, 0.7]), spread([0.5]), spread([0.5, None]), spread([])
        ('0.600 ± 0.141', '0.500', '-', '-')
    """
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = f"{statistics.mean(known):.3f}"
    return f"{mean} ± {statistics.stdev(known):.3f}" if len(known) > 1 else mean


def interval_text(e: Estimate) -> str:
    """The interval and what it rests on, in words."""
    if e.interval is None:
        return e.basis
    low, high = e.interval
    return f"{100 * e.level:.3g} % interval {number(low, 3)} to {number(high, 3)}; {e.basis}"


def change(e: Estimate) -> str:
    """A difference with its interval, short: "+0.012 (−0.003 to +0.027)"."""
    edges = " to ".join(number(edge, 3, sign=True) for edge in e.interval or ())
    return number(e.mean, 3, sign=True) + (f" ({edges})" if edges else "")


def what_seeds_show(seeds: int) -> str:
    """What so many seeds can show at all.

    A bootstrap of n values never reaches beyond the smallest and the largest, and under no
    difference all n have one sign in 2·2⁻ⁿ of all cases: it would then claim one.
    """
    if seeds < 2:
        return (
            "One seed: differences are shown, but nothing tells them from chance. "
            "Two seeds or more give an interval, five or more a useful one."
        )
    text = (
        "Intervals are Student's, over the differences of runs with equal seeds: they speak of new "
        "seeds on these evaluation rows, not of other rows or tasks, and each is at 95 % by itself."
    )
    if seeds < 6:
        text += (
            f" With {seeds} seeds a bootstrap over seeds would find a difference where there is "
            f"none in {percent(2 * 0.5**seeds)} of all cases or more, so it never decides alone."
        )
    return text
