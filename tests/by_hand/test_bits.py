"""A run whose messages were carried by hand has the bits of a run on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import recipe

from by_hand.rounds import ROWS, by_hand, state, weights_used
from fedex_lora.runs.run import start_run


@pytest.mark.parametrize(
    "kind, to, blocks",
    [
        (
            "gpt2",
            "memory://share",
            {"model": {"placement": "side"}, "federation": {"wire_dtype": "bfloat16"}},
        ),
        ("bert", None, {"method": {"name": "fedex-keep"}, "lora": {"ranks": [2, 4, 3]}}),
    ],
    ids=["side", "keep"],
)
def test_bits_are_those_of_a_run_on_one_machine(
    kind: str, to: str | None, blocks: dict[str, Any], tmp_path: Path
) -> None:
    spec = recipe(tmp_path, kind, **blocks)
    start_run(spec, tmp_path / "one")
    to = to and to.format(tmp=tmp_path)
    results = by_hand(spec, tmp_path / "hand", tmp_path / "data", to)
    one, hand = state(tmp_path / "one"), state(tmp_path / "hand")
    assert one.keys() == hand.keys() and all(torch.equal(one[k], hand[k]) for k in one)
    assert results["rounds"] == 2 and results["best"]["scores"]["test"]
    assert weights_used(tmp_path / "hand") == [pytest.approx(ROWS)] * 2
    assert (tmp_path / "hand/final/adapter/adapter_config.json").is_file()
