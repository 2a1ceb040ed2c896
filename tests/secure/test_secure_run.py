"""A whole run under secure aggregation, from its recipe, and resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SIZES, StopAfter, recipe

from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import resume_run, start_run


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("*.safetensors"))[-1])


def test_a_run_and_the_same_run_resumed(tmp_path: Path) -> None:
    raw = recipe(tmp_path, federation={"clients": 3, "rounds": 2}).model_dump()
    raw["federation"].pop("partition")
    raw["privacy"]["secure_aggregation"] = True
    raw["evaluation"]["where"] = "server"
    spec = Recipe.model_validate(raw)
    start_run(spec, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "stopped", StopAfter(1))
    resume_run(tmp_path / "stopped")
    one, other = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    line = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0]
    record = json.loads(line)
    assert record["secure"] and set(record["clients"]) == set(SIZES)
    assert all(set(client) == {"examples"} for client in record["clients"].values())


def test_rehearsed_failures_are_drawn_anew_with_the_round(tmp_path: Path) -> None:
    raw = recipe(tmp_path, federation={"clients": 3, "rounds": 2, "failure_rate": 0.7}).model_dump()
    raw["federation"].pop("partition")
    raw["privacy"]["secure_aggregation"] = {"repeat": 30}
    raw["evaluation"]["where"] = "server"
    start_run(Recipe.model_validate(raw), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert sum(record.get("begun_anew", 0) for record in records) > 0
    assert all(len(record["clients"]) >= 2 for record in records)
