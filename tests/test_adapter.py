import pytest
import torch

from fedex_lora.aggregation.adapter import LayerShape, fresh


@pytest.mark.parametrize("inp", [5, 40])
@pytest.mark.parametrize("std", [None, 0.25])
def test_a_smaller_rank_gets_the_first_rows_of_a_larger_one(inp, std):
    site = LayerShape(out=7, inp=inp, rank=9, scale=2.0, std=std)
    wide = fresh({"q": site}, 3, 2)["q"]
    narrow = fresh({"q": site.at_rank(2)}, 3, 2)["q"]
    assert torch.equal(narrow.A, wide.A[:2])
    assert not wide.B.any() and narrow.B.shape == (7, 2)
    assert narrow.scale == pytest.approx(9.0)


def test_fresh_factors_differ_by_seed_version_and_site_and_have_the_size_asked_for():
    site = LayerShape(out=3, inp=400, rank=8, scale=2.0)
    draws = [fresh({n: site}, s, v)[n].A for n in "qv" for s in (0, 1) for v in (0, 1)]
    assert len({float(a.sum()) for a in draws}) == 8
    assert draws[0].abs().max() <= 400**-0.5 and draws[0].std().item() == pytest.approx(
        400**-0.5 / 3**0.5, rel=0.05
    )
    normal = fresh({"q": LayerShape(3, 400, 8, 2.0, std=0.5)}, 0)["q"].A
    assert normal.std().item() == pytest.approx(0.5, rel=0.05)


def test_the_scale_follows_the_rank_as_alpha_stays():
    assert LayerShape(4, 4, 4, 2.0).at_rank(1).scale == 8.0
    assert LayerShape(4, 4, 4, 2.0, rslora=True).at_rank(1).scale == 4.0
    fixed = LayerShape(4, 4, 4, 2.0, fixed_rank=True)
    assert fixed.at_rank(1) is fixed
