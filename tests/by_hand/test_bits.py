"""A run whose messages were carried by hand has the bits of a run on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SIZES, recipe

from by_hand.rounds import ROWS, by_hand, state, weights_used
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir

BOTH = {"evaluation": {"where": "both", "every": 2, "client_fraction": 0.4}}
CLIENTS = {
    "evaluation": {"where": "clients", "patience": 1},
    "federation": {"clients_per_round": 2},
}


def timeless(run: Path) -> list[dict[str, Any]]:
    """All that the records say but for how long it took."""
    records = RunDir(run).records()
    for record in records:
        del record["seconds"]
        for told in record["clients"].values():
            told.pop("seconds", None)
    return records


@pytest.mark.parametrize(
    "kind, to, blocks",
    [
        (
            "gpt2",
            "memory://share",
            {"model": {"placement": "side"}, "federation": {"wire_dtype": "bfloat16"}},
        ),
        ("bert", None, {"method": {"name": "fedex-keep"}, "lora": {"ranks": [2, 4, 3]}, **BOTH}),
        ("roberta", None, {"method": {"name": "flexlora"}, **CLIENTS}),
    ],
    ids=["side", "keep", "flexlora"],
)
def test_bits_are_those_of_a_run_on_one_machine(
    kind: str, to: str | None, blocks: dict[str, Any], tmp_path: Path
) -> None:
    spec = recipe(tmp_path, kind, **blocks)
    alone = start_run(spec, tmp_path / "one")
    to = to and to.format(tmp=tmp_path)
    results = by_hand(spec, tmp_path / "hand", tmp_path / "data", to)
    one, hand = state(tmp_path / "one"), state(tmp_path / "hand")
    assert one.keys() == hand.keys() and all(torch.equal(one[k], hand[k]) for k in one)
    assert timeless(tmp_path / "hand") == timeless(tmp_path / "one")
    for name in ("rounds", "best_round", "last", "best"):
        assert results[name] == alone[name]
    assert results["rounds"] == 2
    assert (tmp_path / "hand/final/adapter/adapter_config.json").is_file()
    if spec.evaluation.where != "clients":
        assert results["best"]["scores"]["test"]
    if spec.evaluation.where == "server":
        assert weights_used(tmp_path / "hand") == [pytest.approx(ROWS)] * 2
    else:
        assert results["last"]["client_scores"].keys() == SIZES.keys()
