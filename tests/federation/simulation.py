"""A federation without a model: clients drift at random, so that the server is tested alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from oracles import trained_by

from fedex_lora.aggregation.adapter import AdapterState, LayerShape, fresh
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.aggregation.seeding import derive
from fedex_lora.federation.checks import check
from fedex_lora.federation.codec import (
    decode_broadcast,
    decode_update,
    encode_broadcast,
    encode_update,
)
from fedex_lora.federation.header import Limit
from fedex_lora.federation.loop import Exchange, run_round
from fedex_lora.federation.messages import Lost, Tensors, Update, flat, receive, replaced
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, begin, own_part, sent_part, start_of

SITES = {
    "q": LayerShape(out=26, inp=33, rank=3, scale=1.7),
    "v": LayerShape(out=24, inp=20, rank=3, scale=0.6),
}
EXAMPLES = {"a": 5, "b": 1, "c": 3, "d": 9}


def settings(name: str, **kwargs) -> Settings:
    kwargs = {"rank": 2 if METHODS[name].residual == "truncated" else None, **kwargs}
    return Settings(METHODS[name], 7, tuple("abcd"), kwargs.pop("layers", SITES), 5, **kwargs)


def initial(s: Settings) -> AdapterState:
    g = torch.Generator().manual_seed(1)
    return AdapterState(fresh(s.layers, s.seed), {"w": torch.randn(4, 3, generator=g)})


@dataclass
class Clients:
    """Clients that hold what they received, go through the wire, and keep a history."""

    settings: Settings
    held: dict[str, AdapterState]
    history: list[dict[str, tuple[AdapterState, AdapterState]]] = field(default_factory=list)
    down: list[dict[str, int]] = field(default_factory=list)
    spread: float = 0.1
    breaks: Callable[[Update], Update | Lost] = lambda update: update
    arrive: Callable[[list], list] = list  # the order in which replies come in

    def train(self, exchange: Exchange):
        return self.arrive(list(self._replies(exchange)))

    def _replies(self, exchange: Exchange):
        self.history.append({})
        self.down.append({})
        for client in exchange.clients:
            blob = encode_broadcast(exchange.message(client), self.settings.wire_dtype)
            self.down[-1][client] = len(blob)
            message = decode_broadcast(blob, Limit(1 << 30, 1 << 30))
            layers = self.settings.layers_of(client)
            start = receive(self.held[client], message, layers, self.settings.seed)
            assert_same(start, start_of(exchange.state, self.settings, client))
            yield self.breaks(self._train(client, message.round, start))

    def _train(self, client: str, round: int, start: AdapterState) -> Update:
        g = torch.Generator().manual_seed(derive(0, round, client))
        method = self.settings.method
        trained, assignment = method.trained(round), method.assignment
        end = trained_by(start, trained, g, self.spread)
        kept = own_part(self.settings, flat(end)) if assignment.private else {}
        if self.settings.scaffold:
            of = flat(end).items()
            end = replace(end, variates={n: torch.randn(t.shape, generator=g) for n, t in of})
        sent = sent_part(self.settings, flat(end), round)
        update = Update(round, client, sent, EXAMPLES[client], kept=kept)
        if method.exchanges:
            blob = encode_update(update, start, self.settings.wire_dtype)
            update = replace(decode_update(blob, start, client), kept=kept)
        held = start
        if assignment.own and not assignment.dealt:  # what the server decodes is what counts
            check(update, start, round, self.settings)
            held = replaced(start, own_part(self.settings, {**update.tensors, **kept}))
        self.held[client] = held
        self.history[-1][client] = (start, end)
        return update


def simulate(s: Settings, rounds: int = 5, **kwargs) -> tuple[list[ServerState], Clients, list]:
    """All states from the start on, the clients, and the records."""
    start = initial(s)
    state = begin(s, start)
    clients = Clients(s, {c: start_of(state, s, c) for c in s.clients}, **kwargs)
    states, records = [state], []
    for _ in range(rounds):
        state, record = run_round(state, s, clients)
        states.append(state)
        records.append(record)
    return states, clients, records


def same_tensors(a: Tensors, b: Tensors) -> None:
    """Equal bit for bit, under the same names."""
    assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def assert_same(a: AdapterState, b: AdapterState) -> None:
    """Equal bit for bit."""
    assert a.layers.keys() == b.layers.keys() and a.head.keys() == b.head.keys()
    for n, f in a.layers.items():
        assert torch.equal(f.A, b.layers[n].A) and torch.equal(f.B, b.layers[n].B)
        assert f.scale == b.layers[n].scale
    assert all(torch.equal(t, b.head[n]) for n, t in a.head.items())
    same_tensors(a.variates, b.variates)
