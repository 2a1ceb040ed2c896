"""The methods of the field against what their papers say, in float64 and on dense matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import SITES, dense64, mean, product, start_state, trained_by
from test_aggregate import federation, fresh_like, run

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.aggregation.assignments.robust_pca import sparse_part
from fedex_lora.aggregation.assignments.sketched import omega
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import UserError

drawn = given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    st.integers(0, 2**20),
    st.sampled_from([1.0, 0.5]),
)
some = settings(deadline=None, max_examples=25)


def sent(name, n, seed, eta=1.0, **options):
    """Every layer's name, starts, ends, and what the aggregator gives."""
    method = METHODS[name].with_options(options)
    starts, ends = federation(method, len(n), seed)
    out = run(method, SITES, starts, ends, n, eta)
    for site in SITES:
        yield site, [x.layers[site] for x in starts], [x.layers[site] for x in ends], out


def moved(starts, ends, n, eta):
    """B⁰ + η(B̄ − B⁰) and A likewise, and the ideal product Σ w(B⁰A⁰ + η(BA − B⁰A⁰)), unscaled."""
    b, a = (
        mean(
            [getattr(s, x) + eta * (getattr(e, x) - getattr(s, x)) for s, e in zip(starts, ends)], n
        )
        for x in "BA"
    )
    parts = [s.B @ s.A + eta * (e.B @ e.A - s.B @ s.A) for s, e in zip(starts, ends)]
    return b, a, mean(parts, n)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@some
@drawn
def test_fedsa_averages_A_and_puts_nothing_into_the_base(n, seed, eta):
    for site, starts, ends, out in sent("fedsa", n, seed, eta):
        close(out.factors[site].A, moved(starts, ends, n, eta)[1])
        assert not out.increment and not out.deviation  # of products nobody knows


@some
@drawn
def test_fedmomentum_keeps_the_best_pair_and_puts_the_rest_into_the_base(n, seed, eta):
    for site, starts, ends, out in sent("fedmomentum", n, seed, eta):
        f, ideal = out.factors[site], ends[0].scale * moved(starts, ends, n, eta)[2]
        u, values, vh = torch.linalg.svd(ideal, full_matrices=False)
        rank = SITES[site].rank
        close(product(f), u[:, :rank] * values[:rank] @ vh[:rank])
        close(dense64(out.increment[site]), u[:, rank:] * values[rank:] @ vh[rank:])


@some
@drawn
def test_lora_fair_solves_its_ridge_regression(n, seed, eta):
    for penalty in (0.01, 3.0):
        for site, starts, ends, out in sent("lora-fair", n, seed, eta, penalty=penalty):
            b, a, ideal = moved(starts, ends, n, eta)
            # min ‖ideal − (b + x)a‖² + λ‖x‖² as least squares of stacked rows
            rows = torch.cat([a.T, penalty**0.5 * torch.eye(len(a), dtype=a.dtype)])
            wanted = torch.cat([(ideal - b @ a).T, torch.zeros(len(a), len(b), dtype=a.dtype)])
            close(out.factors[site].A, a)
            close(out.factors[site].B, b + torch.linalg.lstsq(rows, wanted).solution.T)


@some
@drawn
def test_florist_keeps_the_least_rank_that_holds_the_energy(n, seed, eta):
    for energy in (0.5, 0.9, 1):
        for site, starts, ends, out in sent("florist", n, seed, eta, energy=energy):
            change = ends[0].scale * moved(starts, ends, n, eta)[2]
            u, values, vh = torch.linalg.svd(change, full_matrices=False)
            shares = [float((values[:p] ** 2).sum() / (values**2).sum()) for p in range(10)]
            p = next((p for p, share in enumerate(shares) if share >= energy - 1e-12), len(values))
            close(dense64(out.increment[site]), u[:, :p] * values[:p] @ vh[:p])
            assert site not in out.factors


