"""What of the clients' data others may see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from fedex_lora.recipe.differential import ClientLevel, ExampleLevel
from fedex_lora.recipe.part import Part, Problem


class SecureAggregation(Part):
    """The coordinator sees sums over clients, and no single client's numbers."""

    threshold: int | None = Field(default=None, ge=2)  # clients that must stay; None: above half
    bits: int = Field(default=40, ge=16, le=48)  # of fixed point, below a tensor's largest entry
    rank: Literal["exact"] | int = "exact"  # of the sketch of the products

    def problems(self) -> Iterator[Problem]:
        if self.rank != "exact" and self.rank < 1:
            yield "rank", f"expected exact, or a rank of at least 1, got {self.rank}"


class Privacy(Part):
    """Nothing of it is in force unless a recipe says so."""

    secure_aggregation: SecureAggregation | None = None  # true: with all defaults
    example_level: ExampleLevel | None = None
    client_level: ClientLevel | None = None
    rehearsal: bool = False  # noise that follows from the seed: for tests, and not private

    @field_validator("secure_aggregation", mode="before")
    @classmethod
    def _secure_aggregation(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value
