"""Which adapters are plain LoRA: they add scale · B · A to a frozen base, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedex_lora.recipe import LoraSpec

# about the file or the training, not about what is added to the base
_NEUTRAL = {"peft_type", "task_type", "auto_mapping", "inference_mode", "revision", "peft_version"}
_NEUTRAL |= {"base_model_name_or_path", "runtime_config", "megatron_core", "qalora_group_size"}
# how factors were drawn, which `init_lora_weights` decides, or how gradients are kept
_NEUTRAL |= {"eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config"}
_NEUTRAL |= {"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"}  # ms-swift: of the optimizer
_ALLOWED = _NEUTRAL | (set(LoraSpec.model_fields) - {"bias", "init_lora_weights"})
# "mica" freezes B; the others that PEFT knows change the base before training
_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
_WHY = {
    "use_dora": "rescales whole weights (DoRA)",
    "use_qalora": "pools a layer's inputs (QALoRA)",
    "lora_bias": "trains a bias beside B·A",
    "bias": "trains biases of the base",
    "trainable_token_indices": "trains the embeddings of single tokens",
    "layer_replication": "repeats layers of the base",
    "alora_invocation_tokens": "is switched on by tokens (aLoRA)",
    "target_parameters": "adapts parameters that are no layers",
    "arrow_config": "routes between adapters (Arrow)",
    "kasa_config": "cuts the base, and scales between A and B (KaSA)",
    "monteclora_config": "draws its factors anew each time (MonteCLoRA)",
    "use_bdlora": "has factors of separate blocks (BD-LoRA)",
    "megatron_config": "is made of Megatron's own layers",
    "ensure_weight_tying": "ties the factors of two layers",
    "peft_type": "is another kind of adapter",
}
_TAKES_FROM_THE_BASE = ("pissa", "olora", "corda", "lora_ga")


def unsupported(config: Mapping[str, Any], also: frozenset[str] = frozenset()) -> str:
    """The fields of an adapter_config.json by which it is more than B·A beside a frozen base.

    Args:
        also: Fields that the caller can deal with.

    Returns:
        Each with its value and what it does; "" for a plain adapter.

    Example:
        >>> unsupported({"peft_type": "LORA", "r": 4, "init_lora_weights": "eva"})
        ''
        >>> unsupported({"peft_type": "LORA", "use_dora": True})
        'use_dora: True, which rescales whole weights (DoRA)'
    """
    refused = [key for key in _refused(config) if key not in also]
    return "; ".join(f"{key}: {config.get(key)!r}, which {_why(key, config)}" for key in refused)


def _why(key: str, config: Mapping[str, Any]) -> str:
    if key == "peft_type" and config.get("fine_tune_type"):
        return "is MLX's own form (lora_a, lora_b, scale); save it in PEFT's"
    if key != "init_lora_weights":
        return _WHY.get(key, "is no field of LoRA that is known here")
    how = str(config[key]).lower()
    if how.startswith(_TAKES_FROM_THE_BASE):
        return (
            "took B·A out of the base, so that it belongs on another one; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    if how == "loftq":
        return "put a quantised remainder in place of the base"
    return "is no way to begin that is known here"


def _refused(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield "peft_type"
        return  # its other fields have other meanings
    init = config.get("init_lora_weights", True)
    if (init.lower() if init == "Gaussian" else init) not in (*_LEAVE_THE_BASE, None):
        yield "init_lora_weights"
    for key, value in config.items():
        known = key in _ALLOWED or key in ("peft_type", "init_lora_weights")
        known |= (key, value) == ("bias", "none")
        if not known and value:
            yield key


def configured(config: Mapping[str, Any], layer: str, rank: int) -> tuple[int, float]:
    """The rank that an adapter_config.json gives to a layer, and the scale it has at `rank`."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    alpha = alphas.get(_pattern(alphas, layer), config.get("lora_alpha", 8))
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return ranks.get(_pattern(ranks, layer), config.get("r", 8)), scale


def _pattern(patterns: Iterable[str], layer: str) -> str | None:
    """The first pattern that fits the end of a layer's name, as PEFT takes it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), None)