@some
@drawn
def test_flora_na_fits_a_pair_of_combinations(n, seed, eta):
    for site, starts, ends, out in sent("flora-na", n, seed, eta):
        ideal = moved(starts, ends, n, eta)[2]
        p = q = torch.tensor(n, dtype=torch.float64) / sum(n)
        bs, as_ = (torch.stack([getattr(e, x) for e in ends]) for x in "BA")

        def solved(parts, ideal=ideal):  # the best combination of matrices, dense
            return torch.linalg.pinv(torch.stack([x.flatten() for x in parts]).T) @ ideal.flatten()

        for _ in range(50):
            q = solved([b @ torch.einsum("u,uin->in", p, as_) for b in bs])
            p = solved([torch.einsum("u,uoi->oi", q, bs) @ a for a in as_])
        fitted = torch.einsum("u,uoi->oi", q, bs) @ torch.einsum("u,uin->in", p, as_)
        got = product(out.factors[site]) / ends[0].scale
        close(got, fitted)
        b, a = (mean([getattr(e, x) for e in ends], n) for x in "BA")
        assert (got - ideal).norm() <= (b @ a - ideal).norm() * (1 + 1e-9) + 1e-12


def test_hetlora_weights_by_the_norm_of_the_product_and_pads_with_zeros():
    wide = {"q": LayerShape(out=7, inp=8, rank=4, scale=1.7)}
    g, narrow = torch.Generator().manual_seed(0), [{"q": wide["q"].at_rank(r)} for r in (1, 4, 2)]
    starts = [start_state(s, g) for s in narrow]
    starts = [replace(s, layers=fresh_like(x, torch.float64)) for s, x in zip(starts, narrow)]
    ends = [trained_by(s, frozenset("AB"), g) for s in starts]
    for eta in (1.0, 0.5):
        out = run(METHODS["hetlora"], wide, starts, ends, [3, 1, 2], eta).factors["q"]
        pairs = [(s.layers["q"], e.layers["q"]) for s, e in zip(starts, ends)]
        norms = [product(e).norm() for _, e in pairs]
        more = [4 - e.rank for _, e in pairs]
        b = [f * (s.B + eta * (e.B - s.B)) for (s, e), f in zip(pairs, [e.scale for _, e in pairs])]
        a = [s.A + eta * (e.A - s.A) for s, e in pairs]
        b = [torch.nn.functional.pad(x, (0, m)) for x, m in zip(b, more)]
        a = [torch.nn.functional.pad(x, (0, 0, 0, m)) for x, m in zip(a, more)]
        close(out.B * out.scale, mean(b, norms))
        close(out.A, mean(a, norms))


def test_hetlora_of_clients_that_changed_nothing_is_their_mean():
    starts, _ = federation(METHODS["hetlora"], 1, 0)
    still = replace(starts[0], layers=fresh_like(SITES, torch.float64))
    out = run(METHODS["hetlora"], SITES, [still] * 3, [still] * 3, [3, 1, 2])
    for site, f in still.layers.items():
        close(out.factors[site].A, f.A)
        assert not out.factors[site].B.any()


def robust_pca(m):
    """Candès et al., algorithm 1, with dense SVDs."""
    mu, threshold = m.numel() / (4 * m.abs().sum()), 1 / max(m.shape) ** 0.5
    low = s = y = torch.zeros_like(m)
    for _ in range(3000):
        u, values, vh = torch.linalg.svd(m - s + y / mu, full_matrices=False)
        low = u * (values - 1 / mu).clamp_min(0) @ vh
        x = m - low + y / mu
        s = x.sign() * (x.abs() - threshold / mu).clamp_min(0)
        y = y + mu * (m - low - s)
    return low, s


