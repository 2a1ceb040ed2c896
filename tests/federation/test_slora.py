"""SLoRA against its equations: sparse rounds, then the best pair of what they came to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import mean, product, relative
from simulation import EXAMPLES, SITES, initial, settings, simulate

from fedex_lora.aggregation.adapter import AdapterState, LayerShape, folded
from fedex_lora.aggregation.sparse import spread
from fedex_lora.errors import UserError
from fedex_lora.federation.state import broadcast_to
from fedex_lora.runs.plan.traffic import DryRun

TWO = {"density": 0.3, "rounds": 2}


def made(**kwargs):
    s = settings("slora", **kwargs)
    return replace(s, method=s.method.with_options(TWO))


def change(state, site):
    """D of the head's values, entry by entry."""
    shape, values = SITES[site], state.head[f"{site}.sparse"].double()
    where = spread(site, shape.out, shape.inp, torch.arange(1.0, len(values) + 1))
    found = torch.zeros(shape.out, shape.inp, dtype=torch.float64)
    for i, value in enumerate(values, 1):
        found[where == i] = value
    return found


@pytest.mark.parametrize("extra", [{}, {"clients_per_round": 2}, {"server_learning_rate": 0.7}])
def test_sparse_rounds_are_exact_and_factors_are_the_best_pair_of_what_they_came_to(extra):
    s = made(**extra)
    states, clients, records = simulate(s, 4)
    for site, shape in SITES.items():
        d = torch.zeros(shape.out, shape.inp, dtype=torch.float64)
        for moves in clients.history[:2]:
            n = [EXAMPLES[c] for c in moves]
            drift = mean([change(e, site) - change(b, site) for b, e in moves.values()], n)
            d = d + s.server_learning_rate * drift
        assert (d != 0).sum() == round(0.3 * shape.out * shape.inp)
        u, values, vh = torch.linalg.svd(d, full_matrices=False)
        f, r = states[2].factors[site], shape.rank
        assert relative(product(f), u[:, :r] * values[:r] @ vh[:r]) < 1e-5
        torch.testing.assert_close(f.A @ f.A.mT, torch.eye(r), rtol=0, atol=1e-5)
        # plain averaging from there on
        moves = clients.history[2]
        for x in "AB":
            first = getattr(f, x).double()
            drift = mean(
                [getattr(e.layers[site], x) - first for _, e in moves.values()],
                [EXAMPLES[c] for c in moves],
            )
            got = getattr(states[3].factors[site], x).double()
            assert relative(got, first + s.server_learning_rate * drift) < 1e-5
    assert [sorted(state.head) for state in states] == [
        ["q.sparse", "v.sparse", "w"],
        ["q.sparse", "v.sparse", "w"],
        ["w"],
        ["w"],
        ["w"],
    ]
    assert ["deviation" in record for record in records] == [False, False, True, True]
    joined = broadcast_to(states[3], s, "a", 0).tensors  # who joins late is sent no sparse change
    assert sorted(joined) == ["A/q", "A/v", "B/q", "B/v", "head/w"]


def test_the_model_of_a_sparse_round_is_exported_as_plain_factors():
    s = made()
    states, _, _ = simulate(s, 1)
    plain = folded(AdapterState(states[1].factors, states[1].head))
    assert set(plain.head) == {"w"}
    for site in SITES:
        assert relative(product(plain.layers[site]), change(states[1], site)) < 1e-6


def test_what_is_sent_is_the_values_and_later_the_factors():
    s = made()
    run = DryRun(s, {n: t.shape for n, t in initial(s).head.items()})
    w = initial(s).head["w"].numel()
    values = sum(round(0.3 * x.out * x.inp) for x in SITES.values())
    pair = sum(x.rank * (x.out + x.inp) for x in SITES.values())
    sent = [run.round() for _ in range(4)]
    assert [up["a"].numbers for up, _ in sent] == [values + w, values + w, pair + w, pair + w]
    assert [down["a"].numbers for _, down in sent] == [0, values + w, pair + w, pair + w]


def test_places_are_many_and_differ_from_layer_to_layer():
    ones = torch.ones(50)
    q, again, v = (spread(name, 20, 30, ones) for name in ("q", "q", "v"))
    assert q.sum() == 50 and torch.equal(q, again) and not torch.equal(q, v)
    assert spread("q", 4, 3, torch.ones(12)).all()


def test_a_layer_narrower_than_the_rank_gets_zeros():
    s = made(layers={"q": LayerShape(out=2, inp=5, rank=4, scale=2.0)})
    states, _, _ = simulate(s, 3)
    f = states[2].factors["q"]
    assert f.B.shape == (2, 4) and not f.B[:, 2:].any() and not f.A[2:].any()


@pytest.mark.parametrize(
    "options, why",
    [
        ({"density": 0.0}, "density: expected a number above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "density: expected a number above 0 and at most 1, got 1.5"),
        ({"rounds": 0}, "rounds: expected a number of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_named(options, why):
    with pytest.raises(UserError, match=rf"^method\.options\.{why}"):
        settings("slora").method.with_options(options)
