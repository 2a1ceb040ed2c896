"""`fl.PrivateTrainer`: example-level privacy in a federation in Python."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import TEXT, tiny

import fedex_lora as fl
from fedex_lora.engines.private.account import Steps, epsilon, noise_for
from fedex_lora.engines.private.losses import example_losses

SMALL = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> fl.Model:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = tiny("roberta", tmp_path_factory.mktemp("private") / "m", **still)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"])
    return fl.Model.from_pretrained(str(folder), lora, num_labels=3)


def rows(model: fl.Model, count: int) -> Dataset:
    texts = [TEXT[i % len(TEXT)] for i in range(count)]
    return Dataset.from_dict({"label": [i % 3 for i in range(count)], **model.tokenizer(texts)})


def federated(model: fl.Model, **options: Any) -> tuple[fl.Federation, fl.PrivateTrainer]:
    trainer = fl.PrivateTrainer(1e-2, rehearsal=True, **{**SMALL, **options})
    clients = {"ann": rows(model, 6), "bob": rows(model, 8)}
    return fl.Federation(model, clients, train=trainer), trainer


def test_the_noise_is_found_from_epsilon_and_the_account_goes_on(
    model: fl.Model, tmp_path: Path
) -> None:
    federation, trainer = federated(model, epsilon=6.0, rounds=2)
    (first,) = federation.rounds(1)
    # L = 2 of 6 rows: three steps a turn; of 8 rows four
    for client, rate, steps in (("ann", 2 / 6, 3), ("bob", 2 / 8, 4)):
        noise = noise_for(6.0, 1e-2, rate, 2 * steps)
        assert trainer.account.spent[client] == (Steps(noise, rate, steps),)
        expected = epsilon([Steps(noise, rate, steps)], 1e-2)
        assert trainer.spent()[client] == first.metrics[client]["epsilon"] == expected
    federation.save(tmp_path / "run")
    again = fl.PrivateTrainer(1e-2, 6.0, 2, rehearsal=True, **SMALL)
    clients = {"ann": rows(model, 6), "bob": rows(model, 8)}
    resumed = fl.Federation.resume(tmp_path / "run", model, clients, train=again)
    assert again.spent() == trainer.spent()
    list(resumed.rounds(1))
    list(federation.rounds(1))
    for name, f in federation.state.factors.items():
        assert torch.equal(f.B, resumed.state.factors[name].B)
    assert 5.9 < max(again.spent().values()) <= 6.0
    with pytest.raises(fl.UserError, match="more steps would bring it to"):
        list(resumed.rounds(1))


def own_loss(module: Any, batch: Any, mixed: bool = False) -> torch.Tensor:
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    each = example_losses(module(**inputs).logits, labels)
    return each / len(each) if mixed else each


def test_a_loss_of_ones_own_trains_the_same_and_one_that_mixes_rows_is_named(
    model: fl.Model,
) -> None:
    ends = []
    for loss in (None, own_loss):
        federation, _ = federated(model, noise_multiplier=0.5, loss=loss)
        list(federation.rounds(1))
        ends.append(federation.state.factors)
    for name, f in ends[0].items():
        assert f.B.any() and torch.equal(f.B, ends[1][name].B)
    federation, _ = federated(model, noise_multiplier=0.5, loss=partial(own_loss, mixed=True))
    with pytest.raises(fl.UserError, match="depends on the other rows"):
        list(federation.rounds(1))


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "gives no noise"),
        ({"epsilon": 8.0}, "gives no noise"),
        ({"epsilon": -1.0, "rounds": 2}, "epsilon: .*greater than 0, got -1"),
        ({"noise_multiplier": 1.0, "bf16": True}, "bf16: noise and clipping are in float32"),
        ({"noise_multiplier": 1.0, "group_by_length": True}, "group_by_length: has no meaning"),
    ],
)
def test_what_gives_no_account_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(fl.UserError, match=told):
        fl.PrivateTrainer(1e-5, **options)


def test_delta_above_one_over_the_rows_is_refused(model: fl.Model) -> None:
    trainer = fl.PrivateTrainer(0.5, noise_multiplier=1.0, **SMALL)
    federation = fl.Federation(model, {"ann": rows(model, 6)}, train=trainer)
    with pytest.raises(fl.UserError, match=r"0.5 is above 1/6"):
        list(federation.rounds(1))
