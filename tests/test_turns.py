"""Turn after turn with one Trainer: the same bits as with a new one for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_runs import recipe

from fedex_lora.engines.setup import Federation, set_up
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
