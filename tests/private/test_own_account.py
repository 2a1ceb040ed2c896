"""A client's own account: on its disk, across runs, whatever the coordinator asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines.in_process import InProcess, institution
from small_runs import recipe

from fedex_lora.engines.private.account import Steps, epsilon
from fedex_lora.engines.private.begin import own_account
from fedex_lora.engines.private.own_account import OwnAccount, names_of
from fedex_lora.errors import StorageError, UserError
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.run import start_run
from fedex_lora.runs.rundir import RunDir

STEP = Steps(2.0, 0.1, 10)


def account(folder: Path, rows: Path, run: str, **more: Any) -> OwnAccount:
    return OwnAccount(folder / "privacy.json", names_of(rows, ""), run, 1e-5, **more)


def test_runs_add_up_and_what_would_exceed_the_files_budget_is_refused(tmp_path: Path) -> None:
    rows = tmp_path / "ann.jsonl"
    rows.write_text("{}\n")
    twice = epsilon([Steps(2.0, 0.1, 20)], 1e-5)
    one = account(tmp_path, rows, "1", most=twice * 1.01)
    assert one.spend("ann", STEP) == epsilon([STEP], 1e-5)
    two = account(tmp_path, rows, "2", most=twice * 1.01)
    assert two.spend("ann", STEP) == epsilon([STEP], 1e-5)  # of this run
    assert two.total() == one.total() == twice
    before = (tmp_path / "privacy.json").read_bytes()
    with pytest.raises(UserError, match=r"ann: another turn .* over all runs; .*--epsilon"):
        account(tmp_path, rows, "3", most=twice * 1.01).spend("ann", STEP)
    assert (tmp_path / "privacy.json").read_bytes() == before
    assert (tmp_path / "privacy.json").stat().st_mode & 0o077 == 0


def test_a_file_that_was_moved_or_has_grown_is_the_same_and_another_is_not(tmp_path: Path) -> None:
    rows, moved, other = (tmp_path / n for n in ("a.jsonl", "b.jsonl", "c.jsonl"))
    rows.write_text("one\n")
    other.write_text("other\n")
    account(tmp_path, rows, "1").spend("ann", STEP)
    rows.rename(moved)
    account(tmp_path, moved, "2").spend("ann", STEP)
    moved.write_text("one\ntwo\n")
    assert account(tmp_path, moved, "3").total() == epsilon([Steps(2.0, 0.1, 20)], 1e-5)
    assert account(tmp_path, other, "3").total() == 0


def test_a_damaged_account_allows_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text("one\n")
    account(tmp_path, rows, "1").spend("ann", STEP)
    (tmp_path / "privacy.json").write_text('[{"names": [], "delta": 0.1}]')
    with pytest.raises(StorageError, match=r"privacy.json: damaged.*Restore"):
        account(tmp_path, rows, "1").spend("ann", STEP)


def test_a_budget_needs_a_recipe_that_is_private(tmp_path: Path) -> None:
    spec = recipe(tmp_path)
    assert own_account(spec, tmp_path / "p", None, "1", None) is None
    with pytest.raises(UserError, match=r"--epsilon: 3, but .* privacy.example_level"):
        own_account(spec, tmp_path / "p", None, "1", 3.0)


def test_across_machines_a_client_refuses_the_round_that_would_exceed_its_budget(
    tmp_path: Path,
) -> None:
    """Bob's operator allows one of two rounds; the run goes on without him, and records what each
    client says that it spent."""
    level = {"epsilon": 9.0, "delta": 1e-3, "noise_multiplier": 1.5}
    private = {"example_level": level}
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    spec = recipe(tmp_path, training=training, privacy=private, engine={"kind": "flower"})
    once = epsilon([Steps(1.5, 2 / 3, 2)], 1e-3)
    nodes = {}
    for name, (file,) in spec.data.files():
        most = 1.2 * once if name == "bob" else None
        mine = own_account(spec, tmp_path / f"{name}.json", file, "1", most)
        nodes[name] = institution(spec, name, file, tmp_path / "cache", mine)
    start_run(spec, tmp_path / "out", None, across_machines(InProcess(nodes)))
    first, second = RunDir(tmp_path / "out").records()
    assert sorted(first["clients"]) == ["ann", "bob", "cleo"]
    assert sorted(second["clients"]) == ["ann", "cleo"]
    assert "--epsilon" in {**second["lost"], **second["refused"]}["bob"]
    assert first["privacy"]["epsilon"]["bob"] == second["privacy"]["epsilon"]["bob"] == once
    both = epsilon([Steps(1.5, 2 / 9, 10)], 1e-3)
    assert second["privacy"]["epsilon"]["ann"] == both
    assert nodes["ann"].train.account.total() == both
