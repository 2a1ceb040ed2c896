"""RAVAN against its equations, in float64 and on dense matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from oracles import mean, relative
from simulation import EXAMPLES, SITES, initial, settings, simulate
from small_runs import recipe

from fedex_lora.aggregation.adapter import AdapterState, LayerShape, folded
from fedex_lora.errors import UserError
from fedex_lora.federation.state import begin
from fedex_lora.runs.plan.traffic import DryRun

HEADS = {"q": replace(SITES["q"], rank=8), "v": replace(SITES["v"], rank=10)}


def change(state: AdapterState, site: str, scale: float) -> torch.Tensor:
    """s·Σₕ BₕHₕAₕ, head by head."""
    f, heads = state.layers[site], state.head[f"{site}.inner"].double()
    p, r = len(heads[0]), f.rank
    parts = [
        f.B[:, i * p : (i + 1) * p].double()
        @ h[: r - i * p, : r - i * p]
        @ f.A[i * p : (i + 1) * p].double()
        for i, h in enumerate(heads)
    ]
    return scale * sum(parts[1:], parts[0])


def test_factors_are_orthonormal_across_heads_a_function_of_the_seed_and_G_is_as_loaded():
    s = settings("ravan", layers=HEADS)
    state = begin(s, initial(s))
    again, other = begin(s, initial(s)), replace(s, seed=8)
    other = begin(other, initial(other))
    for site, shape in HEADS.items():
        f = state.factors[site]
        for q in (f.B.mT @ f.B, f.A @ f.A.mT):
            torch.testing.assert_close(q, torch.eye(shape.rank), rtol=0, atol=1e-6)
        assert torch.equal(f.B, again.factors[site].B) and torch.equal(f.A, again.factors[site].A)
        assert not torch.equal(f.B, other.factors[site].B)
        assert state.head[f"{site}.inner"].shape == ((4, 2, 2) if site == "q" else (4, 3, 3))
        assert not state.head[f"{site}.inner"].any()
    # layers of equal shape have factors of their own
    twins = dict.fromkeys(("q", "q2"), HEADS["q"])
    s = settings("ravan", layers=twins)
    b = begin(s, initial(s)).factors
    assert not torch.equal(b["q"].B, b["q2"].B) and not torch.equal(b["q"].A, b["q2"].A)


@given_settings(deadline=None, max_examples=10)
@given(
    st.sampled_from([{}, {"clients_per_round": 2}, {"server_learning_rate": 0.7}]),
    st.floats(1e-3, 1.0),
)
def test_the_global_model_moves_by_the_weighted_mean_of_the_products(extra, spread):
    s = settings("ravan", layers=HEADS, **extra)
    states, clients, records = simulate(s, 3, spread=spread)
    for before, after, moves in zip(states, states[1:], clients.history):
        n = [EXAMPLES[c] for c in moves]
        for site, shape in HEADS.items():
            moved = [
                change(end, site, shape.scale) - change(start, site, shape.scale)
                for start, end in moves.values()
            ]
            got, held = (
                change(AdapterState(x.factors, x.head), site, shape.scale) for x in (after, before)
            )
            assert relative(got - held, s.server_learning_rate * mean(moved, n)) < 1e-5
            assert torch.equal(after.factors[site].A, states[0].factors[site].A)
            assert torch.equal(after.factors[site].B, states[0].factors[site].B)
            plain = folded(AdapterState(after.factors, after.head)).layers[site]
            torch.testing.assert_close(plain.delta().dense().double(), got, rtol=0, atol=1e-5)
    assert not any("deviation" in record for record in records)


@pytest.mark.parametrize(
    "rank, heads, shape", [(3, 4, (3, 1, 1)), (10, 3, (3, 4, 4)), (5, 1, (1, 5, 5))]
)
def test_a_rank_is_divided_into_heads(rank, heads, shape):
    s = settings("ravan", layers={"q": replace(SITES["q"], rank=rank)})
    s = replace(s, method=s.method.with_options({"heads": heads}))
    assert begin(s, initial(s)).head["q.inner"].shape == shape


def test_what_is_sent_is_r_squared_by_heads_numbers_a_layer_both_ways():
    s = settings("ravan", layers=HEADS)
    run = DryRun(s, {n: t.shape for n, t in initial(s).head.items()})
    inner, w = 4 * (2 * 2 + 3 * 3), initial(s).head["w"].numel()
    up, down = run.round()
    assert (up["a"].numbers, down["a"].numbers) == (inner + w, 0)
    up, down = run.round()
    assert (up["a"].numbers, down["a"].numbers) == (inner + w, inner + w)


@pytest.mark.parametrize("out, inp", [(2, 5), (5, 2)])
def test_a_layer_narrower_than_the_rank_gets_zeros(out, inp):
    s = settings("ravan", layers={"q": LayerShape(out, inp, rank=4, scale=1.0)})
    f = begin(s, initial(s)).factors["q"]
    assert f.B.shape == (out, 4) and f.A.shape == (4, inp)
    assert torch.linalg.matrix_rank(f.B) == min(out, 4)
    assert torch.linalg.matrix_rank(f.A) == min(inp, 4)


@pytest.mark.parametrize("lora", [{"r": 4}, {"r": 9, "rank_pattern": {"query": 4}}])
def test_more_heads_than_the_rank_are_refused_where_they_are_asked_for(lora, tmp_path):
    with pytest.raises(ValueError, match=r"method\.options\.heads: 5 heads share the rank of 4"):
        recipe(tmp_path, lora=lora, method={"name": "ravan", "options": {"heads": 5}})
    recipe(tmp_path, lora={"r": 2}, method={"name": "ravan"})


def test_numbers_of_heads_that_cannot_be_are_refused():
    for heads in (0, -4):
        with pytest.raises(UserError, match=r"options\.heads: expected a number of at least 1"):
            settings("ravan").method.with_options({"heads": heads})
