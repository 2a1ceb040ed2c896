"""Differential privacy: whose presence is hidden, how well, and what it goes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedex_lora.aggregation.methods import METHODS, Method
from fedex_lora.recipe.part import Problem

if TYPE_CHECKING:
    from fedex_lora.recipe.blocks import Blocks


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


def unfit_arguments(training: Mapping[str, Any]) -> Iterator[Problem]:
    """Arguments of TrainingArguments that do not go with DP-SGD, and what to do."""
    for name, value in training.items():
        if name not in _PRIVATE and not (name in _OFF and value == _OFF[name]):
            yield name, _WHY.get(name, "has no meaning with DP-SGD; leave it out")


def differential_problems(recipe: Blocks) -> Iterator[Problem]:
    """What does not go with differential privacy, by key, and what to do."""
    privacy = recipe.privacy
    if privacy.example_level is not None:
        yield from _example_level(recipe)
    if privacy.client_level is not None:
        yield from _client_level(recipe)
    if privacy.example_level is not None and privacy.client_level is not None:
        yield (
            "privacy.client_level",
            "and example_level hide different things, and have no account in common; leave one out",
        )
    if privacy.rehearsal and privacy.example_level is None and privacy.client_level is None:
        yield "privacy.rehearsal", "there is no noise to rehearse; leave it out"


def _example_level(recipe: Blocks) -> Iterator[Problem]:
    key = "privacy.example_level"
    for name, why in unfit_arguments(recipe.training):
        yield f"training.{name}", f"{why} ({key})"
    if recipe.engine.precision == "bfloat16":
        yield "engine.precision", f"{_HALF} ({key})"
    if recipe.engine.fuse not in (1, "auto"):
        yield (
            "engine.fuse",
            f"clients in one pass have no gradients by example ({key}); leave it out",
        )


def _linear(method: Method) -> bool:
    """Whether all that the server publishes is a function of the mean of the updates."""
    of_mean = (
        method.trains == "B" and not method.in_ledger and "ends" not in method.assignment.needs
    )
    return (method.means_alone or of_mean) and not method.pooled


def _client_level(recipe: Blocks) -> Iterator[Problem]:
    key, name = "privacy.client_level", recipe.method.name
    if not _linear(METHODS[name]):
        able = ", ".join(other for other, method in METHODS.items() if _linear(method))
        yield (
            "method.name",
            f"{name} publishes more of the updates than their mean, on which the noise is ({key}). "
            f"Take one of {able}; or privacy.example_level, where A and B are all that is trained",
        )
    if recipe.federation.combining.robust:
        yield (
            "federation.mean",
            f"the noise is on the weighted mean, which {recipe.federation.mean} is not ({key}); "
            "set weighted",
        )
    if recipe.federation.scaffold:
        yield "federation.scaffold", f"variates cross without the noise ({key}); leave it out"
    if recipe.federation.align:
        yield (
            "federation.align",
            f"what is rotated may be larger than the bound that it was clipped to ({key}); leave "
            "it out",
        )
    if recipe.federation.weights != "uniform":
        yield (
            "federation.weights",
            f"a client's number of rows would change the others' weights ({key}); set uniform",
        )
    if recipe.federation.wire_dtype != "float32":
        yield (
            "federation.wire_dtype",
            f"what rounding leaves for later is not accounted for ({key}); set float32",
        )
    if recipe.records.save_updates:
        yield "records.save_updates", f"saved updates are without the noise ({key}); set false"
    if recipe.evaluation.where != "server":
        yield (
            "evaluation.where",
            f"clients' scores are without noise ({key}); set server",
        )
    if recipe.training.get("report_to", "none") != "none":
        yield "training.report_to", f"reports of a training are without noise ({key}); leave it out"
