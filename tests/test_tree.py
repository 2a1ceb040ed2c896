"""A tree of servers comes to what the float64 formulas say of all its clients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import SITES, dense64, ideal_change, mean, product, relative, residual
from test_aggregate import EXCHANGING, federation, run

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.aggregation.aggregator import Aggregator
from fedex_lora.aggregation.methods import METHODS

# a tree: a server's clients, numbered later, and the servers below it
leaves = st.just(0)
trees = st.recursive(
    st.lists(leaves, max_size=3), lambda below: st.lists(below | leaves), max_leaves=9
)


def clients_of(tree):
    """In the order in which a tree takes them in."""
    for part in tree:
        yield from clients_of(part) if isinstance(part, list) else [part]


def renumbered(tree, numbers):
    """The same shape of tree with every client a different one."""
    return [renumbered(p, numbers) if isinstance(p, list) else next(numbers) for p in tree]


def aggregated(tree, new, n, starts, ends):
    """What a server makes of its clients and of the servers below it."""
    aggregator = new()
    for part in tree:
        if isinstance(part, list):
            aggregator.combine(aggregated(part, new, n, starts, ends))
        else:
            aggregator.add(n[part], starts[part], ends[part])
    return aggregator


@given(
    st.sampled_from(EXCHANGING),
    trees.filter(lambda tree: any(True for _ in clients_of(tree))),
    st.integers(0, 2**20),
    st.sampled_from([1.0, 0.5]),
    st.integers(1, 2),
)
def test_a_tree_of_servers_comes_to_the_aggregate_of_all_clients(name, tree, seed, eta, round):
    method = METHODS[name]
    k = len(list(clients_of(tree)))
    tree = renumbered(tree, iter(range(k)))
    n = torch.randint(1, 1000, (k,), generator=torch.Generator().manual_seed(seed)).tolist()
    starts, ends = federation(method, k, seed, round=round)
    out = aggregated(
        tree, lambda: Aggregator(method, SITES, method.trained(round), eta), n, starts, ends
    ).finish()
    flat = run(method, SITES, starts, ends, n, eta, round)
    assert out.factors.keys() == flat.factors.keys()
    assert out.increment.keys() == flat.increment.keys()
    for site in SITES:
        s, e = [x.layers[site] for x in starts], [x.layers[site] for x in ends]
        if site in out.factors:
            close(product(out.factors[site]), product(flat.factors[site]))
        if site in out.increment:
            close(dense64(out.increment[site]), dense64(flat.increment[site]))
        if method.residual not in ("dropped", "partial"):
            got = dense64(out.increment[site]) if site in out.increment else 0.0
            if method.shared_base:
                got = got - product(s[0])
                got = got + product(out.factors[site]) if site in out.factors else got
            close(got, ideal_change(s, e, n, eta))
        if method.averages:
            for x in "AB":
                first = getattr(s[0], x)
                moved = first + eta * (mean([getattr(f, x) for f in e], n) - first)
                close(getattr(out.factors[site], x), moved)
        # of these nobody has the products, or the head decides them
        if not method.shows_products(method.trained(round)):
            continue
        both = method.trained(round) == {"A", "B"}
        expected = residual(e, n).norm().item() if both else 0.0
        assert out.deviation[site] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        ideal = mean([product(f) for f in e], n).norm().item()
        assert out.ideal[site] == pytest.approx(ideal, rel=1e-9)
    if method.shared_base:
        for key, first in starts[0].head.items():
            drift = mean([x.head[key] - first for x in ends], n)
            close(out.head[key], first + eta * drift)


@pytest.mark.parametrize("name", [n for n in EXCHANGING if METHODS[n].ranks_may_differ])
def test_ranks_may_differ_between_the_servers_of_a_tree(name):
    method, n, ranks = METHODS[name], [3, 1, 2, 5], [1, 4, 2, 3]
    wide = {"q": LayerShape(out=7, inp=8, rank=4, scale=1.7)}
    starts, ends = [], []
    for i, rank in enumerate(ranks):
        begun, ended = federation(method, 1, i, {"q": wide["q"].at_rank(rank)})
        zero = {s: replace(f, B=torch.zeros_like(f.B)) for s, f in begun[0].layers.items()}
        starts.append(replace(begun[0], layers=zero))  # of one product, whatever the rank
        ends.append(ended[0])
    new = lambda: Aggregator(method, wide, frozenset("AB"))  # noqa: E731
    out = aggregated([[0, 1], [[2], 3]], new, n, starts, ends).finish()
    s, e = [x.layers["q"] for x in starts], [x.layers["q"] for x in ends]
    if method.residual == "exact":
        close(dense64(out.increment["q"]), ideal_change(s, e, n))
    if out.factors and "product" in method.assignment.needs:
        u, values, vh = torch.linalg.svd(mean([product(f) for f in e], n))
        close(product(out.factors["q"]), (u[:, :4] * values[:4]) @ vh[:4])


@pytest.mark.parametrize("spread", [1, 1e-2, 1e-4])
def test_regions_that_nearly_agree_lose_no_digits_in_float32(spread):
    layers = {"q": LayerShape(out=96, inp=64, rank=4, scale=2.0)}
    starts, ends = federation(METHODS["fedex"], 9, 11, layers, torch.float32, spread)
    n = [5, 1, 3, 8, 2, 7, 1, 1, 4]
    new = lambda: Aggregator(METHODS["fedex"], layers, frozenset("AB"))  # noqa: E731
    tree = [[[0, 1, 2], [3, 4]], [[5], [6, 7, 8]]]
    out = aggregated(tree, new, n, starts, ends).finish()
    expected = residual([x.layers["q"] for x in ends], n)
    assert relative(dense64(out.increment["q"]), expected) < 1e-6


def test_a_server_without_clients_adds_nothing():
    starts, ends = federation(METHODS["fedex"], 3, 1, dtype=torch.float32)
    new = lambda: Aggregator(METHODS["fedex"], SITES, frozenset("AB"))  # noqa: E731
    whole = run(METHODS["fedex"], SITES, starts, ends, [3, 1, 2])
    for tree in ([[], 0, 1, 2], [0, 1, 2, []], [[0, 1, 2]]):
        out = aggregated(tree, new, [3, 1, 2], starts, ends).finish()
        for site, f in whole.factors.items():
            assert torch.equal(out.factors[site].A, f.A) and torch.equal(out.factors[site].B, f.B)
            assert torch.equal(dense64(out.increment[site]), dense64(whole.increment[site]))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
