"""Differential privacy: whose presence is hidden, how well, and what it goes with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedex_lora.recipe.part import Part, Problem

if TYPE_CHECKING:
    from fedex_lora.recipe.whole import Recipe


class ExampleLevel(Part):
    """DP-SGD at each client: the result hides whether any one row was among a client's."""

    epsilon: float | None = Field(default=None, gt=0)  # of all rounds; none exceeds it
    delta: float = Field(gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)  # bound of one row's gradient
    noise_multiplier: float | None = Field(default=None, gt=0)  # found from epsilon if left out

    def problems(self) -> Iterator[Problem]:
        if self.epsilon is None and self.noise_multiplier is None:
            yield "epsilon", "missing; give it, or noise_multiplier, or both"


_PRIVATE = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps",
    "label_smoothing_factor", "learning_rate", "logging_first_step", "logging_steps",
    "logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type", "max_steps",
    "num_train_epochs", "optim", "optim_args", "per_device_train_batch_size", "run_name", "tf32",
    "warmup_ratio", "warmup_steps", "weight_decay",
}  # fmt: skip
"""Arguments of TrainingArguments that mean the same with DP-SGD."""

_HALF = "noise and clipping are in float32; leave it out"
_WHY = {
    "bf16": _HALF,
    "fp16": _HALF,
    "dataloader_drop_last": "rows are drawn by Poisson sampling, which has no last batch; leave it "
    "out",
    "gradient_checkpointing": "gradients by example are lost in a pass that is computed anew; "
    "leave it out, lower per_device_train_batch_size and raise gradient_accumulation_steps",
    "max_grad_norm": "the bound of a row's gradient is privacy.example_level.max_grad_norm; leave "
    "this one out",
    "report_to": "reports of a training show what the noise is to hide; leave it out",
    "train_sampling_strategy": "rows are drawn by Poisson sampling, each by itself, whatever the "
    "others are; leave it out",
}
_OFF: dict[str, Any] = {"bf16": False, "fp16": False, "report_to": "none",
                        "dataloader_drop_last": False, "gradient_checkpointing": False}  # fmt: skip


def differential_problems(recipe: Recipe) -> Iterator[Problem]:
    """What does not go with differential privacy, by key, and what to do."""
    privacy = recipe.privacy
    if privacy.example_level is not None:
        yield from _example_level(recipe)
    if privacy.rehearsal and privacy.example_level is None:
        yield "privacy.rehearsal", "there is no noise to rehearse; leave it out"


def _example_level(recipe: Recipe) -> Iterator[Problem]:
    key = "privacy.example_level"
    for name, value in recipe.training.items():
        if name not in _PRIVATE and not (name in _OFF and value == _OFF[name]):
            yield f"training.{name}", f"{_WHY.get(name, 'leave it out')} ({key})"
    if recipe.engine.precision != "float32":
        yield "engine.precision", f"{_HALF} ({key})"
    if recipe.engine.fuse != 1:
        yield (
            "engine.fuse",
            f"clients in one pass have no gradients by example ({key}); leave it out",
        )
