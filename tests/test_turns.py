"""Turn after turn with one Trainer: the same bits as with a new one for each."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from small_runs import recipe
from transformers import Trainer, set_seed

from fedex_lora.aggregation.adapter import fresh
from fedex_lora.engines.setup import Federation, set_up
from fedex_lora.engines.trainer import LabelledTrainer, seed_cpu, walked_once
from fedex_lora.engines.training import HFTrainer, quick_collections
from fedex_lora.engines.turn import Trained, Turn
from fedex_lora.federation.messages import flat

BOTH, B = frozenset("AB"), frozenset("B")


@pytest.fixture(scope="module", params=["roberta", "llama"])
def federation(request, tmp_path_factory) -> Federation:
    return set_up(recipe(tmp_path_factory.mktemp(request.param), request.param))


def turns(federation: Federation) -> list[Turn]:
    """Several clients and rounds, of which one trains B alone and one has fewer rows."""
    names = sorted(federation.clients)[:2]
    first, second = (
        Turn(name, 1, federation.clients[name], federation.initial, BOTH, 3) for name in names
    )
    fewer = replace(second, round=2, rows=second.rows.select(range(3)))
    return [first, second, replace(first, round=2, trained=B), fewer, first]


def numbers(found: Trained) -> dict[str, Any]:
    return {name: value for name, value in found.metrics.items() if name != "seconds"}


@pytest.mark.parametrize(
    "training",
    [{}, {"bf16": True}, {"label_smoothing_factor": 0.1, "weight_decay": 0.1}],
    ids=["float32", "bfloat16", "smoothed"],
)
def test_a_trainer_that_begins_anew_is_a_new_one(federation, training):
    given = {**federation.recipe.trainer_arguments, **training, "lr_scheduler_type": "cosine"}
    steps: list[tuple[str, int, int, float]] = []
    lasting = HFTrainer(
        federation.task, given, lambda *step: steps.append((step[0].client, *step[1:]))
    )
    with quick_collections():
        for turn in turns(federation):
            before = len(steps)
            again = lasting(federation.model, [turn])[0]
            losses = [loss for *_, loss in steps[before:]]  # of every step, as it was made
            assert sum(losses) / len(losses) == pytest.approx(again.metrics["loss"], rel=1e-5)
            anew = HFTrainer(federation.task, given)(federation.model, [turn])[0]
            assert numbers(again) == numbers(anew)
            expected = flat(anew.end)
            assert expected and any(not v.equal(flat(turn.start)[n]) for n, v in expected.items())
            assert all(value.equal(expected[name]) for name, value in flat(again.end).items())
    taken = [turn.client for turn in turns(federation)]
    assert list(dict.fromkeys(steps)) and [c for c, done, *_ in steps if done == 1] == taken
    assert len(lasting._last) == 1


def test_seeding_for_the_cpu_is_what_transformers_does():
    def drawn() -> tuple[float, float, list[float]]:
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    set_seed(7)
    expected = drawn()
    assert drawn() != expected
    seed_cpu(7)
    assert drawn() == expected


def test_walking_once_and_counting_once_change_nothing(federation):
    def trained() -> list[tuple[Any, Any, float]]:
        train = HFTrainer(federation.task, federation.recipe.trainer_arguments)
        found = [train(federation.model, [turn])[0] for turn in turns(federation)[:3]]
        flos = train._last[0].state.total_flos
        assert flos > 0
        return [
            (numbers(one), {n: v.tolist() for n, v in flat(one.end).items()}, flos) for one in found
        ]

    quick = trained()
    with (
        mock.patch("fedex_lora.engines.training.walked_once", lambda _: nullcontext()),
        mock.patch.object(LabelledTrainer, "floating_point_ops", Trainer.floating_point_ops),
    ):
        assert trained() == quick


def test_a_compiled_model_learns_what_it_does_otherwise(federation):
    given = {**federation.recipe.trainer_arguments, "num_train_epochs": 1}
    turn = next(iter(turns(federation)))
    (plain,) = HFTrainer(federation.task, given)(federation.model, [turn])
    compiled = {**given, "torch_compile": True, "torch_compile_backend": "eager"}
    (found,) = HFTrainer(federation.task, compiled)(federation.model, [turn])
    assert found.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    expected = flat(plain.end)
    for name, value in flat(found.end).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_turn_of_another_rank_than_the_one_before_is_trained(federation):
    model, (turn, *_) = federation.model, turns(federation)
    wider = fresh({name: s.at_rank(s.rank + 2) for name, s in model.layers.items()}, 0)
    both = [turn, replace(turn, start=replace(turn.start, layers=wider))]
    for found in HFTrainer(federation.task, federation.recipe.trainer_arguments)(model, both):
        assert found.end is not None and all(f.B.any() for f in found.end.layers.values())


def test_a_module_that_is_walked_once_gives_what_it_gave(federation):
    module = federation.model.module

    def seen() -> list[Any]:
        return [
            [(name, id(p)) for name, p in module.named_parameters()],
            [id(p) for p in module.parameters()],
            [id(p) for p in module.parameters(recurse=False)],
            [name for name, _ in module.named_parameters(prefix="x")],
            [(name, id(m)) for name, m in module.named_modules()],
            [id(m) for m in module.modules()],
            [name for name, _ in module.named_modules(prefix="x")],
        ]

    before, own = seen(), set(vars(module))
    with walked_once(module):
        assert seen() == before and set(vars(module)) > own
    assert seen() == before and set(vars(module)) == own
