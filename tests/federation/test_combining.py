"""Robust means and aligned factors, against dense float64 formulas, and with liars."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import SITES, dense64, ideal_change, mean, product
from simulation import initial, simulate
from simulation import settings as federation_settings
from test_aggregate import federation

from fedex_lora.aggregation.adapter import Factors
from fedex_lora.aggregation.aggregator import Aggregator
from fedex_lora.aggregation.combining import Combining
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.noise import MeanNoise
from fedex_lora.federation.server import Server
from fedex_lora.federation.state import begin
from fedex_lora.runs.plan.traffic import DryRun

MEDIAN, TRIMMED, KRUM = (Combining(x, 1) for x in ("median", "trimmed-mean", "krum"))  # type: ignore
ROBUST = [n for n, m in METHODS.items() if m.trains != "all" and not list(MEDIAN.problems(m, 9))]
EXACT = [n for n in ROBUST if METHODS[n].residual == "exact"]
ALIGNED = [n for n, m in METHODS.items() if not list(Combining(align=True).problems(m, 1))]


def run(name, starts, ends, n, combining, eta=1.0):
    aggregator = Aggregator(
        METHODS[name], SITES, METHODS[name].trained(1), eta, combining=combining
    )
    for weight, start, end in zip(n, starts, ends):
        aggregator.add(weight, start, end)
    return aggregator.finish()


def change(out, layer, start):
    """G' − G by what the aggregate puts into factors and base."""
    got = -product(start) + (dense64(out.increment[layer]) if layer in out.increment else 0)
    return got + (product(out.factors[layer]) if layer in out.factors else 0)


def coordinate_mean(values, cut):
    ordered = torch.stack([v.double() for v in values]).sort(dim=0).values
    return ordered[cut : len(values) - cut].mean(dim=0)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(EXACT),
    st.sampled_from([MEDIAN, TRIMMED]),
    st.integers(3, 6),
    st.integers(0, 2**20),
    st.sampled_from([1.0, 0.5]),
)
def test_an_exact_method_moves_by_the_robust_mean_of_the_products(name, combining, k, seed, eta):
    starts, ends = federation(METHODS[name], k, seed)
    out = run(name, starts, ends, range(1, k + 1), combining, eta)
    cut = 1 if combining is TRIMMED else (k - 1) // 2
    for layer in SITES:
        s, e = starts[0].layers[layer], [x.layers[layer] for x in ends]
        wanted = eta * coordinate_mean([product(f) - product(s) for f in e], cut)
        torch.testing.assert_close(change(out, layer, s), wanted, rtol=1e-9, atol=1e-9)
        pair = Factors(*(
            getattr(s, x) + coordinate_mean([getattr(f, x) - getattr(s, x) for f in e], cut)
            for x in "AB"
        ), s.scale)  # fmt: skip
        missed = wanted / eta - (product(pair) - product(s))
        assert out.deviation[layer] == pytest.approx(missed.norm().item(), rel=1e-9, abs=1e-9)
    head = coordinate_mean([x.head["w"] - starts[0].head["w"] for x in ends], cut)
    torch.testing.assert_close(out.head["w"], starts[0].head["w"] + eta * head)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("combining", [MEDIAN, TRIMMED, KRUM], ids=lambda c: c.mean)
@pytest.mark.parametrize("lie", [-5.0, 1e6, "noise"])
def test_one_liar_of_five_leads_no_coordinate_beyond_the_honest(name, combining, lie):
    starts, ends = federation(METHODS[name], 5, 1, spread=0.1)
    g = torch.Generator().manual_seed(9)

    def lied(start, end):
        noise = 100 * torch.randn(end.shape, generator=g, dtype=end.dtype)
        return start + noise if lie == "noise" else start + lie * (end - start)

    s, e = starts[0], ends[2]
    layers = {
        n: replace(f, A=lied(s.layers[n].A, f.A), B=lied(s.layers[n].B, f.B))
        for n, f in e.layers.items()
    }
    ends[2] = replace(e, layers=layers, head={n: lied(s.head[n], t) for n, t in e.head.items()})
    honest = [end for i, end in enumerate(ends) if i != 2]
    out, plain = (run(name, starts, ends, [1] * 5, c) for c in (combining, Combining()))
    heads = torch.stack([end.head["w"] for end in honest])
    got = out.head["w"]
    assert (heads.amin(0) - 1e-9 <= got).all() and (got <= heads.amax(0) + 1e-9).all()
    assert (plain.head["w"] - got).norm() > 0.1
    if METHODS[name].residual == "exact":
        for layer in SITES:
            moves = torch.stack([product(x.layers[layer]) for x in honest]) - product(
                s.layers[layer]
            )
            got = change(out, layer, s.layers[layer])
            assert (moves.amin(0) - 1e-9 <= got).all() and (got <= moves.amax(0) + 1e-9).all()


