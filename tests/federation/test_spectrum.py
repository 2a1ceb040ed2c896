"""The singular values of the global change in the records, against the dense matrix."""

from __future__ import annotations

import pytest
import torch
from oracles import dense64, product
from simulation import SITES, settings, simulate

from fedex_lora.aggregation.adapter import inner_name, whole_inner
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.federation.state import global_factors


def dense_change(state, s, site):
    """G − W0 in float64: of a matrix between the factors too."""
    total = state.ledger.total(site)
    change = torch.zeros(SITES[site].out, SITES[site].inp).double()
    change = change if total is None else change + dense64(total)
    if site not in (factors := global_factors(state, s)):
        return change
    f, inner = factors[site], state.head.get(inner_name(site))
    if inner is None:
        return change + product(f)
    return change + f.scale * f.B.double() @ whole_inner(inner, f.rank).double() @ f.A.double()


@pytest.mark.parametrize("name", ["fedex", "fedex-hetero", "flexlora", "florist", "ravan"])
def test_records_have_the_spectrum_of_the_global_change(name):
    ranks = {"a": 1, "b": 3, "c": 2, "d": 3} if METHODS[name].ranks_may_differ else {}
    s = settings(name, ranks=ranks, spectrum=4)
    states, _, records = simulate(s, 3)
    for state, record in zip(states[1:], records):
        for site in SITES:
            expected = torch.linalg.svdvals(dense_change(state, s, site))
            got = torch.tensor(record["spectrum_by_site"][site]).double()
            padded = torch.nn.functional.pad(got, (0, 4 - len(got)))
            torch.testing.assert_close(padded, expected[:4], rtol=1e-5, atol=1e-5)
            assert record["change_by_site"][site] == pytest.approx(expected.norm().item())


def test_nothing_of_it_is_recorded_unasked():
    assert "spectrum_by_site" not in simulate(settings("fedex"), 1)[2][0]
