"""What a federation's server has to know: plain values, made from the recipe higher up."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.aggregation.asynchronous import Asynchronous
from fedex_lora.aggregation.combining import Combining, Mean
from fedex_lora.aggregation.methods import Method
from fedex_lora.aggregation.scaffold import scaffold_problems
from fedex_lora.aggregation.seeding import derive
from fedex_lora.aggregation.server_optimizer import ServerOptimizer
from fedex_lora.errors import UserError, did_you_mean
from fedex_lora.federation.noise import SumNoise


@dataclass(frozen=True)
class Secure:
    """How updates are summed without the server seeing a single one.

    Attributes:
        threshold: How many of a round's clients must stay to its end; None for more than half.
        bits: Of fixed point, below a tensor's largest entry.
        rank: Of the sketch of the clients' products; None for one that loses nothing.
        noise: What clients add to what they send; None for none.
        repeat: How often a round that loses too many clients is begun anew.
    """

    threshold: int | None = None
    bits: int = 40
    rank: int | None = None
    noise: SumNoise | None = None
    repeat: int = 0


@dataclass(frozen=True)
class Settings:
    """The fixed values of a federation.

    Attributes:
        method: Row of the methods table.
        seed: The run's seed.
        clients: Names of all clients, sorted.
        layers: Shapes at the largest rank of any client.
        ranks: Rank by client; empty where all have the layers' rank.
        rank: r' of a truncated residual.
        carry: Whether what truncation cuts off waits for the next round.
        flush: Whether the last round sends the residual whole.
        oversample: How many times as many clients are asked as are needed; the first win.
        max_norm: Bound of an update's norm.
        clip: Bound that a round's clients are told to clip to, where it follows their norms.
        epsilon: That no client's account of its rows may exceed, infinite for any; clients tell
            theirs with every update. None where nothing is counted.
        norm_ratio: Bound of an update's norm in medians of the round's other norms.
        max_share: Bound of one client's share of the weights.
        examples: Rows by client, as declared before round 1; they hold for the run. Empty where
            what an update says is believed.
        secure: Set where the server is to see sums alone.
        mean: What is in the place of the weighted mean, and
        liars: how many clients it is to withstand; see `Combining`.
        align: Whether clients' pairs are rotated before they are averaged.
        scaffold: Whether clients' steps are corrected by control variates.
        asynchronous: How updates count that come in a later round; None: they are dropped.
        spectrum: How many singular values of each layer's global change the records have.
        optimizer: What the server makes of the increments of G; None: it adds them.

    Raises:
        UserError: Options that do not compose.
    """

    method: Method
    seed: int
    clients: tuple[str, ...]
    layers: Mapping[str, LayerShape]
    rounds: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    rank: int | None = None
    carry: bool = True
    flush: bool = True
    weights: Literal["examples", "uniform"] = "examples"
    server_learning_rate: float = 1.0
    clients_per_round: Literal["all"] | int | float = "all"
    min_clients: int = 1
    wire_dtype: torch.dtype = torch.float32
    oversample: float = 1.0
    max_norm: float | None = None
    clip: float | None = None
    epsilon: float | None = None
    norm_ratio: float | None = None
    max_share: float | None = None
    examples: Mapping[str, int] = field(default_factory=dict)
    secure: Secure | None = None
    mean: Mean = "weighted"
    liars: int = 0
    align: bool = False
    scaffold: bool = False
    spectrum: int = 0
    asynchronous: Asynchronous | None = None
    optimizer: ServerOptimizer | None = None

    def __post_init__(self) -> None:
        found = list(self.combining.problems(self.method, self.min_clients))
        if self.optimizer is not None:
            found += self.optimizer.problems(self.method, self.server_learning_rate)
        if self.asynchronous is not None:
            found += self.asynchronous.problems(self.method, self.combining, self.scaffold)
        if self.scaffold:
            found += scaffold_problems(self.method, self.combining)
        ranks = {(s.rank, s.fixed_rank) for s in self.layers.values()}
        if self.method.assignment.pruning is not None and len(ranks) > 1:
            found.append(
                (
                    "method.options.decay",
                    "a client has one rank to prune in all layers; leave lora.rank_pattern out",
                )
            )
        for option, why in found:
            raise UserError(f"{option}: {why}")

    @property
    def combining(self) -> Combining:
        """How the clients' updates are combined."""
        return Combining(self.mean, self.liars, self.align)

    def layers_of(self, client: str, pruned: int | None = None) -> dict[str, LayerShape]:
        """The layers at this client's rank, or at that to which it was pruned."""
        found = dict(self.layers)
        for rank in (self.ranks.get(client), pruned):
            found = {n: s if rank is None else s.at_rank(rank) for n, s in found.items()}
        return found

    def shares(self) -> dict[str, float]:
        """wᵢ = nᵢ / Σn if every client that declared its rows takes part."""
        n = {c: 1 if self.weights == "uniform" else rows for c, rows in self.examples.items()}
        return {client: count / sum(n.values()) for client, count in n.items()}

    @property
    def counts(self) -> dict[str, int]:
        """nᵢ by which every client counts, present or not; 1 where nobody has declared rows."""
        uniform = self.weights == "uniform" or not self.examples
        return {c: 1 if uniform else self.examples.get(c, 0) for c in self.clients}

    def sample(self, round: int, busy: Collection[str] = ()) -> list[str]:
        """The clients of a round, sorted: a function of (seed, round), and of who is busy."""
        generator = torch.Generator().manual_seed(derive(self.seed, "sample", round))
        order = torch.randperm(len(self.clients), generator=generator).tolist()
        asked = math.ceil(self.oversample * self.sample_size)
        free = (self.clients[i] for i in order if self.clients[i] not in busy)
        return sorted(islice(free, asked))

    @property
    def sample_size(self) -> int:
        """How many clients take part in a round: all, a count, or a fraction of them."""
        k, wanted = len(self.clients), self.clients_per_round
        if wanted == "all":
            return k
        return max(1, round(wanted * k)) if isinstance(wanted, float) else min(wanted, k)


_MADE = (
    "method",
    "seed",
    "clients",
    "layers",
    "rounds",
    "secure",
)  # of what a caller gives by itself


def check_options(given: Iterable[str], whose: str) -> None:
    """Raises a `UserError` for a name that is no field of `Settings` which may be chosen.

    Args:
        whose: Who was given it, for the error.
    """
    known = [name for name in Settings.__dataclass_fields__ if name not in _MADE]
    for name in sorted(set(given) - set(known)):
        near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise UserError(f"{whose}: there is no option {name!r}{near}")
