"""How clients' updates are combined, whatever the method: options that compose with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fedex_lora.aggregation.methods import Method

Mean = Literal["weighted", "median", "trimmed-mean", "krum"]


@dataclass(frozen=True)
class Combining:
    """What takes the place of the weighted mean, and what is done to factors before it.

    Attributes:
        mean: "weighted": Σ wᵢxᵢ. "median" and "trimmed-mean": of every coordinate, clients counting
            alike; the latter without the `liars` largest and smallest values. "krum": the one
            client whose k − liars − 2 nearest others are nearest.
        liars: f, how many of a round's clients may send anything.
        align: Whether each client's pair is rotated towards the factors that it began with.
    """

    mean: Mean = "weighted"
    liars: int = 0
    align: bool = False

    @property
    def robust(self) -> bool:
        """Whether a few clients cannot move the result as far as they like."""
        return self.mean != "weighted"

    @property
    def by_coordinate(self) -> bool:
        return self.mean in ("median", "trimmed-mean")

    def cut(self, clients: int) -> int:
        """How many of so many values are left out at either end, of every coordinate."""
        return (clients - 1) // 2 if self.mean == "median" else self.liars

    @property
    def least(self) -> int:
        """How many clients a round must have at least, so that f liars decide nothing."""
        return {"krum": 2 * self.liars + 3, "weighted": 1}.get(self.mean, 2 * self.liars + 1)

    def problems(self, method: Method, min_clients: int) -> Iterator[tuple[str, str]]:
        """Options that do not compose with a method or with each other, and why."""
        needs, why = method.assignment.needs, ""
        if self.liars and not self.robust:
            yield "liars", "the weighted mean withstands none; set mean: median, or another"
        if self.robust and self.liars < 1:
            yield "liars", f"missing; mean: {self.mean} withstands a number of liars, at least 1"
        if self.robust and min_clients < self.least:
            told = f"mean: {self.mean} withstands {self.liars} of at least {self.least} clients"
            yield "min_clients", f"{told}; got {min_clients}"
        if method.pooled or not method.exchanges:
            why = "nothing is exchanged"
        elif method.assignment.own:
            why = "clients go on from factors of their own, which have no mean"
        elif self.robust and "ends" in needs:
            why = f"its assignment ({method.assignment.name}) weighs the clients by itself"
        if self.robust and why:
            yield "mean", f"does not go with {self.mean}: {why}"
        if self.align and not why and method.trained(1) != {"A", "B"}:
            why = "one factor is frozen, so that all are aligned already"
        if self.align and not why and needs and "ends" not in needs:
            why = "it averages products, which no rotation changes"
        if self.align and why and not (self.robust and "ends" in needs):
            yield "align", f"is of no use to the method: {why}"
