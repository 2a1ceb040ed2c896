"""Fed-SB against its equations, in float64 and on dense matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from oracles import mean, product, relative
from simulation import EXAMPLES, SITES, initial, settings, simulate

from fedex_lora.aggregation.adapter import AdapterState, folded
from fedex_lora.errors import UserError
from fedex_lora.federation.server import Server
from fedex_lora.runs.plan.traffic import DryRun

PARTIAL = {"clients_per_round": 2}


@pytest.mark.parametrize("extra", [{}, PARTIAL, {"server_learning_rate": 0.7}])
def test_round_1_keeps_the_best_rank_r_of_the_step_along_the_mean_gradients_sign(extra):
    s = settings("fed-sb", **extra)
    states, clients, _ = simulate(s, 1)
    n = [EXAMPLES[c] for c in clients.history[0]]
    for site, shape in SITES.items():
        g = mean([end.head[f"{site}.weight"] for _, end in clients.history[0].values()], n)
        u, values, vh = torch.linalg.svd(-1e-4 * g.sign(), full_matrices=False)
        r = shape.rank
        got = folded(_whole(states[1])).layers[site]
        assert relative(product(got), u[:, :r] * values[:r] @ vh[:r]) < 1e-6
        f = states[1].factors[site]
        for q in (f.B.mT @ f.B, f.A @ f.A.mT):
            torch.testing.assert_close(q, torch.eye(r), rtol=0, atol=1e-6)
        assert f"{site}.weight" not in states[1].head


@given_settings(deadline=None, max_examples=10)
@given(st.sampled_from([{}, PARTIAL, {"server_learning_rate": 0.7}]), st.floats(1e-3, 1.0))
def test_later_the_global_model_moves_by_the_weighted_mean_of_the_products(extra, spread):
    s = settings("fed-sb", **extra)
    states, clients, records = simulate(s, 4, spread=spread)
    for before, after, moves in zip(states[1:], states[2:], clients.history[1:]):
        n = [EXAMPLES[c] for c in moves]
        for site in SITES:
            moved = [
                product(folded(end).layers[site]) - product(folded(start).layers[site])
                for start, end in moves.values()
            ]
            expected = s.server_learning_rate * mean(moved, n)
            got, held = (product(folded(_whole(x)).layers[site]) for x in (after, before))
            assert relative(got - held, expected) < 1e-5
            assert torch.equal(after.factors[site].A, states[1].factors[site].A)
            assert torch.equal(after.factors[site].B, states[1].factors[site].B)
    assert not any("deviation" in record for record in records)


def test_what_is_sent_is_gradients_once_and_r_squared_numbers_later():
    s = settings("fed-sb")
    run = DryRun(s, {n: t.shape for n, t in initial(s).head.items()})
    whole, inner = sum(x.out * x.inp for x in SITES.values()), 2 * 3 * 3
    rank = sum(x.rank * (x.out + x.inp) for x in SITES.values())
    w = initial(s).head["w"].numel()
    up, down = run.round()
    assert (up["a"].numbers, down["a"].numbers) == (whole + inner + w, 0)
    up, down = run.round()
    assert (up["a"].numbers, down["a"].numbers) == (inner + w, rank + inner + w)
    up, down = run.round()
    assert (up["a"].numbers, down["a"].numbers) == (inner + w, inner + w)


def test_a_layer_narrower_than_the_rank_gets_zeros():
    layers = {"q": replace(SITES["q"], out=2, inp=5, rank=4)}
    states, _, _ = simulate(settings("fed-sb", layers=layers), 2)
    f = states[2].factors["q"]
    assert f.B.shape == (2, 4) and not f.B[:, 2:].any() and not f.A[2:].any()


def test_frozen_factors_are_not_aligned():
    with pytest.raises(UserError, match=r"align: .*one factor is frozen"):
        Server("fed-sb", SITES, ["a"], align=True)


def _whole(state):
    return AdapterState(state.factors, state.head)
