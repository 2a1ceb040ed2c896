# pyright: reportAttributeAccessIssue=false
"""The mathematics of a merge against the dense float64 sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedex_lora.merge.factors import merge_factors, reduce, rounded, weighted_sum

sizes = st.integers(2, 12)


def terms(out, inp, ranks, seed=0, spread=1.0, dtype=torch.float32):
    """Random (A, B, scale); with a small spread all adapters nearly agree."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(max(ranks), inp, generator=g), torch.randn(out, max(ranks), generator=g)

    def factor(start):
        return (start + spread * torch.randn(start.shape, generator=g)).to(dtype)

    return [(factor(first[0][:r]), factor(first[1][:, :r]), 0.7 + i) for i, r in enumerate(ranks)]


def oracle(parts, weights):
    """Σ wᵢ·sᵢ·BᵢAᵢ in float64, and √Σ of the squared norms of its terms."""
    shares = [w / sum(weights) for w in weights]
    products = [w * s * b.double() @ a.double() for w, (a, b, s) in zip(shares, parts)]
    return sum(products), sum(p.norm() ** 2 for p in products) ** 0.5


def total(parts, weights):
    shares = [w / sum(weights) for w in weights]
    shape = parts[0][1].shape[0], parts[0][0].shape[1]
    return weighted_sum(iter(parts), shares, shape, sum(a.shape[0] for a, _, _ in parts))


@settings(deadline=None)
@given(
    sizes,
    sizes,
    st.lists(st.tuples(st.integers(1, 4), st.floats(0.01, 10)), min_size=1, max_size=8),
    st.sampled_from([1.0, 1e-3, 1e-6, 0.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_the_merge_is_the_weighted_mean_of_the_updates(out, inp, some, spread, dtype, seed):
    ranks, weights = zip(*some)
    parts = terms(out, inp, ranks, seed, spread, dtype)
    expected, size = oracle(parts, weights)
    got = merge_factors(parts, weights)
    assert got.left.dtype == got.right.dtype == torch.float32
    assert got.rank <= min(out, inp, sum(ranks))
    missed = (got.left.double() @ got.right.double() - expected).norm()
    assert missed <= 1e-6 * size


@settings(deadline=None)
@given(sizes, sizes, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 6))
def test_a_rank_gives_the_best_approximation_of_that_rank(out, inp, ranks, rank):
    parts, weights = terms(out, inp, ranks), range(1, len(ranks) + 1)
    expected, _ = oracle(parts, weights)
    values = torch.linalg.svdvals(expected)
    got = reduce(total(parts, weights), rank)
    missed = (got.factors.left.double() @ got.factors.right.double() - expected).norm()
    assert got.factors.rank <= rank
    torch.testing.assert_close(missed, values[rank:].norm(), atol=2e-6 * got.norm, rtol=1e-6)
    torch.testing.assert_close(got.norm, expected.norm().item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.missed, missed.item(), atol=2e-6 * got.norm, rtol=1e-5)


@pytest.mark.parametrize("error", [0.5, 1e-1, 1e-2, 1e-4])
def test_an_allowed_error_gives_the_smallest_rank_that_keeps_to_it(error):
    parts = terms(40, 30, [5, 5, 5], spread=0.1)
    expected, _ = oracle(parts, [1, 2, 3])
    values = torch.linalg.svdvals(expected)
    tails = [(values[r:].norm() / values.norm()).item() for r in range(16)]
    got = reduce(total(parts, [1, 2, 3]), error=error)
    assert got.factors.rank == next(r for r, tail in enumerate(tails) if tail <= error)
    assert got.missed / got.norm == pytest.approx(tails[got.factors.rank], rel=1e-4, abs=1e-7)


def test_the_numerical_rank_shows():
    a, b = torch.randn(4, 50), torch.randn(70, 4)
    other = torch.randn(70, 4)
    assert merge_factors([(a, b, 1.0), (a, other, 2.0)], [1, 1]).rank == 4  # a frozen A
    assert merge_factors([(a, b, 1.0), (a, b, 2.0), (a, b, 0.1)], [1, 2, 3]).rank == 4
    assert merge_factors([(a, b, 1.0), (a, -b, 1.0)], [1, 1]).rank == 0
    assert merge_factors([(a, torch.zeros(70, 4), 1.0)], [1]).rank == 0
    assert merge_factors([(a, b, 1.0), (torch.randn(4, 50), other, 1.0)], [1, 0]).rank == 4
    assert merge_factors([(a, b, 1.0), (torch.randn(4, 50), other, 1.0)], [1, 1]).rank == 8
    equal = [(a, b, 1.0), (a, -b, 1.0)] * 20
    assert merge_factors(equal, [1] * 40).rank == 0
    # far more ranks than the matrix has: summed up densely, and still seen to be of rank 4
    many = [(a, torch.randn(70, 4), 1.0) for _ in range(20)]
    assert merge_factors(many, [1] * 20).rank == 4


def test_columns_of_very_different_size_keep_their_digits():
    a, b = torch.randn(6, 50), torch.randn(70, 6)
    sizes = 10.0 ** torch.arange(0, -12, -2)
    part = (a / sizes[:, None], b * sizes, 1.0)
    got = merge_factors([part, (torch.randn(1, 50), torch.randn(70, 1), 1.0)], [1, 0])
    expected = part[1].double() @ part[0].double()
    assert got.rank == 6
    assert (got.left.double() @ got.right.double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_rounding_is_measured(dtype):
    whole = merge_factors(terms(30, 20, [3, 2]), [1, 2])
    stored, lost = rounded(whole, dtype)
    exact = whole.left.double() @ whole.right.double()
    missed = (stored.left.double() @ stored.right.double() - exact).norm().item()
    assert stored.left.dtype == stored.right.dtype == dtype
    assert lost == pytest.approx(missed, rel=1e-4)
    assert 1e-5 < missed / exact.norm() < 1e-2
