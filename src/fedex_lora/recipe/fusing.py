"""What of transformers' TrainingArguments holds for clients that train in one pass."""

from __future__ import annotations

from typing import Any

MOST_FUSED = 8  # `engine.fuse: auto`; each further client adds its activations and gains less

# each client has these for itself
_OWN = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_drop_last", "learning_rate",
    "length_column_name", "lr_scheduler_kwargs", "max_grad_norm", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "warmup_ratio", "warmup_steps",
    "weight_decay",
    # all clients at once: precision; and what writes nothing where nothing is reported
    "bf16", "tf32", "logging_first_step", "logging_steps", "logging_strategy", "run_name",
}  # fmt: skip
_VALUES: dict[str, set[Any]] = {
    "gradient_accumulation_steps": {1},
    "lr_scheduler_type": {
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
    },
    "optim": {"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"},
    "report_to": {"none"},
    "train_sampling_strategy": {"group_by_length", "random", "sequential"},
}  # fmt: skip


def fusable(name: str, value: Any) -> bool:
    """Whether fused clients can train with this setting as each would by itself.

    Example:
        >>> fusable("learning_rate", 1e-3), fusable("gradient_accumulation_steps", 4)
        (True, False)
    """
    if name in _VALUES:
        return isinstance(value, str | int) and value in _VALUES[name]
    return name in _OWN
