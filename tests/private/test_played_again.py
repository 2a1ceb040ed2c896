"""Rounds that are played again have other noise: what was spent on them before stays spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import recipe

from fedex_lora.engines.private.account import Steps, epsilon
from fedex_lora.errors import UserError
from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir

ROWS = {"noise_multiplier": 1.0, "delta": 1e-2}


def made(folder: Path, rehearsal: bool = False, **level: Any) -> Recipe:
    small = {"per_device_train_batch_size": 2, "max_steps": 2}
    privacy = {"example_level": {**ROWS, **level}, "rehearsal": rehearsal}
    return recipe(folder, training=small, privacy=privacy)


@pytest.mark.parametrize(("rehearsal", "steps"), [(False, 6), (True, 4)])
def test_going_back_keeps_the_account(tmp_path: Path, rehearsal: bool, steps: int) -> None:
    """Two steps a round: two rounds, and the second once more."""
    start_run(made(tmp_path, rehearsal), tmp_path / "run")
    RunDir(tmp_path / "run").go_back(1)
    results = resume_run(tmp_path / "run")
    assert {s[2] for c in results["privacy"]["steps"].values() for s in c} == {steps}


@pytest.mark.parametrize("rehearsal", [False, True])
def test_with_no_checkpoint_left_the_account_is_not_begun_anew(
    tmp_path: Path, rehearsal: bool
) -> None:
    start_run(made(tmp_path, rehearsal), tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.unlink()
    (tmp_path / "run" / "results.json").unlink()
    if rehearsal:
        assert resume_run(tmp_path / "run")["rounds"]
    else:
        with pytest.raises(UserError, match=r"no checkpoint is whole, and its 2 rounds .* ε"):
            resume_run(tmp_path / "run")


def test_what_would_exceed_the_budget_is_refused(tmp_path: Path) -> None:
    spent = start_run(made(tmp_path), tmp_path / "free")["privacy"]["epsilon"]
    most = max(spent.values()) * 1.01
    start_run(made(tmp_path, epsilon=most), tmp_path / "run")
    RunDir(tmp_path / "run").go_back(1)
    with pytest.raises(UserError, match="2 more steps would bring it to"):
        resume_run(tmp_path / "run")


def test_a_client_pays_for_a_round_that_is_played_again(tmp_path: Path) -> None:
    level = {"noise_multiplier": 2.0, "clip": 0.01, "delta": 1e-3}
    two = epsilon([Steps(2.0, 1.0, 2)], 1e-3)
    for name, most in (("free", None), ("bounded", two)):
        privacy = {"client_level": {**level, "epsilon": most}}
        federation = {"weights": "uniform", "rounds": 2}
        spec = recipe(tmp_path, method={"name": "ffa"}, federation=federation, privacy=privacy)
        start_run(spec, tmp_path / name)
        RunDir(tmp_path / name).go_back(1)
    results = resume_run(tmp_path / "free")
    assert results["privacy"]["epsilon"]["ann"] == epsilon([Steps(2.0, 1.0, 3)], 1e-3)
    with pytest.raises(UserError, match="one more round would bring it to"):
        resume_run(tmp_path / "bounded")
