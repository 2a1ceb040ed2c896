"""Timing of alternatives in turn, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs of one piece of work."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """(largest − smallest) / median; None for a single run."""
        if len(self.seconds) < 2:
            return None
        return (max(self.seconds) - min(self.seconds)) / self.median


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run; what it started on a GPU is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = perf_counter()
    work()
    wait()
    return perf_counter() - began


def in_turn(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: bool = True,
    follows_itself: bool = False,
) -> dict[str, Times]:
    """Runs every piece of work `repeats` times, one after the other in each repeat.

    Args:
        warm_up: Whether each runs once before anything is measured.
        follows_itself: Whether each runs once more right before it is measured, as a round follows
            a round of the same run.
    """
    if warm_up:
        for work in works.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            if follows_itself:
                work()
            seconds[name].append(timed(work))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def ratio(slow: Times, fast: Times) -> tuple[float, float | None]:
    """How many times faster: of the medians, and the spread of the ratios of paired runs."""
    of_medians = slow.median / fast.median
    if len(slow.seconds) != len(fast.seconds):
        return of_medians, None
    paired = Times(tuple(s / f for s, f in zip(slow.seconds, fast.seconds)))
    return of_medians, paired.spread
