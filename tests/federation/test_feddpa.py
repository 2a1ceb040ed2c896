"""FedDPA against its equations: the shared pair is averaged, a client's own stays with it."""

from __future__ import annotations

import pytest
import torch
from oracles import mean, product
from simulation import EXAMPLES, SITES, initial, settings, simulate
from torch.testing import assert_close

from fedex_lora.aggregation.adapter import folded
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import flat
from fedex_lora.federation.state import begin, broadcast_to, start_of
from fedex_lora.runs.plan.traffic import DryRun


@pytest.mark.parametrize("extra", [{}, {"clients_per_round": 2}, {"server_learning_rate": 0.7}])
def test_the_shared_pair_is_averaged_and_a_client_goes_on_from_its_own(extra):
    s = settings("feddpa", **extra)
    states, clients, records = simulate(s, 3)
    own = {c: start_of(states[0], s, c).pair for c in s.clients}
    assert not any(f.B.any() for f in own["a"].values())
    for before, after, moves in zip(states, states[1:], clients.history):
        n = [EXAMPLES[c] for c in moves]
        for site in SITES:
            for x in "AB":
                first = getattr(before.factors[site], x).double()
                drift = mean([getattr(e.layers[site], x) - first for _, e in moves.values()], n)
                got = getattr(after.factors[site], x).double()
                assert_close(got, first + s.server_learning_rate * drift, rtol=0, atol=1e-6)
        for client, (start, end) in moves.items():
            for site, f in start.pair.items():
                assert torch.equal(f.A, own[client][site].A)
                assert torch.equal(f.B, own[client][site].B)
            own[client] = end.pair
        for client in s.clients:
            held = start_of(after, s, client).pair
            assert all(torch.equal(f.B, own[client][n].B) for n, f in held.items())
            assert all(torch.equal(f.A, own[client][n].A) for n, f in held.items())
        assert not after.ledger.entries
    assert all(record["deviation"] > 0 for record in records)


@pytest.mark.parametrize("mix", [0.5, 0.2, 1])
def test_a_clients_model_is_the_mix_of_both(mix):
    s = settings("feddpa")
    s = type(s)(**{**vars(s), "method": s.method.with_options({"mix": mix})})
    states, clients, _ = simulate(s, 2)
    for client in s.clients:
        state = start_of(states[2], s, client)
        end = clients.history[1][client][1]
        for site, shape in SITES.items():
            f, own = state.layers[site], end.pair[site]
            expected = (1 - mix) * product(f)
            expected = expected + mix * shape.scale * own.B.double() @ own.A.double()
            got = folded(state).layers[site]
            assert got.rank == 2 * shape.rank
            assert_close(product(got), expected, rtol=1e-5, atol=1e-6)


def test_nothing_of_it_is_ever_in_a_message():
    s = settings("feddpa")
    states, clients, _ = simulate(s, 2)
    plain, _, _ = simulate(settings("fedit"), 2)
    for state, like in zip(states, plain):
        for client in s.clients:
            sent = broadcast_to(state, s, client, 0).tensors
            assert sent.keys() == broadcast_to(like, settings("fedit"), client, 0).tensors.keys()
            assert not [name for name in sent if name.startswith("pair/")]
    assert {n for n in flat(clients.held["a"]) if n.startswith("pair/")} == {
        f"pair/{x}/{site}" for x in "AB" for site in SITES
    }
    head = {n: t.shape for n, t in initial(s).head.items()}
    up, down = DryRun(s, head).round()
    assert (up, down) == DryRun(settings("fedit"), head).round()
    run = DryRun(s, head)
    run.round()
    numbers = sum(x.rank * (x.out + x.inp) for x in SITES.values())
    assert run.own_factors() == 4 * 4 * numbers


def test_the_first_pair_is_a_function_of_the_seed_and_not_the_shared_one():
    s = settings("feddpa")
    state = begin(s, initial(s))
    a, b = (start_of(state, s, c) for c in "ab")
    for site in SITES:
        assert torch.equal(a.pair[site].A, b.pair[site].A)
        assert not torch.equal(a.pair[site].A, a.layers[site].A)
    for mix in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"options\.mix: expected a number above 0 and at most"):
            s.method.with_options({"mix": mix})
