"""Options of PEFT and transformers that a recipe may not set, and why."""

from __future__ import annotations

_EXACT = "so that aggregation would no longer be exact"
_BASE = f"changes the base weights, {_EXACT}"
_MORE = f"trains more than A and B, {_EXACT}"
_FORWARD = f"changes what the adapter computes from A and B, {_EXACT}"
_PROGRAM = "set by the program"

REFUSED_LORA: dict[str, str] = {
    "alora_invocation_tokens": "applies the adapter to a part of the tokens only, "
    "which no change of the base can express",
    "arrow_config": f"routes between several adapters, {_EXACT}",
    "bias": _MORE,
    "corda_config": _BASE,
    "ensure_weight_tying": f"ties adapters of several layers to each other, {_EXACT}",
    "eva_config": f"chooses A from one client's data and ranks per layer, {_EXACT}",
    "init_lora_weights": "other initialisations change the base weights or do not start at B = 0",
    "kasa_config": _BASE,
    "layer_replication": "copies layers of the model, which then has others than the pretrained",
    "loftq_config": _BASE,
    "lora_bias": _MORE,
    "lora_ga_config": _BASE,
    "megatron_config": "only layers of torch and transformers are supported",
    "megatron_core": "only layers of torch and transformers are supported",
    "monteclora_config": _MORE,
    "qalora_group_size": _FORWARD,
    "target_parameters": "adapts bare parameters; only Linear, Conv1D and Embedding layers are "
    "supported",
    "trainable_token_indices": _MORE,
    "use_bdlora": _FORWARD,
    "use_dora": _MORE,
    "use_qalora": _FORWARD,
    "velora_config": "changes the gradients of A; not supported",
    **dict.fromkeys(
        ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
         "revision", "runtime_config", "task_type"),
        _PROGRAM,
    ),
}  # fmt: skip
"""Fields of PEFT's LoraConfig that a recipe may not set (or only as `LoraSpec` says), and why."""

_HUB = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_always_push")
REFUSED_TRAINING: dict[str, str] = {
    **dict.fromkeys(
        ("output_dir", "data_seed", "dataloader_pin_memory", "label_names", "do_train",
         "do_eval", "do_predict", "disable_tqdm",
         "eval_on_start", "eval_strategy", "full_determinism",
         "load_best_model_at_end", "logging_nan_inf_filter",
         "remove_unused_columns", "restore_callback_states_from_checkpoint",
         "resume_from_checkpoint", "save_strategy", *_HUB),
        _PROGRAM,
    ),
    "seed": f"{_PROGRAM} for each round and client; the run's is `seed` at the top",
    "use_cpu": f"{_PROGRAM}; see `model.device`",
    "per_device_eval_batch_size": f"{_PROGRAM}; see `evaluation.batch_size`",
}  # fmt: skip
"""Fields of transformers' TrainingArguments that a recipe may not set, and why."""

GONE_TRAINING: dict[str, str] = {
    "group_by_length": "train_sampling_strategy: group_by_length, as it is without it (or random)",
    "warmup_ratio": "warmup_steps, where a number below 1 is a share of the steps",
    "adafactor": "optim: adafactor",
    "no_cuda": "model.device: cpu",
    "evaluation_strategy": "evaluation.every, of rounds",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "max_seq_length": "task.max_length",
}
"""Names that recipes for transformers 4 and TRL have, and what stands for them now."""
