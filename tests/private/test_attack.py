"""Membership inference: its scores against known distributions, and the command on a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from small_runs import recipe
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.engines.setup import set_up
from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.runs import read_run
from fedex_lora.runs import attack as attack_module
from fedex_lora.runs.attack import (
    FILE,
    _losses,
    attack,
    auc,
    by_update,
    halves,
    judged,
    lira,
    seen_updates,
)
from fedex_lora.runs.here import stage_of
from fedex_lora.runs.reopened import read_round
from fedex_lora.runs.run import start_run


def test_auc_is_that_of_two_gaussians() -> None:
    """P(X > Y) of N(d, 1) and N(0, 1) is Φ(d/√2), and the best advantage Φ(d/2) − Φ(−d/2)."""
    rng = np.random.default_rng(1)
    member = np.arange(4000) < 2000
    scores = rng.normal(size=4000) + np.where(member, 1.5, 0.0)
    found = judged(scores, member, 0.75)
    assert found.low < norm.cdf(1.5 / math.sqrt(2)) < found.high
    assert found.high - found.low < 0.05
    assert found.advantage == pytest.approx(norm.cdf(0.75) - norm.cdf(-0.75), abs=0.03)
    assert auc(np.array([1.0]), np.array([1.0])) == 0.5


def test_lira_sees_past_how_hard_a_row_is_and_the_loss_alone_does_not() -> None:
    """Rows differ by N(0, 5²), to be a member adds 2 to N(0, 1): with the rows' means known the
    likelihood ratio tells members from others as two Gaussians, Φ(2/√2) = 0.92."""
    rng = np.random.default_rng(2)
    rows, models = 2000, 64
    hard, member = 5 * rng.normal(size=rows), rng.random(rows) < 0.5
    within = halves(models, rows, 3)
    assert (within.sum(0) == models // 2).all() and 0.4 < within[0].mean() < 0.6
    shadows = hard + 2 * within + rng.normal(size=(models, rows))
    target = hard + 2 * member + rng.normal(size=rows)
    found = judged(lira(target, shadows, within), member, 0.0)
    assert found.auc == pytest.approx(norm.cdf(2 / math.sqrt(2)), abs=0.03)
    assert judged(target, member, 0.0).auc < 0.65
    none = judged(lira(hard + rng.normal(size=rows), shadows, within), member, 0.0)
    assert abs(none.auc - 0.5) < 0.05


def test_the_command_attacks_runs_and_their_reports_say_so(tmp_path: Path) -> None:
    private = {"example_level": {"epsilon": 2.0, "delta": 1e-2}}
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    start_run(recipe(tmp_path, records={"save_updates": True}), tmp_path / "plain")
    start_run(recipe(tmp_path, privacy=private, training=small), tmp_path / "private")
    runs = [str(tmp_path / name) for name in ("plain", "private")]
    result = CliRunner().invoke(app, ["attack", *runs, "--shadows", "2"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "ε 2 of 2" in result.output and "lira" in result.output
    told = json.loads((tmp_path / "private" / FILE).read_text())
    assert (told["members"], told["others"]) == (17, 10)  # of all clients; validation and test
    assert told["attacks"].keys() == {"loss", "lira"}
    assert json.loads((tmp_path / "plain" / FILE).read_text())["attacks"].keys() == {
        "loss",
        "update",
        "owner",
        "lira",
    }
    assert any("(owner) on the single updates" in n for n in read_run(tmp_path / "plain").notes)
    notes = read_run(tmp_path / "private").notes
    assert any("membership inference (lira)" in note for note in notes)


def test_what_cannot_be_attacked_is_refused_by_name(tmp_path: Path) -> None:
    start_run(recipe(tmp_path, evaluation={"where": "clients"}), tmp_path / "run")
    result = CliRunner().invoke(app, ["attack", str(tmp_path / "run")])
    assert result.exit_code != 0 and "evaluation.where: server" in str(result.exception)
    result = CliRunner().invoke(app, ["attack", str(tmp_path / "run"), "--shadows", "3"])
    assert "even number" in str(result.exception)


@pytest.mark.parametrize(
    "level",
    [
        {"client_level": {"noise_multiplier": 0.8, "clip": 0.01, "delta": 1e-3, "epsilon": 5.0}},
        {"example_level": {"noise_multiplier": 0.8, "delta": 1e-3, "epsilon": 4.2}},
    ],
)
def test_shadows_train_as_many_rounds_as_the_budget_left_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: dict[str, Any]
) -> None:
    """Of half of the rows, which cost more by the same noise."""
    federation = {"rounds": 3, "weights": "uniform"}
    training = {"per_device_train_batch_size": 1}
    spec = recipe(
        tmp_path, method={"name": "ffa"}, federation=federation, privacy=level, training=training
    )
    assert start_run(spec, tmp_path / "run")["rounds"] == 1
    rounds, plain = [], attack_module.run_round

    def counted(state: Any, *arguments: Any, **options: Any) -> Any:
        rounds.append(state.version + 1)
        return plain(state, *arguments, **options)

    monkeypatch.setattr(attack_module, "run_round", counted)
    attack(tmp_path / "run", shadows=2)
    assert rounds == [1, 1]


def test_owner_and_update_tell_what_single_updates_show() -> None:
    """Three clients, losses N(0, 1) but lower by 2 of one's own rows by one's own update: a row's
    own loss less the others' mean is apart by 2 and 1 in means of variance 1 + ½."""
    rng = np.random.default_rng(3)
    owner = [name for name in "abc" for _ in range(500)] + ["a", "b", "c"] * 200
    member = np.arange(len(owner)) < 1500
    seen = {}
    for name in "abc":
        mine = np.array([whose == name for whose in owner]) & member
        seen[name] = rng.normal(size=len(owner)) - 2 * mine
    found = by_update(seen, member, owner)
    assert found["update"].auc == pytest.approx(norm.cdf(2 / math.sqrt(2)), abs=0.02)
    # of one's own N(2, 3/2), of others N(-1, 3/2)
    assert found["owner"].auc == pytest.approx(norm.cdf(3 / math.sqrt(3)), abs=0.03)
    expected = norm.cdf(2 / math.sqrt(1.5)) - norm.cdf(-1 / math.sqrt(1.5))
    assert found["owner"].advantage == pytest.approx(expected, abs=0.03)
    assert by_update({}, member, owner) == {}
    assert by_update({"a": seen["a"]}, member, owner).keys() == {"update"}


@pytest.mark.parametrize("method", ["fedex-reinit", "fedex-hetero"])
def test_the_update_of_a_round_of_one_client_is_the_model_that_it_leads_to(
    tmp_path: Path, method: str
) -> None:
    spec = recipe(
        tmp_path,
        method={"name": method},
        federation={"rounds": 3, "clients_per_round": 1},
        records={"save_updates": True},
    )
    start_run(spec, tmp_path / "run")
    told = attack(tmp_path / "run", which="last")
    found = read_round(tmp_path / "run", "last")
    federation = set_up(found.recipe)
    stage, rows = stage_of(federation), federation.evaluation["validation"]
    seen = seen_updates(tmp_path / "run", federation, stage, found.state, rows)
    stage.show_global(found.state, federation.settings)
    (losses,) = seen.values()
    assert losses == pytest.approx(_losses(federation, rows), rel=1e-4)
    assert "owner" not in told["attacks"]
    (folder,) = (tmp_path / "run" / "rounds" / "0003" / "clients").iterdir()
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"0003.*a saved update that cannot be read"):
        attack(tmp_path / "run", which="last")
