"""FedProx: the pull towards where the turn began, against plain steps of SGD."""

from __future__ import annotations

import pytest
import torch
from small_runs import recipe

from fedex_lora.engines.setup import set_up
from fedex_lora.engines.training import HFTrainer
from fedex_lora.engines.turn import Turn
from fedex_lora.federation.messages import flat

SGD = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_second_step_is_pulled_back_by_what_the_first_one_moved(accumulated, tmp_path):
    federation = set_up(recipe(tmp_path, training={**SGD, "per_device_train_batch_size": 2}))
    rows, trained = federation.clients["ann"], federation.settings.method.trained(1)

    def end(steps, mu):
        given = {**federation.recipe.trainer_arguments, "max_steps": steps}
        given["gradient_accumulation_steps"] = accumulated
        turn = Turn("ann", 1, rows, federation.initial, trained, seed=0)
        train = HFTrainer(federation.task, given, proximal=mu)
        (found,) = train(federation.model, [turn])
        assert found.end is not None
        return {name: t.double().clone() for name, t in flat(found.end).items()}

    start = {name: t.double() for name, t in flat(federation.initial).items()}
    one, two = end(1, 0.0), end(2, 0.0)
    for name, t in end(1, 0.5).items():
        assert torch.equal(t, one[name])  # x is x⁰ still
    moved = 0.0
    for name, t in end(2, 0.5).items():
        pulled = -0.3 * 0.5 * (one[name] - start[name])
        torch.testing.assert_close(t - two[name], pulled, rtol=1e-3, atol=1e-7)
        moved += pulled.norm().item()
    assert moved > 1e-4
    assert all(torch.equal(t, two[name]) for name, t in end(2, 0.0).items())  # no hook is left


def test_what_it_does_not_go_with_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"federation.proximal: fused clients train without it"):
        recipe(tmp_path, federation={"proximal": 0.1}, engine={"fuse": 3})
    with pytest.raises(ValueError, match=r"federation.proximal: training.fp16 scales"):
        recipe(tmp_path, federation={"proximal": 0.1}, training={"fp16": True})
