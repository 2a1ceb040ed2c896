"""Clients without a model under secure aggregation: what they train is a function of G."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from fedex_lora.aggregation.adapter import AdapterState, LayerShape, fresh
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.aggregation.seeding import derive
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.messages import Lost, Update, flat, only
from fedex_lora.federation.secure.member import Added, Member
from fedex_lora.federation.secure.messages import Answer, Ask
from fedex_lora.federation.secure.sums import summand
from fedex_lora.federation.secure.told import origin
from fedex_lora.federation.settings import Secure, Settings
from fedex_lora.federation.state import start_of


def settings(method: str, clients: int, secure: bool = True, **options) -> Settings:
    ranks = options.pop("ranks", {})
    rank = max(ranks.values(), default=3)
    layers = {
        "q": LayerShape(out=46, inp=57, rank=rank, scale=1.7),
        "v": LayerShape(out=24, inp=20, rank=rank, scale=0.6),
    }
    if METHODS[method].trains == "all":
        layers = {}
    names = tuple(f"c{i:02}" for i in range(clients))
    cut = 2 if METHODS[method].residual == "truncated" else None
    options = {"rank": cut, "examples": {n: 3 + 5 * i for i, n in enumerate(names)}, **options}
    secured = options.pop("secured", Secure()) if secure else None
    return Settings(METHODS[method], 7, names, layers, 9, ranks=ranks, secure=secured, **options)


def initial(s: Settings) -> AdapterState:
    g = torch.Generator().manual_seed(1)
    return AdapterState(fresh(s.layers, s.seed), {"w": torch.randn(4, 3, generator=g)})


class Crowd:
    """A transport both ways: plain updates, or answers of members who forget between messages.

    Attributes:
        gone: By client, the step at which it is lost.
        forged: What becomes of an answer on its way.
        seen: All answers.
    """

    def __init__(
        self,
        gone: Mapping[str, str] | None = None,
        forged: Callable[[str, Answer], Answer] = lambda step, answer: answer,
        spread: float = 0.03,
    ) -> None:
        self.gone, self.forged, self.spread = gone or {}, forged, spread
        self.kept: dict[str, dict] = {}
        self.seen: list[tuple[str, Answer]] = []

    def trained(self, exchange: Exchange, client: str) -> tuple[AdapterState, Update]:
        s = exchange.settings
        start = start_of(exchange.state, s, client)
        g = torch.Generator().manual_seed(derive(0, exchange.round, client))
        tensors = {
            name: value + self.spread * torch.randn(value.shape, generator=g)
            for name, value in only(flat(start), s.method.sent(exchange.round)).items()
        }
        rows = s.examples[client]
        return start, Update(exchange.round, client, tensors, rows, {"loss": float(rows)})

    def _added(self, exchange: Exchange, client: str) -> Added:
        state, s = exchange.state, exchange.settings
        start = origin(s, AdapterState(state.factors, state.head), state.ledger)
        return lambda widths: replace(
            summand(s, widths, *self.trained(exchange, client)), start=start
        )

    def train(self, exchange: Exchange) -> Iterator[Update | Lost]:
        for client in exchange.clients:
            if client in self.gone:
                yield Lost(client, "away")
            else:
                yield self.trained(exchange, client)[1]

    def evaluate(self, exchange: Exchange) -> Iterator[Lost]:
        yield from ()

    def ask(self, exchange: Exchange, asks: Mapping[str, Ask]) -> Iterator[Answer | Lost]:
        for client, ask in reversed(asks.items()):
            step = f"{ask.step} {ask.about.get('sum', '')}".strip()
            if self.gone.get(client) == step:
                yield Lost(client, f"away at {step}")
                continue
            member = Member(client) if ask.step == "keys" else Member.load(self.kept[client])
            try:
                secure = exchange.settings.secure
                assert secure is not None
                answer = member.answer(ask, secure, self._added(exchange, client))
                self.seen.append((step, answer))
                yield self.forged(step, answer)
            except UserError as error:
                yield Lost(client, str(error), refused=True)
            self.kept[client] = member.dump()
