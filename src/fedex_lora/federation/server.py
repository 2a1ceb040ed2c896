"""The server alone, for other frameworks: torch and values, no model, no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fedex_lora.aggregation.adapter import AdapterState, LayerShape, fresh
from fedex_lora.aggregation.methods import Method, get_method
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import Exchange, Record, run_round
from fedex_lora.federation.messages import Broadcast, Scores, Update, flat, replaced
from fedex_lora.federation.settings import Settings, check_options
from fedex_lora.federation.state import ServerState, begin, own_part, sent_part, start_of


class Server:
    """Pure functions of a state: `init`, `broadcast`, `step`. It keeps nothing itself.

    Args:
        method: Its name, or one of one's own.
        layers: The adapted layers' shapes, by name.
        clients: Their names; more may come later.
        seed: Of fresh factors.
        rounds: After how many what a truncated residual still carries is sent whole.
        options: Further fields of `Settings`: `rank`, `ranks`, `weights`, `wire_dtype`, ...

    Example:
        >>> import torch
        >>> server = Server("fedex", {"q": LayerShape(out=3, inp=2, rank=1, scale=2.0)}, ["a", "b"])
        >>> state = server.init()
        >>> ends = {c: server.start(state, c) for c in "ab"}
        >>> for c, end in ends.items():  # training, of sorts
        ...     _ = end.layers["q"].B.add_(1 if c == "a" else 2)
        >>> updates = {c: server.update(state, c, end, examples=5) for c, end in ends.items()}
        >>> state, record = server.step(state, updates)
        >>> state.version, record["weights"]
        (1, {'a': 0.5, 'b': 0.5})
        >>> bool(torch.allclose(state.factors["q"].B, torch.full((3, 1), 1.5)))
        True
    """

    def __init__(
        self,
        method: str | Method,
        layers: Mapping[str, LayerShape],
        clients: Iterable[str] = (),
        *,
        seed: int = 0,
        rounds: int = 10**9,
        **options: Any,
    ) -> None:
        check_options(options, "Server")
        names = tuple(sorted(clients))
        self.settings = Settings(get_method(method), seed, names, dict(layers), rounds, **options)

    def init(self, adapter: AdapterState | None = None) -> ServerState:
        """The state before round 1; without an adapter A is drawn from the seed and B = 0."""
        settings = self.settings
        return begin(settings, adapter or AdapterState(fresh(settings.layers, settings.seed)))

    def broadcast(self, state: ServerState, clients: Iterable[str]) -> dict[str, Broadcast]:
        """What each client lacks of the state; `codec.encode_broadcast` makes bytes of it."""
        exchange = Exchange(state, self.settings, sorted(clients))
        return {client: exchange.message(client) for client in exchange.clients}

    def start(self, state: ServerState, client: str) -> AdapterState:
        """Copies of the factors and the head from which a client trains."""
        start = start_of(state, self.settings, client)
        return replaced(start, {name: t.clone() for name, t in flat(start).items()})

    def update(self, state: ServerState, client: str, end: AdapterState, examples: int) -> Update:
        """The message of a client that ended there.

        Args:
            examples: n of its weight n/Σn.
        """
        method, round, tensors = self.settings.method, state.version + 1, flat(end)
        kept = own_part(self.settings, tensors) if method.assignment.private else {}
        return Update(round, client, sent_part(self.settings, tensors, round), examples, kept=kept)

    def step(self, state: ServerState, updates: Mapping[str, Update]) -> tuple[ServerState, Record]:
        """The state after the updates are aggregated, and the round's record.

        Raises:
            QuorumLost: Fewer than `min_clients` of them can be used; each reason is named.
        """
        for name, update in updates.items():
            if name != update.client:
                raise UserError(f"step: the update of {update.client!r} is given as {name!r}'s")
        settings = replace(self.settings, clients=tuple(sorted(updates)))
        return run_round(state, settings, _Given(updates))


class _Given:
    """A transport whose replies are there already."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        self.updates = updates

    def train(self, exchange: Exchange) -> Iterator[Update]:
        yield from (self.updates[client] for client in exchange.clients)

    def evaluate(self, exchange: Exchange) -> Iterator[Scores]:
        yield from ()
