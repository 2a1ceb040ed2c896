"""Sums of factored matrices at their rank, against dense float64 sums."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.aggregation.delta import Delta
from fedex_lora.flower.growing import grown


def drawn(seed: int, out: int, inp: int, rank: int, size: float = 1.0) -> Delta:
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(out, rank, generator=random) * size
    return Delta(left, torch.randn(rank, inp, generator=random))


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1e-3, 1.0, 1e2])), max_size=8),
    st.integers(0, 99),
)
def test_it_is_the_sum_and_no_larger_than_the_matrix(out, inp, terms, seed):
    total, right = None, torch.zeros(out, inp, dtype=torch.float64)
    largest = 0.0
    for i, (rank, size) in enumerate(terms):
        term = drawn(seed + i, out, inp, rank, size)
        total = grown(total, term)
        right += term.left.double() @ term.right.double()
        largest = max(largest, right.norm().item(), term.norm().item())
        assert total.numbers <= out * inp
        assert (total.dense().double() - right).norm() <= 2e-6 * largest


def test_its_rank_is_that_of_the_sum():
    one, two = drawn(0, 60, 50, 3), drawn(1, 60, 50, 2)
    total = None
    for term in (one, two, one, two.scaled(-0.5)):
        total = grown(total, term)
    assert total.rank == 5
    # columns that were there already, with rows that were not
    assert grown(total, Delta(one.left, drawn(5, 60, 50, 3).right)).rank == 5


def test_a_small_increment_of_a_large_layer_is_not_taken_for_noise():
    """1e-4 of what is there; ε·max(out, in) would be 5e-4 and leave it out."""
    large, small = drawn(0, 4096, 40, 2), drawn(1, 4096, 40, 2, 1e-4)
    total = grown(grown(None, large), small)
    added = total.dense().double() - large.left.double() @ large.right.double()
    right = small.left.double() @ small.right.double()
    assert total.rank == 4 and (added - right).norm() < 0.01 * right.norm()
