"""DP-SGD against its equation, and what a private run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_runs import StopAfter, recipe
from test_gradients import by_itself
from tiny import tiny

from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.private.account import Accounts, Steps, epsilon
from fedex_lora.engines.private.train import PrivateTrainer
from fedex_lora.engines.setup import set_up
from fedex_lora.engines.turn import Turn
from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.runs import read_run
from fedex_lora.federation.messages import flat
from fedex_lora.federation.randomness import normal, poisson_sample, rehearsed
from fedex_lora.recipe.draft import whole
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir

TRAINING = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
PRIVACY = {"example_level": {"epsilon": 8.0, "delta": 1e-3, "max_grad_norm": 0.5}}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def made(folder: Path, **blocks: Any) -> Any:
    return recipe(folder, **{"training": TRAINING, "privacy": PRIVACY, **blocks})


@pytest.mark.parametrize("physical", [1, 3])
def test_a_step_is_the_clipped_and_noised_mean_over_the_expected_batch(
    tmp_path: Path, physical: int
) -> None:
    """Two steps of plain SGD, with the draws of a rehearsal replayed: the rows' own gradients by
    torch alone, in the order of the draw, in float64 from there on. L = 2 by passes of one row; L =
    6 by passes of three in the order of their lengths."""
    tiny("roberta", tmp_path / "roberta", **NO_DROPOUT)
    federation = set_up(made(tmp_path))
    model, task, rows = federation.model, federation.task, federation.clients["ann"]
    sgd = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.3, "max_steps": 2}
    start = federation.initial
    turn = Turn("ann", 1, rows, start, frozenset("AB"), 5)
    bound, sigma, account, expected_rows = 0.5, 0.8, Accounts(1e-3), 2 * physical
    training = {**TRAINING, **sgd, "per_device_train_batch_size": physical}
    trainer = PrivateTrainer(task, training, bound, {"ann": sigma}, account, True)
    (found,) = trainer(model, [turn])

    bits, collate = rehearsed(derive(5, "private", 1, "ann")), task.collator(model.tokenizer)
    model.write(start)
    model.freeze(frozenset("AB"))
    clipped = 0
    for _ in range(2):
        drawn = poisson_sample(bits, len(rows), expected_rows / 9)
        names = [n for n, p in model.module.named_parameters() if p.requires_grad]
        total = {n: torch.zeros_like(model.module.get_parameter(n)).double() for n in names}
        for row in drawn:
            one = {n: g.double() for n, g in by_itself(model, collate([rows[row]])).items()}
            norm = torch.cat([g.flatten() for g in one.values()]).norm()
            clipped += int(norm > bound)
            for n, g in one.items():
                total[n] += g * min(1.0, bound / norm.item())
        groups = trainer_order(model, total)
        with torch.no_grad():
            for n in groups:
                parameter = model.module.get_parameter(n)
                noise = normal(bits, parameter).double()
                parameter -= (0.3 * (total[n] + sigma * bound * noise) / expected_rows).float()
    assert clipped  # else the bound is not tested
    expected, got = flat(model.read()), flat(found.end)
    for name, tensor in expected.items():
        moved = (tensor - flat(start)[name]).norm()
        assert (got[name] - tensor).norm() <= 1e-4 * moved, name
    assert account.spent == {"ann": (Steps(0.8, expected_rows / 9, 2),)}
    assert found.metrics["epsilon"] == epsilon(account.spent["ann"], 1e-3)
    assert "loss" not in found.metrics  # it is not noised


def trainer_order(model: Any, names: Any) -> list[str]:
    """Parameters as the Trainer's optimizer holds them: those that decay, then the others."""
    return [n for n in names if "bias" not in n] + [n for n in names if "bias" in n]


