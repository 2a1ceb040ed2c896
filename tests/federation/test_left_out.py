# pyright: reportOperatorIssue=false
"""What a truncated residual leaves out, as the records say, against float64 singular values."""

import pytest
import torch
from simulation import EXAMPLES, settings, simulate

SCALES = {"q": 1.7, "v": 0.6}


def residual(ends, site):
    """Σ wᵢsBᵢAᵢ − s·B̄Ā in float64."""
    weights = {c: EXAMPLES[c] / sum(EXAMPLES[c] for c in ends) for c in ends}
    a = {c: end.layers[site].A.double() for c, (_, end) in ends.items()}
    b = {c: end.layers[site].B.double() for c, (_, end) in ends.items()}
    ideal = sum(w * b[c] @ a[c] for c, w in weights.items())
    mean_a, mean_b = (sum(w * x[c] for c, w in weights.items()) for x in (a, b))
    return SCALES[site] * (ideal - mean_b @ mean_a)


@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_without_carry_it_is_the_tail_of_this_round_s_residual(rank):
    _, clients, records = simulate(settings("fedex-svd", rank=rank, carry=False), rounds=3)
    for ends, record in zip(clients.history, records):
        values = torch.cat([torch.linalg.svdvals(residual(ends, site))[rank:] for site in SCALES])
        assert record["left_out"] == pytest.approx(values.norm().item(), rel=1e-5, abs=1e-6)
    assert (records[0]["left_out"] > 1e-3) == (rank < 9)  # of four clients with r = 3


def test_with_carry_it_is_all_that_waits():
    _, _, records = simulate(settings("fedex-svd", rank=1), rounds=5)
    waiting = [record["left_out"] for record in records]
    assert waiting == [record.get("carry", 0.0) for record in records]
    assert waiting[0] < waiting[1] < waiting[2] and waiting[4] == 0  # the last round sends it


@pytest.mark.parametrize("carry", [True, False])
def test_one_client_leaves_nothing_out(carry):
    s = settings("fedex-svd", rank=1, carry=carry, clients_per_round=1)
    _, _, records = simulate(s, rounds=2)
    assert [record["left_out"] for record in records] == [0.0, 0.0]


def test_other_methods_do_not_speak_of_it():
    assert all("left_out" not in record for record in simulate(settings("fedex"), rounds=2)[2])
