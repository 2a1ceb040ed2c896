"""Scores that clients send back: what is refused by name, who is missing, and the end of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Command
from small_runs import recipe

import fedex_lora
from fedex_lora.errors import UserError
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.by_hand.closing import begin_run, close_round
from fedex_lora.runs.by_hand.opening import open_round
from fedex_lora.runs.by_hand.turning import take_turn
from fedex_lora.runs.rundir import RunDir

ODD = {
    '{"rows": 2, "scores": {"accuracy": Infinity}}': r"score accuracy is inf; expected 0 to 1",
    '{"rows": 2, "scores": {"accuracy": 2.0}}': r"score accuracy is 2; expected 0 to 1",
    '{"rows": 2, "scores": {"f1": 0.5}}': r"its scores lack accuracy",
    '{"rows": 2, "scores": {}}': r"holds no score; expected accuracy",
    '{"rows": 0, "scores": {"accuracy": 0.5}}': r"rows: .*greater than or equal to 1; expected",
    '{"rows": 2, "scores": {"accuracy": null}}': r"scores: accuracy: .*valid number; expected",
    '{"rows"': r"Expecting ':' delimiter.*; expected",
}


def test_scores_come_back_and_finish_the_run(command: Command, tmp_path: Path) -> None:
    spec = recipe(tmp_path, evaluation={"where": "clients"}, federation={"rounds": 1})
    (tmp_path / "r.yaml").write_text(dump_recipe(spec))
    run, data = tmp_path / "run", tmp_path / "data"
    command("round", "open", tmp_path / "r.yaml", "--out", run)
    turns = {name: str(run / f"by-hand/round-0001/{name}") for name in ("ann", "bob", "cleo")}
    for name, folder in turns.items():
        taken = take_turn(folder, data / f"{name}.jsonl")
        assert taken.scored is None  # nothing is learned yet, as on one machine
    with pytest.raises(UserError, match="no scores are asked for with round 1"):
        take_turn(turns["ann"], data / "ann.jsonl", train=False)
    with pytest.raises(UserError, match="`updates`: missing"):
        close_round(run, [])
    code, said, _ = command("round", "close", run, "--updates", *turns.values())
    assert code == 0 and "the clients are to score the last model" in said
    last = {name: run / f"by-hand/scores-0001/{name}" for name in turns}
    assert not (last["ann"] / "adapter").exists()
    for name in ("ann", "bob"):
        code, said, _ = command("turn", last[name], "--data", data / f"{name}.jsonl")
        assert code == 0 and f"{name}, the model after round 1, 1 rows: accuracy" in said
    good = (last["ann"] / "update/scores.json").read_text()
    for text, why in ODD.items():
        (last["ann"] / "update/scores.json").write_text(text)
        with pytest.raises(UserError, match=f"(?s)/ann: scores.json: .*{why}.*nothing is changed"):
            close_round(run, [str(last["ann"]), str(last["bob"])])
    assert RunDir(run).results() is None
    (last["ann"] / "update/scores.json").write_text(good)
    (last["bob"] / "update/scores.json").unlink()
    code, said, told = command("round", "close", run, "--updates", last["ann"], last["bob"])
    assert code == 0 and "Best round 1 of 1" in said
    assert "no scores of bob: its update holds no scores.json" in said + told
    assert "no scores of cleo: none were given" in said + told
    (record,) = RunDir(run).records()
    assert record["client_scores"] == {"ann": json.loads(good)["scores"]}
    assert record["score"] == record["client_scores"]["ann"]["accuracy"]


def test_who_trains_otherwise_scores_the_model_sent(tmp_path: Path) -> None:
    spec = recipe(tmp_path, evaluation={"where": "clients", "client_fraction": 0.4})
    run, data = tmp_path / "run", tmp_path / "data"
    begin_run(spec, run)
    folder = open_round(run).folders["ann"]
    take_turn(folder, data / "ann.jsonl")
    close_round(run, [folder])
    folder = open_round(run).folders["ann"]
    module, _ = fedex_lora.open_turn(folder)
    module.save_pretrained(f"{folder}/update")
    saved = (Path(folder) / "update/adapter_model.safetensors").read_bytes()
    taken = take_turn(folder, data / "ann.jsonl", train=False)
    assert taken.update is None and taken.scored is not None and taken.scored.rows == 4
    assert (Path(folder) / "update/adapter_model.safetensors").read_bytes() == saved
    close_round(run, [folder], {"ann": 5})
    first, _ = RunDir(run).records()
    assert first["client_scores"] == {"ann": taken.scored.scores}
    assert torch.tensor(list(taken.scored.scores.values())).isfinite().all()
