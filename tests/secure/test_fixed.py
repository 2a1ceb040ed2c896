"""Fixed point modulo 2⁶⁴: units that follow sizes nobody shows, and no overflow unseen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.errors import UpdateRefused
from fedex_lora.federation.secure.fixed import LEAST, decode, encode, exponent, sizes, votes

numbers = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-20)


@given(st.lists(numbers, min_size=2, max_size=8), st.integers(1, 1000))
def test_a_sum_is_right_to_the_unit_of_the_largest(values: list[float], weight: int) -> None:
    tensors = [{"x": torch.tensor([value], dtype=torch.float64)} for value in values]
    agreed = sizes(sum((votes(t) for t in tensors), np.zeros(1, np.uint64)))
    assert agreed[0] == max(exponent(t["x"]) for t in tensors)
    total = sum(
        (encode(t, agreed, weight, 40, len(values)) for t in tensors), np.zeros(1, np.uint64)
    )
    unit = 2.0 ** (agreed[0] - 40)
    found = decode(total, {"x": (1,)}, agreed, 40)["x"].item()
    assert abs(found - weight * sum(values)) <= unit * len(values) * (1 + 1e-6) + abs(found) * 1e-14


def test_votes_show_the_largest_size_and_not_how_many_have_it() -> None:
    one = votes({"x": torch.tensor([4.0])})
    few, many = one + votes({"x": torch.tensor([0.1])}), one + votes({"x": torch.tensor([5.0])})
    assert sizes(few) == sizes(many) == [3]
    assert (few != 0).tolist() == (many != 0).tolist()


def test_a_tensor_of_zeros_has_the_least_size() -> None:
    assert sizes(votes({"x": torch.zeros(3)})) == [LEAST]


def test_what_could_overflow_or_is_no_number_is_refused() -> None:
    x = {"x": torch.ones(1)}
    with pytest.raises(UpdateRefused, match="could overflow"):
        encode(x, [1], 2.0**23, 40, 2)
    encode(x, [1], 2.0**22, 40, 2)
    with pytest.raises(UpdateRefused, match="x: the size that was agreed on is too small"):
        encode(x, [0], 1.0, 40, 2)
    for bad in (torch.nan, torch.inf, 1e13):
        with pytest.raises(UpdateRefused, match="x: an entry of"):
            votes({"x": torch.tensor([bad])})
