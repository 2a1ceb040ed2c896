"""All clients in this process: they take turns in one model, so one base is in memory.

With `engine.fuse` several of them take one turn together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.lowrank import LowRank, dense
from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.fused import Turn, train_fused
from fedex_lora.engines.training import train_client
from fedex_lora.engines.training_log import TrainingLog
from fedex_lora.federation.loop import Lost
from fedex_lora.federation.messages import Broadcast, Update
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, global_factors, own_increment, start_of
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.tasks import Task
from fedex_lora.tasks.outputs import VerdictFile

OnTurn = Callable[[int, str, int, int], None]  # (round, client, steps done, steps in all)


class LocalEngine:
    """A transport whose clients are turns in `model`.

    Args:
        model: The one resident model.
        task: What is learned.
        clients: Each client's rows, encoded.
        settings: The federation's.
        training: The recipe's block of that name.
        failure_rate: Probability that a client vanishes in a round, for rehearsal; seeded.
        rows: Each silo's own validation rows, encoded, if clients score models.
        batch_size: Of the scoring.
        log: Where the Trainers' own reports go, if the recipe asks for any.
        outputs: A folder for the texts that are generated when models are scored; None for none.
        fuse: How many clients train in one pass, if they have one base and equal ranks.
    """

    def __init__(
        self,
        model: AdaptedModel,
        task: Task,
        clients: Mapping[str, Dataset],
        settings: Settings,
        training: Mapping[str, Any],
        failure_rate: float = 0.0,
        on_turn: OnTurn | None = None,
        rows: Mapping[str, Dataset] | None = None,
        batch_size: int = 64,
        log: TrainingLog | None = None,
        outputs: Path | None = None,
        fuse: int = 1,
    ) -> None:
        self.model, self.task, self.clients = model, task, clients
        self.settings, self.training = settings, training
        self.failure_rate, self.on_turn = failure_rate, on_turn
        self.rows, self.batch_size = rows or {}, batch_size
        self.log, self.outputs, self.fuse = log, outputs, fuse
        self._placed: tuple[Ledger, str | None] | None = None

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of training rows by client."""
        return {name: len(rows) for name, rows in self.clients.items()}

    @property
    def validation(self) -> dict[str, int]:
        """Numbers of validation rows by client."""
        return {name: len(rows) for name, rows in self.rows.items()}

    @property
    def server(self) -> LocalEngine:
        """One model serves the clients and the server."""
        return self

    def newcomers(self) -> list[str]:
        """Nobody joins a running process."""
        return []

    def deliver(self, state: ServerState) -> dict[str, dict[str, float]]:
        """Everybody is here already."""
        return {}

    def exchange(
        self, state: ServerState, broadcasts: Mapping[str, Broadcast]
    ) -> Iterator[Update | Lost]:
        """Every client's turn, in sorted order. What `broadcasts` says equals `start_of`."""
        vanished = self._vanished(state.version + 1, list(broadcasts))
        for client in sorted(vanished):
            yield Lost(client, "rehearsed failure (federation.failure_rate)")
        names = sorted(broadcasts.keys() - vanished)
        for first in range(0, len(names), self.fuse):
            group = names[first : first + self.fuse]
            if len(group) == 1:
                yield self._train(state, broadcasts[group[0]].round, group[0])
            else:
                yield from self._train_fused(state, broadcasts[group[0]].round, group)

    def _train(self, state: ServerState, round: int, client: str) -> Update:
        self.place(state, client)
        return train_client(
            self.model,
            self.task,
            self.clients[client],
            start_of(state, self.settings, client),
            trained=self.settings.method.trained(round),
            training=self.training,
            seed=self.settings.seed,
            round=round,
            client=client,
            on_step=self._on_step(round, client),
            log=self.log.turn(client, round) if self.log else None,
        )

    def _train_fused(self, state: ServerState, round: int, clients: Sequence[str]) -> list[Update]:
        self.place(state, None)
        starts = {name: start_of(state, self.settings, name) for name in clients}
        return train_fused(
            self.model,
            self.task,
            [Turn(name, self.clients[name], starts[name]) for name in clients],
            trained=self.settings.method.trained(round),
            training=self.training,
            seed=self.settings.seed,
            round=round,
            on_step=self._on_step(round, ", ".join(clients)),
        )

    def client_scores(
        self, state: ServerState, clients: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Scores, on each client's own rows, of the model that it starts the next round from."""
        return {name: self.score(state, name) for name in clients if name in self.rows}

    def score(self, state: ServerState, name: str) -> dict[str, float]:
        """One client's scores; a silo whose rows are pooled is given the pooled model."""
        client = name if name in self.settings.clients else self.settings.clients[0]
        self.place(state, client)
        self.model.write(start_of(state, self.settings, client))
        return self.evaluate(self.rows[name], self.batch_size, state, "clients", name, "own-rows")

    def evaluate(
        self, rows: Dataset, batch_size: int, state: ServerState, *whose: str
    ) -> dict[str, float]:
        """The scores of what the model is now, of a state; generated texts are kept.

        Args:
            whose: Where below the round's folder of `outputs`, the last one being the file.
        """
        *folders, name = f"{state.version:04d}", *whose
        kept = self.outputs and VerdictFile(self.outputs.joinpath(*folders, f"{name}.jsonl"))
        model = self.model
        return self.task.evaluate(model.module, rows, model.tokenizer, batch_size, kept)

    def write_global(self, state: ServerState, client: str | None = None) -> None:
        """Makes the model the global one; or `client`'s own, where nothing is exchanged."""
        self.place(state, None)
        if client is not None:
            self.model.write(start_of(state, self.settings, client))
            return
        factors = dict(global_factors(state, self.settings)) or {
            name: _zero(f) for name, f in state.factors.items()
        }
        self.model.write(AdapterState(factors, state.head))

    def place(self, state: ServerState, client: str | None) -> None:
        """base = cast(W0 + T − own); nothing to do where it is so already."""
        owner = None if self.settings.method.shared_base else client
        placed, whose = self._placed or (None, None)
        if placed is state.ledger and whose == owner:
            return
        fold = not self.model.beside
        self.model.place(lambda site: base_increment(state, self.settings, site, owner, fold))
        self._placed = (state.ledger, owner)

    def _vanished(self, round: int, clients: list[str]) -> set[str]:
        """Who fails in a rehearsal: never so many that the round is below its quorum."""

        def draw(client: str) -> float:
            seed = derive(self.settings.seed, "fail", round, client)
            return torch.rand((), generator=torch.Generator().manual_seed(seed)).item()

        unlucky = sorted(clients, key=draw)[: len(clients) - self.settings.min_clients]
        return {client for client in unlucky if draw(client) < self.failure_rate}

    def _on_step(self, round: int, client: str) -> Callable[[int, int], None] | None:
        if self.on_turn is None:
            return None
        on_turn = self.on_turn
        return lambda done, total: on_turn(round, client, done, total)


def base_increment(
    state: ServerState, settings: Settings, site: str, client: str | None, fold: bool = True
) -> LowRank | Tensor | None:
    """T − own of one site: what the base has beyond the pretrained weights.

    Folding takes T as the left fold, the same bits for everybody; beside the layer factors do.
    """
    total = state.ledger.total(site) if fold else state.ledger.factored(site)
    own = None if client is None else own_increment(state, settings, client, site)
    if own is None:
        return total
    if total is None:
        return own.scaled(-1.0)
    if isinstance(total, LowRank):
        return total + own.scaled(-1.0)
    return total - dense(own)


def _zero(f: Factors) -> Factors:
    return Factors(torch.zeros_like(f.A), torch.zeros_like(f.B), f.scale)
