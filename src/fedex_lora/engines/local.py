"""All clients in this process: they take turns in one model, so one base is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from datasets import Dataset

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.stage import Stage
from fedex_lora.engines.turn import Train, Transform, Turn, take_turns, turn_of
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.messages import Broadcast, Lost, Scores, Update, receive, replaced
from fedex_lora.federation.secure.member import Member
from fedex_lora.federation.secure.messages import Answer, Ask
from fedex_lora.federation.secure.sums import Summand, summand
from fedex_lora.federation.secure.told import origin
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import begin, start_of

NOTHING = -1  # the version that a client holds who has no memory
Trained = tuple[AdapterState, Update]  # where a client started from, and its update


class LocalEngine:
    """A transport whose clients are turns on one model.

    Its clients remember nothing: every message brings them all that has changed since the start,
    by reference. The records count what they would have been sent.

    Args:
        stage: The one resident model.
        clients: Each client's rows, encoded.
        settings: The federation's.
        initial: What all clients start from, at the full rank.
        train: What trains them.
        rows: Each silo's own validation rows, encoded, if clients score models.
        failure_rate: Probability that a client vanishes in a round, for rehearsal; seeded.
        transform: What becomes of an update before it is sent.
    """

    scores_later = False

    def __init__(
        self,
        stage: Stage,
        clients: Mapping[str, Dataset],
        settings: Settings,
        initial: AdapterState,
        train: Train,
        rows: Mapping[str, Dataset] | None = None,
        failure_rate: float = 0.0,
        transform: Transform | None = None,
    ) -> None:
        self.stage, self.clients, self.settings = stage, clients, settings
        self._first = replace(begin(settings, initial), own={})
        self.train_with, self.rows = train, rows or {}
        self.failure_rate, self.transform = failure_rate, transform
        self._members: dict[str, Member] = {}
        self._trained: dict[str, Trained] = {}  # of a round under secure aggregation

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of training rows by client."""
        return {name: len(rows) for name, rows in self.clients.items()}

    @property
    def validation(self) -> dict[str, int]:
        """Numbers of validation rows by client."""
        return {name: len(rows) for name, rows in self.rows.items()}

    def newcomers(self) -> list[str]:
        """Nobody joins a running process."""
        return []

    def train(self, exchange: Exchange) -> Iterator[Update | Lost]:
        """Every client's turn, in sorted order, as many in one pass as the training takes."""
        vanished = self._vanished(exchange)
        for client in sorted(vanished):
            yield Lost(client, "rehearsed failure (federation.failure_rate)")
        names = [client for client in exchange.clients if client not in vanished]
        for _, update in self._updates(exchange, names):
            yield update

    def _updates(self, exchange: Exchange, names: Sequence[str]) -> Iterator[Trained]:
        for first in range(0, len(names), self.train_with.together):
            group = names[first : first + self.train_with.together]
            messages = {client: exchange.message(client, NOTHING) for client in group}
            turns = [self._turn(exchange, client, messages[client]) for client in group]
            ledger = messages[group[0]].ledger
            updates = take_turns(
                self.stage, self.train_with, turns, ledger, self.settings, self.transform
            )
            yield from zip((turn.start for turn in turns), updates, strict=True)

    def ask(self, exchange: Exchange, asks: Mapping[str, Ask]) -> Iterator[Answer | Lost]:
        """Every client's answer, in sorted order. Who trains keeps what it came to until it is
        asked for it in the sizes that all have agreed on."""
        names = sorted(asks)
        if any(ask.trains for ask in asks.values()):
            vanished = self._vanished(exchange)
            for client in sorted(vanished):
                yield Lost(client, "rehearsed failure (federation.failure_rate)")
            names = [client for client in names if client not in vanished]
            self._trained, state = {}, exchange.state
            same = origin(self.settings, AdapterState(state.factors, state.head), state.ledger)
            for start, update in self._updates(exchange, names):
                self._trained[update.client] = start, update
                yield self._answer(update.client, asks, same)
            return
        for client in names:
            yield self._answer(client, asks)

    def _answer(self, client: str, asks: Mapping[str, Ask], start: str = "") -> Answer | Lost:
        member, secure = self._members.setdefault(client, Member(client)), self.settings.secure
        assert secure is not None

        def added(widths: Mapping[str, int]) -> Summand:
            found = summand(self.settings, widths, *self._trained[client])
            return replace(found, start=start)

        try:
            return member.answer(asks[client], secure, added)
        except UserError as error:
            return Lost(client, str(error), refused=True)

    def evaluate(self, exchange: Exchange) -> Iterator[Scores]:
        """Scores, on each silo's own rows, of the model that it starts the next round from."""
        for name in exchange.clients:
            if not exchange.scored:
                yield Scores(name, {})
            elif name in self.rows:
                # a silo whose rows are pooled is given the pooled model
                client = name if name in self.settings.clients else self.settings.clients[0]
                message = exchange.message(client, NOTHING)
                self.stage.show(message.ledger, self._start(exchange, client, message))
                version = exchange.state.version
                scores = self.stage.score(self.rows[name], version, "clients", name, "own-rows")
                yield Scores(name, scores)

    def _start(self, exchange: Exchange, client: str, message: Broadcast) -> AdapterState:
        """What the message makes of the first adapter, and what the client kept: of clients in
        this process that lies in the run's state, so that the run can be resumed."""
        layers = self.settings.layers_of(client)
        first = start_of(self._first, self.settings, client)
        own = exchange.state.own.get(client, {})
        return replaced(receive(first, message, layers, self.settings.seed), dict(own.items()))

    def _turn(self, exchange: Exchange, client: str, message: Broadcast) -> Turn:
        rows, start = self.clients[client], self._start(exchange, client, message)
        return turn_of(self.settings, client, message.round, rows, start)

    def _vanished(self, exchange: Exchange) -> set[str]:
        """Who fails in a rehearsal: never so many that the round is below its quorum."""

        def draw(client: str) -> float:
            anew = ("begun anew", exchange.attempt) if exchange.attempt else ()
            seed = derive(self.settings.seed, "fail", exchange.round, client, *anew)
            return torch.rand((), generator=torch.Generator().manual_seed(seed)).item()

        clients: Sequence[str] = exchange.clients
        unlucky = sorted(clients, key=draw)[: len(clients) - self.settings.min_clients]
        return {client for client in unlucky if draw(client) < self.failure_rate}
