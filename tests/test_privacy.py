"""The recipe's block on privacy: what it accepts, and what is refused by name."""

from __future__ import annotations

import pytest

from fedex_lora.recipe import Privacy, Recipe, SecureAggregation


def test_secure_aggregation_is_a_block_or_a_yes() -> None:
    block = Privacy.model_validate({"secure_aggregation": True})
    assert block.secure_aggregation == SecureAggregation()
    assert Privacy.model_validate({"secure_aggregation": False}) == Privacy()
    with pytest.raises(ValueError, match="expected exact, or a rank of at least 1, got 0"):
        Privacy.model_validate({"secure_aggregation": {"rank": 0}})


def _problems(**blocks: dict) -> str:
    raw = {
        "name": "t",
        "model": {"name": "m"},
        "task": {"kind": "glue", "name": "sst2"},
        "data": {"name": "nyu-mll/glue", "config": "sst2"},
        "privacy": {"secure_aggregation": True},
        **blocks,
    }
    try:
        Recipe.model_validate(raw)
    except ValueError as error:
        return str(error)
    return ""


def test_what_secure_aggregation_cannot_do_is_refused_by_name() -> None:
    assert _problems() == ""
    assert "fedex-keep has the coordinator keep" in _problems(method={"name": "fedex-keep"})
    assert "local exchanges nothing" in _problems(method={"name": "local"})
    assert "nobody sees an update" in _problems(records={"save_updates": True})
    assert "single clients' scores" in _problems(evaluation={"where": "both"})
    assert "a sum over 1 client" in _problems(federation={"clients": 4, "clients_per_round": 1})
    assert "median needs every client's factors" in _problems(federation={"mean": "median"})
    assert "align: needs every client's factors" in _problems(federation={"align": True})
    assert "waits for all who took part" in _problems(federation={"oversample": 1.5})
    level = {"noise_multiplier": 1.0, "delta": 1e-5, "clip": 1.0}
    both = {"secure_aggregation": True, "client_level": level}
    uniform = {"method": {"name": "fedit"}, "federation": {"weights": "uniform"}}
    assert _problems(privacy=both, **uniform) == ""
    level["adaptive"] = True
    assert _problems(privacy=both, **uniform) == ""
    level = {"epsilon": 8, "delta": 1e-5, "max_grad_norm": 1.0}
    both = {"secure_aggregation": True, "example_level": level}
    assert _problems(privacy=both) == ""
    both["secure_aggregation"] = {"repeat": 1}
    assert "repeat: a round that is begun anew would be paid for twice" in _problems(privacy=both)
    both["example_level"] = {"noise_multiplier": 1, "delta": 1e-5}
    assert _problems(privacy=both) == ""
    for threshold in (2, 5):
        block = {"secure_aggregation": {"threshold": threshold}}
        assert "more than half of the 4" in _problems(privacy=block, federation={"clients": 4})
    block = {"secure_aggregation": {"rank": 12}}
    assert "is for fedex-svd, fedask-both" in _problems(privacy=block)
    assert "is for fedex-svd" in _problems(privacy=block, method={"name": "fedask"})
    assert _problems(privacy=block, method={"name": "fedask-both"}) == ""
    assert _problems(privacy=block, method={"name": "fedex-svd", "rank": 4}) == ""