class Notes(StopAfter):
    def __init__(self, round: int = 0) -> None:
        super().__init__(round)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_rehearsal_repeats_is_resumed_and_is_marked_in_every_file(tmp_path: Path) -> None:
    private = {**PRIVACY, "rehearsal": True}
    spec, watcher = made(tmp_path, privacy=private), Notes()
    uncut = start_run(spec, tmp_path / "whole", watcher)
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "cut", StopAfter(1))
    resumed = resume_run(tmp_path / "cut")
    assert any(note.startswith("not private") for note in watcher.notes)
    assert resumed["best"] == uncut["best"] and resumed["privacy"] == uncut["privacy"]
    records = [RunDir(tmp_path / run).records() for run in ("whole", "cut")]
    assert records[0][1]["privacy"] == records[1][1]["privacy"]
    for record in records[1]:  # of ⌈9/2⌉ steps a round
        ((noise, rate, count),) = record["privacy"]["steps"]["ann"]
        assert (rate, count) == (2 / 9, 5 * record["round"])
        told = record["privacy"]["epsilon"]["ann"]
        assert told == epsilon([Steps(noise, rate, count)], 1e-3) <= 8.0
        assert record["privacy"]["private"].startswith("not private")
    assert records[1][-1]["privacy"]["epsilon"]["ann"] > 7.9
    adapter = tmp_path / "cut" / "final" / "adapter"
    assert json.loads((adapter / "privacy.json").read_text()) == resumed["privacy"]
    assert "Not private: a rehearsal" in (adapter / "README.md").read_text()
    assert any("Not private: a rehearsal" in note for note in read_run(tmp_path / "cut").notes)


def test_without_rehearsal_nothing_repeats_and_the_run_ends_with_the_last_round_that_fits(
    tmp_path: Path,
) -> None:
    steps = [Steps(1.5, 2 / 3, 2)]  # of bob, who has the fewest rows
    limit = (epsilon(steps, 1e-3) + epsilon([Steps(1.5, 2 / 3, 4)], 1e-3)) / 2
    level = {"epsilon": limit, "delta": 1e-3, "noise_multiplier": 1.5}
    spec, watcher = made(tmp_path, privacy={"example_level": level}), Notes()
    first = start_run(spec, tmp_path / "one", watcher)
    assert first["rounds"] == 1
    assert any("allows 1 of 2 rounds" in note for note in watcher.notes)
    assert first["privacy"]["epsilon"]["bob"] == epsilon(steps, 1e-3) <= limit
    start_run(spec, tmp_path / "two")
    ends = [(tmp_path / run / "final/adapter/adapter_model.safetensors") for run in ("one", "two")]
    assert ends[0].read_bytes() != ends[1].read_bytes()
    card = (tmp_path / "one" / "final" / "adapter" / "README.md").read_text()
    assert "Differential privacy at the example level" in card


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ({"training": {"max_grad_norm": 1.0}}, "training.max_grad_norm"),
        ({"training": {"train_sampling_strategy": "group_by_length"}}, "Poisson sampling"),
        ({"training": {"gradient_checkpointing": True}}, "gradient_accumulation_steps"),
        ({"training": {"bf16": True}}, "training.bf16"),
        ({"training": {"report_to": "tensorboard"}}, "training.report_to"),
        ({"engine": {"fuse": 2}}, "engine.fuse"),
        ({"engine": {"precision": "bfloat16"}}, "engine.precision"),
        ({"privacy": {"example_level": {"delta": 1e-5}}}, "epsilon: missing"),
        ({"privacy": {"example_level": {"epsilon": 1.0, "delta": 0.0}}}, "greater than 0"),
        ({"privacy": {"rehearsal": True}}, "no noise to rehearse"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    tmp_path: Path, blocks: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError, match=told):
        made(tmp_path, **blocks)


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ({"epsilon": 8.0, "delta": 0.2}, r"privacy.example_level.delta: 0.2 is above 1/"),
        ({"epsilon": 0.01, "delta": 1e-3, "noise_multiplier": 1.0}, "allows no round"),
    ],
)
def test_a_budget_that_allows_nothing_is_refused_before_round_1(
    tmp_path: Path, level: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        start_run(made(tmp_path, privacy={"example_level": level}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_misspelt_key_within_an_optional_block_is_named_with_the_nearest() -> None:
    """`privacy.example_level` may be left out, and has keys of its own where it is not."""
    raw = {"privacy": {"example_level": {"epsilonn": 1, "delta": 1e-3}}}
    keys = ("privacy", "example_level", "epsilonn")
    assert (keys, "unknown key; did you mean 'epsilon'?") in whole(raw)[1]
