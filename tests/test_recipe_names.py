"""Names of PEFT's and the Trainer's options: which may be set, and what is said of the others."""

from __future__ import annotations

import dataclasses

from peft import LoraConfig
from transformers import TrainingArguments

from fedex_lora.engines.training import training_problems
from fedex_lora.recipe import LoraSpec
from fedex_lora.recipe.refused import GONE_TRAINING, REFUSED_LORA, REFUSED_TRAINING


def test_every_lora_option_is_either_allowed_or_refused_with_a_reason() -> None:
    options = set(LoraConfig.__dataclass_fields__)
    assert options - set(LoraSpec.model_fields) - set(REFUSED_LORA) == set()
    assert set(REFUSED_LORA) <= options
    assert set(LoraSpec.model_fields) - options == {"init", "ranks"}


def test_refused_training_options_exist() -> None:
    assert set(REFUSED_TRAINING) <= {field.name for field in dataclasses.fields(TrainingArguments)}


def test_names_that_are_gone_from_the_trainer_say_what_stands_for_them() -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name, now in GONE_TRAINING.items():
        assert name not in known
        ((key, told),) = training_problems({name: 0.1})
        assert (key, told) == (f"training.{name}", f"unknown key; set {now}")
    for name in ("reduce_lr_on_plateau", "greedy"):
        ((key, told),) = training_problems({"lr_scheduler_type": name})
        assert key == "training.lr_scheduler_type" and told.startswith(f"{name} goes by scores")
    assert not list(training_problems({"lr_scheduler_type": "cosine"}))
