"""Who takes part, how rows are dealt out, and what is waited for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fedex_lora.aggregation.combining import Combining, Mean
from fedex_lora.aggregation.server_optimizer import Name as OptimizerName
from fedex_lora.aggregation.server_optimizer import ServerOptimizer
from fedex_lora.recipe.part import Part, Problem

_PARTITION_NEEDS = {"iid": "", "dirichlet": "alpha", "shards": "shards_per_client", "by": "column"}


class PartitionSpec(Part):
    """How one data set is dealt out to the clients (flwr-datasets' partitioners)."""

    kind: Literal["iid", "dirichlet", "shards", "by"] = "iid"
    alpha: float | None = Field(default=None, gt=0)  # dirichlet
    shards_per_client: int | None = Field(default=None, ge=1)  # shards
    column: str | None = (
        None  # by: a natural id; dirichlet, shards: split by this instead of labels
    )

    def problems(self) -> Iterator[Problem]:
        for kind, option in _PARTITION_NEEDS.items():
            if option and kind == self.kind and getattr(self, option) is None:
                yield option, f"missing; a partition of kind {kind} needs it"
        useless = {"alpha", "shards_per_client", "column"} - {_PARTITION_NEEDS[self.kind]}
        useless -= {"column"} if self.kind != "iid" else set()
        for option in sorted(useless):
            if getattr(self, option) is not None:
                yield option, f"a partition of kind {self.kind} does not use it"


class ServerOptimizerSpec(Part):
    """What the server makes of the increments of the global model."""

    name: OptimizerName = "fedadam"
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    beta2: float | None = Field(default=None, ge=0, lt=1)  # fedadam, fedyogi: 0.99
    tau: float | None = Field(default=None, gt=0)  # fedadam, fedyogi: 1e-3

    def problems(self) -> Iterator[Problem]:
        for option in ("beta2", "tau"):
            if self.name == "fedavgm" and getattr(self, option) is not None:
                yield option, "fedavgm has none; it is of fedadam and fedyogi"


class AsynchronousSpec(Part):
    """What becomes of updates that come in a later round."""

    staleness: int = Field(default=1, ge=1)  # rounds late, at most
    exponent: float = Field(default=0.5, ge=0)  # a of the weight n·(1 + τ)^−a
    delay: float = Field(default=0.0, ge=0, le=1)  # engine local: how probably one comes late


CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes a folder's name
CLIENT_NAME_RULE = "expected letters, digits, '.', '_', '-', at most 64, a letter or digit first"


class FederationSpec(Part):
    clients: int = Field(default=3, ge=1)
    rounds: int = Field(default=5, ge=1)
    clients_per_round: Literal["all"] | int | float = "all"
    weights: Literal["examples", "uniform"] = "examples"
    server_learning_rate: float = Field(default=1.0, gt=0)
    server_optimizer: ServerOptimizerSpec | None = None
    asynchronous: AsynchronousSpec | None = None
    min_clients: int = Field(default=1, ge=1)
    failure_rate: float = Field(default=0.0, ge=0, le=1)
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    partition: PartitionSpec = PartitionSpec()
    max_norm: float | None = Field(default=None, gt=0)  # bound of an update's norm
    # the same in medians of the round's other norms, from three clients on
    max_norm_ratio: float | None = Field(default=10.0, gt=1)
    max_share: float = Field(default=0.9, gt=0, le=1)  # of the weights, from three clients on
    mean: Mean = "weighted"  # or median, trimmed-mean, krum: a few liars cannot decide them
    liars: int = Field(default=0, ge=0)  # how many clients of a round it is to withstand
    proximal: float = Field(default=0.0, ge=0)  # μ of FedProx, at the clients
    scaffold: bool = False  # control variates, at the clients
    align: bool = False  # rotate each client's pair before averaging
    # across machines (engine flower):
    names: list[str] | None = None  # of the institutions; others are then refused
    round_timeout: float = Field(default=3600, gt=0)  # seconds until a round goes on without
    wait_for_clients: float = Field(default=600, ge=0)  # seconds, while there are too few
    oversample: float = Field(default=1.0, ge=1)  # ask so many times as many; the first win

    @property
    def sampled(self) -> int:
        """How many clients are taken in a round; a fraction is rounded, to at least one."""
        if isinstance(self.clients_per_round, float):
            return max(1, round(self.clients_per_round * self.clients))
        return self.clients if self.clients_per_round == "all" else self.clients_per_round

    @property
    def optimizer(self) -> ServerOptimizer | None:
        """The server's optimizer, if there is one."""
        given = self.server_optimizer
        if given is None:
            return None
        return ServerOptimizer(**given.model_dump(exclude_none=True))

    @property
    def combining(self) -> Combining:
        """How the clients' updates are combined."""
        return Combining(self.mean, self.liars, self.align)

    def problems(self) -> Iterator[Problem]:
        part = self.clients_per_round
        if isinstance(part, float) and not 0 < part <= 1:
            yield "clients_per_round", f"as a fraction it is above 0 and at most 1, got {part}"
        elif isinstance(part, int) and not 1 <= part <= self.clients:
            yield "clients_per_round", f"expected 1 to {self.clients} (the clients), got {part}"
        elif self.min_clients > self.sampled:
            few = f"{self.min_clients} are more than the {self.sampled} clients of a round"
            yield "min_clients", few
        if self.names is not None and len(set(self.names)) != self.clients:
            yield "names", f"expected {self.clients} different names (the clients)"
        for name in self.names or []:
            if not CLIENT_NAME.fullmatch(name):
                yield "names", f"{name!r}: {CLIENT_NAME_RULE}"
