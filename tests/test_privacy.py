"""The recipe's block on privacy: what it accepts, and what is refused by name."""

from __future__ import annotations

import pytest

from fedex_lora.recipe import Privacy, SecureAggregation


def test_secure_aggregation_is_a_block_or_a_yes() -> None:
    block = Privacy.model_validate({"secure_aggregation": True})
    assert block.secure_aggregation == SecureAggregation()
    assert Privacy.model_validate({"secure_aggregation": False}) == Privacy()
    with pytest.raises(ValueError, match="expected exact, or a rank of at least 1, got 0"):
        Privacy.model_validate({"secure_aggregation": {"rank": 0}})
