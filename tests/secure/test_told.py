"""What server and clients tell each other beside a sum: a lie is of no use, or is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from crowd import Crowd, initial, settings

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.errors import QuorumLost, UpdateRefused
from fedex_lora.federation.checks import account
from fedex_lora.federation.loop import Exchange, run_round
from fedex_lora.federation.messages import Lost, Update
from fedex_lora.federation.noise import SumNoise
from fedex_lora.federation.secure import fixed
from fedex_lora.federation.secure.messages import Answer, Ask
from fedex_lora.federation.secure.opening import Book
from fedex_lora.federation.secure.round import secure_round
from fedex_lora.federation.secure.told import origin
from fedex_lora.federation.settings import Secure, Settings
from fedex_lora.federation.state import ServerState, begin

VICTIM = "c01"


class Lying(Crowd):
    """All but one are told something else at one step."""

    def __init__(self, step: str, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.step, self.about = step, about

    def ask(self, exchange: Exchange, asks: Mapping[str, Ask]) -> Iterator[Answer | Lost]:
        for client, ask in asks.items():
            if client != VICTIM and ask.step == self.step:
                asks = {**asks, client: replace(ask, about={**ask.about, **self.about})}
        return super().ask(exchange, asks)


@pytest.mark.parametrize("about", [{"exponents": [fixed.MOST] * 7}, {"halvings": 40}])
def test_who_has_the_others_add_nothing_is_not_left_with_one_client_s_numbers(
    monkeypatch: pytest.MonkeyPatch, about: Mapping[str, Any]
) -> None:
    """In units of 1, or with weights of 2⁻⁴⁰, all that the others add is their number and loss."""
    s = settings("fedit", 3, weights="uniform")
    opened, vectors = list[np.ndarray](), list[np.ndarray]()
    honest, plain = Book.open, fixed.encode

    def spied(self: Book, total: np.ndarray, *arguments: Any) -> None:
        honest(self, total, *arguments)
        opened.append(total)

    def encoded(*arguments: Any) -> np.ndarray:
        vectors.append(plain(*arguments))
        return vectors[-1].copy()

    monkeypatch.setattr(Book, "open", spied)
    monkeypatch.setattr(fixed, "encode", encoded)
    with pytest.raises(QuorumLost, match="rows sum to"):
        secure_round(begin(s, initial(s)), s, Lying("send", about))
    last, victim, first = vectors
    assert np.abs((first + last).view(np.int64)).max() < 32
    off = np.abs((opened[1] - victim).view(np.int64).astype(float))
    assert np.median(off) > 2.0**61


def test_a_sum_of_clients_with_different_bounds_is_none() -> None:
    """Shares of noise that follow a smaller bound would not hide an update with a larger one."""
    noise = SumNoise(bound=0.2, deviation=0.1, least=3, seed=5, of_count=0.3)
    secured = Secure(threshold=3, noise=noise)
    s = settings("fedit", 4, weights="uniform", secured=secured, clip=0.2)
    assert secure_round(begin(s, initial(s)), s, Lying("train", {}))[0].version == 1
    with pytest.raises(QuorumLost, match="asked for a unit"):  # 0.12 would have the same one
        secure_round(begin(s, initial(s)), s, Lying("train", {"clip": 0.12}))


class OtherModels(Crowd):
    """One client is sent another head than the rest, and says that it was not."""

    def __init__(self, s: Settings, says: bool) -> None:
        super().__init__(forged=lambda step, answer: answer if says else self.lie(step, answer))
        self.s = s

    def lie(self, step: str, answer: Answer) -> Answer:
        start = initial(self.s)
        about = {**answer.about, "start": origin(self.s, start, Ledger())}
        return replace(answer, about=about) if step == "train" else answer

    def ask(self, exchange: Exchange, asks: Mapping[str, Ask]) -> Iterator[Answer | Lost]:
        for client in asks:
            state = exchange.state
            if client == VICTIM:
                state = replace(state, head={n: 2 * t for n, t in state.head.items()})
            other = Exchange(state, exchange.settings, exchange.clients)
            yield from super().ask(other, {client: asks[client]})


def test_who_starts_from_another_model_is_left_out_or_spoils_the_sum() -> None:
    s = settings("fedex", 3)
    state = begin(s, initial(s))
    _, record = secure_round(state, s, OtherModels(s, says=True))
    assert "another model" in record["refused"][VICTIM]
    with pytest.raises(QuorumLost, match="rows sum to"):
        secure_round(state, s, OtherModels(s, says=False))


@pytest.mark.parametrize("secure", [False, True])
def test_who_tells_no_account_or_one_above_the_budget_is_left_out(secure: bool) -> None:
    s = settings("fedit", 4, secure, epsilon=8.0)
    told = {"c00": 8.0, "c01": 8.1, "c02": 7.0, "c03": 0.0}
    _, record = (secure_round if secure else run_round)(begin(s, initial(s)), s, Telling(told))
    assert record["clients"].keys() == told.keys() - {"c01"}
    assert "its epsilon is 8.1; expected a number from 0 to 8" in record["refused"]["c01"]
    assert record["clients"]["c02"]["epsilon"] == 7.0
    with pytest.raises(QuorumLost, match="its epsilon is None"):
        (secure_round if secure else run_round)(begin(s, initial(s)), s, Crowd())


@pytest.mark.parametrize("value", [None, "8", 8, True, -1.0, math.nan, math.inf, [1.0]])
def test_an_account_is_a_number(value: object) -> None:
    s = settings("fedit", 2, epsilon=math.inf)
    with pytest.raises(UpdateRefused, match="expected a number from 0 to inf"):
        account({"epsilon": value, "noise_multiplier": 1.0}, s)
    assert account({"epsilon": value}, settings("fedit", 2)) == {}


class Telling(Crowd):
    """Clients that tell an ε."""

    def __init__(self, told: Mapping[str, float]) -> None:
        super().__init__()
        self.told = told

    def trained(self, exchange: Exchange, client: str) -> tuple[AdapterState, Update]:
        start, update = super().trained(exchange, client)
        metrics = {"epsilon": self.told[client], "noise_multiplier": 1.0}
        return start, replace(update, metrics=metrics)


def test_an_origin_is_of_ledger_head_and_factors() -> None:
    s = settings("fedex", 2)
    first = initial(s)
    one = {"q": Delta(torch.ones(46, 1), torch.ones(1, 57))}
    ledger = Ledger().append(1, one)
    other = replace(first, head={"w": first.head["w"] + 1e-6})
    layers = {**first.layers, "v": replace(first.layers["v"], B=first.layers["v"].B + 1e-6)}
    found = {
        origin(s, first, Ledger()),
        origin(s, first, ledger),
        origin(s, first, ledger.append(2, one)),
        origin(s, first, Ledger().append(2, one)),
        origin(s, other, ledger),
        origin(s, AdapterState(layers, first.head), ledger),
    }
    assert len(found) == 6 and origin(s, initial(s), Ledger()) in found
    several = settings("flexlora", 2, ranks={"c00": 2, "c01": 3})
    state: ServerState = begin(several, initial(several))
    assert origin(several, AdapterState(state.factors, state.head), Ledger()) == origin(
        several, AdapterState({}, state.head), Ledger()
    )
