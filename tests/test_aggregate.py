"""Laws for every row of the methods table, against dense float64 oracles."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    SITES,
    dense64,
    ideal_change,
    mean,
    product,
    relative,
    residual,
    start_state,
    trained_by,
)

from fedex_lora.aggregation.adapter import Factors, LayerShape, fresh
from fedex_lora.aggregation.aggregator import Aggregator
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.aggregation.statistics import orthonormal_rows

EXCHANGING = [name for name, m in METHODS.items() if m.exchanges]
federations = given(
    st.sampled_from(EXCHANGING),
    st.lists(st.integers(1, 1000), min_size=1, max_size=7),
    st.integers(0, 2**20),
    st.sampled_from([1.0, 0.5]),
    st.integers(1, 2),
)


def run(method, layers, starts, ends, n, eta=1.0, round=1):
    aggregator = Aggregator(method, layers, method.trained(round), eta)
    for weight, start, end in zip(n, starts, ends):
        aggregator.add(weight, start, end)
    return aggregator.finish()


def federation(method, k, seed, layers=SITES, dtype=torch.float64, spread=1.0, round=1):
    g = torch.Generator().manual_seed(seed)
    if method.shared_base:
        starts = [start_state(layers, g, dtype)] * k
    else:
        starts = [start_state(layers, g, dtype) for _ in range(k)]
    if method.assignment.drawn:
        starts = [replace(s, layers=fresh_like(layers, dtype)) for s in starts]
    return starts, [trained_by(s, method.trained(round), g, spread) for s in starts]


def fresh_like(layers, dtype):
    return {
        n: Factors(f.A.to(dtype), f.B.to(dtype), f.scale) for n, f in fresh(layers, 0, 1).items()
    }


@settings(deadline=None, max_examples=150)
@federations
def test_assigned_plus_residual_is_ideal(name, n, seed, eta, round):
    method = METHODS[name]
    starts, ends = federation(method, len(n), seed, round=round)
    out = run(method, SITES, starts, ends, n, eta, round)
    for site in SITES:
        s, e = [x.layers[site] for x in starts], [x.layers[site] for x in ends]
        change = ideal_change(s, e, n, eta)
        got = dense64(out.increment[site]) if site in out.increment else torch.zeros_like(change)
        if method.shared_base:
            got = got - product(s[0])
            got = got + product(out.factors[site]) if site in out.factors else got
        if method.residual in ("dropped", "partial"):
            continue
        torch.testing.assert_close(got, change, rtol=1e-9, atol=1e-9)
    for key in starts[0].head:
        expected = starts[0].head[key] + eta * mean(
            [e.head[key] - starts[0].head[key] for e in ends], n
        )
        if method.shared_base:
            torch.testing.assert_close(out.head[key], expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@federations
def test_deviation_is_what_plain_averaging_misses(name, n, seed, eta, round):
    method = METHODS[name]
    starts, ends = federation(method, len(n), seed, round=round)
    out = run(method, SITES, starts, ends, n, eta, round)
    for site in SITES:
        e = [x.layers[site] for x in ends]
        # of these nobody has the products, or the head decides them
        if not method.shows_products(method.trained(round)):
            assert not out.deviation and not out.ideal
            continue
        if method.trained(round) == {"A", "B"}:
            expected = residual(e, n).norm().item()
            assert out.deviation[site] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        ideal = mean([product(f) for f in e], n).norm().item()
        assert out.ideal[site] == pytest.approx(ideal, rel=1e-9)
        if "A" not in method.trained(round) or "B" not in method.trained(round):
            assert out.deviation[site] == 0


@pytest.mark.parametrize("name", EXCHANGING)
@pytest.mark.parametrize("round", [1, 2])
def test_identical_clients_give_no_deviation_and_no_residual(name, round):
    method = METHODS[name]
    starts, ends = federation(method, 1, 3, dtype=torch.float32, round=round)
    out = run(method, SITES, starts * 4, ends * 4, [3, 1, 7, 2], round=round)
    for site in SITES:
        if method.assignment.private:  # what is shared alone is known
            torch.testing.assert_close(out.factors[site].A, ends[0].layers[site].A)
            continue
        if method.shows_products(method.trained(round)):  # else the head decides them, exactly
            assert out.deviation[site] == 0
        if method.assignment.shared and not method.assignment.needs:
            assert site not in out.increment or not dense64(out.increment[site]).any()
            torch.testing.assert_close(
                product(out.factors[site]), product(ends[0].layers[site]), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", EXCHANGING)
@pytest.mark.parametrize("round", [1, 2])
def test_a_frozen_factor_is_passed_on_bit_for_bit(name, round):
    method = METHODS[name]
    starts, ends = federation(method, 3, 5, dtype=torch.float32, round=round)
    out = run(method, SITES, starts, ends, [3, 1, 7], round=round)
    if method.assignment.needs or not method.assignment.shared:
        return
    for site in SITES:
        for factor in {"A", "B"} - method.trained(round):
            got = getattr(out.factors[site], factor)
            assert torch.equal(got, getattr(starts[0].layers[site], factor))


@pytest.mark.parametrize("spread", [1, 1e-1, 1e-2, 1e-3, 1e-4])
def test_the_residual_keeps_its_digits_however_close_the_clients_are(spread):
    layers = {"q": LayerShape(out=96, inp=64, rank=4, scale=2.0)}
    starts, ends = federation(METHODS["fedex"], 5, 11, layers, torch.float32, spread)
    n = [5, 1, 3, 8, 2]
    out = run(METHODS["fedex"], layers, starts, ends, n)
    expected = residual([e.layers["q"] for e in ends], n)
    assert relative(dense64(out.increment["q"]), expected) < 1e-6
    assert relative(dense64(out.increment["q"].wire_form()), expected) < 1e-6


@pytest.mark.parametrize("k", [2, 3, 6, 40])
def test_the_residual_has_rank_at_most_k_minus_1_times_r_and_turns_dense_when_that_is_smaller(k):
    layers = {"q": LayerShape(out=60, inp=40, rank=3, scale=2.0)}
    starts, ends = federation(METHODS["fedex"], k, 11, layers, torch.float32)
    increment = run(METHODS["fedex"], layers, starts, ends, [1] * k).increment["q"]
    if (k - 1) * 3 * (60 + 40) < 60 * 40:
        assert increment.right is not None and increment.rank == (k - 1) * 3
    else:
        assert increment.right is None
    expected = residual([e.layers["q"] for e in ends], [1] * k)
    assert relative(dense64(increment), expected) < 1e-6


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.ranks_may_differ])
def test_ranks_may_differ(name):
    method, n = METHODS[name], [3, 1, 2]
    g = torch.Generator().manual_seed(0)
    wide = {"q": LayerShape(out=7, inp=8, rank=4, scale=1.7)}
    narrow = [{"q": wide["q"].at_rank(r)} for r in (1, 4, 2)]
    starts = [start_state(s, g) for s in narrow]
    if method.shared_base:  # they start from one product only where B = 0
        starts = [replace(s, layers=fresh_like(x, torch.float64)) for s, x in zip(starts, narrow)]
    ends = [trained_by(s, frozenset("AB"), g) for s in starts]
    out = run(method, wide, starts, ends, n)
    s, e = [x.layers["q"] for x in starts], [x.layers["q"] for x in ends]
    if method.residual == "exact":
        torch.testing.assert_close(dense64(out.increment["q"]), ideal_change(s, e, n))
    if out.factors and "product" in method.assignment.needs:
        u, sv, vh = torch.linalg.svd(mean([product(f) for f in e], n))
        best = (u[:, :4] * sv[:4]) @ vh[:4]
        torch.testing.assert_close(product(out.factors["q"]), best)
    b = [torch.nn.functional.pad(f.B * f.scale, (0, 4 - f.rank)) for f in e]
    a = [torch.nn.functional.pad(f.A, (0, 0, 0, 4 - f.rank)) for f in e]
    expected = (mean([product(f) for f in e], n) - mean(b, n) @ mean(a, n)).norm().item()
    assert out.deviation["q"] == pytest.approx(expected)


def test_svd_assignment_has_orthonormal_rows_even_where_the_product_has_lower_rank():
    a = torch.zeros(4, 6, dtype=torch.float64)
    a[0, 2] = 1
    rows = orthonormal_rows(a)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64))
    assert torch.equal(rows[0], a[0])


@pytest.mark.parametrize("given", [0, 2, 3])
def test_more_rows_than_columns_are_zero_beyond_them(given):
    a = torch.zeros(5, 3, dtype=torch.float64)
    a[[4, 1, 0][:given]] = torch.eye(3, dtype=torch.float64)[:given]
    rows = orthonormal_rows(a)
    kept = rows[rows.norm(dim=1) > 0]
    torch.testing.assert_close(kept @ kept.T, torch.eye(3, dtype=torch.float64))
    assert torch.equal(rows[[4, 1, 0][:given]], a[[4, 1, 0][:given]])


@pytest.mark.parametrize("name", ["flexlora", "fedex-hetero", "fedsvd"])
@pytest.mark.parametrize("out, inp", [(7, 3), (3, 7), (4, 4)])
def test_an_svd_assignment_of_more_ranks_than_a_layer_has_is_the_product_itself(name, out, inp):
    """r = 6 > min(out, in): B'A' is the mean of the products, and nothing is NaN."""
    method, layers = METHODS[name], {"q": LayerShape(out=out, inp=inp, rank=6, scale=1.5)}
    starts, ends = federation(method, 3, 5, layers)
    n = [3, 1, 2]
    result = run(method, layers, starts, ends, n)
    f = result.factors["q"]
    assert torch.isfinite(f.A).all() and torch.isfinite(f.B).all()
    if name == "fedsvd":  # trains B alone: the mean of B, times A
        ideal = 1.5 * mean([e.layers["q"].B for e in ends], n) @ starts[0].layers["q"].A
    else:
        ideal = mean([product(e.layers["q"]) for e in ends], n)
    assert relative(product(f), ideal) < 1e-12
    kept = f.A[f.A.norm(dim=1) > 0]
    torch.testing.assert_close(kept @ kept.T, torch.eye(len(kept), dtype=torch.float64))


def test_the_transposed_residual_is_not_mistaken_for_the_residual():
    """Square layers hide the published mistake; these are not square."""
    starts, ends = federation(METHODS["fedex"], 3, 1)
    out = run(METHODS["fedex"], SITES, starts, ends, [1, 2, 3])
    assert {n: w.shape for n, w in out.increment.items()} == {
        "q": (7, 5),
        "v": (6, 9),
        "q2": (7, 5),
    }


def test_a_client_by_itself_is_the_average_bit_for_bit():
    starts, ends = federation(METHODS["fedex"], 1, 1, dtype=torch.float32)
    out = run(METHODS["fedex"], SITES, starts, ends, [3])
    for site, end in ends[0].layers.items():
        assert torch.equal(out.factors[site].A, end.A) and torch.equal(out.factors[site].B, end.B)
        assert out.deviation[site] == 0 and site not in out.increment


def test_norms_are_left_out_if_nobody_asks_for_them():
    starts, ends = federation(METHODS["fedex"], 3, 1)
    aggregator = Aggregator(METHODS["fedex"], SITES, frozenset("AB"))
    for start, end in zip(starts, ends):
        aggregator.add(1.0, start, end)
    out = aggregator.finish(norms=False)
    whole = run(METHODS["fedex"], SITES, starts, ends, [1.0] * 3)
    assert not out.deviation and not out.ideal and whole.deviation
    for site in SITES:
        assert torch.equal(dense64(out.increment[site]), dense64(whole.increment[site]))
