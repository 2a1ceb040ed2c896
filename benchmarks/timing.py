"""Timing of alternatives in turn, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs of one piece of work."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(largest − smallest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def in_turn(
    works: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True
) -> dict[str, Times]:
    """Runs every piece of work `repeats` times, one after the other in each repeat."""
    if warm_up:
        for work in works.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            began = perf_counter()
            work()
            seconds[name].append(perf_counter() - began)
    return {name: Times(tuple(values)) for name, values in seconds.items()}
