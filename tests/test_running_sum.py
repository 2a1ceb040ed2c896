import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import dense64

from fedex_lora.aggregation.running_sum import RunningSum

ranks = st.lists(st.integers(1, 4), max_size=9)


def filled(m, n, ranks, expected, seed=0):
    """A running sum of random terms, and the same in float64."""
    g = torch.Generator().manual_seed(seed)
    total, exact = RunningSum(expected), torch.zeros(m, n, dtype=torch.float64)
    for i, rank in enumerate(ranks):
        left, right = torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g)
        total.add(left, right, 0.5 + i)
        exact += (0.5 + i) * left.double() @ right.double()
    return total, exact


def check(total, exact, rank):
    """It is 0.25 times the sum, in the form that holds fewer numbers."""
    found, (m, n) = total.total(0.25), exact.shape
    if not rank:
        assert found is None
        return
    assert (dense64(found) - 0.25 * exact).norm() <= 1e-5 * exact.norm() + 1e-6
    assert (found.right is None) == (rank * (m + n) >= m * n)
    if found.right is not None:
        assert found.rank == rank


@given(st.integers(1, 12), st.integers(1, 12), ranks, st.integers(0, 12))
def test_a_running_sum_is_the_sum_in_bounded_memory(m, n, ranks, expected):
    check(*filled(m, n, ranks, expected), sum(ranks))


@given(st.integers(1, 12), st.integers(1, 12), ranks, ranks)
def test_two_sums_combine_to_the_sum_of_all(m, n, ranks, more):
    total, exact = filled(m, n, ranks, 2)
    other, rest = filled(m, n, more, 3, seed=1)
    total.combine(other)
    check(total, exact + rest, sum(ranks) + sum(more))


def test_terms_written_in_place_count_as_if_they_were_added():
    g = torch.Generator().manual_seed(0)
    terms = [(torch.randn(9, 2, generator=g), torch.randn(2, 7, generator=g)) for _ in range(5)]
    written = RunningSum(5)
    for left, right in terms:  # from the second one on there is no more room for factors
        to_left, to_right = written.place(left, right)
        to_left.copy_(left)
        to_right.copy_(right)
    check(written, sum(left.double() @ right.double() for left, right in terms), 10)
