import torch
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.aggregation.lowrank import LowRank
from fedex_lora.aggregation.running_sum import RunningSum


def dense(w):
    return w.dense() if isinstance(w, LowRank) else w


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.integers(1, 4), min_size=1, max_size=9),
    st.integers(0, 12),
    st.sampled_from([(), (2,)]),
)
def test_a_running_sum_is_the_sum_in_bounded_memory(m, n, ranks, expected, batch):
    g = torch.Generator().manual_seed(0)
    total, exact = RunningSum(expected), torch.zeros(*batch, m, n, dtype=torch.float64)
    for i, rank in enumerate(ranks):
        left, right = (
            torch.randn(*batch, m, rank, generator=g),
            torch.randn(*batch, rank, n, generator=g),
        )
        total.add(LowRank(left, right), 0.5 + i)
        exact += (0.5 + i) * left.double() @ right.double()
    found = total.total(0.25)
    assert (dense(found).double() - 0.25 * exact).norm() <= 1e-5 * exact.norm() + 1e-6
    if isinstance(found, LowRank):
        assert found.rank == sum(ranks)
        assert found.rank * (m + n) < m * n


def test_nothing_added_is_no_sum():
    assert RunningSum().total(1.0) is None


def test_terms_written_in_place_count_as_if_they_were_added():
    g = torch.Generator().manual_seed(0)
    terms = [
        LowRank(torch.randn(9, 2, generator=g), torch.randn(2, 7, generator=g)) for _ in range(5)
    ]
    written = RunningSum()
    for some in (terms[:2], terms[2:]):  # the second time there is no more room for factors
        for place, term in zip(written.places(terms[0], len(some)), some, strict=True):
            place.left.copy_(term.left)
            place.right.copy_(term.right)
    total = dense(written.total(0.5))
    torch.testing.assert_close(total, 0.5 * sum(dense(t) for t in terms))
