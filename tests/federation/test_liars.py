"""Clients that lie: no message moves the global model further than its bound, and a run goes on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulation import EXAMPLES, SITES, assert_same, initial, settings, simulate

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import QuorumLost, UserError
from fedex_lora.federation.checks import LARGEST, check_shares, outliers
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.state import begin

EXCHANGING = [name for name, method in METHODS.items() if method.exchanges and not method.pooled]


def times(factor, *liars):
    """What the liars trained is so many times as far away."""

    def spoil(update):
        if update.client not in liars:
            return update
        return replace(update, tensors={n: t * factor for n, t in update.tensors.items()})

    return spoil


def rounds_of(name):
    """Where factors stay with their clients the made-up liar of these tests goes on from its lie;
    a real one is told by the server where its round begins (tests/engines)."""
    assignment = METHODS[name].assignment
    return 1 if assignment.own and not assignment.dealt else 2


@pytest.mark.parametrize("name", EXCHANGING)
@pytest.mark.parametrize("factor", [1e3, -1e4, 1e11, 1e19, 3e38])
def test_who_changes_far_more_than_the_others_is_left_out(name, factor):
    s = settings(name, norm_ratio=10.0, layers={} if name == "full" else SITES)
    rounds = rounds_of(name)
    states, _, records = simulate(s, rounds, breaks=times(factor, "b"))
    alone, _, _ = simulate(replace(s, clients=tuple("acd")), rounds)
    for state, expected in zip(states, alone):
        assert_same(
            AdapterState(state.factors, state.head), AdapterState(expected.factors, expected.head)
        )
    assert all(list(r["refused"]) == ["b"] and sorted(r["weights"]) == list("acd") for r in records)


def test_the_record_holds_norms_their_median_and_shares():
    s = settings("fedex", norm_ratio=10.0)
    _, clients, (record,) = simulate(s, 1, breaks=times(1e3, "b"))
    moves = clients.history[0]
    squares = {
        c: sum(
            (getattr(e.layers[n], x) - getattr(b.layers[n], x)).double().square().sum()
            for n in SITES
            for x in "AB"
        )
        + (e.head["w"] - b.head["w"]).double().square().sum()
        for c, (b, e) in moves.items()
    }
    for client in "acd":
        assert record["norms"][client] == pytest.approx(squares[client].sqrt().item(), rel=1e-6)
        assert record["weights"][client] == EXAMPLES[client] / 17
    assert record["norms"]["b"] > 10 * record["norms"]["a"]
    in_order = sorted(record["norms"].values())
    assert record["median_norm"] == pytest.approx((in_order[1] + in_order[2]) / 2)
    assert "the median of the others is" in record["refused"]["b"]


@given(
    honest=st.lists(st.floats(0.1, 1.0), min_size=2, max_size=9),
    liars=st.lists(st.floats(11, 1e30), max_size=4),
)
def test_liars_who_are_fewer_are_all_found_and_nobody_else(honest, liars):
    lies = liars[: len(honest) - 1]  # fewer than the honest, so also the median of the others
    norms = {f"h{i}": n for i, n in enumerate(honest)} | {f"l{i}": n for i, n in enumerate(lies)}
    found = outliers(norms, 10.0)
    assert not any(name.startswith("h") for name in found)
    if len(lies) + 1 < len(honest):
        assert len(found) == len(lies)


def test_norms_are_not_compared_with_nothing():
    assert outliers({"a": 1.0, "b": 1e9}, 10.0) == {}  # who of two lies cannot be told
    assert outliers({"a": 0.0, "b": 0.0, "c": 1.0}, 10.0) == {}
    assert outliers({"a": 1.0, "b": 1.0, "c": 1e9}, None) == {}


PRODUCTS = [  # of methods whose products the server knows
    n
    for n in EXCHANGING
    if METHODS[n].trained(1) == {"A", "B"} and not METHODS[n].assignment.private
]


@pytest.mark.parametrize("name", PRODUCTS)
def test_of_two_the_update_that_would_spoil_the_state_is_left_out(name):
    """Every entry is finite and small enough; the products are not."""
    rank = 2 if METHODS[name].residual == "truncated" else None
    s = replace(settings(name, norm_ratio=10.0, rank=rank), clients=tuple("ab"))
    states, _, records = simulate(s, rounds_of(name), breaks=times(1e11, "b"))
    for record in records:
        assert list(record["clients"]) == ["a"]
        assert "beyond what can be trained from" in record["refused"]["b"]
    assert all(torch.isfinite(f.A).all() for f in states[-1].factors.values())
    for site in SITES:
        total = states[-1].ledger.total(site)
        assert total is None or total.abs().max() < LARGEST


def test_below_the_quorum_the_run_stops_and_goes_on_with_honest_clients():
    s = replace(settings("fedex", norm_ratio=10.0, min_clients=2), clients=tuple("ab"))
    states, clients, _ = simulate(s, 1)
    clients.breaks = times(1e11, "b")
    with pytest.raises(QuorumLost, match=r"round 2: 1 valid updates.* 2.*b: it changed by"):
        run_round(states[-1], s, clients)
    clients.breaks = lambda update: update
    after, _ = run_round(states[-1], s, clients)
    undisturbed, _, _ = simulate(s, 2)
    assert_same(AdapterState(after.factors), AdapterState(undisturbed[-1].factors))


def test_who_was_not_asked_is_named_and_not_counted():
    s = settings("fedex")

    class Crowd:
        def __init__(self, inner):
            self.inner = inner

        def train(self, exchange):
            for update in self.inner.train(exchange):
                yield update
                yield replace(update, client="zoe")

    _, clients, _ = simulate(s, 0)
    _, record = run_round(begin(s, initial(s)), s, Crowd(clients))
    assert sorted(record["clients"]) == list("abcd")
    assert record["refused"] == {"zoe": "sent something that was not asked for"}


def test_counts_hold_for_the_run():
    s = settings("fedex", examples=EXAMPLES)
    more = replace(s, examples={**EXAMPLES, "b": 2})
    _, _, (record,) = simulate(more, 1)
    assert "trained on 1 examples; it declared 2 before round 1" in record["refused"]["b"]


def test_one_client_of_several_may_not_decide_the_mean_by_itself():
    s = settings("fedex", max_share=0.9)
    rows = {"a": 50, "b": 10**9, "c": 70}
    with pytest.raises(
        UserError, match=r"client b declares 1,000,000,000 of 1,000,000,120 rows.*max_share is 0.9"
    ):
        check_shares(replace(s, examples=rows))
    check_shares(replace(s, examples=rows, weights="uniform"))
    check_shares(replace(s, examples=rows, max_share=1.0))
    check_shares(replace(s, examples={"a": 1, "b": 10**9}))
    check_shares(replace(s, examples={"a": 5, "b": 90, "c": 5}))