@pytest.mark.parametrize("k", [1, 3, 6])
def test_fedrpca_adds_the_low_rank_part_and_so_many_times_the_sparse_one(k):
    n = list(range(1, k + 1))
    for site, starts, ends, out in sent("fedrpca", n, 5, 0.5, boost=3.0):
        for x in "AB":
            drifts = [getattr(e, x) - getattr(s, x) for s, e in zip(starts, ends)]
            low, sparse = robust_pca(torch.stack([d.flatten() for d in drifts], dim=1))
            step = mean(list((low + 3.0 * sparse).T), n).reshape(drifts[0].shape)
            torch.testing.assert_close(
                getattr(out.factors[site], x), getattr(starts[0], x) + 0.5 * step, rtol=0, atol=1e-5
            )


def test_robust_pca_finds_what_was_hidden():
    g = torch.Generator().manual_seed(0)
    common = torch.randn(400, 1, generator=g) @ torch.randn(1, 12, generator=g)
    own = torch.zeros(400, 12)
    own.view(-1)[torch.randperm(4800, generator=g)[:150]] = 10.0
    found = sparse_part(common + own)
    assert (found - own).norm() < 0.05 * own.norm() and not sparse_part(0 * own).any()


@some
@drawn
def test_fedask_is_what_two_exchanges_of_sketches_come_to(n, seed, eta):
    for name, p in (("fedask", 0), ("fedask-both", 1)):
        for site, starts, ends, out in sent(name, n, seed, eta, oversampling=p):
            rank = SITES[site].rank
            products = [product(s) + eta * (product(e) - product(s)) for s, e in zip(starts, ends)]
            y = mean([x @ omega(SITES[site].inp, rank + p) for x in products], n)
            q = torch.linalg.qr(y).Q  # which the server sends, and clients answer
            z = mean([q.T @ x for x in products], n)
            u, values, vh = torch.linalg.svd(z, full_matrices=False)
            close(product(out.factors[site]), q @ u[:, :rank] * values[:rank] @ vh[:rank])
            balanced = out.factors[site].A.norm(dim=1), out.factors[site].B.norm(dim=0)
            close(*balanced)
            close(balanced[0] ** 2, values[:rank] / SITES[site].scale)


def test_no_rank_of_fedask_dies_where_a_product_lacks_some():
    wide = {"q": LayerShape(out=7, inp=8, rank=4, scale=1.7)}
    (start,), (end,) = federation(METHODS["fedask"], 1, 0, wide)
    end.layers["q"].B[:, 1:] = 0
    pair = run(METHODS["fedask"], wide, [start], [end], [1]).factors["q"]
    close(product(pair), product(end.layers["q"]))
    close(pair.A[1:] @ pair.A.T, torch.eye(4, dtype=torch.float64)[1:])


def test_with_no_boost_fedrpca_is_plain_averaging():
    for site, starts, ends, out in sent("fedrpca", [3, 1, 2], 1, 0.5, boost=1):
        b, a, _ = moved(starts, ends, [3, 1, 2], 0.5)
        close(out.factors[site].B, b)
        close(out.factors[site].A, a)


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("florist", {"energi": 0.9}, "energi: there is no such option; did you mean 'energy'"),
        ("florist", {"energy": 0.0}, "energy: expected a number above 0 and at most 1, got 0.0"),
        ("florist", {"energy": float("nan")}, "energy: expected a number above 0"),
        ("florist", {"energy": "all"}, "energy: expected a float, got 'all'"),
        ("fedask", {"oversampling": 1.5}, "oversampling: expected an int, got 1.5"),
        ("fedask", {"oversampling": -1}, "oversampling: expected a number of at least 0, got -1"),
        ("florist", {"energy": True}, "energy: expected a float, got True"),
        ("lora-fair", {"penalty": -1.0}, "penalty: expected a number of at least 0, got -1.0"),
        ("fedrpca", {"boost": float("inf")}, "boost: expected a number of at least 0, got inf"),
        ("fedex", {"energy": 0.9}, "energy: there is no such option; it has none"),
    ],
)
def test_options_that_cannot_be_are_named(name, options, why):
    with pytest.raises(UserError, match=rf"^method\.options\.{why}"):
        METHODS[name].with_options(options)
