"""What of the clients' data others may see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from fedex_lora.recipe.part import Part, Problem


class SecureAggregation(Part):
    """The coordinator sees sums over clients, and no single client's numbers."""

    threshold: int | None = Field(default=None, ge=2)  # clients that must stay; None: above half
    bits: int = Field(default=40, ge=16, le=48)  # of fixed point, below a tensor's largest entry
    rank: Literal["exact"] | int = "exact"  # of the sketch of the products
    repeat: int = Field(default=0, ge=0)  # how often a round that loses too many is begun anew

    def problems(self) -> Iterator[Problem]:
        if self.rank != "exact" and self.rank < 1:
            yield "rank", f"expected exact, or a rank of at least 1, got {self.rank}"


class ExampleLevel(Part):
    """DP-SGD at each client: the result hides whether any one row was among a client's."""

    epsilon: float | None = Field(default=None, gt=0)  # of all rounds; none exceeds it
    delta: float = Field(gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)  # bound of one row's gradient
    noise_multiplier: float | None = Field(default=None, ge=0.01)  # left out: from epsilon

    def problems(self) -> Iterator[Problem]:
        if self.epsilon is None and self.noise_multiplier is None:
            yield "epsilon", "missing; give it, or noise_multiplier, or both"


class ClientLevel(Part):
    """Noise on the mean of clipped updates: the result hides whether any one client took part."""

    noise_multiplier: float = Field(ge=0.01)
    clip: float = Field(ge=1e-9, le=1e9)  # bound of an update's norm; with `adaptive` the first one
    delta: float = Field(gt=0, lt=1)
    epsilon: float | None = Field(default=None, gt=0)  # the run stops at the last round within it
    adaptive: bool = False  # the bound follows `quantile` of the updates' norms
    quantile: float = Field(default=0.5, gt=0, lt=1)
    clip_learning_rate: float = Field(default=0.2, gt=0)  # of the bound's logarithm


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
