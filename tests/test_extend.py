"""A finished run that gets more rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import Command
from safetensors.torch import load_file
from small_runs import recipe

from fedex_lora.errors import UserError
from fedex_lora.runs.extend import extend
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir


def test_an_extended_run_is_the_longer_one(command: Command, tmp_path: Path) -> None:
    short = {"clients": 3, "rounds": 1}
    start_run(recipe(tmp_path, federation={"clients": 3, "rounds": 3}), tmp_path / "long")
    start_run(recipe(tmp_path, federation=short), tmp_path / "run")
    run = RunDir(tmp_path / "run")
    code, said, _ = command("resume", run.path, "--rounds", "1")
    assert code == 0 and "now of 2 rounds" in said
    assert extend(run, 1) == 3
    results = resume_run(run.path)
    assert results["rounds"] == 3
    assert results["extended"] == [{"from": 1, "to": 2}, {"from": 2, "to": 3}]
    assert [record.get("extends") for record in run.records()] == [None, 1, 2]
    name = "checkpoints/round-0003.safetensors"
    got, expected = load_file(run.path / name), load_file(tmp_path / "long" / name)
    assert all(torch.equal(got[key], expected[key]) for key in expected) and got.keys() == {
        *expected
    }
    assert (run.path / "after-round-1/final/adapter").is_dir()  # what it came to before
    assert command("export", run.path, "--round", "2")[0] == 0


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    spec = recipe(tmp_path, federation={"clients": 3, "rounds": 1})
    directory = RunDir(tmp_path / "run")
    directory.create(spec)
    with pytest.raises(UserError, match=r"is not finished; .* comes first"):
        extend(directory, 1)
    ended = {"best": {"scores": {}}, "last": {"scores": {}}, "best_round": 1, "metric": "accuracy"}
    ended |= {"seed": 0, "deviation": None, "bytes_up": 0, "bytes_down": 0, "seconds": 1.0}
    directory.write_json("results.json", {**ended, "rounds": 0})
    with pytest.raises(UserError, match=r"ended after round 0 of 1, by evaluation\.patience"):
        extend(directory, 1)
    assert directory.recipe() == spec and not directory.extensions()