def test_krum_takes_the_client_whose_neighbours_are_nearest():
    starts, ends = federation(METHODS["fedex"], 5, 4, spread=0.1)
    out = run("fedex", starts, ends, [1, 50, 1, 1, 1], KRUM)
    distances = torch.zeros(5, 5, dtype=torch.float64)
    for i, one in enumerate(ends):
        for j, other in enumerate(ends):
            parts = [product(f) - product(other.layers[n]) for n, f in one.layers.items()]
            parts += [t - other.head[n] for n, t in one.head.items()]
            distances[i, j] = sum(p.square().sum() for p in parts)
    chosen = ends[int(distances.sort(dim=1).values[:, :3].sum(dim=1).argmin())]  # itself and 2
    for layer, f in chosen.layers.items():
        torch.testing.assert_close(out.factors[layer].B, f.B)
    torch.testing.assert_close(out.head["w"], chosen.head["w"])


@pytest.mark.parametrize("name", ALIGNED)
def test_pairs_that_differ_by_a_rotation_are_one_pair_after_alignment(name):
    starts, ends = federation(METHODS[name], 1, 2, spread=0.1)
    g, rotated = torch.Generator().manual_seed(0), []
    for _ in range(4):
        turned = {}
        for layer, f in ends[0].layers.items():
            q, _ = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=g, dtype=f.A.dtype))
            turned[layer] = replace(f, A=q.T @ f.A, B=f.B @ q)
        rotated.append(replace(ends[0], layers=turned))
    n = [3, 1, 7, 2]
    out, plain = (run(name, starts * 4, rotated, n, Combining(align=a)) for a in (True, False))
    for layer in SITES:
        assert plain.deviation[layer] > 0.1 and out.deviation[layer] < 1e-9
        if name != "fedrpca":  # which scales up what one client changed
            torch.testing.assert_close(
                product(out.factors[layer]), product(ends[0].layers[layer]), rtol=1e-9, atol=1e-9
            )


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(0, 2**20), st.sampled_from([1.0, 0.5]))
def test_alignment_leaves_the_ideal_as_it_is(k, seed, eta):
    starts, ends = federation(METHODS["fedex"], k, seed)
    n = list(range(1, k + 1))
    out = run("fedex", starts, ends, n, Combining(align=True), eta)
    for layer in SITES:
        s, e = ([x.layers[layer] for x in which] for which in (starts, ends))
        wanted = ideal_change(s, e, n, eta)
        torch.testing.assert_close(change(out, layer, s[0]), wanted, rtol=1e-9, atol=1e-9)
        # R by the polar decomposition of AᵢA⁰ᵀ, from the eigenvectors of its square
        turned = []
        for f in e:
            m = f.A @ s[0].A.T
            values, v = torch.linalg.eigh(m.T @ m)
            turned.append(m @ (v / values.sqrt()) @ v.T)
        a = mean([r.T @ f.A for r, f in zip(turned, e)], n)
        wanted = s[0].A + eta * (a - s[0].A)
        torch.testing.assert_close(out.factors[layer].A, wanted, rtol=1e-6, atol=1e-6)


OPTIONS = [
    {"mean": "median", "liars": 1, "min_clients": 3},
    {"mean": "trimmed-mean", "liars": 1, "min_clients": 3},
    {"align": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.get("mean", "align"))
@pytest.mark.parametrize("name", ["fedex", "fedex-svd", "fedex-reinit", "fedit", "ffa", "florist"])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_rounds_with_options_restore_starts_and_send_the_bytes_foretold(name, options, wire):
    if list(Combining(**{k: v for k, v in options.items() if k != "min_clients"}).problems(
        METHODS[name], 9
    )):  # fmt: skip
        return
    s = federation_settings(name, wire_dtype=wire, **options)
    states, _, records = simulate(s, 3)  # which compares what is received with the state
    played = DryRun(s, {n: t.shape for n, t in initial(s).head.items()})
    for record in records:
        foretold = {c: size.bytes for c, size in played.round()[1].items()}
        if name == "florist":
            assert all(record["bytes_down"][c] <= most for c, most in foretold.items())
        else:
            assert foretold == record["bytes_down"]
    assert all(b.version + 1 == a.version for b, a in pairwise(states))


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("fedex", {"liars": 1}, "liars: the weighted mean withstands none"),
        ("fedex", {"mean": "median"}, "liars: missing; mean: median withstands"),
        ("fedex", {"mean": "krum", "liars": 1, "min_clients": 4}, "min_clients: .* at least 5 cl"),
        ("fedex-keep", {"mean": "median", "liars": 1}, "mean: .*factors of their own"),
        ("hetlora", {"mean": "median", "liars": 1}, "mean: .*weighs the clients by itself"),
        ("local", {"mean": "median", "liars": 1}, "mean: .*nothing is exchanged"),
        ("fedsa", {"align": True}, "align: .*factors of their own"),
        ("flexlora", {"align": True}, "align: .*averages products, which no rotation changes"),
        ("ffa", {"align": True}, "align: .*one factor is frozen"),
    ],
)
def test_options_that_do_not_compose_are_refused_by_name(name, options, why):
    with pytest.raises(UserError, match=f"^{why}"):
        Server(name, SITES, "abcde", **{"min_clients": 5, **options})


def test_noise_on_the_mean_is_refused_beside_another_mean():
    for options in ({"mean": "median", "liars": 1, "min_clients": 3}, {"align": True}):
        s = federation_settings("fedit", **options)
        with pytest.raises(UserError, match="the noise is on the weighted mean alone"):
            run_round(begin(s, initial(s)), s, None, noise=MeanNoise(1.0, 1.0, 4))  # type: ignore[arg-type]
