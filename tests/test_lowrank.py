import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.aggregation.lowrank import (
    LowRank,
    concat,
    from_dense,
    partial_norms,
    smaller,
    thin_qr,
)
from fedex_lora.errors import UserError

DTYPES = [torch.float32, torch.float64]
sizes = st.integers(1, 9)


def random(m, n, r, batch=(), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(*batch, m, r, generator=g, dtype=dtype),
        torch.randn(*batch, r, n, generator=g, dtype=dtype),
    )


def close(a, b, dtype=torch.float64):
    torch.testing.assert_close(a, b, **tolerance(dtype))


def tolerance(dtype):
    return (
        {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    )


@given(sizes, sizes, sizes, sizes, st.sampled_from([(), (3,)]), st.sampled_from(DTYPES))
def test_sum_norm_distance_and_forms_agree_with_the_dense_matrix(m, n, r, q, batch, dtype):
    a, b = random(m, n, r, batch, dtype), random(m, n, q, batch, dtype, seed=1)
    close((a + b).dense(), a.dense() + b.dense(), dtype)
    close(a.norm(), torch.linalg.matrix_norm(a.dense()), dtype)
    close(a.distance(b), torch.linalg.matrix_norm(a.dense() - b.dense()), dtype)
    close(a.orthonormal().dense(), a.dense(), dtype)
    close(a.compress().dense(), a.dense(), dtype)
    close(a.scaled(-2.5).dense(), -2.5 * a.dense(), dtype)
    small = smaller(a)
    close(small.dense() if isinstance(small, LowRank) else small, a.dense(), dtype)


@given(sizes, sizes, sizes, st.integers(0, 10), st.sampled_from(DTYPES))
def test_truncation_error_is_the_tail_of_the_singular_values(m, n, r, rank, dtype):
    a = random(m, n, r, dtype=dtype)
    values = torch.linalg.svdvals(a.dense())
    kept, tail = a.split(rank)
    assert kept.rank <= rank
    close(a.truncate(rank).distance(a), values[rank:].norm(), dtype)
    close((kept + tail).dense(), a.dense(), dtype)
    close(a.singular_values(), values[: a.singular_values().shape[-1]], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_compress_finds_the_numerical_rank_of_a_redundant_sum(dtype, batch):
    a = random(20, 30, 3, batch, dtype)
    again = concat([a, a.scaled(2.0), random(20, 30, 2, batch, dtype, seed=5)])
    compressed = again.compress()
    assert again.rank == 8 and compressed.rank == 5
    close(compressed.dense(), again.dense(), dtype)
    eye = torch.eye(5, dtype=dtype).expand(*batch, 5, 5)
    close(compressed.left.mT @ compressed.left, eye, dtype)
    assert concat([a, a.scaled(-1.0)]).compress().rank == 0


def test_orthonormal_basis_is_orthonormal():
    q = random(12, 7, 4).orthonormal().left
    close(q.T @ q, torch.eye(4, dtype=torch.float64))


def test_distance_in_float32_keeps_the_digits_that_inner_products_lose():
    a = random(300, 200, 4, dtype=torch.float32)
    b = LowRank(a.left * (1 + 1e-4), a.right)
    exact = torch.linalg.matrix_norm(
        a.dense().double() * 0 + b.to(torch.float64).dense() - a.to(torch.float64).dense()
    )
    assert abs(a.distance(b).item() / exact.item() - 1) < 1e-2


def test_from_dense_round_trips_whichever_side_is_longer():
    for m, n in ((3, 5), (5, 3)):
        w = torch.randn(m, n)
        assert torch.equal(from_dense(w).dense(), w) and from_dense(w).rank == 3


def test_factors_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"\(2, 3\) and \(4, 5\)"):
        LowRank(torch.zeros(2, 3), torch.zeros(4, 5))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(-7, 0), st.sampled_from([(), (3,)]))
def test_thin_qr_is_orthonormal_and_exact_however_ill_conditioned(m, r, power, batch):
    w = random(m, 1, r, batch, torch.float32).left * torch.logspace(0, power, r)
    w = w + w[..., :1]  # columns that almost agree, as those of a trained factor do
    q, triangle = thin_qr(w)
    eye = torch.eye(q.shape[-1])
    assert (q.mT @ q - eye).abs().max() < 1e-5
    assert ((q @ triangle - w).norm() / w.norm()).item() < 1e-6


@pytest.mark.parametrize("w", [torch.zeros(7, 3), torch.ones(7, 3), torch.eye(7)[:, [0, 0, 1]]])
def test_thin_qr_of_a_singular_matrix(w):
    q, triangle = thin_qr(w)
    assert (q.mT @ q - torch.eye(3)).abs().max() < 1e-5
    assert torch.allclose(q @ triangle, w, atol=1e-6)


@pytest.mark.parametrize("left_over", [1.0, 1e-3, 1e-5])
def test_norms_of_a_sum_that_cancels_keep_their_digits(left_over):
    big = random(300, 200, 4, dtype=torch.float32)
    small = random(300, 200, 4, dtype=torch.float32, seed=1).scaled(left_over)
    first, whole = partial_norms(big, concat([big.scaled(-1.0), small]))
    assert first.item() == pytest.approx(big.dense().double().norm().item(), rel=1e-6)
    assert whole.item() == pytest.approx(
        small.dense().double().norm().item(), rel=3e-2 if left_over < 1e-4 else 1e-3
    )
