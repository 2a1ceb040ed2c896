"""Which precision training has, and that a run keeps to the one it began with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from small_runs import StopAfter, recipe

from fedex_lora.engines.setup import set_up, set_up_client, set_up_server
from fedex_lora.engines.training import HFTrainer
from fedex_lora.engines.turn import Turn
from fedex_lora.recipe.reader import differences
from fedex_lora.runs.autotune import settle_precision
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Silent


def test_auto_takes_what_is_faster_and_the_run_is_as_if_it_had_been_named(tmp_path, monkeypatch):
    measured = iter([0.3, 0.2])
    monkeypatch.setattr("fedex_lora.runs.autotune.few_steps", lambda _: next(measured))
    told = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    auto = recipe(tmp_path, engine={"precision": "auto"})
    start_run(auto, tmp_path / "auto", Notes())
    assert told[:1] == ["precision: bfloat16 (seconds a step: float32 0.3, bfloat16 0.2)"]
    assert RunDir(tmp_path / "auto").recipe().engine.precision == "bfloat16"
    start_run(recipe(tmp_path, engine={"precision": "bfloat16"}), tmp_path / "named")
    start_run(recipe(tmp_path), tmp_path / "full")
    auto_, named, full = (final(tmp_path / name) for name in ("auto", "named", "full"))
    assert all(torch.equal(auto_[key], named[key]) for key in named)
    assert any(not torch.equal(full[key], named[key]) for key in named)


def test_measuring_does_not_change_the_run(tmp_path):
    start_run(recipe(tmp_path, engine={"precision": "auto"}), tmp_path / "auto")
    chosen = RunDir(tmp_path / "auto").recipe().engine.precision
    assert chosen in ("float32", "bfloat16")
    start_run(recipe(tmp_path, engine={"precision": chosen}), tmp_path / "named")
    auto, named = final(tmp_path / "auto"), final(tmp_path / "named")
    assert all(torch.equal(auto[key], named[key]) for key in named)


def test_a_run_that_is_resumed_keeps_its_precision(tmp_path, monkeypatch):
    measured = iter([0.3, 0.2])  # a second measurement would find nothing
    monkeypatch.setattr("fedex_lora.runs.autotune.few_steps", lambda _: next(measured))
    auto = recipe(tmp_path, engine={"precision": "auto"})
    with pytest.raises(KeyboardInterrupt):
        start_run(auto, tmp_path / "run", StopAfter(1))
    resume_run(tmp_path / "run", auto)
    start_run(recipe(tmp_path, engine={"precision": "bfloat16"}), tmp_path / "whole")
    resumed, whole = final(tmp_path / "run"), final(tmp_path / "whole")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_every_turn_trains_in_the_precision_that_was_asked_for(tmp_path):
    """Turns share a model: what one leaves on it must not change the next."""
    federation = set_up(recipe(tmp_path, engine={"precision": "bfloat16"}))
    settings, given = federation.settings, federation.recipe.trainer_arguments

    def turn(training):
        rows, trained = federation.clients["ann"], settings.method.trained(1)
        ann = Turn("ann", 1, rows, federation.initial, trained, seed=0)
        return HFTrainer(federation.task, training)(federation.model, [ann])[0].end.layers

    first, second, full = turn(given), turn(given), turn({**given, "bf16": False})
    for site, f in first.items():
        assert torch.equal(second[site].B, f.B) and not torch.equal(full[site].B, f.B)


def test_only_a_precision_that_was_left_open_fits_another(tmp_path):
    auto, full, half = (
        recipe(tmp_path, engine={"precision": p}) for p in ("auto", "float32", "bfloat16")
    )
    assert not differences(auto, half) and not differences(auto, full)
    assert differences(full, half) == ["engine.precision: float32 != bfloat16"]


PRIVATE = {"example_level": {"noise_multiplier": 1.0, "delta": 1e-3}}


@pytest.mark.parametrize("where", ["privacy", "device", "noise"])
def test_auto_is_float32_where_bfloat16_cannot_be_had_or_measured(tmp_path, monkeypatch, where):
    measured = iter([0.2, 0.0] if where == "noise" else [])
    monkeypatch.setattr("fedex_lora.runs.autotune.few_steps", lambda _: next(measured))
    blocks = {"privacy": PRIVATE} if where == "privacy" else {}
    federation = set_up(recipe(tmp_path, engine={"precision": "auto"}, **blocks))
    if where == "device":
        old = SimpleNamespace(device=torch.device("cuda"))  # and there is none here
        federation = replace(federation, model=cast(Any, old))
    assert settle_precision(federation)[0].recipe.engine.precision == "float32"


@pytest.mark.parametrize("kind", ["flower", "flower-simulation", "local"])
def test_auto_is_what_all_machines_can_where_there_are_several(tmp_path, kind):
    auto = recipe(tmp_path, engine={"precision": "auto", "fuse": "auto", "kind": kind})
    for federation in (set_up_server(auto), set_up_client(auto, "ann")):
        engine = federation.recipe.engine
        assert (engine.precision, engine.fuse) == ("float32", 1)
    named = auto.with_engine(precision="bfloat16")
    assert set_up_server(named).recipe.trainer_arguments["bf16"]


@pytest.mark.parametrize(
    ("blocks", "wrong"),
    [
        ({"engine": {"precision": "auto"}, "training": {"bf16": True}}, "training.bf16"),
        ({"engine": {"precision": "bfloat16"}, "privacy": PRIVATE}, "engine.precision"),
    ],
)
def test_what_contradicts_it_is_refused(tmp_path, blocks, wrong):
    with pytest.raises(ValidationError, match=wrong):
        recipe(tmp_path, **blocks)


def final(run):
    state = RunDir(run).newest()[0]
    assert state is not None
    factors = {f"{n}.{k}": getattr(f, k) for n, f in state.factors.items() for k in "AB"}
    return {**factors, **state.head}
