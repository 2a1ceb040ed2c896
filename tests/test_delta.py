import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.aggregation.delta import Delta, concat
from fedex_lora.errors import UserError

DTYPES = [torch.float32, torch.float64]
sizes = st.integers(1, 9)


def random(m, n, r, dtype=torch.float64, seed=0):
    """left · right of rank r, or for r = 0 a dense matrix."""
    g = torch.Generator().manual_seed(seed)
    if not r:
        return Delta(torch.randn(m, n, generator=g, dtype=dtype))
    return Delta(
        torch.randn(m, r, generator=g, dtype=dtype), torch.randn(r, n, generator=g, dtype=dtype)
    )


def close(a, b, dtype=torch.float64):
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@given(sizes, sizes, st.integers(0, 9), st.integers(0, 9), st.sampled_from(DTYPES))
def test_sum_norm_and_forms_agree_with_the_dense_matrix(m, n, r, q, dtype):
    a, b = random(m, n, r, dtype), random(m, n, q, dtype, seed=1)
    close((a + b).dense(), a.dense() + b.dense(), dtype)
    close((a - b).dense(), a.dense() - b.dense(), dtype)
    close((a - b).norm(), torch.linalg.matrix_norm(a.dense() - b.dense()), dtype)
    close(concat([a, b, a]).dense(), 2 * a.dense() + b.dense(), dtype)
    close(a.norm(), torch.linalg.matrix_norm(a.dense()), dtype)
    for form in (a.orthonormal(), a.compress(), a.smaller(), a.wire_form(), Delta(*a.factors())):
        close(form.dense(), a.dense(), dtype)
    close(a.scaled(-2.5).dense(), -2.5 * a.dense(), dtype)
    assert a.shape == (m, n) and a.rank == (r or min(m, n))
    assert a.numbers == (r * (m + n) if r else m * n)
    assert a.smaller().numbers == min(a.numbers, m * n)
    assert (a.wire_form().right is None) == (not r or r * (m + n) >= m * n)


@given(sizes, sizes, st.integers(0, 9), st.integers(0, 10), st.sampled_from(DTYPES))
def test_truncation_error_is_the_tail_of_the_singular_values(m, n, r, rank, dtype):
    a = random(m, n, r, dtype)
    values = torch.linalg.svdvals(a.dense())
    kept, tail = a.split(rank)
    assert kept.rank <= rank
    close((kept - a).norm(), values[rank:].norm(), dtype)
    close(tail.norm(), values[rank:].norm(), dtype)
    close((kept + tail).dense(), a.dense(), dtype)
    close(a.singular_values(), values[: a.singular_values().shape[-1]], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_finds_the_numerical_rank_of_a_redundant_sum(dtype):
    a = random(20, 30, 3, dtype)
    again = concat([a, a.scaled(2.0), random(20, 30, 2, dtype, seed=5)])
    compressed = again.compress()
    assert again.rank == 8 and compressed.rank == 5
    close(compressed.dense(), again.dense(), dtype)
    close(compressed.left.T @ compressed.left, torch.eye(5, dtype=dtype), dtype)
    assert concat([a, a.scaled(-1.0)]).compress().rank == 0
    assert Delta(again.dense()).compress().rank == 5


def test_without_numbers_there_are_shapes():
    meta = torch.device("meta")
    a = Delta(torch.empty(20, 3, device=meta), torch.empty(3, 30, device=meta))
    assert concat([a, a]).compress().rank == 6 and a.wire_form().numbers == 3 * 50
    assert [part.shape for part in a.split(2)] == [(20, 30)] * 2
    assert concat([a] * 12).compress().rank == 20  # no more than it can be


def test_orthonormal_basis_is_orthonormal():
    q = random(12, 7, 4).orthonormal().left
    close(q.T @ q, torch.eye(4, dtype=torch.float64))


def test_a_distance_in_float32_keeps_the_digits_that_inner_products_lose():
    a = random(300, 200, 4, torch.float32)
    assert a.right is not None
    b = Delta(a.left * (1 + 1e-4), a.right)
    exact = (b.to(torch.float64).dense() - a.to(torch.float64).dense()).norm().item()
    assert (a - b).norm().item() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("left_over", [1.0, 1e-3, 1e-5])
def test_the_norm_of_a_sum_that_cancels_keeps_its_digits(left_over):
    big = random(300, 200, 4, torch.float32)
    small = random(300, 200, 4, torch.float32, seed=1).scaled(left_over)
    assert big.norm().item() == pytest.approx(big.dense().double().norm().item(), rel=1e-6)
    assert concat([big, big.scaled(-1.0), small]).norm().item() == pytest.approx(
        small.dense().double().norm().item(), rel=3e-2 if left_over < 1e-4 else 1e-3
    )


@pytest.mark.parametrize("m, n", [(3, 5), (5, 3)])
def test_a_dense_matrix_as_factors_keeps_its_bits_whichever_side_is_longer(m, n):
    w = torch.randn(m, n)
    factors = Delta(*Delta(w).factors())
    assert torch.equal(factors.dense(), w) and factors.rank == 3


@pytest.mark.parametrize("left", [torch.zeros(7, 3), torch.ones(7, 3), torch.eye(7)[:, [0, 0, 1]]])
def test_a_singular_matrix_has_an_orthonormal_basis_too(left):
    w = Delta(left, torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    basis = w.orthonormal()
    close(basis.left.T @ basis.left, torch.eye(3), torch.float32)
    close(basis.dense(), w.dense(), torch.float32)


def test_factors_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"\(2, 3\) and \(4, 5\)"):
        Delta(torch.zeros(2, 3), torch.zeros(4, 5))
